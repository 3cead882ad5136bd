"""From the tokens of a block to the vector that stands for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.planning import Pool

Tokens = Float[Tensor, "b h n d"]
Sets = Float[Tensor, "b h sets size"]


class Summary(ABC):
    """One vector for each set of tokens, in float32 at least."""

    @abstractmethod
    def __call__(self, x: Tokens, pool: Pool) -> Sets:
        """`pool`: which tokens belong to which set."""


@dataclass(frozen=True)
class Mean(Summary):
    """The mean. `normalized`: times the root of the number of tokens, so that chance matches of long blocks and of
    short ones have scores of one size (Dynamic Hierarchical Sparse Attention)."""

    normalized: bool = False

    def __call__(self, x: Tokens, pool: Pool) -> Sets:
        mean = pool.mean(x)
        return mean * pool.count.sqrt().to(mean)[:, None] if self.normalized else mean


@dataclass(frozen=True)
class Max(Summary):
    """The largest number of each channel."""

    def __call__(self, x: Tokens, pool: Pool) -> Sets:
        x = pool.gather(x.to(torch.promote_types(x.dtype, torch.float32)))
        top = x.masked_fill(~pool.real.to(x.device)[..., None], -torch.inf).amax(3)
        return torch.where(pool.count.to(x.device)[:, None] > 0, top, 0.0)


@dataclass(frozen=True)
class Middle(Summary):
    """One token that stands for all: that in the middle."""

    def __call__(self, x: Tokens, pool: Pool) -> Sets:
        middle = pool.token.gather(1, (pool.real.sum(1, keepdim=True) // 2).clamp(max=pool.token.shape[1] - 1))
        return x.index_select(2, middle.flatten().to(x.device)).to(torch.promote_types(x.dtype, torch.float32))
