"""How well a block of keys answers a block of queries."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Queries = Float[Tensor, "b h rows d"]
Sets = Float[Tensor, "b h sets d"]


class Score(ABC):
    """One number for each block of queries and each set of keys, from their summaries."""

    @abstractmethod
    def __call__(self, q: Queries, k: Sets, count: Float[Tensor, "sets"]) -> Float[Tensor, "b h rows sets"]:
        """`count`: tokens of each set of keys."""


@dataclass(frozen=True)
class Dot(Score):
    """q . k / sqrt(D) + log(tokens): the logarithm of the weight of the whole set, were all its keys alike.

    `counted=False`: q . k / sqrt(D) alone, which blocks of one size order in the same way.
    """

    counted: bool = True

    def __call__(self, q: Queries, k: Sets, count: Float[Tensor, "sets"]) -> Float[Tensor, "b h rows sets"]:
        score = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)
        return score.add_(count.clamp(min=1).log().to(q)) if self.counted else score


@dataclass(frozen=True)
class Cosine(Score):
    """The cosine of the angle between q and k."""

    def __call__(self, q: Queries, k: Sets, count: Float[Tensor, "sets"]) -> Float[Tensor, "b h rows sets"]:
        unit = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        return next(unit) @ next(unit).transpose(-1, -2)


@dataclass(frozen=True)
class Hashed(Score):
    """The share of `bits` random hyperplanes with q and k on the same side: locality-sensitive hashing of directions.

    1 - angle / pi in expectation (Charikar 2002).
    """

    bits: int = 32
    seed: int = 0

    def __call__(self, q: Queries, k: Sets, count: Float[Tensor, "sets"]) -> Float[Tensor, "b h rows sets"]:
        planes = torch.randn(q.shape[-1], self.bits, generator=torch.Generator().manual_seed(self.seed)).to(q)
        left, right = (torch.where(x @ planes > 0, 1.0, -1.0).to(q) for x in (q, k))
        return (left @ right.transpose(-1, -2) / self.bits + 1) / 2
