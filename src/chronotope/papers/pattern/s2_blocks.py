"""Patterns of blocks on one axis, block of x = floor(x / block): a band, a strided shard, and a table per head."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import Boxes, identify
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid, align
from chronotope.patterns import Pattern, per_head
from chronotope.patterns.base import Verdict
from chronotope.patterns.reach import Reach
from chronotope.patterns.separable import Separable, conjunction, require_axes
from chronotope.planning.parse import word


@dataclass(frozen=True, repr=False)
class Band(Separable):
    """-before <= key block - query block <= after."""

    axis: str
    block: int
    before: int
    after: int

    def constrained(self, grid: Grid, key_grid: Grid) -> tuple[str, ...]:
        return (self.axis,) if self.axis in grid.axes and self.axis in key_grid.axes else ()

    def check(self, grid: Grid, key_grid: Grid) -> None:
        require_axes(repr(self), (self.axis,), grid, key_grid)

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        seen = {}
        for axis in self.constrained(q.grid, k.grid):
            delta = k.axes[axis] // self.block - q.axes[axis] // self.block
            seen[axis] = (-self.before <= delta) & (delta <= self.after)
        return conjunction(q, k, seen)

    def reach(self, axis: str, n_query: int, n_key: int) -> Reach:
        x = align(torch.arange(n_query), n_query, n_key) // self.block
        first, last = (x - self.before) * self.block, (x + self.after + 1) * self.block - 1
        return Reach(first.clamp(min=0), last.clamp(max=n_key - 1), 1)

    def horizon(self, axis: str) -> int | None:
        return (self.before + 1) * self.block - 1 if axis == self.axis else None

    def __repr__(self) -> str:
        return f"band({self.axis!r}, {self.block}, {self.before}, {self.after})"


@dataclass(frozen=True, repr=False)
class Shard(Pattern):
    """(key block + turn) mod stride = 0, whoever asks."""

    axis: str
    block: int
    stride: int
    turn: int

    def check(self, grid: Grid, key_grid: Grid) -> None:
        key_grid.require((self.axis,), repr(self))

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        seen = (k.axes[self.axis] // self.block + self.turn) % self.stride == 0
        return seen.expand(torch.broadcast_shapes(q.place.shape, k.place.shape))

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        first, last = k.lo[self.axis] // self.block, k.hi[self.axis] // self.block
        found = first + (-first - self.turn) % self.stride
        some = found <= last
        # Two neighbouring blocks are both of the shard only where every block is.
        return some, some & ((first == last) | torch.tensor(self.stride == 1))

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        return k.lo[self.axis] % (self.block * self.stride)

    def prefix_sees(self) -> tuple[bool, bool]:
        return True, True

    def __repr__(self) -> str:
        return f"shard({self.axis!r}, {self.block}, {self.stride}, {self.turn})"


@word
def band(axis: str, block: int, before: int, after: int) -> Pattern:
    """Key blocks from `before` blocks before the query's block to `after` blocks after it."""
    return Band(axis, block, before, after)


@word
def shard(axis: str, block: int, stride: int, turn: int) -> Pattern:
    """Key blocks j with (j + turn) mod stride = 0, whoever asks."""
    return Shard(axis, block, stride, turn)


@dataclass(frozen=True, repr=False)
class Table(Pattern):
    """table[query block, key block]."""

    axis: str
    block: int
    data: bytes
    table: Bool[Tensor, "nb nb"] = field(compare=False, hash=False)

    def check(self, grid: Grid, key_grid: Grid) -> None:
        for g in (grid, key_grid):
            g.require((self.axis,), repr(self))
            count = -(-g.sizes[self.axis] // self.block)
            if count > len(self.table):
                raise ChronotopeError(
                    f"{self!r} holds {len(self.table)} blocks of {self.block}, but {g!r} has {count} on {self.axis!r}; "
                    "give a table of at least as many."
                )

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        return self.table.to(q.place.device)[q.axes[self.axis] // self.block, k.axes[self.axis] // self.block]

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        n_query, n_key = q.grid.sizes[self.axis], k.grid.sizes[self.axis]
        a, b = (align(x[self.axis], n_query, n_key) // self.block for x in (q.lo, q.hi))
        c, d = (x[self.axis] // self.block for x in (k.lo, k.hi))
        # On a coarse query axis whole blocks may be skipped: rows are those of the query places, not of the blocks.
        rows = align(torch.arange(n_query), n_query, n_key) // self.block
        a, b = torch.searchsorted(rows.unique(), a), torch.searchsorted(rows.unique(), b) + 1
        total = torch.nn.functional.pad(self.table[rows.unique()].long().cumsum(0).cumsum(1), (1, 0, 1, 0))
        count = total[b, d + 1] - total[a, d + 1] - total[b, c] + total[a, c]
        return count > 0, count == (b - a) * (d + 1 - c)

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        return identify(q.lo[self.axis], k.lo[self.axis])

    def prefix_sees(self) -> tuple[bool, bool]:
        return True, True

    def __repr__(self) -> str:
        return f"Table({self.axis!r}, {self.block}, {len(self.table)} x {len(self.table)} blocks)"


def block_tables(tables: Bool[Tensor, "h nb nb"], *, axis: str = "n", block: int = 64) -> Pattern:
    """Head i sees key block j from query block r where tables[i, r, j]; to be joined with `ct.causal`.

    Raises ChronotopeError where some head drops a block and asks for it again later: see `cache_friendly`.
    """
    if not bool(cache_friendly(tables).all()):
        heads = (~cache_friendly(tables)).nonzero()[:, 0].tolist()
        raise ChronotopeError(
            f"block_tables: heads {heads} see a block again after not seeing it, so no cache can drop it."
        )
    return per_head([Table(axis, block, np.packbits(t.cpu().numpy()).tobytes(), t.cpu()) for t in tables])


def cache_friendly(tables: Bool[Tensor, "h nb nb"]) -> Bool[Tensor, "h"]:
    """Whether a key block of the past that a head does not see is never seen by it later."""
    returns = tables[:, 1:] & ~tables[:, :-1]
    past = torch.ones_like(tables[0]).tril(-1)[1:] & torch.ones_like(tables[0]).tril()[:-1]
    return ~(returns & past).flatten(1).any(1)
