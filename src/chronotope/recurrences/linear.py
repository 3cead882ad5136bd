"""Attention without a softmax: the sum over keys is taken first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.recurrences.features import FeatureMap
from chronotope.recurrences.recurrence import recurrence


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features: FeatureMap | None = None,
    normalize: bool = True,
    scale: float | int = 1.0,
    causal: bool = False,
    keep: Tensor | None = None,
) -> Tensor:
    """out_i = scale * phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j)), in O(N D Dv).

    Args:
        q: [B, H, N, D]; k: [B, H, M, D]; v: [B, H, M, Dv]; with `causal`, M = N.
        features: phi; None: q and k are features already.
        normalize: whether to divide; where the divisor is 0 the output is 0. `normalizers` says how often.
        causal: sum over the keys up to i only: `ct.recurrence`.
        keep: bool [B, M]; False leaves a key out.

    Returns out [B, H, N, Dv] in q's dtype; sums are float32 at least.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236; non-causal as in Shen et al. 2018, arXiv 1812.01243.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 1000, 64)
        >>> linear_attention(q, k, v, features=features.Elu()).shape
        torch.Size([2, 4, 1000, 64])
    """
    if q.ndim != 4 or k.shape[:3] != v.shape[:3] or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ChronotopeError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: "
            "expected [B, H, N, D], [B, H, M, D], [B, H, M, Dv]."
        )
    if features is not None:
        q, k = features(q), features(k)
    if keep is not None:
        # Not multiplied: what is left out may be NaN.
        k, v = (torch.where(keep[:, None, :, None], x, 0.0) for x in (k, v))
    if causal:
        return recurrence(q, k, v, normalize=normalize, scale=scale)[0]
    exact = torch.promote_types(q.dtype, torch.float32)
    keys, queries = k.to(exact), q.to(exact)
    out = queries @ (keys.transpose(-1, -2) @ v.to(exact))
    if normalize:
        total = queries @ keys.sum(2)[..., None]
        empty = total == 0
        out = torch.where(empty, 0.0, out / torch.where(empty, 1.0, total))
    return (scale * out).to(q.dtype)


@dataclass(frozen=True)
class Normalizers:
    """How far q_i . z_i is from a sum of weights: shares of all queries, by head."""

    negative: Float[Tensor, "h"]
    zero: Float[Tensor, "h"]
    smallest: Float[Tensor, "h"]

    def __str__(self) -> str:
        rows = zip(self.negative.tolist(), self.zero.tolist(), self.smallest.tolist(), strict=True)
        return "\n".join(f"head {i}: {n:.2%} negative, {z:.2%} zero, least {s:.3g}" for i, (n, z, s) in enumerate(rows))


def normalizers(
    q: Tensor,
    k: Tensor,
    *,
    features: FeatureMap | None = None,
    causal: bool = True,
    decay: Tensor | None = None,
) -> Normalizers:
    """What `normalize` divides by: the share that is negative or 0, and the least size, for each head.

    A negative divisor turns weights around, one near 0 blows them up: feature maps that are positive have neither.
    """
    if features is not None:
        q, k = features(q), features(k)
    with torch.no_grad():
        if causal:
            total = recurrence(q, k, torch.ones_like(k[..., :1]), decay=decay)[0][..., 0]
        else:
            total = (q @ k.sum(2)[..., None])[..., 0]
        total = total.transpose(0, 1).flatten(1)
        share = total.shape[1]
        return Normalizers((total < 0).sum(1) / share, (total == 0).sum(1) / share, total.abs().amin(1))
