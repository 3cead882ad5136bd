"""Batches for kernels: query tiles whose listed keys look alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

if TYPE_CHECKING:
    from chronotope.planning.tiling import Tiling

MASKS_KEPT = 1 << 26  # elements of masks that may be kept whatever the grid; beyond that, so many for each token
MASKS_PER_TOKEN = 1 << 10


@dataclass(frozen=True)
class Group:
    """Query tiles of one size, each with a list of key tiles; column by column these have one size too.

    `kinds`: of the element masks, column by column, for every tile of the group; None: everything is visible.
    `again`: an earlier group has other keys for the same queries, so the results must be merged. `keep`: whether the
    mask may stay in memory.
    """

    tiling: Tiling
    q_tiles: Int64[Tensor, "g"]
    k_tiles: Int64[Tensor, "g n"]
    kinds: tuple[int, ...] | None
    again: bool
    keep: bool

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Number of query tiles, tokens of one, and keys listed by one."""
        q, k = self.tiling.q, self.tiling.k
        return len(self.q_tiles), int(q.sizes[self.q_tiles[0]]), int(k.sizes[self.k_tiles[0]].sum())

    def queries(self, members: slice) -> Int64[Tensor, "m q_tokens"]:
        """The query tokens of some tiles."""
        return self.tiling.q.tokens(self.q_tiles[members])

    def keys(self, members: slice) -> Int64[Tensor, "m k_tokens"]:
        """The key tokens that some tiles list."""
        _, counts = torch.unique_consecutive(self.tiling.k.sizes[self.k_tiles[0]], return_counts=True)
        columns = self.k_tiles[members].split(counts.tolist(), dim=1)
        return torch.cat([self.tiling.k.tokens(tiles).flatten(1) for tiles in columns], dim=1)

    @property
    def mask(self) -> Bool[Tensor, "q_tokens k_tokens"] | None:
        """Which keys each query sees, shared by all tiles of the group; None: everything is visible."""
        if self.kinds is None:
            return None
        return self._kept if self.keep else self._evaluate()

    @cached_property
    def _kept(self) -> Bool[Tensor, "q_tokens k_tokens"]:
        return self._evaluate()

    def _evaluate(self) -> Bool[Tensor, "q_tokens k_tokens"]:
        masks = self.tiling.mask_of(torch.tensor(self.kinds))
        rows, widths = self.shape[1], self.tiling.k.sizes[self.k_tiles[0]].tolist()
        return torch.cat([mask[:rows, :width] for mask, width in zip(masks, widths, strict=True)], dim=1)


def group(tiling: Tiling, rows: Tensor, cols: Tensor, kinds: Tensor | None, before: set[int]) -> list[Group]:
    """Groups the pairs (rows, cols), in order of rows: query tiles of one size whose keys are of the same kinds.

    `kinds`: equal numbers mean equal element masks and sizes; None: all pairs are full, only sizes matter. `before`:
    query tiles that have keys in other groups already.
    """
    if not len(rows):
        return []
    q, k, masked = tiling.q, tiling.k, kinds is not None
    kinds = k.sizes[cols] if kinds is None else kinds
    # The order of the keys is free; sorted by kind, more tiles look alike.
    order = torch.argsort(rows * (int(kinds.max()) + 1) + kinds, stable=True)
    cols, kinds = cols[order], kinds[order]
    tiles, count = torch.unique_consecutive(rows, return_counts=True)
    ends = count.cumsum(0)
    starts, sizes, kind_list = (ends - count).tolist(), q.sizes.tolist(), kinds.tolist()
    same: dict[tuple[int, bool, tuple[int, ...]], list[int]] = {}
    for i, (tile, start, end) in enumerate(zip(tiles.tolist(), starts, ends.tolist(), strict=True)):
        same.setdefault((sizes[tile], tile in before, tuple(kind_list[start:end])), []).append(i)
    listed = {key: cols[_spans(starts, members, len(key[2]))] for key, members in same.items()}
    elements = sum(key[0] * int(k.sizes[tiles_of[0]].sum()) for key, tiles_of in listed.items())
    keep = elements <= max(MASKS_KEPT, MASKS_PER_TOKEN * max(q.grid.size, k.grid.size))
    return [
        Group(tiling, tiles[torch.tensor(members)], listed[key], key[2] if masked else None, key[1], keep)
        for key, members in same.items()
    ]


def _spans(starts: list[int], members: list[int], length: int) -> Int64[Tensor, "m length"]:
    """Indices of the `length` pairs of each member."""
    return torch.tensor([starts[i] for i in members])[:, None] + torch.arange(length)
