"""Exact attention over lists of keys, one list for each query."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from chronotope.boxes import chunks
from chronotope.errors import ChronotopeError

AT_ONCE = 1 << 24  # numbers of gathered keys held at once


def gathered(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk dv"],
    index: Int64[Tensor, "b h nq most"],
    *,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"]]:
    """(out, lse) of softmax attention of each query over the keys that its list names: Nq x most products, and no more.

    Where single tokens are chosen, almost every tile of a plan has some: kernels of tiles then compute them all, and
    this one only what was chosen. It reads each key as often as it is named, so whole blocks are better left to plans:
    `ct.attention(..., where=ct.route.chosen(index, n=1))` is the same attention.

    Args:
        q: [B, H, Nq, D]; k: [B, Hk, Nk, D]; v: [B, Hk, Nk, Dv], H a multiple of Hk.
        index: numbers of keys, no number twice in a list; -1: none. A query without keys gets 0, and lse -inf.
        scale: default 1 / sqrt(D).

    Differentiable in q, k and v. Values of keys that nobody names are not read.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 100, 16)
        >>> out, lse = gathered(q, k, v, torch.randn(2, 4, 100, 100).topk(8).indices)
        >>> out.shape, lse.shape
        (torch.Size([2, 4, 100, 16]), torch.Size([2, 4, 100]))
    """
    batch, heads, count = q.shape[:3]
    if heads % k.shape[1] or index.shape[:3] != q.shape[:3]:
        raise ChronotopeError(
            f"gathered: q {list(q.shape)}, k {list(k.shape)}, index {list(index.shape)}; expected [B, H, Nq, D], "
            "[B, Hk, Nk, D] and [B, H, Nq, any], H a multiple of Hk."
        )
    if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < k.shape[2]:
        raise ChronotopeError(f"gathered: expected numbers of keys from 0 to {k.shape[2] - 1}, or -1 for none.")
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    # Lists name rows of one table; its last row, of zeros, stands for no key.
    first = torch.arange(batch * heads, device=index.device) // (heads // k.shape[1]) * k.shape[2]
    none = batch * k.shape[1] * k.shape[2]
    place = torch.where(index >= 0, index + first.view(batch, heads, 1, 1), none)
    tables = [F.pad(x.reshape(-1, x.shape[3]), (0, 0, 0, 1)) for x in (k, v)]
    some = [
        _attend(q[:, :, part], tables[0], tables[1], place[:, :, part], none, scale)
        for part in chunks(count, batch * heads * index.shape[3] * max(k.shape[3], v.shape[3]), AT_ONCE)
    ]
    if not some:
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])
    return torch.cat([out for out, _ in some], 2), torch.cat([lse for _, lse in some], 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, place: Tensor, none: int, scale: float) -> tuple[Tensor, Tensor]:
    logits = scale * (F.embedding(place, k) @ q[..., None])[..., 0].to(torch.promote_types(q.dtype, torch.float32))
    real = place != none
    found = real.any(-1, keepdim=True)
    # A row of -inf alone would have NaN for a gradient.
    logits = torch.where(real, logits, torch.where(found, -torch.inf, 0.0).to(logits))
    weights = torch.where(real, logits.softmax(-1), 0.0).to(v.dtype)
    lse = (
        torch.where(found[..., 0], logits.logsumexp(-1), -torch.inf) if place.shape[-1] else logits.sum(-1) - torch.inf
    )
    return (weights[..., None, :] @ F.embedding(place, v))[..., 0, :], lse
