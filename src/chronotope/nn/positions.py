"""Where a token is, added to what it holds: codes that stand before the blocks of a stack."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.position import Offset, Places, Rope


@dataclass(frozen=True)
class CodeState(Carried):
    """`time`: coordinate of the next slice on the first axis."""

    time: int
    grid: Grid


class Code(Mixer):
    """y = x + code(places): the place of each token after the prefix, added to it.

    A code mixes nothing; as a mixer it can stand first in a `Stack`, and be stepped with it: `Stack([Sinusoidal(64,
    ("t",)), Block(...), ...])`.
    """

    dim: int
    place: Rope
    """Whose coordinates they are."""

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        grid: Grid,
        context: Context | None = None,
        *,
        coords: Places | None = None,
        offset: Offset | None = None,
    ) -> Float[Tensor, "b n c"]:
        """x + code. `coords`: places of the tokens after the prefix, as for `ct.Rope`; `offset={"t": 7}` moves them."""
        require_tokens(x, grid, self.dim, "x")
        code = self.code(grid, coords, offset, x.device).to(x.dtype)
        first = self.first(grid)
        if grid.prefix == 0:
            return x + code
        head = x[:, : grid.prefix] if first is None else x[:, : grid.prefix] + first.to(x.dtype)
        return torch.cat((head, x[:, grid.prefix :] + code), 1)

    @abstractmethod
    def code(
        self, grid: Grid, coords: Places | None, offset: Offset | None, device: torch.device
    ) -> Float[Tensor, "*b n c"]:
        """What is added to the tokens after the prefix."""

    def first(self, grid: Grid) -> Float[Tensor, "prefix c"] | None:
        """What is added to the prefix tokens; None: nothing."""
        return None

    @property
    def placed(self) -> tuple[str, ...]:
        return self.place.axes

    def init_state(self, batch: int, grid: Grid) -> CodeState:
        """No slice has come."""
        require_slice(grid)
        return CodeState(0, grid)

    def step(
        self, x: Float[Tensor, "b s c"], state: CodeState, *, coords: Places | None = None
    ) -> tuple[Float[Tensor, "b s c"], CodeState]:
        """The next slice. An axis that `coords` names is where they say; the others follow from the slices counted."""
        axis = state.grid.axes[0]
        counted = axis in self.place.counted(coords)
        y = self(x, state.grid, coords=coords, offset={axis: state.time} if counted else None)
        return y, CodeState(state.time + 1, state.grid)


class Sinusoidal(Code):
    """x + (sin(s_0 p), cos(s_0 p), sin(s_1 p), cos(s_1 p), ...), s_i = base^(-i / n), for each axis in turn.

    p: the coordinate of the token on the axis, any number. An axis has n pairs of channels: an equal part of all, or
    its `share`; channels that are left over get nothing. Prefix tokens pass.

    Args:
        dim: channels of x.
        axes, base, share, places: as for `ct.Rope`.

    Example:
        >>> code = Sinusoidal(64, ("t", "h", "w"))
        >>> code(torch.zeros(1, 4 * 3 * 3, 64), Grid(t=4, h=3, w=3)).shape
        torch.Size([1, 36, 64])

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5, which is the case of one axis.
    """

    def __init__(
        self,
        dim: int,
        axes: tuple[str, ...] | str,
        base: float | int = 10000.0,
        share: Mapping[str, float | int] | None = None,
        places: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self.dim, self.place = dim, Rope(axes, base, share, places)
        self.place.pairs(dim)

    def code(
        self, grid: Grid, coords: Places | None, offset: Offset | None, device: torch.device
    ) -> Float[Tensor, "*b n c"]:
        angle = self.place.angles(self.place.located(grid, coords, offset, device), self.dim)
        waves = torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)
        return nn.functional.pad(waves, (0, self.dim - waves.shape[-1]))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.place!r}"


class Learned(Code):
    """x + sum over the named axes of table_axis[coordinate].

    Args:
        dim: channels of x.
        prefix: prefix tokens that have a code of their own, in order; 0: they pass.
        interpolate: whether a grid with a longer axis is laid over the table, centre on centre, codes between two
            entries being mixed linearly. Else it is refused.
        sizes: entries of each axis: `Learned(64, t=16, h=8, w=8)`. A shorter grid takes the first of them.

    Coordinates that are given lie between 0 and the last entry of the table; between two entries the code is mixed
    linearly.

    Example:
        >>> code = Learned(64, prefix=1, t=16, h=8, w=8)
        >>> code(torch.zeros(1, 1 + 4 * 8 * 8, 64), Grid(t=4, h=8, w=8, prefix=1)).shape
        torch.Size([1, 257, 64])

    Raises ChronotopeError: a place that the table does not have, a grid with another prefix.

    Source: Gehring et al. 2017 (arXiv 1705.03122); Dosovitskiy et al. 2021 (arXiv 2010.11929) interpolate.
    """

    def __init__(self, dim: int, prefix: int = 0, interpolate: bool = False, **sizes: int):
        super().__init__()
        if not sizes or prefix < 0 or any(isinstance(n, bool) or n < 1 for n in sizes.values()):
            raise ChronotopeError(f"Learned({dim}, prefix={prefix}, {sizes}): give an axis or more, each of 1 or more.")
        self.dim, self.place, self.interpolate, self.sizes = dim, Rope(tuple(sizes)), interpolate, dict(sizes)
        self.tables = nn.ParameterDict({axis: nn.Parameter(torch.empty(n, dim)) for axis, n in sizes.items()})
        self.prefix = nn.Parameter(torch.empty(prefix, dim)) if prefix else None
        for table in self.parameters():
            nn.init.normal_(table, std=0.02)

    def first(self, grid: Grid) -> Float[Tensor, "prefix c"] | None:
        if self.prefix is not None and grid.prefix != len(self.prefix):
            raise ChronotopeError(f"Learned has codes for {len(self.prefix)} prefix tokens, got {grid!r}.")
        return self.prefix

    def code(
        self, grid: Grid, coords: Places | None, offset: Offset | None, device: torch.device
    ) -> Float[Tensor, "*b n c"]:
        places = self.place.located(grid, coords, offset, device)
        codes = []
        for axis, x in zip(self.place.axes, places.unbind(-1), strict=True):
            if coords is None:
                codes.append(self._on_grid(axis, x, grid.sizes[axis], (offset or {}).get(axis, 0)))
            else:
                self._require(axis, float(x.min()), float(x.max()))
                codes.append(self._between(axis, x))
        return torch.stack(codes).sum(0)

    def _on_grid(self, axis: str, x: Float[Tensor, "*b n"], size: int, first: float | int) -> Float[Tensor, "*b n c"]:
        """The code of the places first, first + 1, ... of an axis; nothing is asked of the device."""
        entries = self.sizes[axis]
        if self.interpolate and size > entries and first == 0:
            return self._between(axis, ((x + 0.5) * entries / size - 0.5).clamp(0, entries - 1))
        self._require(axis, first, first + size - 1)
        return self.tables[axis][x.long()] if first == int(first) else self._between(axis, x)

    def _between(self, axis: str, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n c"]:
        table: Tensor = self.tables[axis]
        below = x.floor().long()
        return torch.lerp(table[below], table[(below + 1).clamp(max=len(table) - 1)], (x - below)[..., None].to(table))

    def _require(self, axis: str, low: float | int, high: float | int) -> None:
        if low < 0 or high > self.sizes[axis] - 1:
            raise ChronotopeError(
                f"Learned has {self.sizes[axis]} codes on {axis!r}, and is asked for the places {low:g} to {high:g}. "
                "Make the table longer, or, for a longer grid as a whole, set interpolate=True."
            )

    def extra_repr(self) -> str:
        return f"{self.dim}, {', '.join(f'{axis}={n}' for axis, n in self.sizes.items())}"
