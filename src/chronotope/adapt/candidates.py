"""Patterns that are worth a try on a grid, from the narrowest window to whole axes."""

from __future__ import annotations

from itertools import product
from typing import Any

from chronotope.grid import Grid
from chronotope.patterns import Pattern, full, sinks, window

SINKS = 4


def candidates(grid: Grid) -> list[Pattern]:
    """Windows of 1, 3, 5, 9, 17, ... on the first axis and on the others, which share a size, and whole axes.

    On a sequence: windows that look 1/64 of it to each side, 1/45, 1/32, ... 1/2, together with its first tokens.

    Example:
        >>> candidates(Grid(n=256))[:3]
        [window(n=9) | sinks(4), window(n=13) | sinks(4), window(n=17) | sinks(4)]
    """
    first, *others = grid.axes
    if not others:
        length = grid.sizes[first]
        spans = dict.fromkeys(round(length / 2 ** (half / 2)) for half in range(12, 1, -1))
        return [_window({first: 2 * span + 1}) | sinks(SINKS) for span in spans if 1 < span < length - 1]
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
