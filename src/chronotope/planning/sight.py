"""What a route sees of a call before it chooses: blocks, who may look at whom, and what may influence a choice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from chronotope.boxes import Boxes, chunks
from chronotope.grid import Coords
from chronotope.patterns import Pattern, window
from chronotope.planning.arrow import arrow
from chronotope.planning.layout import Layout

PAIRS_AT_ONCE = 1 << 20
UNKNOWN = -1
LOWEST = -1e30
"""The score of a block of which nothing may be known: chosen after all others."""


@dataclass(frozen=True)
class Pool:
    """Sets of tokens that are summarised together: `token[i, j]`, where `real[i, j]`, belongs to set i."""

    token: Int64[Tensor, "sets most"]
    real: Bool[Tensor, "sets most"]

    @cached_property
    def count(self) -> Float[Tensor, "sets"]:
        """Tokens of each set."""
        return self.real.sum(1).float()

    def gather(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h sets most d"]:
        """The tokens of each set; zeros beyond its end."""
        sets, most = self.token.shape
        out = x.index_select(2, self.token.flatten().to(x.device)).unflatten(2, (sets, most))
        return out if bool(self.real.all()) else torch.where(self.real.to(x.device)[..., None], out, 0.0)

    def mean(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h sets d"]:
        """The mean of each set, in float32 at least; zeros of an empty one."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.gather(x).sum(3) / self.count.clamp(min=1).to(x)[:, None]


def join(pools: list[Pool]) -> Pool:
    """The sets of several pools."""
    most = max(pool.token.shape[1] for pool in pools)
    pad = [(0, most - pool.token.shape[1]) for pool in pools]
    tokens = [torch.nn.functional.pad(pool.token, p) for pool, p in zip(pools, pad, strict=True)]
    return Pool(
        torch.cat(tokens),
        torch.cat([torch.nn.functional.pad(pool.real, p) for pool, p in zip(pools, pad, strict=True)]),
    )


@dataclass(frozen=True)
class Sight:
    """The blocks of a route on one pair of grids, under `pattern`: what is seen where the route chooses everything.

    Blocks are numbered without those of the prefix. Where the pattern keeps an order, only what no query of a block
    has in its future stands for the block's queries, and for keys as this block may know them.
    """

    pattern: Pattern
    q: Layout
    k: Layout

    @property
    def counts(self) -> tuple[int, int]:
        """Number of blocks of queries, and of keys."""
        return len(self.q.sizes) - self.q.prefix_tiles, len(self.k.sizes) - self.k.prefix_tiles

    @cached_property
    def arrow(self) -> Pattern | None:
        """The order that the pattern keeps, as a pattern; None: it keeps none."""
        return arrow(self.pattern, self.q.grid, self.k.grid)

    @cached_property
    def visible(self) -> Bool[Tensor, "nq nk"]:
        """Pairs of blocks with something to see."""
        return self._over(self.pattern)[0]

    @cached_property
    def own(self) -> Bool[Tensor, "nq nk"]:
        """Pairs of blocks that hold one place of both, of those visible."""
        shared = [axis for axis in self.q.grid.axes if axis in self.k.grid.axes]
        ones: Any = dict.fromkeys(shared, 1)
        return self._over(window(**ones))[0] & self.visible if shared else torch.zeros_like(self.visible)

    @cached_property
    def queries(self) -> Pool:
        """The tokens that stand for each block of queries."""
        live = self.live[0]
        if self.arrow is None:
            return _pool(self.q, live)
        tile = torch.arange(self.counts[0]) + self.q.prefix_tiles
        token, real = _members(self.q, tile)
        known = self._known(self.arrow, self.q, tile, self.q, tile)
        return _compact(token, real & known & live[token])

    @cached_property
    def keys(self) -> Pool:
        """The tokens that stand for each block of keys, and after them those of blocks known in part."""
        live = self.live[1]
        whole = _pool(self.k, live)
        extra = self._part and self._part[0]
        return whole if extra is None else join([whole, extra])

    @property
    def column(self) -> Int32[Tensor, "nq nk"] | None:
        """Which set of `keys` a block of queries knows a block of keys by, or UNKNOWN; None: the block's own."""
        if self.arrow is None:
            return None
        return self._columns if self._part is None else self._part[1]

    @cached_property
    def _columns(self) -> Int32[Tensor, "nq nk"]:
        """`column` where no block is known in part."""
        column = torch.arange(self.counts[1], dtype=torch.int32).repeat(self.counts[0], 1)
        column[self._blank] = UNKNOWN
        return column

    @cached_property
    def _part(self) -> tuple[Pool | None, Int32[Tensor, "nq nk"]] | None:
        """Blocks that a block of queries may know in part, or not at all, and `column`; None: there are no such."""
        if self.arrow is None:
            return None
        known = self._over(self.arrow)[1]
        rows, cols = (self.visible & ~known & ~self.own).nonzero().T  # its own are kept whatever their score
        if not len(rows):
            return None
        tiles, column = (rows + self.q.prefix_tiles, cols + self.k.prefix_tiles), self._columns.clone()
        token, real = _members(self.k, tiles[1])
        known = real & self._known(self.arrow, self.q, tiles[0], self.k, tiles[1]) & self.live[1][token]
        found, inverse = torch.unique(torch.cat([cols[:, None], known.long()], 1), dim=0, return_inverse=True)
        some = found[:, 1:].any(1)
        number = torch.where(some, some.cumsum(0) - 1 + self.counts[1], UNKNOWN)
        column[rows, cols] = number[inverse].int()
        if not bool(some.any()):
            return None, column
        token, _ = _members(self.k, found[some, 0] + self.k.prefix_tiles)
        return _compact(token, found[some, 1:].bool()), column

    @cached_property
    def _blank(self) -> Bool[Tensor, "nq nk"]:
        """Own blocks that are not known whole: they are kept whatever is in them."""
        assert self.arrow is not None
        # A last block is not known because the first axis ends within it: a choice must not ask how long that is.
        return self.own & ~self._over(self.arrow, unended=True)[1]

    def _over(self, pattern: Pattern, unended: bool = False) -> tuple[Bool[Tensor, "nq nk"], Bool[Tensor, "nq nk"]]:
        """(some, all) of every pair of blocks; unended: as if the first axis of the keys went on."""
        rows, cols = self.counts
        some, every = torch.empty(rows, cols, dtype=torch.bool), torch.empty(rows, cols, dtype=torch.bool)
        k = self.k.boxes(torch.arange(cols) + self.k.prefix_tiles)
        if unended:
            axis = self.k.grid.axes[0]
            k = Boxes(k.grid, k.lo, {**k.hi, axis: k.lo[axis] + self.k.tile[0] - 1}, k.prefix)
        for part in chunks(rows, cols, PAIRS_AT_ONCE):
            own = torch.arange(part.start, part.stop).repeat_interleave(cols)
            other = torch.arange(cols).repeat(part.stop - part.start)
            verdict = pattern.over(self.q.boxes(own + self.q.prefix_tiles), k[other])
            some[part], every[part] = (x.view(-1, cols) for x in verdict)
        return some, every

    def _known(self, order: Pattern, q: Layout, rows: Tensor, k: Layout, cols: Tensor) -> Bool[Tensor, "p most"]:
        """Which tokens of the key block of each pair come after no query of its query block."""
        coords, real = k.boxes(cols).tokens()
        which = torch.arange(len(rows)).repeat_interleave(real.shape[1])
        return order.over(q.boxes(rows[which]), _points(coords))[1].view(real.shape)

    @cached_property
    def _last(self) -> Float[Tensor, "nk"]:
        """Scores of blocks of which nothing is known: the first of them before the others."""
        return LOWEST * (1 + 1e-6 * torch.arange(self.counts[1], dtype=torch.float64))

    @cached_property
    def live(self) -> tuple[Bool[Tensor, "n_query"], Bool[Tensor, "n_key"]]:
        """Queries that may see something, and keys that may be seen: no other may influence a choice."""
        return self._live(self.q, queries=True), self._live(self.k, queries=False)

    def _live(self, layout: Layout, queries: bool) -> Bool[Tensor, "n"]:
        n = layout.grid.size
        if self.pattern.costly:
            return torch.ones(n, dtype=torch.bool)
        every = torch.zeros(layout.grid.size - layout.grid.prefix, dtype=torch.int64)
        points = _points(Coords.of(layout.grid, torch.arange(layout.grid.prefix, n)))
        other = Boxes.whole((self.k if queries else self.q).grid)[every]
        some = self.pattern.over(*((points, other) if queries else (other, points)))[0]
        return torch.cat([torch.ones(layout.grid.prefix, dtype=torch.bool), some])

    def spread(self, scores: Float[Tensor, "b h rows sets"], rows: slice) -> Float[Tensor, "b h rows nk"]:
        """Scores of sets as scores of blocks: -inf where nothing is visible, LOWEST or less where nothing is known."""
        scores = scores.nan_to_num(LOWEST, torch.inf, LOWEST).clamp_(min=LOWEST)
        if self._part is not None:
            column = self._part[1][rows].long().to(scores.device)
            found = scores.gather(3, column.clamp(min=0).expand(*scores.shape[:3], -1))
            scores = torch.where(column == UNKNOWN, self._last.to(found), found)
        elif self.arrow is not None:
            scores = torch.where(self._blank[rows].to(scores.device), self._last.to(scores), scores)
        return scores.masked_fill_(~self.visible[rows].to(scores.device), -torch.inf)

    def pairs(self, chosen: Bool[Tensor, "b h rows nk"], first: int = 0) -> Int64[Tensor, "pairs"]:
        """What `Route.choose` returns, from a table of blocks whose first row is block `first` of queries."""
        batch, head, row, col = chosen.cpu().nonzero().T
        return self._numbers(batch * chosen.shape[1] + head, row + first, col)

    def listed(self, index: Int64[Tensor, "b h nq most"]) -> Int64[Tensor, "pairs"]:
        """What `Route.choose` returns, from the key blocks of each query block; -1: none. Repeats count once."""
        batch, head, row, at = (index >= 0).cpu().nonzero().T
        numbers = self._numbers(batch * index.shape[1] + head, row, index.cpu()[batch, head, row, at])
        return torch.unique(numbers)

    def _numbers(self, slab: Tensor, row: Tensor, col: Tensor) -> Tensor:
        row, col = row + self.q.prefix_tiles, col + self.k.prefix_tiles
        return (slab * len(self.q.sizes) + row) * len(self.k.sizes) + col


@lru_cache(maxsize=16)
def sight(pattern: Pattern, q: Layout, k: Layout) -> Sight:
    """Kept by value: nothing in it depends on numbers."""
    return Sight(pattern, q, k)


def _points(coords: Coords) -> Boxes:
    axes = {name: value.flatten() for name, value in coords.axes.items()}
    return Boxes(coords.grid, axes, axes)


def _members(layout: Layout, tiles: Int64[Tensor, "p"]) -> tuple[Int64[Tensor, "p most"], Bool[Tensor, "p most"]]:
    """The tokens of some tiles, in order, and which are real."""
    sizes = layout.sizes[tiles]
    within = torch.arange(int(sizes.max()) if len(sizes) else 0)
    position = (layout.start[tiles][:, None] + within).clamp(max=layout.grid.size - 1)
    return layout.order[position], within < sizes[:, None]


def _pool(layout: Layout, live: Bool[Tensor, "n"]) -> Pool:
    token, real = _members(layout, torch.arange(layout.prefix_tiles, len(layout.sizes)))
    return Pool(token, real) if bool(live.all()) else _compact(token, real & live[token])


def _compact(token: Int64[Tensor, "p most"], real: Bool[Tensor, "p most"]) -> Pool:
    """Real tokens first, and no more columns than are needed."""
    most = max(1, int(real.sum(1).max())) if len(real) else 1
    order = real.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return Pool(token.gather(1, order), real.gather(1, order))
