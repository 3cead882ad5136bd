"""Where a token is, written into queries and keys by rotation, so that their product knows differences only."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid, joint_shape

Offset = Mapping[str, float | int]
Places = Tensor | Mapping[str, Tensor]
"""Where tokens are on the axes of a code: [N, axes] or [B, N, axes]; or by axis, each [N] or [B, N]."""


class Table:
    """Where the members of an axis are: float64 [members, columns], equal and hashed by content."""

    def __init__(self, values: Tensor):
        self.values = values.detach().to("cpu", torch.float64, copy=True)
        # Of numbers only: the hash of text or bytes would be another in each process, and this one is pickled.
        self._hash = hash((tuple(values.shape), zlib.crc32(self.values.contiguous().numpy().tobytes())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and torch.equal(self.values, other.values)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"<{self.values.shape[0]} x {self.values.shape[1]}>"


@dataclass(frozen=True, init=False)
class Rope:
    """Rotary position code over named axes.

    Pair i of the n pairs of an axis turns by the angle x * base^(-i / n) at coordinate x; so the product of a rotated
    query and a rotated key depends on the difference of their coordinates only, and codes do not change when an axis
    grows. Of a head of size D the first R channels are rotated, the pair of channel c being (c, c + R / 2), the axes
    in order; the other channels pass.

    Args:
        axes: names of the axes, such as ("t", "h", "w").
        base: the longest wavelength is about 2 pi * base tokens.
        share: the part of the pairs that each axis gets, such as {"t": 0.5, "h": 0.25, "w": 0.25}; adding up to 1 or
            less. Default: equal parts. Parts are rounded down to whole pairs.
        places: where the members of an axis are, where that is not 0, 1, 2 ...: float [members] or, in a space of k
            dimensions, [members, k], such as {"v": ct.spectral(edges, nodes=25, vectors=4)} or the longitudes and
            latitudes of sensors. Such an axis is k columns of coordinates, which share its pairs evenly.

    `rope(x, grid)` rotates x [B, H, grid.size, D]; prefix tokens have no place and pass. `rope(x, coords=c)` takes
    coordinates of its own, float [N, columns] or [B, N, columns], a column for each axis unless it has `places`:
    timestamps, or the places of one grid on another (`rope.coords(grid, onto=other)`). `rope(x, grid,
    coords={"time": c})`, c [N] or [B, N], takes those of the axes that it does not name from the grid.
    `offset={"t": 7}` moves the coordinates: a slice at time 7.

    Example:
        >>> rope = Rope(axes=("t", "h", "w"))
        >>> rope(torch.randn(2, 4, 8 * 6 * 6, 32), Grid(t=8, h=6, w=6)).shape
        torch.Size([2, 4, 288, 32])

    Raises ChronotopeError: an axis that the grid lacks, a head with fewer pairs than one for each column, coordinates
    of another shape, an axis of another size than its places.

    Source: Su et al. 2021 (arXiv 2104.09864), one rotation for each axis.
    """

    axes: tuple[str, ...]
    base: float
    share: tuple[float, ...]
    places: tuple[Table | None, ...]

    def __init__(
        self,
        axes: tuple[str, ...] | str = ("t", "h", "w"),
        base: float | int = 10000.0,
        share: Mapping[str, float | int] | None = None,
        places: Mapping[str, Tensor] | None = None,
    ):
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        if not axes or len(set(axes)) < len(axes):
            raise ChronotopeError(f"Rope(axes={axes!r}): expected different names of axes, such as ('t', 'h', 'w').")
        if not base > 1:
            raise ChronotopeError(f"Rope(base={base!r}): expected a number above 1.")
        if share is not None and (
            set(share) != set(axes) or min(share.values()) <= 0 or sum(share.values()) > 1 + 1e-9
        ):
            raise ChronotopeError(
                f"Rope(share={dict(share)!r}): expected a part above 0 for each of the axes {', '.join(axes)}, "
                "adding up to 1 or less."
            )
        given = dict(places or {})
        if not set(given) <= set(axes) or any(x.ndim not in (1, 2) or x.numel() == 0 for x in given.values()):
            sizes = {axis: list(x.shape) for axis, x in given.items()}
            raise ChronotopeError(
                f"Rope(axes={axes!r}, places of {sizes}): [members] or [members, columns] for some of the axes."
            )
        tables = tuple(Table(given[a].reshape(len(given[a]), -1)) if a in given else None for a in axes)
        object.__setattr__(self, "places", tables)
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "base", float(base))
        object.__setattr__(self, "share", tuple(1 / len(axes) if share is None else float(share[a]) for a in axes))

    def __call__(
        self,
        x: Float[Tensor, "b h n d"],
        grid: Grid | None = None,
        *,
        coords: Places | None = None,
        offset: Offset | None = None,
    ) -> Float[Tensor, "b h n d"]:
        """x rotated, in its own dtype. With a grid and coords, the coords are those of the tokens after the prefix."""
        exact = torch.promote_types(x.dtype, torch.float32)
        if coords is None and not offset and grid is not None:
            # A compiler cannot look into a cache; it keeps the table as a constant by itself.
            made = _table if torch.compiler.is_compiling() else _kept_table
            table = made(self, grid, x.shape[3], exact, x.device)
        else:
            table = _waves(self.angles(self.located(grid, coords, offset, x.device), x.shape[3]), exact)
        cos, sin = table
        prefix = 0 if grid is None else grid.prefix
        if cos.shape[-2] != x.shape[2] - prefix:
            raise ChronotopeError(f"Rope: {cos.shape[-2] + prefix} coordinates for x of shape {list(x.shape)}.")
        return _rotate(x, cos, sin, prefix)

    def coords(
        self, grid: Grid, onto: Grid | None = None, device: torch.device | str | None = None
    ) -> Float[Tensor, "n columns"]:
        """Coordinates of the tokens with a place, float64: a column for each axis of this code, or those of its places.

        With `onto`, the places of `grid` on the axes of another grid of other sizes, centre on centre:
        (x + 0.5) * n_onto / n - 0.5. An axis that one of the two lacks tells nothing: it is 0.
        """
        return torch.cat([self._column(axis, grid, onto, device) for axis in self.axes], 1)

    def between(self, grid: Grid, key_grid: Grid) -> tuple[Float[Tensor, "n columns"], Float[Tensor, "nk columns"]]:
        """Coordinates of the tokens of two grids that meet, on the axes of the first: `coords` of both.

        An axis that only one of them has tells nothing: it is 0 in both.
        """
        places, key_places = self.coords(grid, onto=grid), self.coords(key_grid, onto=grid)
        for axis, own in zip(self.axes, places.split(self.widths, 1), strict=True):
            if axis not in grid.axes and axis not in key_grid.axes:
                grid.require((axis,), repr(self))
            if axis not in key_grid.axes:
                own.zero_()
        return places, key_places

    def counted(self, coords: Places | None) -> tuple[str, ...]:
        """The axes on which the grid says where tokens are, and not these coords."""
        if coords is None:
            return self.axes
        return tuple(axis for axis in self.axes if axis not in coords) if isinstance(coords, Mapping) else ()

    @property
    def widths(self) -> list[int]:
        """Columns of coordinates that each axis has: 1, or those of its places."""
        return [self._width(table) for table in self.places]

    def pairs(self, head_dim: int) -> dict[str, int]:
        """Channel pairs that each axis gets in a head of this size."""
        # The small number keeps 0.3 * 10 from being 2.
        out = {axis: int(head_dim // 2 * part + 1e-6) for axis, part in zip(self.axes, self.share, strict=True)}
        # Columns of one axis get the same number of pairs.
        out = {axis: n - n % width for (axis, n), width in zip(out.items(), self.widths, strict=True)}
        if min(out.values()) < 1:
            raise ChronotopeError(
                f"{self!r}: a head of size {head_dim} has {head_dim // 2} pairs of channels, which leaves {out}; "
                "every column of an axis needs 1 pair or more. Use a larger head, fewer axes or other shares."
            )
        return out

    def angles(self, coords: Float[Tensor, "*b n columns"], size: int) -> Float[Tensor, "*b n pairs"]:
        """x * base^(-i / n) for each pair of `size` channels, in float64, for large times."""
        found, columns = [], iter(coords.unbind(-1))
        for n, width in zip(self.pairs(size).values(), self.widths, strict=True):
            each = n // width
            speed = self.base ** (-torch.arange(each, dtype=torch.float64, device=coords.device) / each)
            found += [next(columns)[..., None].double() * speed for _ in range(width)]
        return torch.cat(found, -1)

    def located(
        self, grid: Grid | None, coords: Places | None, offset: Offset | None, device: torch.device | str | None = None
    ) -> Float[Tensor, "*b n columns"]:
        """The coordinates meant by a grid, or by coords given in its place, moved by an offset."""
        if coords is None or isinstance(coords, Mapping):
            coords = self._filled(grid, coords or {}, device)
        elif coords.ndim not in (2, 3) or coords.shape[-1] != sum(self.widths):
            raise ChronotopeError(
                f"Rope: coords of shape {list(coords.shape)}; expected [N, {sum(self.widths)}] or "
                f"[B, N, {sum(self.widths)}] for the axes {', '.join(self.axes)}."
            )
        coords = coords.to(device, torch.float64)
        movable = [axis for axis, table in zip(self.axes, self.places, strict=True) if table is None]
        unknown = [axis for axis in offset or () if axis not in movable]
        if unknown:
            raise ChronotopeError(
                f"Rope: offset={dict(offset or {})!r} names {unknown}; the code can be moved along {movable}."
            )
        if not offset:
            return coords
        moved = [float(offset.get(axis, 0)) for axis, n in zip(self.axes, self.widths, strict=True) for _ in range(n)]
        return coords + coords.new_tensor(moved)

    def _filled(
        self, grid: Grid | None, given: Mapping[str, Tensor], device: torch.device | str | None
    ) -> Float[Tensor, "*b n columns"]:
        """Columns by axis: those given, and those of the grid."""
        tables = dict(zip(self.axes, self.places, strict=True))
        sizes = {axis: list(x.shape) for axis, x in given.items()}
        unfit = [axis for axis, x in given.items() if tables.get(axis, x) is not None or x.ndim not in (1, 2)]
        if unfit:
            raise ChronotopeError(
                f"Rope: coords {sizes}; expected [N] or [B, N] for axes among "
                f"{[axis for axis, table in tables.items() if table is None]}."
            )
        parts = {axis: x.to(device, torch.float64)[..., None] for axis, x in given.items()}
        for axis in self.axes:
            if axis not in given and grid is None:
                raise ChronotopeError(f"Rope: give a grid, or coords of shape [N, {sum(self.widths)}].")
            if axis not in given and grid is not None:
                parts[axis] = self._column(axis, grid, None, device)
        if len({x.shape[-2] for x in parts.values()}) > 1:
            raise ChronotopeError(f"Rope: coords {sizes} on {grid!r}: numbers of tokens differ.")
        shape = joint_shape(*(x[..., 0] for x in parts.values()))
        return torch.cat([parts[axis].expand(*shape, -1) for axis in self.axes], -1)

    def _column(
        self, axis: str, grid: Grid, onto: Grid | None, device: torch.device | str | None
    ) -> Float[Tensor, "n width"]:
        """The coordinates of `coords` for one axis."""
        table = self.places[self.axes.index(axis)]
        if onto is not None and not (axis in grid.axes and axis in onto.axes):
            return torch.zeros(grid.places, self._width(table), dtype=torch.float64, device=device)
        grid.require((axis,), repr(self))
        x = grid.coords(device)[grid.prefix :, grid.axes.index(axis)]
        if table is None:
            ratio = 1.0 if onto is None else onto.sizes[axis] / grid.sizes[axis]
            return (x.double() if ratio == 1 else (x.double() + 0.5) * ratio - 0.5)[:, None]
        if grid.sizes[axis] != len(table.values):
            raise ChronotopeError(f"{self!r} knows {len(table.values)} places on {axis!r}, got {grid!r}.")
        return table.values.to(x.device)[x]

    @staticmethod
    def _width(table: Table | None) -> int:
        return 1 if table is None else table.values.shape[1]

    def __repr__(self) -> str:
        base = "" if self.base == 10000.0 else f", base={self.base:g}"
        equal = self.share == (1 / len(self.axes),) * len(self.axes)
        share = "" if equal else f", share={dict(zip(self.axes, self.share, strict=True))}"
        known = {axis: table for axis, table in zip(self.axes, self.places, strict=True) if table is not None}
        return f"Rope(axes={self.axes!r}{base}{share}{f', places={known}' if known else ''})"


def _table(rope: Rope, grid: Grid, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return _waves(rope.angles(rope.coords(grid, device=device), head_dim), dtype)


def _waves(angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, [N, R / 2] or [B, 1, N, R / 2]."""
    angle = angle if angle.ndim == 2 else angle[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


@lru_cache(maxsize=64)
def _kept_table(
    rope: Rope, grid: Grid, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    # A table made in inference mode could not be used by a later training step.
    with torch.inference_mode(False), torch.no_grad():
        return _table(rope, grid, head_dim, dtype, device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, prefix: int) -> Tensor:
    half = cos.shape[-1]
    body = x[:, :, prefix:].to(cos.dtype)
    a, b, rest = body.split((half, half, x.shape[3] - 2 * half), -1)
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin), rest
    out = torch.cat(turned, -1).to(x.dtype)
    return torch.cat((x[:, :, :prefix], out), 2) if prefix else out
