"""The meaning of attention, written out: dense, plain, in float64 where the input is."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.kernels.call import Backend, Scores
from chronotope.planning import Tiling


def reference(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk dv"],
    tiles: Tiling,
    scores: Scores,
) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"]]:
    """out = softmax(softcap(scale * q k^T) + bias, over the visible keys) v, and lse, the log of the softmax's sum.

    A query that sees no key has out 0, lse -inf and gradient 0. What nobody sees (NaN too) changes nothing.
    Differentiable any number of times. Memory: every pair of tokens.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    mask = tiles.mask().to(q.device)
    sees, seen = mask.any(1)[:, None], mask.any(0)[:, None]
    groups = q.shape[1] // k.shape[1]
    # Zeros in place of what no one looks at: a masked NaN would still spread through 0 * NaN.
    x = torch.where(sees, q.to(exact), 0.0)
    y = torch.where(seen, k.to(exact), 0.0).repeat_interleave(groups, dim=1)
    z = torch.where(seen, v.to(exact), 0.0).repeat_interleave(groups, dim=1)
    logits = scores.scale * (x @ y.transpose(-1, -2))
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    every_q, every_k = torch.arange(x.shape[2], device=q.device)[None], torch.arange(y.shape[2], device=q.device)[None]
    bias = scores.exact(exact).values(tiles, every_q, every_k)
    if bias is not None:
        logits = logits + torch.where(mask, bias[:, :, 0].to(exact), 0.0)
    logits = logits.masked_fill(~mask, -torch.inf)
    top = logits.amax(-1, keepdim=True).detach()
    weights = torch.exp(logits - torch.where(top == -torch.inf, 0.0, top))
    total = weights.sum(-1, keepdim=True)
    blind = total == 0
    out = (weights / torch.where(blind, 1.0, total)) @ z
    lse = torch.where(blind, -torch.inf, top + torch.log(torch.where(blind, 1.0, total)))
    return out.to(q.dtype), lse[..., 0]


REFERENCE = Backend(
    name="reference",
    about="dense and plain: defines the meaning",
    forward=reference,
    devices=("cpu", "cuda"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    priority=0,
    largest_pairs=1 << 28,
)
