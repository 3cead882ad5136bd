"""A second, slow interpreter of pattern expressions: what the design's table says, pair by pair, in plain Python.

Nothing here imports the patterns under test. An expression is text, or a pattern whose `repr` is its text; the words in
it are evaluated as the functions of this file, and a `Relation` answers for two grids with a dense numpy mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Token:
    """A token of a grid; `at` is None for a prefix token."""

    at: dict[str, int] | None
    place: int


@dataclass(frozen=True)
class Pair:
    """Two tokens with places. `q` and `k`: coordinates on the axes that both grids have, q's moved onto k's axis."""

    q: dict[str, int]
    k: dict[str, int]
    query: Token
    key: Token
    sizes: dict[str, int]


def tokens(grid: Any) -> list[Token]:
    """All tokens of a grid: the prefix, then the places in row-major order."""
    ranges = [range(n) for n in grid.shape]
    places = [Token(dict(zip(grid.axes, at, strict=True)), i) for i, at in enumerate(itertools.product(*ranges))]
    return [Token(None, -1)] * grid.prefix + places


def centre(x: int, n_query: int, n_key: int) -> int:
    """The key place at the centre of query place x."""
    return math.floor((x + Fraction(1, 2)) * n_key / n_query)


class Relation:
    """What an expression means: `mask(grid, key_grid)`, bool [Nq, Nk], or [H, Nq, Nk] where heads differ."""

    def __init__(self, mask: Callable[[Any, Any], np.ndarray]):
        self.mask = mask

    def __and__(self, other: Relation) -> Relation:
        return Relation(lambda g, h: self.mask(g, h) & other.mask(g, h))

    def __or__(self, other: Relation) -> Relation:
        return Relation(lambda g, h: self.mask(g, h) | other.mask(g, h))

    def __invert__(self) -> Relation:
        return Relation(lambda g, h: ~self.mask(g, h))


def relation(sees: Callable[[Pair], bool], of_prefix: bool = True, by_prefix: bool = True) -> Relation:
    """A relation from a rule for places; prefix keys are seen by all, prefix queries see all, unless said otherwise."""

    def mask(grid: Any, key_grid: Any) -> np.ndarray:
        shared = [axis for axis in grid.axes if axis in key_grid.axes]
        sizes = dict(zip(key_grid.axes, key_grid.shape, strict=True))
        own = dict(zip(grid.axes, grid.shape, strict=True))
        out = np.zeros((grid.size, key_grid.size), dtype=bool)
        for (i, query), (j, key) in itertools.product(enumerate(tokens(grid)), enumerate(tokens(key_grid))):
            if key.at is None:
                out[i, j] = of_prefix
            elif query.at is None:
                out[i, j] = by_prefix
            else:
                q = {a: centre(query.at[a], own[a], sizes[a]) for a in shared}
                out[i, j] = sees(Pair(q, {a: key.at[a] for a in shared}, query, key, sizes))
        return out

    return Relation(mask)


def full() -> Relation:
    return relation(lambda p: True)


def nothing() -> Relation:
    return relation(lambda p: False, of_prefix=False, by_prefix=False)


def along(*axes: str) -> Relation:
    return relation(lambda p: all(p.q[a] == p.k[a] for a in p.q if a not in axes))


def window(*, dilation: int | dict[str, int] = 1, edge: str = "clip", **sizes: int | tuple[int, int]) -> Relation:
    def one(axis: str, x: int, y: int, n: int) -> bool:
        size = sizes[axis]
        before, after = size if isinstance(size, tuple) else ((size - 1) // 2, (size - 1) // 2)
        step = dilation.get(axis, 1) if isinstance(dilation, dict) else dilation
        if edge == "clip":
            return (y - x) % step == 0 and -before * step <= y - x <= after * step
        row = [place for place in range(n) if (place - x) % step == 0]
        start = row.index(x) - before
        while start < 0:
            start += 1
        while start + before + after >= len(row):
            start -= 1
        return y in row[start : start + before + after + 1]

    return relation(lambda p: all(one(a, p.q[a], p.k[a], p.sizes[a]) for a in sizes if a in p.q))


def blocks(*, shift: dict[str, int] | None = None, **sizes: int) -> Relation:
    def block(axis: str, x: int) -> int:
        return math.floor(Fraction(x + (shift or {}).get(axis, 0), sizes[axis]))

    return relation(lambda p: all(block(a, p.q[a]) == block(a, p.k[a]) for a in sizes if a in p.q))


def causal(*axes: str, strict: bool = False) -> Relation:
    def sees(p: Pair) -> bool:
        compared = [a for a in (axes or p.q) if a in p.q]
        query, key = tuple(p.q[a] for a in compared), tuple(p.k[a] for a in compared)
        # An axis that only one grid has is unconstrained, so without a common axis there is no order to keep.
        return not compared or key < query or (key == query and not strict)

    return relation(sees, by_prefix=False)


def strided(**strides: int) -> Relation:
    return relation(lambda p: all((p.k[a] - p.q[a]) % strides[a] == 0 for a in strides if a in p.q))


def sinks(n: int) -> Relation:
    return relation(lambda p: p.key.place < n)


def segments(ids: list[int]) -> Relation:
    return relation(lambda p: ids[p.query.place] == ids[p.key.place])


def graph(edges: list[list[int]], axis: str = "v", hops: int = 1) -> Relation:
    def within(query: int, key: int) -> bool:
        reached = {key}
        for _ in range(hops):
            reached |= {target for source, target in zip(*edges, strict=True) if source in reached}
        return query in reached

    return relation(lambda p: axis not in p.q or within(p.q[axis], p.k[axis]))


def predicate(fn: Callable[[Any, Any], bool]) -> Relation:
    def sees(p: Pair) -> bool:
        assert p.query.at is not None and p.key.at is not None
        return bool(fn(SimpleNamespace(**(p.query.at | p.q)), SimpleNamespace(**p.key.at)))

    return relation(sees)


def per_head(relations: list[Relation]) -> Relation:
    return Relation(lambda g, h: np.stack([one.mask(g, h) for one in relations]))


WORDS = {
    word.__name__: word
    for word in (full, nothing, along, window, blocks, causal, strided, sinks, segments, graph, predicate, per_head)
}


def mask(expression: Any, grid: Any, key_grid: Any = None) -> np.ndarray:
    """The mask of an expression (text, or a pattern by its repr) on a grid, or from a grid to a key grid."""
    found = eval(str(expression), {"__builtins__": {}}, WORDS)
    return found.mask(grid, grid if key_grid is None else key_grid)
