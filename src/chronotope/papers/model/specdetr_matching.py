"""SpecDETR: which query is taught by which object, and by what."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F


def one_to_many(
    cost: Float[Tensor, "q g"], share: Float[Tensor, "q g"], count: int, least: float = 0.95
) -> Int64[Tensor, "q"]:
    """The object of each query, or -1: the cheapest pairs first, until each object has one query.

    Then, in further rounds of one for each object up to `count`, pairs of the largest overlap, of `least` or more.
    """
    whose = torch.full((len(cost),), -1, device=cost.device)
    for turn in range(count):
        left = cost.clone() if turn == 0 else torch.where(share >= least, -share, torch.inf)
        left[whose >= 0] = torch.inf
        if not bool(left.isfinite().any()):
            break
        for _ in range(cost.shape[1]):
            query, thing = divmod(int(left.argmin()), cost.shape[1])
            if left[query, thing] == torch.inf:
                break
            whose[query] = thing
            left[query], left[:, thing] = torch.inf, torch.inf
    return whose


def overlap(a: Float[Tensor, "*#p 4"], b: Float[Tensor, "*#p 4"]) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al. 2019, arXiv 1902.09630) of boxes, which broadcast."""
    (a0, a1), (b0, b1) = ((c[..., :2] - c[..., 2:] / 2, c[..., :2] + c[..., 2:] / 2) for c in (a, b))
    shared = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - shared
    around = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod(-1)
    return shared / union, shared / union - (around - union) / around


def focal(logits: Float[Tensor, "*s"], target: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Focal loss (Lin et al. 2017, arXiv 1708.02002), gamma = 2, alpha = 0.25, of targets that are 0 or 1."""
    p = logits.sigmoid()
    missed = torch.where(target > 0, 0.25 * (1 - p).square(), 0.75 * p.square())
    return missed * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
