"""The short-term half of Titans: causal attention within a window, or within a segment, beside persistent tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.attention import attention
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.patterns import window
from chronotope.position import Rope

ROPE = Rope("n")


class Persistent(nn.Module):
    """Projections, and learned tokens [P, dim] that every query sees and that have no place."""

    def __init__(self, dim: int, heads: int, persistent: int):
        super().__init__()
        if heads < 1 or dim % heads or (dim // heads) % 2:
            raise ChronotopeError(f"dim={dim}, heads={heads}: expected heads of an even size.")
        self.dim, self.heads = dim, heads
        self.tokens = nn.Parameter(0.5 * torch.randn(persistent, dim))
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def project(self, x: Float[Tensor, "b n c"], place: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, N, D] of tokens at place, place + 1, ..."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        grid, offset = Grid(n=x.shape[1]), {"n": place}
        return ROPE(q, grid, offset=offset), ROPE(k, grid, offset=offset), v

    def before(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v with those of the persistent tokens in front."""
        _, own_k, own_v = self.qkv(self.tokens).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        return tuple(torch.cat((x.expand(len(y), -1, -1, -1), y), 2) for x, y in ((own_k, k), (own_v, v)))  # type: ignore[return-value]

    def look(self, q: Tensor, k: Tensor, v: Tensor, bias: Float[Tensor, "*h n m"]) -> Float[Tensor, "b n c"]:
        """Attention over the persistent tokens and over k [B, H, M, D], to whose scores the bias is added."""
        k, v = self.before(k, v)
        bias = nn.functional.pad(bias, (len(self.tokens), 0))
        out = attention(q, k, v, grid=Grid(n=q.shape[2]), key_grid=Grid(m=k.shape[2]), bias=bias)
        return self.out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return,union-attr]


@dataclass(frozen=True)
class SlidingState(Carried):
    """Keys and values of the last window - 1 tokens. place: tokens so far."""

    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n d"]
    place: int
    grid: Grid


class Sliding(Mixer):
    """Attention of each token over itself, the window - 1 tokens before it, and the persistent tokens."""

    def __init__(self, dim: int, heads: int, window: int = 32, persistent: int = 4):
        super().__init__()
        self.dim, self.window = dim, window
        self.attend = Persistent(dim, heads, persistent)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once, in the order of the grid."""
        require_tokens(x, grid, self.dim, "x")
        q, k, v = self.attend.project(x)
        own, n = Grid(n=x.shape[1]), len(self.attend.tokens)
        out = attention(
            q, *self.attend.before(k, v), grid=own, key_grid=own.replace(prefix=n), where=window(n=(self.window - 1, 0))
        )
        return self.attend.out(out.transpose(1, 2).flatten(2))  # type: ignore[union-attr,no-any-return]

    def init_state(self, batch: int, grid: Grid) -> SlidingState:
        """An empty window."""
        require_slice(grid)
        heads = self.attend.heads
        empty = self.attend.qkv.weight.new_empty(batch, heads, 0, self.dim // heads)
        return SlidingState(empty, empty, 0, grid)

    def step(self, x: Float[Tensor, "b s c"], state: SlidingState) -> tuple[Float[Tensor, "b s c"], SlidingState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        q, k, v = self.attend.project(x, state.place)
        k, v = torch.cat((state.k, k), 2), torch.cat((state.v, v), 2)
        new, known = q.shape[2], k.shape[2]
        apart = torch.arange(known, device=x.device) - torch.arange(known - new, known, device=x.device)[:, None]
        seen = (apart <= 0) & (apart > -self.window)
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=x.device).masked_fill(~seen, -torch.inf)
        spare = max(0, known - self.window + 1)
        after = SlidingState(k[:, :, spare:].clone(), v[:, :, spare:].clone(), state.place + new, state.grid)
        return self.attend.look(q, k, v, bias), after
