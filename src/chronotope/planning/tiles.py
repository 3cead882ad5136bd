"""One pattern on one pair of layouts: the pairs of tiles to compute, and the element masks they share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import identify
from chronotope.grid import Coords
from chronotope.patterns import Pattern
from chronotope.planning.layout import Layout
from chronotope.planning.search import search
from chronotope.planning.tiling import Found, Tiling


@dataclass(frozen=True)
class Tiles(Tiling):
    """A plain pattern (of one head or of heads that are alike), cut in tiles."""

    pattern: Pattern
    q: Layout
    k: Layout

    @cached_property
    def found(self) -> Found:
        return search(self.pattern, self.q, self.k)

    @cached_property
    def partial_kinds(self) -> tuple[Int64[Tensor, "p"], Int64[Tensor, "p"], Int64[Tensor, "p"]]:
        partial = ~self.found.full
        rows, cols = self.found.rows[partial], self.found.cols[partial]
        if not len(rows):
            return rows, cols, rows
        q, k = self.q.boxes(rows), self.k.boxes(cols)
        sizes = [*q.sizes().values(), *k.sizes().values()]
        return rows, cols, identify(self.pattern.alike(q, k), *sizes)

    @cached_property
    def kinds(self) -> tuple[Int64[Tensor, "kinds"], Int64[Tensor, "kinds"]]:
        rows, cols, kinds = self.partial_kinds
        member = torch.zeros(int(kinds.max()) + 1 if len(kinds) else 0, dtype=torch.int64)
        member.scatter_(0, kinds, torch.arange(len(kinds)))
        return rows[member], cols[member]

    def mask_of(self, kinds: Int64[Tensor, "n"]) -> Bool[Tensor, "n q_tokens k_tokens"]:
        rows, cols = self.kinds
        (x, real_x), (y, real_y) = self.q.boxes(rows[kinds]).tokens(), self.k.boxes(cols[kinds]).tokens()
        n, width, depth = *real_x.shape, real_y.shape[1]
        seen = self.pattern.sees(x.view(n, width, 1), y.view(n, 1, depth))
        return seen & real_x[:, :, None] & real_y[:, None, :]

    def mask(self) -> Bool[Tensor, "n_query n_key"]:
        q = Coords.of(self.q.grid, torch.arange(self.q.grid.size)).view(-1, 1)
        k = Coords.of(self.k.grid, torch.arange(self.k.grid.size)).view(1, -1)
        return self.pattern.sees(q, k).expand(self.q.grid.size, self.k.grid.size)
