"""What one route chose, by tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import Boxes
from chronotope.grid import Coords, Grid
from chronotope.patterns import Pattern
from chronotope.patterns.base import Verdict
from chronotope.planning.layout import Nest

BITS = 62
"""Blocks within a pair of tiles that are told apart by one number."""


@dataclass(frozen=True, eq=False, repr=False)
class Decided(Pattern):
    """What a route chose, of everything or, token by token, of some pairs of boxes."""

    seen: Bool[Tensor, "..."]

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        return self.seen

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        return self.seen.expand(len(q)), self.seen.expand(len(q))

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        return torch.zeros(len(q), dtype=torch.int64)

    def prefix_sees(self) -> tuple[bool, bool]:
        return True, True

    def check(self, grid: Grid, key_grid: Grid) -> None:
        return None


ALL, NONE = Decided(torch.tensor(True)), Decided(torch.tensor(False))


@dataclass(frozen=True, eq=False)
class Choice:
    """The pairs of blocks that a route chose, sorted by the pair of tiles in which they lie.

    `lit`: which blocks of queries chose something, and which of keys were chosen by somebody, in each slab.
    """

    q: Nest
    k: Nest
    pair: Int64[Tensor, "n"]
    within: Int64[Tensor, "n"]
    lit: tuple[Bool[Tensor, "slabs fine_q"], Bool[Tensor, "slabs fine_k"]]

    @classmethod
    def of(cls, chosen: Int64[Tensor, "n"], q: Nest, k: Nest, slabs: int) -> Choice:
        """From the numbers of (slab, query block, key block)."""
        col, rest = chosen % len(k.fine.sizes), chosen // len(k.fine.sizes)
        row, slab = rest % len(q.fine.sizes), rest // len(q.fine.sizes)
        pair = (slab * len(q.coarse.sizes) + q.parent[row]) * len(k.coarse.sizes) + k.parent[col]
        order = pair.argsort(stable=True)
        lit = [torch.zeros(slabs, len(nest.fine.sizes), dtype=torch.bool) for nest in (q, k)]
        lit[0][slab, row] = lit[1][slab, col] = torch.ones((), dtype=torch.bool)
        return cls(q, k, pair[order], (q.child[row] * k.most + k.child[col])[order], (lit[0], lit[1]))

    def share(self, pairs: Int64[Tensor, "p"]) -> tuple[Bool[Tensor, "p"], Bool[Tensor, "p"]]:
        """Of each pair of tiles: whether some of it was chosen, and whether all."""
        col, row = pairs % len(self.k.coarse.sizes), pairs // len(self.k.coarse.sizes) % len(self.q.coarse.sizes)
        found = torch.searchsorted(self.pair, pairs, right=True) - torch.searchsorted(self.pair, pairs)
        return found > 0, found == self.q.count[row] * self.k.count[col]

    def _of(self, pairs: Int64[Tensor, "p"]) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "n"]]:
        """The blocks chosen of some pairs: of which one each is, and its place within."""
        first, last = torch.searchsorted(self.pair, pairs), torch.searchsorted(self.pair, pairs, right=True)
        which = torch.arange(len(pairs)).repeat_interleave(last - first)
        at = first[which] + torch.arange(len(which)) - ((last - first).cumsum(0) - (last - first))[which]
        return which, self.within[at]

    def blocks(self, pairs: Int64[Tensor, "p"]) -> Int64[Tensor, "p"] | None:
        """What was chosen of each pair as the bits of a number; None: there are too many."""
        if self.q.most * self.k.most > BITS:
            return None
        which, within = self._of(pairs)
        return torch.zeros_like(pairs).index_add_(0, which, 1 << within)

    def seen(self, pairs: Int64[Tensor, "p"], q: Coords, k: Coords) -> Bool[Tensor, "p most_q most_k"]:
        """What was chosen of each pair, for the tokens of its tiles, [P, V] each."""
        which, within = self._of(pairs)
        blocks = torch.zeros(len(pairs), self.q.most * self.k.most, dtype=torch.bool)
        blocks[which, within] = torch.ones((), dtype=torch.bool)
        row, col = (
            nest.child[nest.fine.tile_of[coords.place + nest.fine.grid.prefix]]
            for nest, coords in ((self.q, q), (self.k, k))
        )
        return blocks.gather(1, (row[:, :, None] * self.k.most + col[:, None, :]).flatten(1)).view(
            *row.shape, col.shape[1]
        )
