"""Learned predictors of who looks at whom, which never multiply all queries with all keys."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError


class LowRank(nn.Module):
    """Attention maps of n tokens, as mixtures of r learned rows.

        A = softmax(W_q q (W_down^T W_k k)^T / sqrt(c)) W_up,   W_down [n, r], W_up [r, n]

    Args:
        tokens: n; each has a place of its own in W_down and W_up.
        head_dim: channels of q and k.
        rank: r.
        channels: c, default half of head_dim.
        terms: rows mixed by `scores`; the largest coefficients. None: all.
        floor: entries of W_up of at most this size count as 0 in `scores`.

    Learn it by regression of `forward(q, k)` on maps of attention; choose by `scores(q, k)`.

    Example:
        >>> predict = LowRank(65, 16, rank=10)
        >>> predict(*torch.randn(2, 3, 4, 65, 16)).shape
        torch.Size([3, 4, 65, 65])

    Source: Wei et al. 2023, Sparsifiner, arXiv 2303.13755.
    """

    def __init__(
        self,
        tokens: int,
        head_dim: int,
        rank: int,
        channels: int | None = None,
        terms: int | None = None,
        floor: float = 0.0,
    ):
        super().__init__()
        channels = max(1, head_dim // 2) if channels is None else channels
        if min(tokens, head_dim, rank, channels) < 1 or (terms is not None and terms < 1):
            raise ChronotopeError(
                f"LowRank(tokens={tokens}, head_dim={head_dim}, rank={rank}, channels={channels}, terms={terms}): "
                "expected numbers from 1 on."
            )
        self.tokens, self.terms, self.floor = tokens, terms, floor
        self.query, self.key = nn.Linear(head_dim, channels), nn.Linear(head_dim, channels)
        self.down, self.up = nn.Parameter(torch.empty(tokens, rank)), nn.Parameter(torch.empty(rank, tokens))
        for weight in (self.down, self.up):
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n n"]:
        """The map predicted, of all terms and entries: differentiable."""
        return self.coefficients(q, k) @ self.up

    def scores(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n n"]:
        """The map predicted of the largest coefficients and entries alone."""
        mix = self.coefficients(q, k)
        if self.terms is not None and self.terms < mix.shape[3]:
            best = mix.topk(self.terms, dim=-1)
            mix = torch.zeros_like(mix).scatter(-1, best.indices, best.values)
        return mix @ self.basis()

    def basis(self) -> Float[Tensor, "rank n"]:
        """W_up, and 0 for its small entries."""
        return torch.where(self.up.abs() > self.floor, self.up, 0.0)

    def coefficients(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n rank"]:
        """How much each query has of each row; they sum to 1."""
        if q.shape[2] != self.tokens or k.shape[2] != self.tokens:
            raise ChronotopeError(
                f"LowRank: made for {self.tokens} tokens, got {q.shape[2]} queries and {k.shape[2]} keys."
            )
        rows = self.key(k).transpose(-1, -2) @ self.down
        return (self.query(q) @ rows / math.sqrt(rows.shape[-2])).softmax(-1)
