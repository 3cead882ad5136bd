"""Layers one after the other, without anything in between."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.block import Cross
from chronotope.nn.mixer import Context, Mixer, States, coords_for, placed_by, require_placed
from chronotope.position import Places


class Chain(Mixer):
    """layer_L(... layer_1(x)): one mixer made of several, to stand in a `Block`, whose residual goes around all.

    Args:
        layers: mixers, and modules that take each token on its own, such as nn.Linear, nn.GELU or `FeedForward`.

    Example, a residual block of shifted convolutions:
        >>> inner = [TemporalShift(16), GridConv(16, {"h": 3, "w": 3}), nn.GELU(), nn.Linear(16, 16)]
        >>> block = Block([Chain(inner)], mlp=None)
        >>> block(torch.randn(2, 4 * 5 * 6, 16), Grid(t=4, h=5, w=6)).shape
        torch.Size([2, 120, 16])
    """

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        if not layers:
            raise ChronotopeError("Chain([]): give at least one layer.")
        self.layers = nn.ModuleList(layers)
        sizes = {getattr(mixer, "dim", None) for mixer in self.mixers}
        self.dim = sizes.pop() if len(sizes) == 1 else None

    @property
    def mixers(self) -> list[Mixer]:
        """The layers that mix tokens."""
        return [layer for layer in self.layers if isinstance(layer, Mixer)]

    @property
    def placed(self) -> tuple[str, ...]:
        return placed_by(self.mixers)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None, *, coords: Places | None = None
    ) -> Float[Tensor, "b n c"]:
        """All tokens at once. `context` goes to the mixers that are wrapped in `Cross`."""
        if coords is not None:
            require_placed(self.placed, coords, "Chain")
        for layer in self.layers:
            if isinstance(layer, Mixer):
                x = layer(x, grid, context if isinstance(layer, Cross) else None, **coords_for(layer, coords))
            else:
                x = layer(x)
        return x

    def init_state(self, batch: int, grid: Grid) -> States:
        """The states of the mixers."""
        return States(tuple(mixer.init_state(batch, grid) for mixer in self.mixers))

    def step(
        self, x: Float[Tensor, "b s c"], state: States, *, coords: Places | None = None
    ) -> tuple[Float[Tensor, "b s c"], States]:
        """The next slice through every layer."""
        if coords is not None:
            require_placed(self.placed, coords, "Chain")
        before, after = iter(state.parts), []
        for layer in self.layers:
            if isinstance(layer, Mixer):
                x, new = layer.step(x, next(before), **coords_for(layer, coords))  # type: ignore[call-arg]
                after.append(new)
            else:
                x = layer(x)
        return x, States(tuple(after))
