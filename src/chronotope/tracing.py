"""What `ct.attention` does where torch.compile or torch.export traces it.

A call's plan is made once, while tracing, and the graph holds its name. What the compiler reads of grids, patterns and
numbers on the way it guards by value: an equal grid or pattern made anew is no reason to compile again, and both may
be made inside what is traced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from chronotope.attention import Heads, calls
from chronotope.bias import Bias
from chronotope.grid import Grid
from chronotope.held import Held
from chronotope.kernels import named
from chronotope.patterns import Pattern
from chronotope.planning import Layout, Part, Plan, Tiles


def named_calls(*request: Any) -> list[tuple[Heads, str]]:
    """`attention.calls` with the names of the calls in their place."""
    return _named(_plain(request), torch.compiler.is_exporting())


@torch.compiler.disable
def outside(function: Callable[..., Any], *arguments: Any) -> Any:
    """What cannot be traced, since it depends on numbers: the graph ends before it and goes on after it."""
    return function(*arguments)


def _plain(x: Any) -> Any:
    """A value in terms of what a compiler takes for a constant: text, numbers, classes, `Held`, and tuples of these.

    A tuple that begins with a class stands for an object, which `_real` makes. This function itself is traced.
    """
    if isinstance(x, tuple):
        return tuple([_plain(y) for y in x])
    if isinstance(x, Bias) or (isinstance(x, Pattern) and x.held is not None):
        return x.held
    if isinstance(x, Pattern):
        # Made inside: there is no object yet, only its fields, which a dataclass names in order.
        return (type(x), *[_plain(getattr(x, name)) for name in type(x).__match_args__])  # type: ignore[attr-defined]
    if isinstance(x, Grid):
        return (Grid, x.axes, _plain(x.shape), _plain(x.prefix))
    if isinstance(x, Plan):
        parts = [(_plain(p.heads), _plain(p.tiles.pattern), _plain((p.tiles.q.tile, p.tiles.k.tile))) for p in x.parts]
        return (Plan, _plain(x.where), _plain(x.grid), _plain(x.key_grid), _plain(x.heads), tuple(parts))
    return settled(x)


def settled(x: Any) -> Any:
    """A number that a compiler may have left open, as it is now: the graph is for this one only."""
    if isinstance(x, float):
        return float.fromhex(x.hex())
    return operator.index(x) if isinstance(x, int) and not isinstance(x, bool) else x


def _real(x: Any) -> Any:
    """The value behind `_plain`."""
    if isinstance(x, Held):
        return x.value
    if not isinstance(x, tuple):
        return x
    if not x or not isinstance(x[0], type):
        return tuple(map(_real, x))
    kind, *fields = map(_real, x)
    if kind is Grid:
        axes, shape, prefix = fields
        return Grid(prefix, **dict(zip(axes, shape, strict=True)))
    if kind is Plan:
        where, grid, key_grid, heads, parts = fields
        return Plan(where, grid, key_grid, heads, tuple(_part(grid, key_grid, *part) for part in parts))
    return kind(*fields)


def _part(grid: Grid, key_grid: Grid, heads: Heads, pattern: Pattern, tile: tuple[tuple[int, ...], ...]) -> Part:
    return Part(heads, Tiles(pattern, Layout(grid, tile[0]), Layout(key_grid, tile[1])), ())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _named(request: tuple[Any, ...], exported: bool) -> list[tuple[Heads, str]]:
    return _once(request, exported)


@cache
def _once(request: tuple[Any, ...], exported: bool) -> list[tuple[Heads, str]]:
    """Kept as long as the process, like the graphs that hold the names."""
    # A plan's tensors must be real, and no part of the graph: what traces this thread does not reach another.
    with ThreadPoolExecutor(1) as outside:
        found = outside.submit(lambda: calls(*_real(request))).result()
    return [(heads, named(call, forever=True, exported=exported)) for heads, call in found]
