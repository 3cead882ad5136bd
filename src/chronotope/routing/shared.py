"""Scores on which the heads agree."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from chronotope.routing.scores import Queries, Score, Sets


@dataclass(frozen=True)
class Shared(Score):
    """The mean of `score` over the heads, so that all heads choose the same blocks."""

    score: Score

    def __call__(self, q: Queries, k: Sets, count: Float[Tensor, "sets"]) -> Float[Tensor, "b h rows sets"]:
        each = self.score(q, k, count)
        return each.mean(1, keepdim=True).expand_as(each)
