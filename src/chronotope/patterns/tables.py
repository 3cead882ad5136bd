"""Patterns that are given as data: segments, graph, predicate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import Boxes, chunks, identify
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid, align, joint_shape
from chronotope.patterns.base import Pattern, Verdict
from chronotope.patterns.separable import require_axes, require_positive

PAIRS_AT_ONCE = 1 << 22
EXACT_BELOW = 1 << 16


@dataclass(frozen=True, repr=False)
class Segments(Pattern):
    """Same id."""

    data: bytes
    ids: Int64[Tensor, "n"] = field(compare=False, hash=False)

    def check(self, grid: Grid, key_grid: Grid) -> None:
        for g in (grid, key_grid):
            if len(self.ids) != g.places:
                raise ChronotopeError(
                    f"segments: {len(self.ids)} ids for {g!r}, which has {g.places} tokens without its prefix; "
                    "give one id for each of them."
                )

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        ids = self.ids.to(q.place.device)
        return ids[q.place] == ids[k.place]

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        a, b = self._present(q), self._present(k)
        some = torch.empty(len(q), dtype=torch.bool)
        for part in chunks(len(q), a[0].shape[1], PAIRS_AT_ONCE):
            some[part] = (a[0][a[1][part]] & b[0][b[1][part]]).any(1)
        every = (a[2] == a[3])[a[1]] & (b[2] == b[3])[b[1]] & (a[2][a[1]] == b[2][b[1]])
        return some, every

    def _present(self, boxes: Boxes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the distinct boxes: which ids they hold (bits), their number per row, smallest and largest id."""
        index = identify(boxes.place(boxes.lo), boxes.place(boxes.hi))
        member = torch.zeros(int(index.max()) + 1, dtype=torch.int64).scatter_(0, index, torch.arange(len(index)))
        tokens, _ = boxes[member].tokens()  # padded by repeating a token of the box, which changes nothing here
        ids = self.ids[tokens.place]
        bits = torch.zeros(len(ids), int(self.ids.max()) // 8 + 1, dtype=torch.uint8)
        for bit in range(8):
            row, column = (ids % 8 == bit).nonzero(as_tuple=True)
            bits[row, ids[row, column] // 8] |= 1 << bit
        return bits, index, ids.min(1).values, ids.max(1).values

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        return identify(q.place(q.lo), k.place(k.lo))

    def prefix_sees(self) -> tuple[bool, bool]:
        return True, True

    def __repr__(self) -> str:
        runs = [(value, len(list(run))) for value, run in groupby(self.ids.tolist())]
        if 2 * len(runs) < len(self.ids):
            return f"segments({' + '.join(f'[{value}] * {count}' for value, count in runs)})"
        return f"segments({self.ids.tolist()})"


@dataclass(frozen=True, repr=False)
class Graph(Pattern):
    """On one axis the key is the query, or within `hops` along directed edges key -> query."""

    edges: tuple[tuple[int, int], ...]
    axis: str
    hops: int

    def check(self, grid: Grid, key_grid: Grid) -> None:
        require_axes(f"graph(axis={self.axis!r})", (self.axis,), grid, key_grid)
        if self.axis in key_grid.axes:
            size = key_grid.sizes[self.axis]
            outside = [edge for edge in self.edges if not 0 <= min(edge) <= max(edge) < size]
            if outside:
                raise ChronotopeError(
                    f"graph: edge {outside[0][0]} -> {outside[0][1]} is outside the axis {self.axis}={size}; "
                    f"expected nodes 0 to {size - 1}."
                )

    def _shared(self, grid: Grid, key_grid: Grid) -> bool:
        return self.axis in grid.axes and self.axis in key_grid.axes

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        if not self._shared(q.grid, k.grid):
            return torch.ones(joint_shape(q.place, k.place), dtype=torch.bool, device=q.place.device)
        table = _within(self, k.grid.sizes[self.axis]).to(q.place.device)
        return table[q.axes[self.axis], k.axes[self.axis]]

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        if not self._shared(q.grid, k.grid):
            return torch.ones(len(q), dtype=torch.bool), torch.ones(len(q), dtype=torch.bool)
        total = _sums(self, q.grid.sizes[self.axis], k.grid.sizes[self.axis])
        a, b, c, d = q.lo[self.axis], q.hi[self.axis] + 1, k.lo[self.axis], k.hi[self.axis] + 1
        count = total[b, d] - total[a, d] - total[b, c] + total[a, c]
        return count > 0, count == (b - a) * (d - c)

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        if not self._shared(q.grid, k.grid):
            return torch.zeros(len(q), dtype=torch.int64)
        return identify(q.lo[self.axis], k.lo[self.axis])

    def prefix_sees(self) -> tuple[bool, bool]:
        return True, True

    def __repr__(self) -> str:
        ends = [[edge[0] for edge in self.edges], [edge[1] for edge in self.edges]]
        return f"graph({ends}, axis={self.axis!r}{f', hops={self.hops}' if self.hops > 1 else ''})"


@lru_cache(maxsize=16)
def _within(graph: Graph, size: int) -> Bool[Tensor, "v v"]:
    """[query, key]: whether the key reaches the query in at most `hops` steps."""
    step = torch.eye(size, dtype=torch.float32)
    for source, target in graph.edges:
        step[target, source] = 1
    reached = torch.eye(size, dtype=torch.float32)
    for _ in range(min(graph.hops, size)):
        reached = ((step @ reached) > 0).float()
    return reached > 0


@lru_cache(maxsize=8)
def _sums(graph: Graph, n_query: int, n_key: int) -> Int64[Tensor, "query_and_one key_and_one"]:
    """Number of visible pairs before each (query, key): four of these give the number in a box."""
    table = _within(graph, n_key)[align(torch.arange(n_query), n_query, n_key)]
    total = torch.zeros(n_query + 1, n_key + 1, dtype=torch.int64)
    total[1:, 1:] = table.long().cumsum(0).cumsum(1)
    return total


@dataclass(frozen=True, repr=False)
class Predicate(Pattern):
    """What a function of coordinates says."""

    fn: Callable[[Coords, Coords], Tensor]

    costly = True

    def check(self, grid: Grid, key_grid: Grid) -> None:
        one = torch.zeros(1, 1, dtype=torch.int64)
        self._sees(Coords.of(grid, one + grid.prefix), Coords.of(key_grid, one + key_grid.prefix))

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        answer = self.fn(q, k)
        if not isinstance(answer, Tensor) or answer.dtype != torch.bool:
            kind = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
            raise ChronotopeError(f"{self!r} returned {kind}; expected a bool tensor, such as q.t >= k.t.")
        return answer.expand(joint_shape(answer, q.place, k.place))

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        """By looking at every pair of small boxes; a pair of large boxes is left undecided, which is safe."""
        some = torch.ones(len(q), dtype=torch.bool)
        every = torch.zeros(len(q), dtype=torch.bool)
        small = (q.volume() * k.volume() <= EXACT_BELOW).nonzero()[:, 0]
        if len(small):
            each = int((q.volume() * k.volume())[small].max())
            for part in chunks(len(small), each, PAIRS_AT_ONCE):
                rows = small[part]
                (x, real_x), (y, real_y) = q[rows].tokens(), k[rows].tokens()
                count, width, depth = len(rows), x.place.shape[1], y.place.shape[1]
                x, y = x.view(count, width, 1).aligned(k.grid), y.view(count, 1, depth)
                real = real_x[:, :, None] & real_y[:, None, :]
                seen = self._sees(x, y)
                some[rows] = (seen & real).flatten(1).any(1)
                every[rows] = (seen | ~real).flatten(1).all(1)
        return some, every

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        return identify(q.place(q.lo), k.place(k.lo))

    def prefix_sees(self) -> tuple[bool, bool]:
        return True, True

    def __repr__(self) -> str:
        return f"predicate({getattr(self.fn, '__qualname__', repr(self.fn))})"


def segments(ids: Tensor | Sequence[int]) -> Pattern:
    """A query sees the keys of the same id. `ids`: int, one for each token without the prefix, in token order."""
    values = _whole_numbers("segments", "[tokens]", ids)
    if values.ndim != 1 or values.is_floating_point() or values.is_complex() or values.numel() == 0:
        raise ChronotopeError(
            f"segments: expected whole numbers of shape [tokens], got {values.dtype} {list(values.shape)}."
        )
    compact = torch.unique(values.long(), return_inverse=True)[1]
    # Ids count from 0 in order of value: what they are called does not matter, only who shares one.
    return Segments(np.ascontiguousarray(compact.numpy()).tobytes(), compact)


def graph(edges: Any, axis: str = "v", hops: int = 1) -> Pattern:
    """On `axis`, a query sees itself and the keys within `hops` along directed edges key -> query.

    `edges`: int [2, E], sources in row 0 and targets in row 1.
    """
    values = _whole_numbers("graph", "[2, E]", edges)
    if values.numel() == 0:
        values = values.reshape(2, 0).long()
    if values.ndim != 2 or values.shape[0] != 2 or values.is_floating_point():
        raise ChronotopeError(
            f"graph: expected edges as whole numbers [2, E], got {values.dtype} {list(values.shape)}."
        )
    require_positive(f"graph(hops={hops!r})", "number of hops", hops)
    return Graph(tuple(sorted({(int(a), int(b)) for a, b in values.T.tolist()})), axis, hops)


def _whole_numbers(word: str, shape: str, data: Any) -> Tensor:
    try:
        return torch.as_tensor(data).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ChronotopeError(f"{word}: expected whole numbers of shape {shape}, got {data!r} ({error}).") from None


def predicate(fn: Callable[[Any, Any], Tensor]) -> Pattern:
    """`fn(q, k) -> bool tensor`, of coordinates such as `q.t` and `k.h` that broadcast against each other.

    Slow to plan: every pair of a tile is looked at, some at a time. Where a primitive says the same, use it.
    """
    if not callable(fn):
        raise ChronotopeError(f"predicate({fn!r}): expected a function of (q, k), such as lambda q, k: q.t >= k.t.")
    return Predicate(fn)
