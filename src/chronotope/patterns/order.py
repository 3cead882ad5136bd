"""Patterns of order and of position in the sequence: full, nothing, causal, sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import Boxes, identify
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid, align, joint_shape
from chronotope.patterns.base import Pattern, Reaches, Verdict
from chronotope.patterns.reach import Reach
from chronotope.patterns.separable import require_axes, require_once, require_positive


@dataclass(frozen=True, repr=False)
class Constant(Pattern):
    """Always, or never."""

    value: bool

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        shape = joint_shape(q.place, k.place)
        return torch.full(shape, self.value, dtype=torch.bool, device=q.place.device)

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        out = torch.full((len(q),), self.value)
        return out, out.clone()

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        return torch.zeros(len(q), dtype=torch.int64)

    def prefix_sees(self) -> tuple[bool, bool]:
        return self.value, self.value

    def check(self, grid: Grid, key_grid: Grid) -> None:
        return None

    def reaches(self, grid: Grid, key_grid: Grid) -> Reaches | None:
        return {} if self.value else None

    def __repr__(self) -> str:
        return "full()" if self.value else "nothing()"


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    """The key is not after the query, lexicographically on the axes (all shared axes where none is named)."""

    axes: tuple[str, ...]
    strict: bool

    def _axes(self, grid: Grid, key_grid: Grid) -> list[str]:
        return [axis for axis in self.axes or grid.axes if axis in grid.axes and axis in key_grid.axes]

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        axes = self._axes(q.grid, k.grid)
        if not axes:  # an axis that only one grid has is unconstrained: no order to keep
            return torch.ones(joint_shape(q.place, k.place), dtype=torch.bool, device=q.place.device)
        before = after = torch.zeros((), dtype=torch.bool, device=q.place.device)
        for axis in axes:
            tie = ~before & ~after
            before, after = (
                before | (tie & (k.axes[axis] < q.axes[axis])),
                after | (tie & (k.axes[axis] > q.axes[axis])),
            )
        seen = before if self.strict else ~after
        return seen.expand(joint_shape(seen, q.place, k.place))

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        # The lexicographic extremes of a box are its corners, and alignment keeps the order of places.
        earliest, latest = (
            {axis: align(corner[axis], q.grid.sizes[axis], k.grid.sizes[axis]) for axis in self._axes(q.grid, k.grid)}
            for corner in (q.lo, q.hi)
        )
        return self._precedes(k.lo, latest, len(q)), self._precedes(k.hi, earliest, len(q))

    def _precedes(self, key: dict[str, Tensor], query: dict[str, Tensor], count: int) -> Bool[Tensor, "p"]:
        out = torch.full((count,), not self.strict or not query)
        for axis in reversed(query):
            out = (key[axis] < query[axis]) | ((key[axis] == query[axis]) & out)
        return out

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        keys = []
        for axis in self._axes(q.grid, k.grid):
            if q.grid.sizes[axis] == k.grid.sizes[axis]:
                keys.append(k.lo[axis] - q.lo[axis])
            else:
                keys.extend((k.lo[axis], q.lo[axis]))
        return identify(*keys) if keys else torch.zeros(len(q), dtype=torch.int64)

    def prefix_sees(self) -> tuple[bool, bool]:
        return True, False

    def check(self, grid: Grid, key_grid: Grid) -> None:
        require_axes(repr(self), self.axes, grid, key_grid)

    def reaches(self, grid: Grid, key_grid: Grid) -> Reaches | None:
        axes = self._axes(grid, key_grid)
        if len(axes) != 1:
            return None
        n_query, n_key = grid.sizes[axes[0]], key_grid.sizes[axes[0]]
        x = align(torch.arange(n_query), n_query, n_key)
        return {axes[0]: [Reach(torch.zeros_like(x), x - 1 if self.strict else x, 1)]}

    def __repr__(self) -> str:
        return f"causal({', '.join([*map(repr, self.axes), *(['strict=True'] if self.strict else [])])})"


@dataclass(frozen=True, repr=False)
class Sinks(Pattern):
    """The key is one of the first n tokens after the prefix."""

    n: int

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        return (k.place < self.n).expand(joint_shape(q.place, k.place))

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        return k.place(k.lo) < self.n, k.place(k.hi) < self.n

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        return k.place(k.lo)

    def prefix_sees(self) -> tuple[bool, bool]:
        return True, True

    def check(self, grid: Grid, key_grid: Grid) -> None:
        return None

    def __repr__(self) -> str:
        return f"sinks({self.n})"


def full() -> Pattern:
    """Every query sees every key."""
    return Constant(True)


def nothing() -> Pattern:
    """No query sees any key, not even of the prefix: the zero of `|`, equal to `~full()`."""
    return Constant(False)


def causal(*axes: str, strict: bool = False) -> Pattern:
    """The key is not after the query (strict: is before it).

    Without axes: in token order. With axes: lexicographically on these. Prefix tokens come before everything:
    all see them, and they see each other but nothing after them.
    """
    if any(not isinstance(axis, str) for axis in axes):
        raise ChronotopeError(f"causal{axes!r}: expected names of axes, such as causal('t').")
    require_once("causal", axes)
    return Causal(tuple(axes), bool(strict))


def sinks(n: int) -> Pattern:
    """The key is one of the first n tokens after the prefix."""
    require_positive(f"sinks({n!r})", "number of tokens", n)
    return Sinks(n)
