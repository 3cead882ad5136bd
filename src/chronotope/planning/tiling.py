"""Pairs of tiles to compute and the element masks they share: what every kernel reads, whoever decided on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import chunks
from chronotope.patterns import Pattern
from chronotope.planning.groups import Group, group
from chronotope.planning.layout import Order
from chronotope.planning.lists import Rows, by_key, by_query

PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Found:
    """Pairs of tiles in order of (row, column): query tile, key tile, and whether every token pair is visible."""

    rows: Int64[Tensor, "p"]
    cols: Int64[Tensor, "p"]
    full: Bool[Tensor, "p"]


class Tiling(ABC):
    """Two orders of tokens cut in tiles, the pairs of tiles with something to see, and the masks of partial pairs."""

    q: Order
    k: Order
    pattern: Pattern | None
    """The pattern whose tiles these are; None where content decided."""

    @property
    @abstractmethod
    def found(self) -> Found:
        """All non-empty pairs of tiles."""

    @property
    @abstractmethod
    def partial_kinds(self) -> tuple[Int64[Tensor, "p"], Int64[Tensor, "p"], Int64[Tensor, "p"]]:
        """Of the partial pairs: query tile, key tile, and a number; equal numbers have equal element masks."""

    @property
    @abstractmethod
    def kinds(self) -> tuple[Int64[Tensor, "kinds"], Int64[Tensor, "kinds"]]:
        """A query tile and a key tile of each kind of partial pair."""

    @abstractmethod
    def mask_of(self, kinds: Int64[Tensor, "n"]) -> Bool[Tensor, "n q_tokens k_tokens"]:
        """The element masks of some kinds; tokens in their order in a tile, False beyond its end."""

    @abstractmethod
    def mask(self) -> Bool[Tensor, "n_query n_key"]:
        """The dense mask, in token order."""

    def kind_masks(self) -> Iterator[tuple[slice, Bool[Tensor, "n q_tokens k_tokens"]]]:
        """The element masks of all kinds, some at a time."""
        rows, cols = self.kinds
        if not len(rows):
            return
        each = int(self.q.sizes[rows].max() * self.k.sizes[cols].max())
        for part in chunks(len(rows), each, PAIRS_AT_ONCE):
            yield part, self.mask_of(torch.arange(part.start, part.stop))

    @property
    def computed(self) -> int:
        """Number of token pairs in non-empty pairs of tiles."""
        return int((self.q.sizes[self.found.rows] * self.k.sizes[self.found.cols]).sum())

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
    def by_query(self) -> Rows:
        """The key tiles that each query tile meets."""
        return by_query(self)

    @cached_property
    def by_key(self) -> Rows:
        """The query tiles that each key tile meets."""
        return by_key(self)

    @cached_property
    def groups(self) -> list[Group]:
        """Batches that together visit every non-empty pair of tiles once: full ones, then, with masks, partial ones."""
        full = self.found.full
        rows, cols = self.found.rows[full], self.found.cols[full]
        groups = group(self, rows, cols, None, set())
        return groups + group(self, *self.partial_kinds, set(rows.tolist()))

    @cached_property
    def sighted(self) -> tuple[Bool[Tensor, "n_query"], Bool[Tensor, "n_key"]]:
        """Which queries see some key, and which keys are seen by some query; in token order."""
        found = self.found
        sees, seen = self.q.spread(found.rows[found.full]), self.k.spread(found.cols[found.full])
        if bool(sees.all()) and bool(seen.all()):
            return sees, seen
        rows, cols, kinds = self.partial_kinds
        for part, mask in self.kind_masks():
            here = (kinds >= part.start) & (kinds < part.stop)
            for live, order, tiles, some in ((sees, self.q, rows, mask.any(2)), (seen, self.k, cols, mask.any(1))):
                lit = some[kinds[here] - part.start]
                position = order.start[tiles[here]][:, None] + torch.arange(lit.shape[1])
                live[order.order[position[lit]]] = torch.ones((), dtype=torch.bool)
        return sees, seen
