"""Titans: a memory that learns at test time, beside attention that sees what is near.

The memory is a network f (a matrix, or an MLP of 1 to 4 layers) whose weights M are the state. With q, k of length 1
after SiLU and a depthwise convolution, and alpha, eta, theta in (0, 1) by linear maps and sigmoids of the token,

    S_t = eta_t S_{t-1} - theta_t dl/dM,   l = ||f(k_t; M) - v_t||^2,   M_t = (1 - alpha_t) M_{t-1} + S_t,
    y_t = f(q_t; M_t),

gradients being taken at the weights of the chunk's start; so a chunk is a few matrix products. With P learned tokens:

    MAL  y = slide(memory(x)), slide: attention over a window of tokens and the P persistent ones
    MAG  y = g norm(slide(x)) + (1 - g) norm(memory(x)), g = sigmoid(W x); the memory learns the persistent tokens first
    MAC  for each segment: h = what its tokens recall; a = attention over [persistent, h, segment]; the memory learns a
         and reads m; y = a (1 + g m). Keys h weigh g = sigmoid(gate) in the softmax

Sizes: x [B, N, dim] -> [B, N, dim]; state: weights, momentum and the weights of the chunk's start for each sequence
and head, 3 * 8 (dim / heads)^2 numbers for two layers, whatever N; window or segment of keys. Work O(N chunk dim).

    >>> layer = MemoryAsGate(64, 4, window=32)
    >>> layer(torch.randn(2, 300, 64), Grid(n=300)).shape
    torch.Size([2, 300, 64])

Left out: contexts of 2M tokens and language modelling. Ours where the paper does not say, or where we depart: in MAC a
token sees what it and the tokens before it recall, not what later ones do, so that nothing comes from the future; the
gate g and the 1 in (1 + g m), so that a gate of 0 is attention within segments; MAG's gate is a share of each branch.
theta is (1 - eta) times a share of `rate`, lest the gradients of a chunk, all at one place, add up until they diverge.
Trained to find needles with one layer; with two at these rates it has not learned to. Segment, depth and P by model
size are not known to us.

Paper: Behrouz, Zhong, Mirrokni 2024, "Titans: Learning to Memorize at Test Time", arXiv 2501.00663. No official code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.memories import Matrix, Memory, Mlp, Momentum
from chronotope.nn.memory import DeepMemory, DeepMemoryState, MemoryGates
from chronotope.nn.mixer import Context, Mixer, States, require_slice, require_tokens
from chronotope.papers.memory.titans_attention import Persistent, Sliding
from chronotope.papers.registry import paper


@paper(
    system=25,
    name="Titans",
    family="memory",
    claim="a deep memory that learns at test time by surprise, momentum and forgetting, as context, gate or layer",
    evidence=["tests/papers/memory/test_titans.py", "tests/papers/memory/test_titans_needle.py"],
)
def neural_memory(
    dim: int, heads: int, depth: int = 2, *, chunk: int = 64, conv: int | None = 4, rate: float | int | None = None
) -> DeepMemory:
    """The memory alone.

    Args:
        depth: layers of its network, 1 to 4; 0: a matrix, which is the same as 1.
        chunk, conv: as for `DeepMemory`.
        rate: the largest theta / (1 - eta); None: 1 / (4 chunk). With a matrix up to 1 / chunk is stable however much
            the keys of a chunk are alike; with more layers it depends on what they have learned.

    Raises ChronotopeError for another depth.
    """
    if not 0 <= depth <= 4:
        raise ChronotopeError(f"depth={depth}: expected 1 to 4 layers, or 0 for a matrix.")
    memory = Memory(learner=Mlp(depth) if depth else Matrix(), optimizer=Momentum())
    gates = MemoryGates(dim, heads, memory, rate=0.25 / chunk if rate is None else rate)
    layer = DeepMemory(dim, heads, memory=memory, gates=gates, chunk=chunk, conv=conv)
    # What is read at first is what has been learned, and no noise of the start.
    nn.init.zeros_(layer.weights[-1])
    return layer


class MemoryAsLayer(Mixer):
    """MAL: attention over a window of what the memory gives.

    Args:
        dim, heads: those of both.
        window: tokens that attention sees, the own one included.
        persistent: P.
        options: as for `neural_memory`.
    """

    def __init__(self, dim: int, heads: int, window: int = 32, persistent: int = 4, **options: int | float | None):
        super().__init__()
        self.dim = dim
        self.memory = neural_memory(dim, heads, **options)  # type: ignore[arg-type]
        self.attention = Sliding(dim, heads, window, persistent)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once."""
        return self.attention(self.memory(x, grid, context), grid)  # type: ignore[no-any-return]

    def init_state(self, batch: int, grid: Grid) -> States:
        """Both states."""
        return States((self.memory.init_state(batch, grid), self.attention.init_state(batch, grid)))

    def step(self, x: Float[Tensor, "b s c"], state: States) -> tuple[Float[Tensor, "b s c"], States]:
        """The next slice."""
        y, memory = self.memory.step(x, state.parts[0])
        y, near = self.attention.step(y, state.parts[1])
        return y, States((memory, near))


class MemoryAsGate(Mixer):
    """MAG: attention over a window and memory side by side. Arguments as for `MemoryAsLayer`."""

    def __init__(self, dim: int, heads: int, window: int = 32, persistent: int = 4, **options: int | float | None):
        super().__init__()
        self.dim = dim
        self.memory = neural_memory(dim, heads, **options)  # type: ignore[arg-type]
        self.attention = Sliding(dim, heads, window, persistent)
        self.norms = nn.ModuleList([nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)])
        self.gate = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        require_tokens(x, grid, self.dim, "x")
        if context is not None:
            raise ChronotopeError("Titans take no context.")
        far, _ = _go(self.memory, x, self._start(x.shape[0], Grid(n=1)))
        return self._joined(x, self.attention(x, grid), far)

    def init_state(self, batch: int, grid: Grid) -> States:
        """Both states; the memory has learned the persistent tokens."""
        return States((self._start(batch, grid), self.attention.init_state(batch, grid)))

    def step(self, x: Float[Tensor, "b s c"], state: States) -> tuple[Float[Tensor, "b s c"], States]:
        """The next slice."""
        far, memory = self.memory.step(x, state.parts[0])
        near, window = self.attention.step(x, state.parts[1])
        return self._joined(x, near, far), States((memory, window))

    def _start(self, batch: int, grid: Grid) -> DeepMemoryState:
        tokens = self.attention.attend.tokens.expand(batch, -1, -1)
        return replace(_go(self.memory, tokens, self.memory.init_state(batch, grid))[1], grid=grid)

    def _joined(self, x: Tensor, near: Tensor, far: Tensor) -> Tensor:
        return torch.lerp(self.norms[1](far), self.norms[0](near), self.gate(x).sigmoid())


@dataclass(frozen=True)
class ContextState(Carried):
    """Of the segment under way: the memory at its start, keys and values of its tokens and of what they recalled.

    place: tokens of the segment so far.
    """

    memory: DeepMemoryState
    start: DeepMemoryState
    tokens: tuple[Float[Tensor, "b h n d"], ...]
    recalled: tuple[Float[Tensor, "b h n d"], ...]
    place: int
    grid: Grid


class MemoryAsContext(Mixer):
    """MAC: attention within segments, over the tokens and what they recall; the memory learns what comes out.

    Args:
        dim, heads: those of both.
        segment: tokens of a segment, which is the memory's chunk as well.
        persistent: P.
        depth, rate: as for `neural_memory`. The memory has no convolution: attention has mixed its tokens before.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        segment: int = 32,
        persistent: int = 4,
        depth: int = 2,
        rate: float | int | None = None,
    ):
        super().__init__()
        self.dim, self.segment = dim, segment
        self.memory = neural_memory(dim, heads, depth, chunk=segment, conv=None, rate=rate)
        self.attend = Persistent(dim, heads, persistent)
        self.norm, self.gate = nn.RMSNorm(dim, eps=1e-6), nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens, segment after segment. Takes no context."""
        require_tokens(x, grid, self.dim, "x")
        if context is not None:
            raise ChronotopeError("Titans take no context.")
        return self._advance(x, self.init_state(x.shape[0], Grid(n=1)))[0]

    def init_state(self, batch: int, grid: Grid) -> ContextState:
        """The memory as it begins, and an empty segment."""
        require_slice(grid)
        memory = self.memory.init_state(batch, grid)
        heads = self.attend.heads
        empty = self.attend.qkv.weight.new_empty(batch, heads, 0, self.dim // heads)
        return ContextState(memory, memory, (empty, empty), (empty, empty), 0, grid)

    def step(self, x: Float[Tensor, "b s c"], state: ContextState) -> tuple[Float[Tensor, "b s c"], ContextState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        return self._advance(x, state)

    def _advance(self, x: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
        outs, at = [], 0
        while at < x.shape[1]:
            part = x[:, at : at + self.segment - state.place]
            out, state = self._within(part, state)
            outs.append(out)
            at += part.shape[1]
            if state.place == self.segment:
                none = tuple(k[:, :, :0] for k in state.tokens)
                state = replace(state, start=state.memory, tokens=none, recalled=none, place=0)
        return torch.cat(outs, 1), state

    def _within(self, x: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
        """Tokens of one segment."""
        q, *new = self.attend.project(x, state.place)
        _, *found = self.attend.project(self.memory.recall(x, state.start), state.place)
        tokens, recalled = (
            tuple(torch.cat(pair, 2) for pair in zip(old, more, strict=True))
            for old, more in ((state.tokens, new), (state.recalled, found))
        )
        n = x.shape[1]
        later = torch.ones(n, state.place + n, dtype=torch.bool, device=x.device).triu(1 + state.place)
        weight = F.logsigmoid(self.gate).to(q.dtype)
        bias = torch.stack((weight, torch.zeros_like(weight)))[:, None, None].masked_fill(later, -torch.inf)
        keys, values = (torch.cat((h, own), 2) for h, own in zip(recalled, tokens, strict=True))
        near = self.attend.look(q, keys, values, bias.transpose(0, 1).flatten(1))
        read, memory = _go(self.memory, self.norm(near), state.memory)
        out = near * (1 + self.gate.sigmoid() * read)
        return out, replace(state, memory=memory, tokens=tokens, recalled=recalled, place=state.place + n)


def _go(memory: DeepMemory, x: Tensor, state: DeepMemoryState) -> tuple[Tensor, DeepMemoryState]:
    """So many tokens as one slice."""
    out, after = memory.step(x, replace(state, grid=Grid(n=x.shape[1])))
    return out, replace(after, grid=state.grid)
