"""Joining attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Joins `(out, lse)` pairs over disjoint key sets into the attention over their union.

    out = sum_i exp(lse_i - lse) out_i,  lse = log sum_i exp(lse_i)

    Args:
        parts: pairs of out [..., N, Dv] and lse [..., N] (natural log), all of one shape.

    Returns (out, lse), out in the dtype of the first part. A query that sees no key in any part has out 0, lse -inf.
    Differentiable in every out and lse.
    """
    parts = list(parts)
    if not parts:
        raise ChronotopeError("merge([]): give at least one (out, lse) pair.")
    for out, lse in parts:
        if out.shape != parts[0][0].shape or lse.shape != out.shape[:-1]:
            shapes = ", ".join(f"({list(o.shape)}, {list(s.shape)})" for o, s in parts)
            raise ChronotopeError(f"merge: every out must be [..., N, Dv] and every lse [..., N]; got {shapes}.")
    exact = torch.promote_types(parts[0][1].dtype, torch.float32)
    lses = torch.stack([lse.to(exact) for _, lse in parts])
    top = lses.amax(0).detach()
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    blind = total == 0
    safe = torch.where(blind, 1.0, total)
    # The output of a part that sees nothing may be anything, NaN too: it has no weight and must not be multiplied.
    outs = torch.stack([torch.where((lse == -torch.inf)[..., None], 0.0, out.to(exact)) for out, lse in parts])
    out = (outs * (weights / safe)[..., None]).sum(0)
    lse = torch.where(blind, -torch.inf, top + torch.log(safe))
    return out.to(parts[0][0].dtype), lse
