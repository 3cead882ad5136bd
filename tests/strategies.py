"""Hypothesis strategies: grids, pairs of grids, expressions that fit them (as text), heads, tiles and boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy, composite

import chronotope as ct
from chronotope import patterns
from chronotope.boxes import Boxes
from chronotope.planning import Layout

AXES = ("t", "h", "w")
WORDS = {name: getattr(patterns, name) for name in patterns.__all__ if name[0].islower()}


def build(text: str) -> ct.Pattern:
    """The pattern that an expression makes, `predicate` included."""
    return eval(text, {"__builtins__": {}}, WORDS)


@composite
def grids(draw: DrawFn, most: int = 40, axes: tuple[str, ...] | None = None) -> ct.Grid:
    """Odd, non-square and size-1 axes, with up to 3 prefix tokens, at most `most` places."""
    names = draw(st.sampled_from([("t",), ("h", "w"), ("t", "h"), AXES, AXES])) if axes is None else axes
    sizes, room = {}, most
    for i, name in enumerate(names):
        sizes[name] = draw(
            st.integers(1, max(1, min(7 if len(names) > 1 else 24, room // 2 if i < len(names) - 1 else room)))
        )
        room //= sizes[name]
    return ct.Grid(prefix=draw(st.integers(0, 3)), **sizes)


@composite
def grid_pairs(draw: DrawFn, most: int = 40) -> tuple[ct.Grid, ct.Grid]:
    """A query grid and a key grid: the same, or other sizes, with an axis more or less, or axes in another order."""
    grid = draw(grids(most))
    kind = draw(st.sampled_from(["same", "same", "sizes", "axes", "order", "prefix"]))
    if kind == "sizes":
        return grid, draw(grids(most, grid.axes))
    if kind == "axes":
        other = draw(st.sampled_from([("t",), ("s", "t"), ("h",), ("w", "s"), ("s",), AXES]))
        return grid, draw(grids(most, other))
    if kind == "order":
        return grid, draw(grids(most, grid.axes[::-1]))
    return grid, ct.Grid(prefix=draw(st.integers(0, 3)), **grid.sizes) if kind == "prefix" else grid


@composite
def leaves(draw: DrawFn, grid: ct.Grid, key_grid: ct.Grid) -> str:
    """One primitive that fits the grids."""
    axes = list(dict.fromkeys(grid.axes + key_grid.axes))
    some = draw(st.lists(st.sampled_from(axes), min_size=1, max_size=len(axes), unique=True))
    words = [
        "full",
        "nothing",
        "along",
        "window",
        "window",
        "shift",
        "blocks",
        "causal",
        "strided",
        "sinks",
        "graph",
        "predicate",
    ]
    kind = draw(st.sampled_from(words + (["segments"] if grid.places == key_grid.places else [])))
    small = st.integers(1, 4)
    match kind:
        case "full" | "nothing":
            return f"{kind}()"
        case "along":
            return f"along({', '.join(map(repr, some))})"
        case "window":
            sizes = {a: draw(st.sampled_from([1, 3, 5, (0, 2), (3, 0), (1, 4)])) for a in some}
            dilation = draw(st.sampled_from([1, 1, 2, 3, {some[0]: 2}]))
            return f"window({_named(sizes)}, dilation={dilation})"
        case "shift":
            return _shifted(draw, some, grid, key_grid)
        case "blocks":
            shift = {a: draw(st.integers(-5, 5)) for a in some if draw(st.booleans())}
            return f"blocks({_named({a: draw(small) for a in some})}, shift={shift})"
        case "causal":
            named = [repr(a) for a in some] if draw(st.booleans()) else []
            return f"causal({', '.join([*named, f'strict={draw(st.booleans())}'])})"
        case "strided":
            return f"strided({_named({a: draw(small) for a in some})})"
        case "sinks":
            return f"sinks({draw(st.integers(1, 9))})"
        case "segments":
            return f"segments({draw(st.lists(st.integers(0, 9), min_size=grid.places, max_size=grid.places))})"
        case "graph":
            n = key_grid.sizes.get(some[0], 3)
            edges = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=6))
            ends = [[a for a, _ in edges], [b for _, b in edges]]
            return f"graph({ends}, axis={some[0]!r}, hops={draw(st.integers(1, 3))})"
        case _:
            return _predicate(draw, grid, key_grid)


def _shifted(draw: DrawFn, some: list[str], grid: ct.Grid, key_grid: ct.Grid) -> str:
    """Windows that move inside their axis, so they must fit it."""
    sizes: dict[str, Any] = {}
    steps: dict[str, int] = {}
    for axis in some:
        n = key_grid.sizes.get(axis, 9) if axis in grid.axes else 9
        steps[axis] = draw(st.integers(1, max(1, min(3, n))))
        room = n // steps[axis]
        before = draw(st.integers(0, min(2, (room - 1) // 2)))
        lopsided = draw(st.booleans()) and room >= before + 2
        sizes[axis] = (before, draw(st.integers(0, room - 1 - before))) if lopsided else 2 * before + 1
    return f"window({_named(sizes)}, dilation={steps}, edge='shift')"


def _predicate(draw: DrawFn, grid: ct.Grid, key_grid: ct.Grid) -> str:
    q, k = draw(st.sampled_from(grid.axes)), draw(st.sampled_from(key_grid.axes))
    body = draw(st.sampled_from(["q.{q} >= k.{k}", "(q.{q} + 2 * k.{k}) % 3 == 0", "q.{q} == 1", "k.{k} < 2"]))
    return f"predicate(lambda q, k: {body.format(q=q, k=k)})"


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def expressions(grid: ct.Grid, key_grid: ct.Grid, depth: int = 3) -> SearchStrategy[str]:
    """Trees of `& | ~` over primitives, up to this depth."""
    leaf = leaves(grid, key_grid)
    if depth == 0:
        return leaf
    below = expressions(grid, key_grid, depth - 1)
    pair = st.tuples(below, st.sampled_from("&|"), below).map(lambda e: f"({e[0]} {e[1]} {e[2]})")
    return st.one_of(leaf, below.map(lambda e: f"~({e})"), pair)


@dataclass(frozen=True)
class Case:
    """One random situation; `seed` decides what needs no shrinking (boxes, tiles, numbers)."""

    grid: ct.Grid
    key_grid: ct.Grid
    text: str
    heads: int
    seed: int

    @property
    def where(self) -> ct.Pattern:
        return build(self.text)

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


@composite
def cases(draw: DrawFn, most: int = 40, depth: int = 3, per_head: bool = True) -> Case:
    """Grids, an expression on them, heads; sometimes another expression for each head."""
    grid, key_grid = draw(grid_pairs(most))
    heads = draw(st.sampled_from([1, 2, 3, 4]))
    one = expressions(grid, key_grid, depth)
    text = draw(one)
    if per_head and draw(st.integers(0, 4)) == 0:
        each = [text, *(draw(one) for _ in range(heads - 1))]
        text = f"per_head([{', '.join(each)}])"
        if draw(st.booleans()):
            text = f"~{text}" if draw(st.booleans()) else f"{text} & ({draw(leaves(grid, key_grid))})"
    return Case(grid, key_grid, text, heads, draw(st.integers(0, 2**32 - 1)))


def random_tile(rng: np.random.Generator, grid: ct.Grid) -> dict[str, int]:
    """A tile of any size that fits the axes."""
    return {axis: int(rng.integers(1, n + 1)) for axis, n in grid.sizes.items()}


def random_layout(rng: np.random.Generator, grid: ct.Grid) -> Layout:
    """A grid cut in tiles of a random shape."""
    return Layout(grid, tuple(random_tile(rng, grid).values()))


def random_boxes(rng: np.random.Generator, grid: ct.Grid, count: int) -> Boxes:
    """Boxes with random corners, anywhere on the grid."""
    lo, hi = {}, {}
    for axis, n in grid.sizes.items():
        ends = np.sort(rng.integers(0, n, size=(2, count)), axis=0)
        lo[axis], hi[axis] = torch.from_numpy(ends[0].copy()), torch.from_numpy(ends[1].copy())
    return Boxes(grid, lo, hi)


def tokens_in(boxes: Boxes, index: int) -> np.ndarray:
    """The tokens, in token order, of one box (of the prefix where the box is marked so)."""
    grid = boxes.grid
    if boxes.prefix is not None and bool(boxes.prefix[index]):
        raise ValueError("a prefix box covers a part of the prefix: ask the layout")
    inside = np.ones(grid.shape, dtype=bool)
    for i, axis in enumerate(grid.axes):
        x = np.arange(grid.shape[i])
        on_axis = (x >= int(boxes.lo[axis][index])) & (x <= int(boxes.hi[axis][index]))
        inside &= on_axis.reshape([-1 if j == i else 1 for j in range(len(grid.shape))])
    return grid.prefix + np.flatnonzero(inside)
