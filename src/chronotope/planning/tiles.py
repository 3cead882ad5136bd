"""One pattern on one pair of layouts: the pairs of tiles to compute, and the element masks they share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import chunks, identify
from chronotope.grid import Coords
from chronotope.patterns import Pattern
from chronotope.planning.groups import Group, group
from chronotope.planning.layout import Layout
from chronotope.planning.search import Found, search

PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Tiles:
    """What a kernel runs: a plain pattern (of one head or of heads that are alike), cut in tiles."""

    pattern: Pattern
    q: Layout
    k: Layout

    @cached_property
    def found(self) -> Found:
        """All non-empty pairs of tiles."""
        return search(self.pattern, self.q, self.k)

    @property
    def computed(self) -> int:
        """Number of token pairs in non-empty pairs of tiles."""
        return int((self.q.sizes[self.found.rows] * self.k.sizes[self.found.cols]).sum())

    @cached_property
    def partial_kinds(self) -> tuple[Int64[Tensor, "p"], Int64[Tensor, "p"], Int64[Tensor, "p"]]:
        """Of the partial pairs: query tile, key tile, and a number; equal numbers have equal element masks."""
        partial = ~self.found.full
        rows, cols = self.found.rows[partial], self.found.cols[partial]
        if not len(rows):
            return rows, cols, rows
        q, k = self.q.boxes(rows), self.k.boxes(cols)
        sizes = [*q.sizes().values(), *k.sizes().values()]
        return rows, cols, identify(self.pattern.alike(q, k), *sizes)

    @cached_property
    def visible(self) -> int:
        """Exact number of visible token pairs: every distinct element mask is counted once."""
        full = self.found.full
        total = int((self.q.sizes[self.found.rows[full]] * self.k.sizes[self.found.cols[full]]).sum())
        rows, cols, kinds = self.partial_kinds
        if not len(rows):
            return total
        kind, inverse, count = torch.unique(kinds, return_inverse=True, return_counts=True)
        member = torch.zeros_like(kind).scatter_(0, inverse, torch.arange(len(inverse)))
        q, k = self.q.boxes(rows[member]), self.k.boxes(cols[member])
        each = int(q.volume().max() * k.volume().max())
        for part in chunks(len(member), each, PAIRS_AT_ONCE):
            (x, real_x), (y, real_y) = q[part].tokens(), k[part].tokens()
            n, width, depth = len(count[part]), x.place.shape[1], y.place.shape[1]
            seen = self.pattern.sees(x.view(n, width, 1), y.view(n, 1, depth))
            seen = seen & real_x[:, :, None] & real_y[:, None, :]
            total += int((seen.flatten(1).sum(1) * count[part]).sum())
        return total

    def mask(self) -> Bool[Tensor, "n_query n_key"]:
        """The dense mask, in token order."""
        q = Coords.of(self.q.grid, torch.arange(self.q.grid.size)).view(-1, 1)
        k = Coords.of(self.k.grid, torch.arange(self.k.grid.size)).view(1, -1)
        return self.pattern.sees(q, k).expand(self.q.grid.size, self.k.grid.size)

    @cached_property
    def groups(self) -> list[Group]:
        """Batches that together visit every non-empty pair of tiles once: full ones, then, with masks, partial ones."""
        full = self.found.full
        rows, cols = self.found.rows[full], self.found.cols[full]
        groups = group(self.pattern, self.q, self.k, rows, cols, None, set())
        partial = self.partial_kinds
        return groups + group(self.pattern, self.q, self.k, *partial, set(rows.tolist()))

    @cached_property
    def sighted(self) -> tuple[Bool[Tensor, "n_query"], Bool[Tensor, "n_key"]]:
        """Which queries see some key, and which keys are seen by some query; in token order."""
        full = self.found.full
        sees = self.q.spread(self.found.rows[full])
        seen = self.k.spread(self.found.cols[full])
        for some in self.groups:
            if some.mask is not None:
                mask, everyone = some.mask, slice(None)
                sees[some.queries(everyone)[:, mask.any(1)]] = torch.ones((), dtype=torch.bool)
                seen[some.keys(everyone)[:, mask.any(0)]] = torch.ones((), dtype=torch.bool)
        return sees, seen
