"""Selections in which blocks of queries, or heads, compete with each other; and the threshold on scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.planning.sight import LOWEST
from chronotope.routing.selections import Kept, Mass, Scores, Selection, require_share

OVER = ("head", "block", "all")
TINY = 1e-30
"""What the lowest score counts: kept after all others, but not never."""


@dataclass(frozen=True)
class Threshold(Selection):
    """The fewest blocks of each query block that hold a share of the sum of its scores, its own counted.

    Scores are counted from the lowest of the blocks that it could keep: neither their scale nor a shift matters.
    """

    share: float | int

    def __post_init__(self) -> None:
        require_share("share", self.share)

    def __call__(self, scores: Scores, own: Bool[Tensor, "rows nk"]) -> Kept:
        known = scores > LOWEST
        low = scores.masked_fill(~known, torch.inf).amin(-1, keepdim=True)
        level = torch.where(known, scores - low, 0.0)  # to divide by the highest would change no share
        # The softmax of logarithms is the share of the sum.
        return Mass(self.share)(level.clamp(min=TINY).log().masked_fill(scores == -torch.inf, -torch.inf), own)


@dataclass(frozen=True)
class Joint(Selection):
    """`selection` among more pairs (query block, key block) at once than those of one query block.

    over: "head", all pairs of a head; "block", those of one key block, with all query blocks of all heads; "all", all
    pairs of all heads. A share is then of all these pairs, and a number counts among all.
    """

    selection: Selection
    over: str = "head"
    together = True

    def __post_init__(self) -> None:
        if self.over not in OVER:
            raise ChronotopeError(f"Joint(over={self.over!r}): expected one of {', '.join(OVER)}.")

    def __call__(self, scores: Scores, own: Bool[Tensor, "rows nk"]) -> Kept:
        own = own.to(scores.device)
        batch, heads, rows, cols = scores.shape
        if self.over == "block":
            first = own.T[:, None].expand(cols, heads, rows).flatten(1)
            kept = self.selection(scores.permute(0, 3, 1, 2).reshape(batch, 1, cols, heads * rows), first)
            kept = kept.view(batch, cols, heads, rows).permute(0, 2, 3, 1)
        else:
            groups = heads if self.over == "head" else 1
            first = own.expand(heads // groups, rows, cols).reshape(1, -1)
            kept = self.selection(scores.reshape(batch, groups, 1, -1), first).view(scores.shape)
        return kept


@dataclass(frozen=True)
class Impartial(Selection):
    """`selection`, in which the blocks that hold the queries themselves must be chosen as all others."""

    selection: Selection

    def __post_init__(self) -> None:
        object.__setattr__(self, "together", self.selection.together)

    def __call__(self, scores: Scores, own: Bool[Tensor, "rows nk"]) -> Kept:
        return self.selection(scores, torch.zeros_like(own))
