"""Which blocks a pass computes and what each runs over: blocks of one side, pieces of the other, by position."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from chronotope.boxes import Boxes, chunks
from chronotope.grid import Coords
from chronotope.kernels.triton.tables import kept, spread
from chronotope.planning import Order, Tiling
from chronotope.planning.lists import Rows

SMALLEST = 16  # what a product of tensor cores takes at least
LOOKED_AT = 1 << 20  # pairs of a block and a piece that are looked at together


class Lists(NamedTuple):
    """The work of one pass: a program computes a block of its own side over pieces of the other.

    `blocks` [n, 7]: first position, number of positions; of the pieces without a mask that all blocks of a tile share
    the first and their number; of its own pieces the first, the first with a mask, the end.
    `pieces` [m, 3]: first position, number of positions, and what makes the tile of a position an index of `kinds`.
    `height`, `width`: positions in a block and in a piece at most, powers of two. `kinds`: which element mask.
    """

    blocks: Int32[Tensor, "n 7"]
    pieces: Int32[Tensor, "m 3"]
    kinds: Int32[Tensor, "pairs"]
    height: tl.constexpr
    width: tl.constexpr


@kept
def lists(tiles: Tiling, by_query: bool, height: int, width: int, device: torch.device) -> Lists:
    """Blocks of at most `height` query positions with pieces of at most `width` key positions, or the other way."""
    own, other = (tiles.q, tiles.k) if by_query else (tiles.k, tiles.q)
    pairs = Pairs.of(tiles.by_query if by_query else tiles.by_key, own, other, len(tiles.kinds[0]))
    apart, joined = Runs(pairs, other), Runs(replace(pairs, masked=pairs.masked | pairs.placed), other)
    height = min(height, power(int(own.sizes.max())))
    width = min(width, power(int(joined.length.max()) if len(joined.length) else 0))
    # Where runs of full and of partial pairs make fewer pieces together than apart, full pairs get a mask as well.
    better = joined.count(width, len(own.sizes)) < apart.count(width, len(own.sizes))
    runs = Runs(replace(pairs, masked=pairs.masked | (pairs.placed & better[pairs.owner])), other)
    tile, index = spread((own.sizes + height - 1) // height)
    position = own.start[tile] + index * height
    spans = torch.stack([position, (own.start[tile + 1] - position).clamp(max=height)], 1)
    blocks, pieces = assign(tiles, by_query, tile, spans, *runs.pieces(width))
    blocks, pieces, kinds = (x.int().contiguous().to(device) for x in (blocks, pieces, runs.kind))
    return Lists(blocks, pieces, kinds, tl.constexpr(height), tl.constexpr(width))


def power(n: int) -> int:
    """The least power of two that holds n and that a kernel takes."""
    return max(SMALLEST, int(triton.next_power_of_2(n)))


@dataclass(frozen=True)
class Pairs:
    """Pairs of tiles: of the own side, of the other, the kind of the element mask, whether it is looked at, and whether
    all tokens have a place, so that it may be."""

    owner: Int64[Tensor, "p"]
    tile: Int64[Tensor, "p"]
    kind: Int64[Tensor, "p"]
    masked: Bool[Tensor, "p"]
    placed: Bool[Tensor, "p"]

    @classmethod
    def of(cls, rows: Rows, own: Order, other: Order, kinds: int) -> Pairs:
        """The pairs that `rows` lists; those that are full have the kind after all others."""
        owner, _ = spread(rows.start.long().diff())
        tile, partial = rows.tile.long(), rows.kind >= 0
        placed = (owner >= own.prefix_tiles) & (tile >= other.prefix_tiles)
        return cls(owner, tile, torch.where(partial, rows.kind.long(), kinds), partial, placed)


class Runs:
    """The listed tiles of each tile joined to runs of consecutive positions, those without a mask first."""

    def __init__(self, pairs: Pairs, other: Order):
        owner = 2 * pairs.owner + pairs.masked
        order = torch.argsort(owner, stable=True)
        owner, tile, self.kind = owner[order], pairs.tile[order], pairs.kind[order]
        begins = torch.ones(len(tile), dtype=torch.bool)
        begins[1:] = (owner[1:] != owner[:-1]) | (tile[1:] != tile[:-1] + 1)
        first = begins.nonzero()[:, 0]
        last = torch.cat([first[1:], torch.tensor([len(tile)])])[: len(first)] - 1
        self.owner, self.shift = owner[first], first - tile[first]
        self.position = other.start[tile[first]]
        self.length = other.start[tile[last] + 1] - self.position

    def count(self, width: int, tiles: int) -> Int64[Tensor, "tiles"]:
        """Pieces of each tile."""
        return torch.zeros(tiles, dtype=torch.int64).index_add_(0, self.owner // 2, (self.length + width - 1) // width)

    def pieces(self, width: int) -> tuple[Int64[Tensor, "m 3"], Int64[Tensor, "m"]]:
        """The runs cut to pieces of `width`: (position, count, shift), and twice the tile, plus 1 with a mask."""
        run, index = spread((self.length + width - 1) // width)
        count = (self.length[run] - index * width).clamp(max=width)
        return torch.stack([self.position[run] + index * width, count, self.shift[run]], 1), self.owner[run]


def assign(
    tiles: Tiling,
    by_query: bool,
    tile: Int64[Tensor, "n"],
    spans: Int64[Tensor, "n 2"],
    pieces: Int64[Tensor, "m 3"],
    owner: Int64[Tensor, "m"],
) -> tuple[Int64[Tensor, "n 7"], Int64[Tensor, "all 3"]]:
    """`Lists.blocks` and `Lists.pieces`: each block leaves out the pieces with a mask of which it sees nothing, and the
    mask where it sees all."""
    masked = owner % 2 == 1
    shared, rest = pieces[~masked], pieces[masked]
    ends = [torch.searchsorted(owner[~masked] // 2, tile, right=right) for right in (False, True)]
    start, end = (torch.searchsorted(owner[masked] // 2, tile, right=right) for right in (False, True))
    block, index = spread(end - start)
    piece = start[block] + index
    some, every = _verdicts(tiles, by_query, spans[block], rest[piece, :2])
    key = (2 * block + ~every)[some]
    order = torch.argsort(key, stable=True)
    number, own = torch.arange(len(tile)), rest[piece[some][order]]
    limits = [len(shared) + torch.searchsorted(key[order], 2 * number + i) for i in range(3)]
    return torch.cat([spans, torch.stack([ends[0], ends[1] - ends[0], *limits], 1)], 1), torch.cat([shared, own])


def _verdicts(
    tiles: Tiling, by_query: bool, blocks: Int64[Tensor, "p 2"], pieces: Int64[Tensor, "p 2"]
) -> tuple[Bool[Tensor, "p"], Bool[Tensor, "p"]]:
    """(some, all) as `Pattern.over` says it of the boxes around spans of positions."""
    if tiles.pattern is None:  # only the masks know
        return torch.ones(len(blocks), dtype=torch.bool), torch.zeros(len(blocks), dtype=torch.bool)
    queries, keys = (blocks, pieces) if by_query else (pieces, blocks)
    (q, of_q), (k, of_k) = _boxes(tiles.q, queries), _boxes(tiles.k, keys)
    found = [torch.ones(2, 0, dtype=torch.bool)]
    for part in chunks(len(blocks), 1, LOOKED_AT):
        found.append(torch.stack(tiles.pattern.over(q[of_q[part]], k[of_k[part]])))
    some, every = torch.cat(found, 1)
    return some, every


def _boxes(layout: Order, spans: Int64[Tensor, "p 2"]) -> tuple[Boxes, Int64[Tensor, "p"]]:
    """The boxes around distinct spans (position, count), and which is that of each."""
    distinct, index = torch.unique(spans, dim=0, return_inverse=True)
    member, offset = spread(distinct[:, 1])
    places = Coords.of(layout.grid, layout.order[distinct[member, 0] + offset]).axes
    blank = torch.zeros(len(distinct), dtype=torch.int64)
    lo, hi = (
        {axis: blank.scatter_reduce(0, member, x, how, include_self=False) for axis, x in places.items()}
        for how in ("amin", "amax")
    )
    return Boxes(layout.grid, lo, hi), index
