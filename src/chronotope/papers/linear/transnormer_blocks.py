"""What the pages of TransNormerLLM share: norm, gated linear attention, channel mixer, block, language model.

    x = x + GLA(norm(x)),    x = x + SGLU(norm(x)),    norm(x) = x / (|x| / sqrt(C)), without weights
    GLA(x) = W_o (norm(lightning(silu(W_q x), silu(W_k x), phi(W_v x), lambda)) * U(x))
    SGLU(x) = W_3 (W_1 x * W_2 x)

No denominator: the norm stands for it. The pages choose phi, U and the decays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.bias import Alibi
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, States, require_slice, require_tokens
from chronotope.papers.linear.lightning import CHUNK, both_ways, lightning_attention
from chronotope.recurrences import RecurrentState
from chronotope.recurrences.features import Lrpe


def released_slopes(heads: int, layers: int) -> Float[Tensor, "layers heads"]:
    """-log lambda of the released models: 2^(-8 h / H) (1 - l / (L - 1) + 1e-5), h = 1..H, l = 0..L-1."""
    share = 1 - torch.arange(layers) / max(layers - 1, 1) + 1e-5
    return share[:, None] * Alibi(heads).slopes


def paper_slopes(heads: int, layers: int) -> Float[Tensor, "layers heads"]:
    """-log lambda of the first paper: (8 h / H) (1 - l / L), h = 1..H, l = 0..L-1."""
    share = 1 - torch.arange(layers) / layers
    return share[:, None] * 8 * torch.arange(1, heads + 1) / heads


class SimpleRMSNorm(nn.Module):
    """x / (|x| / sqrt(C)): the length becomes sqrt(C). No weights; computed in float32 at least."""

    EPS = 1e-12

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Each token on its own; 0 stays 0."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return (exact * (exact.square().mean(-1, keepdim=True) + self.EPS).rsqrt()).to(x.dtype)


class SimpleGLU(nn.Module):
    """W_3 (W_1 x * W_2 x), without an activation."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.enter = nn.Linear(dim, 2 * hidden, bias=False)
        self.leave = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Each token on its own."""
        left, right = self.enter(x).chunk(2, -1)
        return self.leave(left * right)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class GatedState(Carried):
    """What the tokens so far have written. `tokens`: how many there were; `grid`: of a slice."""

    past: RecurrentState
    tokens: int
    grid: Grid


class GatedLinearAttention(Mixer):
    """y = W_o (norm(lightning(silu(W_q x), silu(W_k x), value(W_v x))) * gate(x)), the tokens in grid order.

    Args:
        dim: channels of x.
        slopes: -log lambda >= 0 of each head, constants.
        gate: from x to what the output is multiplied by, [.., dim] -> [.., dim].
        lrpe: whether queries and keys are also turned by learned angles (Qin et al. 2023, arXiv 2307.09270).
        value: what happens to values; None: nothing.
        norm: of all heads together; None: `SimpleRMSNorm`.
        causal: False: tokens see those after them too, as far as the decay lets them.
        chunk: tokens in a block. An attribute, which may be set to another number later.
    """

    slopes: Tensor

    def __init__(
        self,
        dim: int,
        slopes: Float[Tensor, "h"],
        gate: nn.Module,
        *,
        lrpe: bool = False,
        value: nn.Module | None = None,
        norm: nn.Module | None = None,
        causal: bool = True,
        chunk: int = CHUNK,
    ):
        super().__init__()
        heads = len(slopes)
        if heads < 1 or dim % heads or bool((slopes < 0).any()):
            raise ChronotopeError(f"slopes={slopes.tolist()}: expected one of 0 or more for each head, dividing {dim}.")
        self.dim, self.heads, self.causal, self.chunk = dim, heads, causal, chunk
        self.register_buffer("slopes", slopes.clone(), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lrpe = Lrpe(heads, dim // heads) if lrpe else None
        self.value = nn.Identity() if value is None else value
        self.norm = SimpleRMSNorm() if norm is None else norm
        self.gate = gate
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("GatedLinearAttention takes no context: keys are written in the order of queries.")
        require_tokens(x, grid, self.dim, "x")
        q, k, v = self._project(x, 0)
        if not self.causal:
            return self._leave(x, both_ways(q, k, v, decay=-self.slopes, chunk=self.chunk))
        return self._leave(x, lightning_attention(q, k, v, decay=-self.slopes, chunk=self.chunk)[0])

    def init_state(self, batch: int, grid: Grid) -> GatedState:
        """Nothing written. Raises ChronotopeError where tokens see later ones."""
        require_slice(grid)
        if not self.causal:
            raise ChronotopeError("GatedLinearAttention(causal=False) cannot be stepped: tokens see later slices.")
        size = self.dim // self.heads
        weight = self.out.weight
        memory = weight.new_zeros(
            batch, self.heads, size if self.lrpe is None else self.lrpe.size(size), size,
            dtype=torch.promote_types(weight.dtype, torch.float32),
        )  # fmt: skip
        return GatedState(RecurrentState(memory), 0, grid)

    def step(self, x: Float[Tensor, "b s c"], state: GatedState) -> tuple[Float[Tensor, "b s c"], GatedState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        q, k, v = self._project(x, state.tokens)
        out, past = lightning_attention(q, k, v, decay=-self.slopes, state=state.past, chunk=self.chunk)
        return self._leave(x, out), replace(state, past=past, tokens=state.tokens + state.grid.size)

    def _project(self, x: Tensor, position: int) -> list[Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        parts = (F.silu(q), F.silu(k), self.value(v))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return [q, k, v] if self.lrpe is None else [self.lrpe(q, position), self.lrpe(k, position), v]

    def _leave(self, x: Tensor, out: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
        return self.out(self.norm(out.transpose(1, 2).flatten(2)) * self.gate(x))  # type: ignore[no-any-return]


class TransNormerBlock(Mixer):
    """x = x + mixer(norm(x)), x = x + SGLU(norm(x))."""

    def __init__(self, mixer: Mixer, dim: int, hidden: int):
        super().__init__()
        self.dim, self.mixer, self.norm, self.mlp = dim, mixer, SimpleRMSNorm(), SimpleGLU(dim, hidden)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once."""
        x = x + self.mixer(self.norm(x), grid, context)
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]

    def init_state(self, batch: int, grid: Grid) -> Carried:
        """That of the mixer."""
        return self.mixer.init_state(batch, grid)  # type: ignore[return-value]

    def step(self, x: Float[Tensor, "b s c"], state: Carried) -> tuple[Float[Tensor, "b s c"], Carried]:
        """The next slice."""
        y, after = self.mixer.step(self.norm(x), state)
        x = x + y
        return x + self.mlp(self.norm(x)), after  # type: ignore[return-value]


class LanguageModel(nn.Module):
    """Logits of the next token: an embedding, blocks, a norm, a linear layer."""

    def __init__(self, vocab: int, dim: int, blocks: Sequence[Mixer]):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = SimpleRMSNorm()
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n vocab"]:
        """All tokens at once."""
        x, grid = self.embed(ids), Grid(n=ids.shape[1])
        for block in self.blocks:
            x = block(x, grid)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def init_state(self, batch: int, tokens: int = 1) -> States:
        """The states of the blocks, for steps of so many tokens."""
        grid = Grid(t=1, n=tokens)
        return States(tuple(block.init_state(batch, grid) for block in self.blocks))  # type: ignore[operator]

    def step(self, ids: Int[Tensor, "b n"], state: States) -> tuple[Float[Tensor, "b n vocab"], States]:
        """The next tokens."""
        x, after = self.embed(ids), []
        for block, before in zip(self.blocks, state.parts, strict=True):
            x, new = block.step(x, before)  # type: ignore[operator]
            after.append(new)
        return self.head(self.norm(x)), States(tuple(after))
