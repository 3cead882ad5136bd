"""Scores that are learned from what attention does."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.planning import Pool
from chronotope.routing.scores import Queries, Score
from chronotope.routing.summaries import Mean, Sets, Summary, Tokens


class Moments(Summary):
    """Mean, largest and smallest number of each channel, one after the other: [B, H, sets, 3 D]."""

    def __call__(self, x: Tokens, pool: Pool) -> Sets:
        mean = Mean()(x, pool)
        found, real = pool.gather(x.to(mean.dtype)), pool.real.to(x.device)[..., None]
        ends = (found.masked_fill(~real, -torch.inf).amax(3), found.masked_fill(~real, torch.inf).amin(3))
        some = pool.count.to(x.device)[:, None] > 0
        return torch.cat([mean, *(torch.where(some, end, 0.0) for end in ends)], -1)


class Bilinear(nn.Module, Score):  # type: ignore[misc]
    """score = (W_q q) . (W_k k) / sqrt(channels) + log(tokens), with W of each head, from summaries of `size` numbers.

    Learn it on scores of blocks against the share of attention that each block of keys gets, by cross entropy
    (after Gao et al. 2024, SeerAttention, arXiv 2410.13276). Heads that share keys have weights of their own.
    """

    def __init__(self, heads: int, size: int, channels: int):
        super().__init__()
        self.query, self.key = (nn.Parameter(torch.randn(heads, size, channels) / math.sqrt(size)) for _ in range(2))

    def forward(self, q: Queries, k: Sets, count: Float[Tensor, "sets"]) -> Float[Tensor, "b h rows sets"]:
        """Differentiable."""
        logits = (q @ self.query) @ (k @ self.key).transpose(-1, -2) / math.sqrt(self.query.shape[-1])
        return logits + count.clamp(min=1).log().to(q)
