"""One pattern on one pair of layouts: the pairs of tiles to compute, and the element masks they share."""

from __future__ import annotations

from collections.abc import Iterator
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
from chronotope.planning.lists import Rows, by_key, by_query
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
        rows, _, kinds = self.partial_kinds
        if not len(rows):
            return total
        count = torch.bincount(kinds)
        for part, seen in self.kind_masks():
            total += int((seen.flatten(1).sum(1) * count[part]).sum())
        return total

    @cached_property
    def kinds(self) -> tuple[Int64[Tensor, "kinds"], Int64[Tensor, "kinds"]]:
        """A query tile and a key tile of each kind of partial pair."""
        rows, cols, kinds = self.partial_kinds
        member = torch.zeros(int(kinds.max()) + 1 if len(kinds) else 0, dtype=torch.int64)
        member.scatter_(0, kinds, torch.arange(len(kinds)))
        return rows[member], cols[member]

    def kind_masks(self) -> Iterator[tuple[slice, Bool[Tensor, "n q_tokens k_tokens"]]]:
        """The element masks of all kinds, some at a time; tokens in their order in a tile, False beyond its end."""
        rows, cols = self.kinds
        if not len(rows):
            return
        q, k = self.q.boxes(rows), self.k.boxes(cols)
        each = int(q.volume().max() * k.volume().max())
        for part in chunks(len(rows), each, PAIRS_AT_ONCE):
            (x, real_x), (y, real_y) = q[part].tokens(), k[part].tokens()
            n, width, depth = *real_x.shape, real_y.shape[1]
            seen = self.pattern.sees(x.view(n, width, 1), y.view(n, 1, depth))
            yield part, seen & real_x[:, :, None] & real_y[:, None, :]

    @cached_property
    def by_query(self) -> Rows:
        """The key tiles that each query tile meets."""
        return by_query(self)

    @cached_property
    def by_key(self) -> Rows:
        """The query tiles that each key tile meets."""
        return by_key(self)

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
