"""Tokens in another order, for each head its own."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor


def take(x: Float[Tensor, "b h n d"], index: Int64[Tensor, "b h m"]) -> Float[Tensor, "b h m d"]:
    """The tokens of these numbers, in this order."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[3]))


def back(x: Float[Tensor, "b h n d"], order: Int64[Tensor, "b h n"]) -> Float[Tensor, "b h n d"]:
    """What `take(y, order)` was made of, `order` being a permutation: token order[i] is x[i]."""
    return take(x, order.argsort(-1))
