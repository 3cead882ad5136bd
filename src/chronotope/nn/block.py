"""Blocks and stacks of mixers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.feedforward import FeedForward
from chronotope.nn.mixer import Context, Mixer, States


class Block(Mixer):
    """x = x + mixer(norm(x)) for each mixer in turn, then x = x + mlp(norm(x)).

    Args:
        mixers: one after the other; `Block(mixers=[Attention(64, 4, where=along("t")),
            Attention(64, 4, where=along("h", "w"))])` is divided space-time attention.
        dim: channels of x; default: those of the mixers.
        mlp: "swiglu", "gelu", or None for no feed-forward.
        mlp_ratio: hidden channels of the feed-forward over dim.

    `context` goes to the mixers that are wrapped in `Cross`, which no others look at.
    """

    def __init__(
        self,
        mixers: Sequence[Mixer],
        dim: int | None = None,
        mlp: str | None = "swiglu",
        mlp_ratio: float | int = 4.0,
    ):
        super().__init__()
        if not mixers:
            raise ChronotopeError("Block(mixers=[]): give at least one mixer, such as ct.nn.Attention(dim, heads).")
        self.dim = dim = _dim_of(mixers, dim, "Block")
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in mixers)
        self.mlp = None if mlp is None else FeedForward(dim, mlp, mlp_ratio)
        self.mlp_norm = None if mlp is None else nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once."""
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x), grid, context if isinstance(mixer, Cross) else None)
        return self._feed(x)

    def init_state(self, batch: int, grid: Grid) -> States:
        """The states of the mixers."""
        return States(tuple(mixer.init_state(batch, grid) for mixer in self.mixers))  # type: ignore[operator]

    def step(self, x: Float[Tensor, "b s c"], state: States) -> tuple[Float[Tensor, "b s c"], States]:
        """The next slice through every mixer."""
        after = []
        for norm, mixer, before in zip(self.norms, self.mixers, state.parts, strict=True):
            y, new = mixer.step(norm(x), before)  # type: ignore[operator]
            x = x + y
            after.append(new)
        return self._feed(x), States(tuple(after))

    def _feed(self, x: Tensor) -> Tensor:
        return x if self.mlp is None or self.mlp_norm is None else x + self.mlp(self.mlp_norm(x))


class Stack(Mixer):
    """Blocks one after the other, then a norm: LayerNorm(block_L(... block_1(x)))."""

    def __init__(self, blocks: Sequence[Mixer], dim: int | None = None):
        super().__init__()
        self.dim = dim = _dim_of(blocks, dim, "Stack")
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once; every block gets the context."""
        for block in self.blocks:
            x = block(x, grid, context)
        return self.norm(x)

    def init_state(self, batch: int, grid: Grid) -> States:
        """The states of the blocks."""
        return States(tuple(block.init_state(batch, grid) for block in self.blocks))  # type: ignore[operator]

    def step(self, x: Float[Tensor, "b s c"], state: States) -> tuple[Float[Tensor, "b s c"], States]:
        """The next slice through every block."""
        after = []
        for block, before in zip(self.blocks, state.parts, strict=True):
            x, new = block.step(x, before)  # type: ignore[operator]
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
