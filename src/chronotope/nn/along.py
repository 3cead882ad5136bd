"""A mixer of sequences on a grid: it runs along some axes, for each place on the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, States, require_slice, require_tokens


@dataclass(frozen=True)
class AlongState(Carried):
    """What the mixer carries, each of the places being a member of its batch, those of an example side by side."""

    inner: Any
    places: int
    grid: Grid

    def select(self, index: Tensor) -> AlongState:
        """The state of some examples, in this order."""
        places = torch.arange(self.places, device=index.device)
        return replace(self, inner=self.inner.select((index[:, None] * self.places + places).flatten()))

    def repeat(self, n: int) -> AlongState:
        """The state with every example n times in a row."""
        held = self.inner.tensors()
        if not held:
            return self
        examples = torch.arange(held[0].shape[0] // self.places, device=held[0].device)
        return self.select(examples.repeat_interleave(n))


class Along(Mixer):
    """mixer(x) on the lines along `axes`: one sequence for each place on the other axes, which do not meet.

    `Along(Mamba(64), "t")` holds a state for each place over time; `Along(S5(64), "h", "w")` runs over each frame, in
    the order of the grid. It is stepped as the mixer is, if the first axis of the grid is among its axes; else a slice
    is seen as a whole.

    `Attention` needs none of this: `where=ct.along("t")` says the same, and so does `Recurrence(along="t")`.

    Args:
        mixer: what runs along the axes.
        axes: one or more, in any order; that of the grid counts.

    Example:
        >>> layer = Along(Mamba(16), "t")
        >>> layer(torch.randn(2, 4 * 5 * 6, 16), Grid(t=4, h=5, w=6)).shape
        torch.Size([2, 120, 16])

    Raises ChronotopeError: an axis that the grid lacks, a prefix, which is on no line.
    """

    def __init__(self, mixer: Mixer, *axes: str):
        super().__init__()
        if not axes:
            raise ChronotopeError("Along(mixer): name one axis or more, such as 't'.")
        self.mixer, self.axes = mixer, axes
        self.dim = getattr(mixer, "dim", None)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("Along takes no context: its lines are those of one grid.")
        line = self._line(grid)
        require_tokens(x, grid, x.shape[-1], "x")
        return self._back(self.mixer(self._lines(x, grid), line), grid)

    def init_state(self, batch: int, grid: Grid) -> AlongState:
        """The states of all lines. Raises ChronotopeError where the mixer cannot be stepped."""
        require_slice(grid)
        line = self._line(grid)
        places = grid.size // line.size
        inner = self.mixer.init_state(batch * places, line) if grid.axes[0] in self.axes else States(())
        return AlongState(inner, places, grid)

    def step(self, x: Float[Tensor, "b s c"], state: AlongState) -> tuple[Float[Tensor, "b s c"], AlongState]:
        """The next slice."""
        if state.grid.axes[0] not in self.axes:
            return self(x, state.grid), state
        require_tokens(x, state.grid, x.shape[-1], "x")
        y, inner = self.mixer.step(self._lines(x, state.grid), state.inner)
        return self._back(y, state.grid), replace(state, inner=inner)

    def _line(self, grid: Grid) -> Grid:
        grid.require(self.axes, "Along")
        if grid.prefix:
            raise ChronotopeError(f"Along({', '.join(self.axes)}): the prefix of {grid!r} is on no line.")
        return Grid(**{axis: size for axis, size in grid.sizes.items() if axis in self.axes})

    def _order(self, grid: Grid) -> list[int]:
        """Batch, the other axes, those of a line, channels."""
        own = [1 + i for i, axis in enumerate(grid.axes) if axis in self.axes]
        others = [1 + i for i, axis in enumerate(grid.axes) if axis not in self.axes]
        return [0, *others, *own, 1 + len(grid.axes)]

    def _lines(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "lines length c"]:
        others = len(grid.axes) - len(set(self.axes))
        return x.unflatten(1, grid.shape).permute(self._order(grid)).flatten(others + 1, -2).flatten(0, others)

    def _back(self, x: Float[Tensor, "lines length c"], grid: Grid) -> Float[Tensor, "b n c"]:
        order = self._order(grid)
        sizes = [grid.shape[place - 1] for place in order[1:-1]]
        x = x.reshape(-1, *sizes, x.shape[-1])
        return x.permute([order.index(place) for place in range(len(order))]).flatten(1, -2)

    def extra_repr(self) -> str:
        return ", ".join(map(repr, self.axes))
