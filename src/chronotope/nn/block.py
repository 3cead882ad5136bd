"""Blocks and stacks of mixers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.dropout import Dropout
from chronotope.nn.feedforward import FeedForward
from chronotope.nn.mixer import Context, Mixer, States, coords_for, placed_by, require_placed
from chronotope.position import Places


class Block(Mixer):
    """x = x + mixer(norm(x)) for each mixer in turn, then x = x + mlp(norm(x)).

    Args:
        mixers: one after the other; `Block(mixers=[Attention(64, 4, where=along("t")),
            Attention(64, 4, where=along("h", "w"))])` is divided space-time attention.
        dim: channels of x; default: those of the mixers.
        mlp: "swiglu", "geglu", "gelu", or None for no feed-forward.
        mlp_ratio: hidden channels of the feed-forward over dim.
        dropout, drop_path: of what each mixer and the feed-forward add, as for `DropBranch`. Stepping drops nothing.

    `context` goes to the mixers that are wrapped in `Cross`, which no others look at. `coords` goes to the mixers with
    a position code, to each what its code is over; given as a mapping, since codes may differ: {"time": [B, N]}.
    """

    def __init__(
        self,
        mixers: Sequence[Mixer],
        dim: int | None = None,
        mlp: str | None = "swiglu",
        mlp_ratio: float | int = 4.0,
        *,
        dropout: float | int = 0.0,
        drop_path: float | int = 0.0,
    ):
        super().__init__()
        if not mixers:
            raise ChronotopeError("Block(mixers=[]): give at least one mixer, such as ct.nn.Attention(dim, heads).")
        self.dim = dim = _dim_of(mixers, dim, "Block")
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in mixers)
        self.mlp = None if mlp is None else FeedForward(dim, mlp, mlp_ratio)
        self.mlp_norm = None if mlp is None else nn.LayerNorm(dim)
        self.drop = DropBranch(dropout, drop_path)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None, *, coords: Places | None = None
    ) -> Float[Tensor, "b n c"]:
        """All tokens at once."""
        if coords is not None:
            require_placed(self.placed, coords, "Block")
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            known = coords_for(mixer, coords)  # type: ignore[arg-type]
            x = x + self.drop(mixer(norm(x), grid, context if isinstance(mixer, Cross) else None, **known))
        return x if self.mlp is None or self.mlp_norm is None else x + self.drop(self.mlp(self.mlp_norm(x)))

    @property
    def placed(self) -> tuple[str, ...]:
        return placed_by(self.mixers)  # type: ignore[arg-type]

    def init_state(self, batch: int, grid: Grid) -> States:
        """The states of the mixers."""
        return States(tuple(mixer.init_state(batch, grid) for mixer in self.mixers))  # type: ignore[operator]

    def step(
        self, x: Float[Tensor, "b s c"], state: States, *, coords: Places | None = None
    ) -> tuple[Float[Tensor, "b s c"], States]:
        """The next slice through every mixer."""
        if coords is not None:
            require_placed(self.placed, coords, "Block")
        after = []
        for norm, mixer, before in zip(self.norms, self.mixers, state.parts, strict=True):
            y, new = mixer.step(norm(x), before, **coords_for(mixer, coords))  # type: ignore[operator, arg-type]
            x = x + y
            after.append(new)
        x = x if self.mlp is None or self.mlp_norm is None else x + self.mlp(self.mlp_norm(x))
        return x, States(tuple(after))


class DropBranch(nn.Module):
    """In training: `Dropout(dropout)`; then for each example the whole, over 1 - path, or, with probability path, 0.

    Nothing is drawn where a probability is 0.

    Source: Huang et al. 2016, stochastic depth (arXiv 1603.09382), drawn for each example.
    """

    def __init__(self, dropout: float | int = 0.0, path: float | int = 0.0):
        super().__init__()
        if not 0 <= path < 1:
            raise ChronotopeError(f"drop_path={path}: expected a probability from 0 to below 1.")
        self.dropout, self.path = Dropout(dropout), path

    def forward(self, y: Float[Tensor, "b *rest"]) -> Float[Tensor, "b *rest"]:
        """What is added to the residual stream."""
        y = self.dropout(y)
        if self.training and self.path:
            kept = torch.rand(y.shape[0], *[1] * (y.ndim - 1), device=y.device) >= self.path
            y = torch.where(kept, y / (1 - self.path), 0.0)
        return y

    def extra_repr(self) -> str:
        return f"path={self.path}"


class Stack(Mixer):
    """Blocks one after the other, then a norm: LayerNorm(block_L(... block_1(x)))."""

    def __init__(self, blocks: Sequence[Mixer], dim: int | None = None):
        super().__init__()
        self.dim = dim = _dim_of(blocks, dim, "Stack")
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None, *, coords: Places | None = None
    ) -> Float[Tensor, "b n c"]:
        """All tokens at once; every block gets the context."""
        if coords is not None:
            require_placed(self.placed, coords, "Stack")
        for block in self.blocks:
            x = block(x, grid, context, **coords_for(block, coords))  # type: ignore[arg-type]
        return self.norm(x)

    @property
    def placed(self) -> tuple[str, ...]:
        return placed_by(self.blocks)  # type: ignore[arg-type]

    def init_state(self, batch: int, grid: Grid) -> States:
        """The states of the blocks."""
        return States(tuple(block.init_state(batch, grid) for block in self.blocks))  # type: ignore[operator]

    def step(
        self, x: Float[Tensor, "b s c"], state: States, *, coords: Places | None = None
    ) -> tuple[Float[Tensor, "b s c"], States]:
        """The next slice through every block."""
        if coords is not None:
            require_placed(self.placed, coords, "Stack")
        after = []
        for block, before in zip(self.blocks, state.parts, strict=True):
            x, new = block.step(x, before, **coords_for(block, coords))  # type: ignore[operator, arg-type]
            after.append(new)
        return self.norm(x), States(tuple(after))


class Cross(Mixer):
    """A mixer that looks at the context, and at nothing else: mixer(x, grid, context)."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.mixer = mixer
        self.dim: int | None = getattr(mixer, "dim", None)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """The mixer over the context. Raises ChronotopeError where there is none."""
        if context is None:
            raise ChronotopeError("Cross: no context given; call with context=(tokens [B, Nk, C], their grid).")
        return self.mixer(x, grid, context)

    def init_state(self, batch: int, grid: Grid) -> Any:
        """Raises ChronotopeError: a step has no context."""
        raise ChronotopeError("Cross cannot be stepped: step(x, state) takes no context. Call forward for each slice.")

    def step(self, x: Float[Tensor, "b s c"], state: Any) -> tuple[Float[Tensor, "b s c"], Any]:
        """Never reached: there is no state."""
        raise ChronotopeError("Cross cannot be stepped: step(x, state) takes no context. Call forward for each slice.")


def _dim_of(mixers: Sequence[Mixer], dim: int | None, what: str) -> int:
    """The channels that are given, or that the mixers say they have."""
    said = {size for size in (getattr(mixer, "dim", None) for mixer in mixers) if size is not None}
    if dim is None and len(said) == 1:
        return int(said.pop())
    if dim is None or not said <= {dim}:
        raise ChronotopeError(f"{what}: dim={dim}, and its mixers have {sorted(said)} channels; give one size to all.")
    return dim
