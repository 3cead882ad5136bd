"""Which pairs of tiles have anything to see: a search from the whole grid down, by three-valued verdicts on boxes.

A pair of boxes where nothing is visible is dropped, one where everything is visible is kept whole, and only the
undecided are cut further. Work and memory therefore grow with the pairs of tiles that are kept, never with N x N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import Boxes
from chronotope.patterns import Pattern
from chronotope.planning.layout import Layout
from chronotope.planning.tiling import Found

AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Blocks:
    """P ranges of tiles of one layout: per axis the first tile and the one after the last, [axes, P]."""

    layout: Layout
    lo: Int64[Tensor, "axes p"]
    hi: Int64[Tensor, "axes p"]

    def __getitem__(self, index: Tensor | slice) -> Blocks:
        return Blocks(self.layout, self.lo[:, index], self.hi[:, index])

    def boxes(self) -> Boxes:
        """The coordinates that the ranges cover."""
        grid, tile = self.layout.grid, self.layout.tile
        lo = {axis: self.lo[i] * tile[i] for i, axis in enumerate(grid.axes)}
        hi = {axis: (self.hi[i] * tile[i]).clamp(max=grid.shape[i]) - 1 for i, axis in enumerate(grid.axes)}
        return Boxes(grid, lo, hi)

    def extent(self) -> Int64[Tensor, "axes"]:
        """The longest range on each axis."""
        return (self.hi - self.lo).amax(1)

    def halves(self, axis: int) -> tuple[Blocks, Blocks, Bool[Tensor, "p"]]:
        """Both halves on one axis, and which ranges have a second half."""
        middle = (self.lo[axis] + self.hi[axis] + 1) // 2
        first_hi, second_lo = self.hi.clone(), self.lo.clone()
        first_hi[axis], second_lo[axis] = middle, middle
        return Blocks(self.layout, self.lo, first_hi), Blocks(self.layout, second_lo, self.hi), middle < self.hi[axis]

    def single(self) -> Bool[Tensor, "p"]:
        """Which ranges are one tile."""
        return (self.hi - self.lo == 1).all(0)

    def expand(self, member: Int64[Tensor, "m"], offset: Int64[Tensor, "m"]) -> Int64[Tensor, "m"]:
        """The tile number of the offset-th tile of range `member`."""
        out = torch.zeros_like(offset)
        stride = torch.ones_like(offset)
        for axis in range(len(self.layout.counts) - 1, -1, -1):
            extent = (self.hi[axis] - self.lo[axis])[member]
            out = out + (self.lo[axis][member] + offset % extent) * stride
            offset = offset // extent
            stride = stride * self.layout.counts[axis]
        return out + self.layout.prefix_tiles

    def volume(self) -> Int64[Tensor, "p"]:
        """Number of tiles in each range."""
        return (self.hi - self.lo).prod(0)


def join(parts: list[Blocks]) -> Blocks:
    """All ranges of several."""
    return Blocks(parts[0].layout, torch.cat([p.lo for p in parts], 1), torch.cat([p.hi for p in parts], 1))


def whole(layout: Layout) -> Blocks:
    """One range that holds every tile with a place."""
    hi = torch.tensor(layout.counts)[:, None]
    return Blocks(layout, torch.zeros_like(hi), hi)


def search(pattern: Pattern, q_layout: Layout, k_layout: Layout, queries: Blocks | None = None) -> Found:
    """All non-empty pairs of tiles; with `queries` (single tiles), only of those."""
    q = whole(q_layout) if queries is None else queries
    k = whole(k_layout)[torch.zeros(q.lo.shape[1], dtype=torch.int64)]
    pending = [(q, k)]
    found: list[tuple[Tensor, Tensor, bool]] = [] if queries is not None else _prefix_pairs(pattern, q_layout, k_layout)
    while pending:
        q, k = pending.pop()
        some, every = pattern.over(q.boxes(), k.boxes())
        if every.any():
            found.append((*_pairs(q[every], k[every]), True))
        rest = some & ~every
        leaf = rest & q.single() & k.single()
        if leaf.any():
            found.append((*_pairs(q[leaf], k[leaf]), False))
        rest = rest & ~leaf
        if rest.any():
            pending.extend(_split(q[rest], k[rest]))
    return _sorted(found, len(k_layout.sizes))


def _split(q: Blocks, k: Blocks) -> list[tuple[Blocks, Blocks]]:
    """Cuts both sides on the axis where they are longest; in portions that fit in memory."""
    q_axis, k_axis = int(q.extent().argmax()), int(k.extent().argmax())
    q_first, q_second, q_has = q.halves(q_axis)
    k_first, k_second, k_has = k.halves(k_axis)
    quarters = [(q_first, k_first), (q_second[q_has], k_first[q_has])]
    quarters.append((q_first[k_has], k_second[k_has]))
    both = q_has & k_has
    quarters.append((q_second[both], k_second[both]))
    q_all, k_all = join([a for a, _ in quarters]), join([b for _, b in quarters])
    count = q_all.lo.shape[1]
    return [(q_all[s : s + AT_ONCE], k_all[s : s + AT_ONCE]) for s in range(0, count, AT_ONCE)]  # type: ignore[misc]


def _pairs(q: Blocks, k: Blocks) -> tuple[Tensor, Tensor]:
    """Every pair of tiles of matching ranges."""
    q_volume, k_volume = q.volume(), k.volume()
    member = torch.arange(len(q_volume)).repeat_interleave(q_volume * k_volume)
    ends = (q_volume * k_volume).cumsum(0)
    offset = torch.arange(len(member)) - (ends - q_volume * k_volume)[member]
    return q.expand(member, offset // k_volume[member]), k.expand(member, offset % k_volume[member])


def _prefix_pairs(pattern: Pattern, q: Layout, k: Layout) -> list[tuple[Tensor, Tensor, bool]]:
    """Prefix tiles see and are seen wholly or not at all: the pattern says which."""
    of_prefix, by_prefix = pattern.prefix_sees()
    out = []
    if of_prefix and k.prefix_tiles:
        out.append((*torch.cartesian_prod(torch.arange(len(q.sizes)), torch.arange(k.prefix_tiles)).T, True))
    if by_prefix and q.prefix_tiles:
        out.append(
            (*torch.cartesian_prod(torch.arange(q.prefix_tiles), torch.arange(k.prefix_tiles, len(k.sizes))).T, True)
        )
    return out


def _sorted(found: list[tuple[Tensor, Tensor, bool]], key_tiles: int) -> Found:
    if not found:
        none = torch.zeros(0, dtype=torch.int64)
        return Found(none, none, none.bool())
    rows, cols = torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])
    full = torch.cat([torch.full((len(f[0]),), f[2]) for f in found])
    order = torch.argsort(rows * key_tiles + cols)
    return Found(rows[order], cols[order], full[order])
