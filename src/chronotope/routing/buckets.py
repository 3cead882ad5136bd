"""Buckets of tokens by the direction in which they point, numbered so that neighbours are close."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from chronotope.errors import ChronotopeError

MOST = 62
"""Bits of a number that is positive in 64."""


@dataclass(frozen=True)
class Buckets:
    """The bucket of a token is told by its sides of `bits` random hyperplanes through 0, and numbered in Gray order.

    Buckets i and i + 1 have one hyperplane between them (Hamming-sorted hashing, Zandieh et al. 2023), so
    tokens that are sorted by bucket have much the same direction as those that come next to them, be they of their
    bucket or not. The same seed draws the same hyperplanes. bits=0: one bucket.
    """

    bits: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 0 <= self.bits <= MOST:
            raise ChronotopeError(f"Buckets(bits={self.bits!r}): expected a number of hyperplanes from 0 to {MOST}.")

    def __call__(self, x: Float[Tensor, "b h n d"]) -> Int64[Tensor, "b h n"]:
        """The bucket of each token, 0 to 2^bits - 1."""
        if not self.bits:
            return torch.zeros(x.shape[:3], dtype=torch.int64, device=x.device)
        planes = torch.randn(x.shape[3], self.bits, generator=torch.Generator().manual_seed(self.seed))
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        sides = (x @ planes.to(x) > 0).long()
        return gray_place((sides << torch.arange(self.bits, device=x.device)).sum(-1))


def gray_place(word: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The place of a word in the Gray code, in which each word differs from the one before in one bit.

    Word i of the code is i ^ (i >> 1); this is the way back: bit b of the place is the parity of the bits from b on.
    """
    shift = 1
    while shift < MOST:
        word = word ^ (word >> shift)
        shift *= 2
    return word
