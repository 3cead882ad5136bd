"""RAT: a gated average inside chunks, softmax attention across them.

With chunks of L tokens, and g_t in 0..1 for every channel, restarted with every chunk (t = c L + l):

    k~_t = g_t k~_{t-1} + (1 - g_t) k_t,   v~_t likewise with the same g; both are 0 before the first token of a chunk
    y_t  = softmax([q_t . k~_last of every earlier chunk ; q_t . k~_t] / sqrt(d)) [v~_last of these chunks ; v~_t]

A query sees the last pair of every earlier chunk and the running pair of its own. The own pair is one more logit, which
`ct.merge` joins to attention over the earlier chunks. As a layer: g = sigmoid(W_g x + b), output gate sigmoid(W_z x),
queries and keys shared by groups of heads (2 of them pay for g and z), rotary positions of the chunk, not of the token.
L = 1 with g = 0 is causal attention, L = N the gated average alone.

Sizes: q, k, v, g [B, H, N, D] -> [B, H, N, D], any N; work O(N^2 D / L). Cache: ceil(t / L) pairs after t tokens.

    >>> layer = RAT(64, heads=4, chunk=16)
    >>> layer(torch.randn(2, 100, 64), Grid(n=100)).shape
    torch.Size([2, 100, 64])

A pair is one average: two facts in a chunk share it and are harder to tell apart than one (the test says how much).

Left out: the layers of local attention between which the hybrid puts these (`ct.nn.Attention` with a window of 1024),
the 1.3B models, the fused kernels. Norm and residual, which the released layer has inside, are those of `ct.nn.Block`.

Paper: Wei, Yadav, Pascanu and Gulcehre 2025, "RAT: Bridging RNN Efficiency and Attention Accuracy in Language
Modeling", arXiv 2507.04416.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.merge import merge
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, causal
from chronotope.position import Rope
from chronotope.recurrences.scans import linear_recurrence

EARLIER: Pattern = causal("c", strict=True)
"""Queries on Grid(c=chunks, l=L), keys on Grid(c=chunks): the chunk of the key comes before."""


@dataclass(frozen=True)
class RatState(Carried):
    """keys, values [B, H, chunks finished, D]: the last pair of each. running [2, B, H, D] as [B, 2, H, D]: the pair
    (v~, k~) of the chunk at hand, before its rotation. `count`: tokens so far."""

    keys: Float[Tensor, "b h c d"]
    values: Float[Tensor, "b h c d"]
    running: Float[Tensor, "b two h d"]
    count: int
    grid: Grid | None = None


def gated_averages(
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    gate: Float[Tensor, "b h n d"],
    chunk: int,
    start: int = 0,
    running: Float[Tensor, "b two h d"] | None = None,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
    """k~ and v~ of tokens that begin at place `start` of the sequence, after the pair `running` = (v~, k~)."""
    place = torch.arange(start, start + k.shape[2], device=k.device)
    kept = torch.where(place % chunk == 0, 0.0, gate.movedim(2, -1)).movedim(-1, 2)
    exact = torch.promote_types(k.dtype, torch.float32)
    added = (1 - gate)[:, None] * torch.stack((v, k), 1)
    averages = linear_recurrence(kept[:, None].to(exact), added.to(exact), running, dim=3).to(k.dtype)
    return averages[:, 1], averages[:, 0]


def rat_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    gate: Float[Tensor, "b h n d"],
    chunk: int = 16,
    position: Rope | None = None,
) -> Float[Tensor, "b h n d"]:
    """The whole sequence at once; `gate` is what is kept of the running pair, in 0..1; `position` codes the chunk."""
    n = q.shape[2]
    keys, values = gated_averages(k, v, gate, chunk)
    q, keys = (_rotated(x, position, chunk, 0) for x in (q, keys))
    chunks = -(-n // chunk)
    # What fills the last chunk is seen by nobody, and what it would see is dropped.
    padded = F.pad(q, (0, 0, 0, chunks * chunk - n))
    last = (slice(None), slice(None), slice(chunk - 1, None, chunk))
    pairs = (F.pad(x[last], (0, 0, 0, chunks - n // chunk)) for x in (keys, values))
    across, lse = attention(
        padded, *pairs, grid=Grid(c=chunks, l=chunk), key_grid=Grid(c=chunks), where=EARLIER, return_lse=True
    )
    own = (q * keys).to(lse.dtype).sum(-1) / q.shape[-1] ** 0.5
    return merge([(across[:, :, :n], lse[:, :, :n]), (values, own)])[0]


def _rotated(x: Float[Tensor, "b h n d"], position: Rope | None, chunk: int, start: int) -> Float[Tensor, "b h n d"]:
    if position is None:
        return x
    place = torch.arange(start, start + x.shape[2], device=x.device, dtype=torch.float64)
    return position(x, coords=(place // chunk)[:, None])


def rat_step(
    q: Float[Tensor, "b h s d"],
    k: Float[Tensor, "b h s d"],
    v: Float[Tensor, "b h s d"],
    gate: Float[Tensor, "b h s d"],
    state: RatState,
    chunk: int,
    position: Rope | None = None,
) -> tuple[Float[Tensor, "b h s d"], RatState]:
    """The next tokens, as many as there are, wherever in a chunk they begin."""
    start, end = state.count, state.count + q.shape[2]
    plain, values = gated_averages(k, v, gate, chunk, start, state.running)
    q, keys = (_rotated(x, position, chunk, start) for x in (q, plain))
    done_keys, done_values, out = state.keys, state.values, []
    for first in range(start - start % chunk, end, chunk):
        part = (slice(None), slice(None), slice(max(first, start) - start, min(first + chunk, end) - start))
        out.append(_over(q[part], done_keys, done_values, keys[part], values[part]))
        if first + chunk <= end:
            done_keys, done_values = (
                torch.cat((done, x[part][:, :, -1:]), 2) for done, x in ((done_keys, keys), (done_values, values))
            )
    running = torch.stack((values[:, :, -1], plain[:, :, -1]), 1)
    return torch.cat(out, 2), RatState(done_keys, done_values, running, end, state.grid)


def _over(q: Tensor, done_keys: Tensor, done_values: Tensor, keys: Tensor, values: Tensor) -> Float[Tensor, "b h s d"]:
    """Queries of one chunk, which all see the same earlier chunks, and each its own pair: one softmax, no plan."""
    scores = torch.cat((q @ done_keys.transpose(-1, -2), (q * keys).sum(-1, keepdim=True)), -1) / q.shape[-1] ** 0.5
    weights = scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1).to(q.dtype)
    return weights[..., :-1] @ done_values + weights[..., -1:] * values


@paper(
    system=113,
    name="RAT",
    family="linear",
    claim="gated averages inside chunks of L tokens, softmax attention across them: a cache L times shorter",
    evidence=["tests/papers/linear/test_rat.py"],
)
class RAT(Mixer):
    """y = W_o (sigmoid(W_z x) * rat_attention(q, k, W_v x, sigmoid(W_g x + b))), tokens in the order of the grid.

    Args:
        dim: channels of x.
        heads: a divisor of dim.
        chunk: tokens in a chunk, L.
        groups: different queries and keys, a divisor of heads; head h takes those of group h mod groups.
        rope: whether chunks have rotary positions.
    """

    def __init__(self, dim: int, heads: int, chunk: int = 16, groups: int = 2, rope: bool = True):
        super().__init__()
        if heads < 1 or dim % heads or groups < 1 or heads % groups or chunk < 1:
            raise ChronotopeError(
                f"RAT: dim={dim}, heads={heads}, groups={groups}, chunk={chunk}; heads must divide dim, groups heads, "
                "and a chunk has 1 token or more."
            )
        self.dim, self.heads, self.chunk, self.groups = dim, heads, chunk, groups
        self.position = Rope("c") if rope else None
        self.zvg = nn.Linear(dim, 3 * dim, bias=False)
        self.qk = nn.Linear(dim, 2 * groups * (dim // heads), bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        # What is kept is spread over the chunk: sigmoid(log u) is an average over about u + 1 tokens.
        self.gate_bias = nn.Parameter(torch.empty(dim).uniform_(1, max(chunk - 1, 1)).log())

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("RAT takes no context: its keys run along with its queries.")
        require_tokens(x, grid, self.dim, "x")
        z, q, k, v, gate = self._parts(x)
        return self._left(z, rat_attention(q, k, v, gate, self.chunk, self.position))

    def init_state(self, batch: int, grid: Grid) -> RatState:
        """No chunk finished, nothing running."""
        require_slice(grid)
        empty = self.out.weight.new_zeros(batch, self.heads, 0, self.dim // self.heads)
        running = empty.new_zeros(batch, 2, self.heads, self.dim // self.heads)
        return RatState(empty, empty, running, 0, grid)

    def step(self, x: Float[Tensor, "b s c"], state: RatState) -> tuple[Float[Tensor, "b s c"], RatState]:
        """The next slice."""
        if state.grid is not None:
            require_tokens(x, state.grid, self.dim, "x")
        z, q, k, v, gate = self._parts(x)
        out, state = rat_step(q, k, v, gate, state, self.chunk, self.position)
        return self._left(z, out), state

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """z, and q, k, v, gate by heads."""
        z, v, g = self.zvg(x).chunk(3, -1)
        q, k = (
            self.qk(x)
            .unflatten(2, (2, self.groups, -1))
            .transpose(1, 3)
            .repeat(1, self.heads // self.groups, 1, 1, 1)
            .unbind(2)
        )
        v, gate = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (v, (g + self.gate_bias).sigmoid()))
        return z.sigmoid(), q, k, v, gate

    def _left(self, z: Tensor, out: Tensor) -> Tensor:
        return self.out(z * out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
