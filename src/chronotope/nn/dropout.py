"""Dropout from few random bits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError

STEPS = 2**16
"""Of the probability: each number is decided by 16 bits, so that one draw decides four."""


class Dropout(nn.Module):
    """In training x * m / (1 - p), each m 0 with probability p, which is rounded to a multiple of 2^-16.

    On a CPU `torch.nn.Dropout` draws a double for each number, which takes longer than the matrix multiplications of a
    small model; its numbers, from the same seed, are others.
    """

    def __init__(self, p: float | int = 0.5):
        super().__init__()
        if not 0 <= p < 1:
            raise ChronotopeError(f"dropout={p}: expected a probability from 0 to below 1.")
        self.p, self.dropped = p, min(round(p * STEPS), STEPS - 1)

    def forward(self, x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """With some numbers 0, the others larger."""
        if not self.training or not self.dropped:
            return x
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= self.dropped - STEPS // 2
        return x * (kept.to(x.dtype) * (STEPS / (STEPS - self.dropped)))

    def extra_repr(self) -> str:
        return f"p={self.p}"
