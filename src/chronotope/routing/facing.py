"""Which keys face which queries where both are sorted: blocks of the two orders, or a band."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


@dataclass(frozen=True)
class Facing:
    """What faces what in the two sorted orders: block i of `size` queries, and `width[i]` keys from `start[i]` on."""

    size: int
    start: Int64[Tensor, "rows"]
    width: Int64[Tensor, "rows"]
    plain: bool = False

    @classmethod
    def blocks(cls, nq: int, nk: int, block: int) -> Facing:
        """As many blocks of queries as of keys, none longer than `block`."""
        count = -(-max(nq, nk) // block)
        size = -(-nq // count)
        rows = -(-nq // size)
        start = torch.arange(rows) * -(-nk // rows)
        return cls(size, start, (nk - start).clamp(0, -(-nk // rows)), plain=nq == nk)

    @classmethod
    def band(cls, nq: int, nk: int, block: int, step: int) -> Facing:
        """The `block` keys around the place of every `step` queries; the orders are rings."""
        middle = (torch.arange(-(-nq // step)) * step + step // 2).clamp(max=nq - 1) * nk // nq
        return cls(step, (middle - block // 2) % nk, torch.full_like(middle, min(block, nk)))

    def keys(self, valid: Int64[Tensor, "b"], nk: int) -> Int64[Tensor, "b 1 rows most"]:
        """The places of the keys of each block, of the first `valid` of all; -1: none."""
        at = torch.arange(int(self.width.max()))
        place = torch.where(at < self.width[:, None], (self.start[:, None] + at) % nk, -1)
        return torch.where(place < valid[:, None, None].cpu(), place, -1)[:, None]

    def beyond(self, place: Int64[Tensor, "b h m"], nk: int) -> Bool[Tensor, "b h rows m"]:
        """Which places lie outside of what faces each block."""
        start, width = (x[:, None].to(place.device) for x in (self.start, self.width))
        return (place[:, :, None] - start) % nk >= width
