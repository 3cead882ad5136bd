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
from chronotope.planning.layout import Layout
from chronotope.planning.search import Found, search

PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Group:
    """Query tiles of one size whose listed keys look alike: one batch for a kernel.

    `mask` [query tokens, key tokens] is shared by every tile of the group; None: everything is visible.
    `again`: an earlier group has other keys for the same queries, so the results must be merged.
    """

    queries: Int64[Tensor, "g q_tokens"]
    keys: Int64[Tensor, "g k_tokens"]
    mask: Bool[Tensor, "q_tokens k_tokens"] | None
    again: bool

    @cached_property
    def runs(self) -> tuple[bool, bool]:
        """Whether the queries, and the keys, are consecutive tokens all through: then slices serve as well."""
        return tuple(bool((index.flatten().diff() == 1).all()) for index in (self.queries, self.keys))  # type: ignore[return-value]

    @cached_property
    def blind(self) -> Bool[Tensor, "q_tokens"] | None:
        """Queries that see none of these keys; None where there is no such query."""
        if self.mask is None or bool(self.mask.any(1).all()):
            return None
        return ~self.mask.any(1)


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
        q.__dict__["prefix"] = k.__dict__["prefix"] = None  # partial pairs are never of the prefix
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
        """Batches that together visit every non-empty pair of tiles once: the full ones without mask, then the partial."""
        full = self.found.full
        sizes = self.k.sizes
        groups = self._batches(self.found.rows[full], self.found.cols[full], sizes[self.found.cols[full]], masked=False)
        rows, cols, kinds = self.partial_kinds
        return groups + self._batches(rows, cols, kinds, masked=True)

    def _batches(self, rows: Tensor, cols: Tensor, kinds: Tensor, masked: bool) -> list[Group]:
        """Query tiles of one size with the same sequence of kinds form one batch."""
        if not len(rows):
            return []
        tiles, count = torch.unique_consecutive(rows, return_counts=True)
        ends = count.cumsum(0).tolist()
        col_list, kind_list, q_sizes = cols.tolist(), kinds.tolist(), self.q.sizes.tolist()
        before = set(self.found.rows[self.found.full].tolist()) if masked else set()
        same: dict[tuple[int, ...], list[int]] = {}
        for i, (tile, end) in enumerate(zip(tiles.tolist(), ends, strict=True)):
            begin = ends[i - 1] if i else 0
            # Without a mask the order of the keys does not matter, only how many there are.
            seen = tuple(kind_list[begin:end]) if masked else (sum(kind_list[begin:end]), end - begin)
            same.setdefault((q_sizes[tile], tile in before, *seen), []).append(i)
        out = []
        for (_, again, *_), members in same.items():
            queries = self.q.tokens(tiles[torch.tensor(members)])
            spans = [col_list[ends[i - 1] if i else 0 : ends[i]] for i in members]
            keys = torch.stack([torch.cat([self._keys[c] for c in span]) for span in spans])
            out.append(Group(queries, keys, self._mask(queries[0], keys[0]) if masked else None, bool(again)))
        return out

    @cached_property
    def _keys(self) -> list[Tensor]:
        return list(self.k.order.split(self.k.sizes.tolist()))

    def _mask(self, queries: Tensor, keys: Tensor) -> Bool[Tensor, "q_tokens k_tokens"]:
        q, k = Coords.of(self.q.grid, queries).view(-1, 1), Coords.of(self.k.grid, keys).view(1, -1)
        return self.pattern.sees(q, k)

    @cached_property
    def sighted(self) -> tuple[Bool[Tensor, "n_query"], Bool[Tensor, "n_key"]]:
        """Which queries see some key, and which keys are seen by some query; in token order."""
        sees = torch.zeros(self.q.grid.size, dtype=torch.bool)
        seen = torch.zeros(self.k.grid.size, dtype=torch.bool)
        for group in self.groups:
            ones = torch.ones((), dtype=torch.bool)
            sees[group.queries if group.mask is None else group.queries[:, group.mask.any(1)]] = ones
            seen[group.keys if group.mask is None else group.keys[:, group.mask.any(0)]] = ones
        return sees, seen
