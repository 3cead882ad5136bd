"""The order that a pattern keeps: which tokens are the future of which."""

from __future__ import annotations

from functools import lru_cache

import torch

from chronotope.boxes import Boxes
from chronotope.grid import Grid, align
from chronotope.patterns import And, Or, Pattern, causal
from chronotope.patterns.order import Causal

Axes = tuple[str, ...]


@lru_cache(maxsize=256)
def arrow(pattern: Pattern, grid: Grid, key_grid: Grid) -> Pattern | None:
    """The causal patterns that a pattern implies, joined; None: it looks ahead on every axis.

    Found where a causal pattern must hold for anything to be seen, and where no slice of an axis sees a later one
    (one-sided windows). An order that only a predicate knows of is not found: join it with `causal` too.
    """
    axes = dict.fromkeys(_required(pattern))
    if not pattern.costly:
        shared = (axis for axis in grid.axes if axis in key_grid.axes)
        axes |= dict.fromkeys((axis,) for axis in shared if _looks_back(pattern, grid, key_grid, axis))
    orders = [causal(*some) for some in axes]
    return And(tuple(orders)) if len(orders) > 1 else orders[0] if orders else None


def _required(pattern: Pattern) -> set[Axes]:
    """The axes of causal patterns without which nothing is seen."""
    if isinstance(pattern, Causal):
        return {pattern.axes}
    if isinstance(pattern, And):
        return set().union(*map(_required, pattern.parts))
    if isinstance(pattern, Or):
        return set.intersection(*map(_required, pattern.parts))
    return set()


def _looks_back(pattern: Pattern, grid: Grid, key_grid: Grid, axis: str) -> bool:
    """Whether no slice of the axis sees a later one."""
    count, length = grid.sizes[axis], key_grid.sizes[axis]
    if length == 1:
        return False
    slices = torch.arange(count)
    later = align(slices, count, length) + 1
    slices, later = slices[later < length], later[later < length]
    if not len(slices):  # nothing is later than any query, so nothing is looked back at either
        return False
    q = Boxes.slices(grid, axis, slices, slices)
    k = Boxes.slices(key_grid, axis, later, torch.full_like(later, length - 1))
    return not bool(pattern.over(q, k)[0].any())
