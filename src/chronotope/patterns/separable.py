"""Patterns that are a conjunction of one relation per axis: along, window, blocks, strided."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import Boxes, identify
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid, align, joint_shape
from chronotope.patterns.base import Pattern, Reaches, Verdict
from chronotope.patterns.reach import Reach

Size = int | tuple[int, int]


class Separable(Pattern):
    """A conjunction of one `Reach` per axis; only `_sees` and `reach` differ between members."""

    @abstractmethod
    def constrained(self, grid: Grid, key_grid: Grid) -> tuple[str, ...]:
        """The axes, of both grids, on which this pattern says anything."""

    @abstractmethod
    def reach(self, axis: str, n_query: int, n_key: int) -> Reach:
        """The relation on one axis."""

    def reaches(self, grid: Grid, key_grid: Grid) -> Reaches:
        return {
            axis: [_reach(self, axis, grid.sizes[axis], key_grid.sizes[axis])]
            for axis in self.constrained(grid, key_grid)
        }

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        some = torch.ones(len(q), dtype=torch.bool)
        every = torch.ones(len(q), dtype=torch.bool)
        for axis, (reach,) in self.reaches(q.grid, k.grid).items():
            one, both = reach.over(q.lo[axis], q.hi[axis], k.lo[axis], k.hi[axis])
            some &= one
            every &= both
        return some, every

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        reaches = self.reaches(q.grid, k.grid).items()
        keys = [reach.alike(q.lo[axis], q.hi[axis], k.lo[axis], k.hi[axis]) for axis, (reach,) in reaches]
        return identify(*keys) if keys else torch.zeros(len(q), dtype=torch.int64)

    def prefix_sees(self) -> tuple[bool, bool]:
        return True, True


@lru_cache(maxsize=64)
def _reach(pattern: Separable, axis: str, n_query: int, n_key: int) -> Reach:
    """Kept by value: planning asks for the same relation at every level of its search."""
    return pattern.reach(axis, n_query, n_key)


@dataclass(frozen=True, repr=False)
class Along(Separable):
    """All other axes are equal."""

    axes: tuple[str, ...]

    def constrained(self, grid: Grid, key_grid: Grid) -> tuple[str, ...]:
        return tuple(axis for axis in grid.axes if axis in key_grid.axes and axis not in self.axes)

    def check(self, grid: Grid, key_grid: Grid) -> None:
        require_axes(repr(self), self.axes, grid, key_grid)

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        return conjunction(q, k, {axis: q.axes[axis] == k.axes[axis] for axis in self.constrained(q.grid, k.grid)})

    def reach(self, axis: str, n_query: int, n_key: int) -> Reach:
        x = align(torch.arange(n_query), n_query, n_key)
        return Reach(x, x, 1)

    def horizon(self, axis: str) -> int | None:
        return None if axis in self.axes else 0

    def __repr__(self) -> str:
        return f"along({', '.join(map(repr, self.axes))})"


@dataclass(frozen=True, repr=False)
class Window(Separable):
    """-before * d <= key - query <= after * d on each named axis, in steps of d."""

    spans: tuple[tuple[str, tuple[int, int]], ...]
    dilation: tuple[tuple[str, int], ...]
    edge: str

    def constrained(self, grid: Grid, key_grid: Grid) -> tuple[str, ...]:
        return tuple(axis for axis, _ in self.spans if axis in grid.axes and axis in key_grid.axes)

    def check(self, grid: Grid, key_grid: Grid) -> None:
        require_axes(repr(self), tuple(axis for axis, _ in self.spans), grid, key_grid)
        if self.edge == "shift":
            for axis in self.constrained(grid, key_grid):
                (before, after), d, n = dict(self.spans)[axis], dict(self.dilation)[axis], key_grid.sizes[axis]
                if before + after + 1 > n // d:
                    raise ChronotopeError(
                        f"{self!r}: {before + after + 1} keys {f'at dilation {d} ' if d > 1 else ''}do not fit on axis "
                        f"{axis}={n}; with edge='shift' the window must fit inside the axis. "
                        "Use a smaller window, or edge='clip'."
                    )

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        seen = {}
        for axis in self.constrained(q.grid, k.grid):
            (before, after), d = dict(self.spans)[axis], dict(self.dilation)[axis]
            x, y = q.axes[axis], k.axes[axis]
            if self.edge == "clip":
                seen[axis] = (y - x >= -before * d) & (y - x <= after * d) & ((y - x) % d == 0)
            else:
                start = self._start(x, axis, k.grid.sizes[axis])
                seen[axis] = (y % d == x % d) & (y // d >= start) & (y // d <= start + before + after)
        return conjunction(q, k, seen)

    def _start(self, x: Tensor, axis: str, n: int) -> Tensor:
        """edge='shift': of the places d apart from x, the index of the first that the window holds."""
        (before, after), d = dict(self.spans)[axis], dict(self.dilation)[axis]
        count = (n - x % d + d - 1) // d
        return (x // d - before).clamp(min=0).minimum(count - 1 - before - after)

    def reach(self, axis: str, n_query: int, n_key: int) -> Reach:
        (before, after), d = dict(self.spans)[axis], dict(self.dilation)[axis]
        x = align(torch.arange(n_query), n_query, n_key)
        if self.edge == "shift":
            first = self._start(x, axis, n_key) * d + x % d
            return Reach(first, first + (before + after) * d, d)
        end = x % d + (n_key - 1 - x % d).div(d, rounding_mode="floor") * d
        return Reach(torch.maximum(x - before * d, x % d), torch.minimum(x + after * d, end), d)

    def horizon(self, axis: str) -> int | None:
        if axis not in dict(self.spans) or self.edge == "shift":
            return None
        return dict(self.spans)[axis][0] * dict(self.dilation)[axis]

    def __repr__(self) -> str:
        sizes = [f"{axis}={2 * b + 1 if b == a else (b, a)}" for axis, (b, a) in self.spans]
        steps = {axis: d for axis, d in self.dilation if d > 1}
        if steps:
            same = len(set(dict(self.dilation).values())) == 1
            sizes.append(f"dilation={next(iter(steps.values())) if same else steps}")
        return f"window({', '.join(sizes + ([] if self.edge == 'clip' else [f'edge={self.edge!r}']))})"


@dataclass(frozen=True, repr=False)
class Blocks(Separable):
    """floor((x + shift) / size) is equal on each named axis."""

    sizes: tuple[tuple[str, int], ...]
    shift: tuple[tuple[str, int], ...]

    def constrained(self, grid: Grid, key_grid: Grid) -> tuple[str, ...]:
        return tuple(axis for axis, _ in self.sizes if axis in grid.axes and axis in key_grid.axes)

    def check(self, grid: Grid, key_grid: Grid) -> None:
        require_axes(repr(self), tuple(axis for axis, _ in self.sizes), grid, key_grid)

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        seen = {}
        for axis in self.constrained(q.grid, k.grid):
            size, shift = dict(self.sizes)[axis], dict(self.shift)[axis]
            seen[axis] = (q.axes[axis] + shift) // size == (k.axes[axis] + shift) // size
        return conjunction(q, k, seen)

    def reach(self, axis: str, n_query: int, n_key: int) -> Reach:
        size, shift = dict(self.sizes)[axis], dict(self.shift)[axis]
        block = (align(torch.arange(n_query), n_query, n_key) + shift) // size
        return Reach((block * size - shift).clamp(min=0), (block * size + size - 1 - shift).clamp(max=n_key - 1), 1)

    def horizon(self, axis: str) -> int | None:
        return dict(self.sizes)[axis] - 1 if axis in dict(self.sizes) else None

    def __repr__(self) -> str:
        shifts = {axis: s for axis, s in self.shift if s}
        tail = f", shift={shifts}" if shifts else ""
        return f"blocks({', '.join(f'{axis}={size}' for axis, size in self.sizes)}{tail})"


@dataclass(frozen=True, repr=False)
class Strided(Separable):
    """key - query is a multiple of the stride on each named axis."""

    strides: tuple[tuple[str, int], ...]

    def constrained(self, grid: Grid, key_grid: Grid) -> tuple[str, ...]:
        return tuple(axis for axis, _ in self.strides if axis in grid.axes and axis in key_grid.axes)

    def check(self, grid: Grid, key_grid: Grid) -> None:
        require_axes(repr(self), tuple(axis for axis, _ in self.strides), grid, key_grid)

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        axes = self.constrained(q.grid, k.grid)
        return conjunction(q, k, {a: (k.axes[a] - q.axes[a]) % dict(self.strides)[a] == 0 for a in axes})

    def reach(self, axis: str, n_query: int, n_key: int) -> Reach:
        stride = dict(self.strides)[axis]
        first = align(torch.arange(n_query), n_query, n_key) % stride
        # A residue beyond the end of a short axis cannot occur: the aligned place itself has it.
        return Reach(first, first + (n_key - 1 - first).div(stride, rounding_mode="floor") * stride, stride)

    def __repr__(self) -> str:
        return f"strided({', '.join(f'{axis}={s}' for axis, s in self.strides)})"


def along(*axes: str) -> Pattern:
    """A query sees the keys that differ from it on the named axes only: all OTHER axes are equal.

    `along("t")` is temporal attention, `along("h", "w")` spatial; all axes named is joint attention.
    """
    if not axes or any(not isinstance(axis, str) for axis in axes):
        raise ChronotopeError(f"along{axes!r}: name at least one axis, such as along('t') or along('h', 'w').")
    require_once("along", axes)
    return Along(tuple(axes))


def window(*, dilation: int | dict[str, int] = 1, edge: str = "clip", **sizes: Size) -> Pattern:
    """|key - query| <= (size - 1) / 2 on each named axis; odd sizes, or `(before, after)` for one-sided.

    With `dilation` d (int, or dict by axis) the difference is a multiple of d and the radius scales by d.
    `edge="shift"` moves the window inside the axis, so that each query sees exactly `size` keys
    (neighborhood attention; dilated: among the places d apart from the query).
    """
    if not sizes:
        raise ChronotopeError("window() constrains no axis: name at least one, such as window(t=5, h=9).")
    if edge not in ("clip", "shift"):
        raise ChronotopeError(f"window(edge={edge!r}): expected 'clip' or 'shift'.")
    spans = tuple((axis, _span(axis, size)) for axis, size in sizes.items())
    steps = dilation if isinstance(dilation, dict) else dict.fromkeys(sizes, dilation)
    for axis, step in steps.items():
        if axis not in sizes:
            raise ChronotopeError(f"window(dilation={dilation!r}) names the axis {axis!r}, which has no window.")
        require_positive(f"window(dilation={dilation!r})", "dilation", step)
    return Window(spans, tuple((axis, steps.get(axis, 1)) for axis in sizes), edge)


def _span(axis: str, size: Size) -> tuple[int, int]:
    if isinstance(size, tuple):
        if len(size) != 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in size):
            raise ChronotopeError(f"window({axis}={size!r}): expected (before, after), two counts of 0 or more.")
        return size
    require_positive(f"window({axis}={size!r})", "size", size)
    if size % 2 == 0:
        raise ChronotopeError(
            f"window({axis}={size}): an even window has no centre; give an odd size such as {size + 1}, "
            f"or (before, after) such as ({size // 2}, {size // 2 - 1})."
        )
    return size // 2, size // 2


def blocks(*, shift: dict[str, int] | None = None, **sizes: int) -> Pattern:
    """Same block: floor((x + shift) / size) is equal on each named axis. The last block may be shorter."""
    if not sizes:
        raise ChronotopeError("blocks() constrains no axis: name at least one, such as blocks(h=8, w=8).")
    for axis, size in sizes.items():
        require_positive(f"blocks({axis}={size!r})", "block size", size)
    if shift is not None and not isinstance(shift, dict):
        raise ChronotopeError(f"blocks(shift={shift!r}): expected whole numbers by axis, such as shift={{'h': 4}}.")
    for axis, by in (shift or {}).items():
        if axis not in sizes or isinstance(by, bool) or not isinstance(by, int):
            raise ChronotopeError(f"blocks(shift={shift!r}): expected whole numbers for the axes {', '.join(sizes)}.")
    return Blocks(tuple(sizes.items()), tuple((axis, (shift or {}).get(axis, 0)) for axis in sizes))


def strided(**strides: int) -> Pattern:
    """key - query is a multiple of the stride on each named axis."""
    if not strides:
        raise ChronotopeError("strided() constrains no axis: name at least one, such as strided(t=4).")
    for axis, stride in strides.items():
        require_positive(f"strided({axis}={stride!r})", "stride", stride)
    return Strided(tuple(strides.items()))


def conjunction(q: Coords, k: Coords, seen: dict[str, Tensor]) -> Bool[Tensor, "..."]:
    """All of the per-axis relations; everything where there are none, in the shape of the pair."""
    if not seen:
        shape = joint_shape(q.place, k.place)
        return torch.ones(shape, dtype=torch.bool, device=q.place.device)
    out = None
    for relation in seen.values():
        out = relation if out is None else out & relation
    assert out is not None
    return out


def require_axes(what: str, axes: tuple[str, ...], grid: Grid, key_grid: Grid) -> None:
    """Raises unless each axis exists on one of the grids at least."""
    if grid.axes == key_grid.axes:
        grid.require(axes, what)
    unknown = [axis for axis in axes if axis not in grid.axes and axis not in key_grid.axes]
    if unknown:
        raise ChronotopeError(f"{what} names the axes {unknown}, which neither {grid!r} nor {key_grid!r} has.")


def require_once(what: str, axes: tuple[str, ...]) -> None:
    """Raises where an axis is named twice."""
    twice = sorted({axis for axis in axes if axes.count(axis) > 1})
    if twice:
        raise ChronotopeError(f"{what}{axes!r} names the axis {twice[0]!r} twice; name each axis once.")


def require_positive(what: str, name: str, value: object) -> None:
    """Raises unless the value is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ChronotopeError(f"{what}: the {name} must be a whole number of at least 1, got {value!r}.")
