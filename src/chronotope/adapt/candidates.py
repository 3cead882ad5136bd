"""Patterns that are worth a try on a grid, from the narrowest window to whole axes."""

from __future__ import annotations

from itertools import product
from typing import Any

from chronotope.grid import Grid
from chronotope.patterns import Pattern, full, sinks, window

SINKS = 4


def candidates(grid: Grid) -> list[Pattern]:
    """Windows of 1, 3, 5, 9, 17, ... on the first axis and on the others, which share a size, and whole axes.

    On a sequence: windows of 1/64, 1/32, ... of it, together with its first tokens.

    Example:
        >>> candidates(Grid(n=256))[:2]
        [window(n=9) | sinks(4), window(n=17) | sinks(4)]
    """
    first, *others = grid.axes
    if not others:
        length = grid.sizes[first]
        spans = [length >> shift for shift in range(6, 0, -1) if length >> shift > 1]
        return [_window({first: 2 * span + 1}) | sinks(SINKS) for span in spans]
    longest = max(grid.sizes[axis] for axis in others)
    out: list[Pattern] = []
    for own, shared in product(_sizes(grid.sizes[first]), _sizes(longest)):
        if (own, shared) == (None, None):
            continue
        sizes = {} if own is None else {first: own}
        sizes |= {} if shared is None else dict.fromkeys(others, shared)
        out.append(_window(sizes))
    return [one for one in out if one != full()]


def _window(sizes: dict[str, Any]) -> Pattern:
    return window(**sizes)


def _sizes(length: int) -> list[int | None]:
    """1, 3, 5, 9, ... as long as they leave something out; None: everything."""
    out: list[int | None] = [1]
    radius = 1
    while radius < length - 1:
        out.append(2 * radius + 1)
        radius *= 2
    return [*out, None]
