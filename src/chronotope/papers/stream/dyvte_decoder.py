"""A causal decoder layer of DyVTE, whose tokens say where they are and which of them may be seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.carried import Carried
from chronotope.grid import Grid
from chronotope.nn.feedforward import FeedForward
from chronotope.patterns import causal
from chronotope.position import Rope


@dataclass(frozen=True)
class Cache(Carried):
    """Keys and values of one layer, and which of them may be seen; None: all."""

    k: Float[Tensor, "b hk n d"]
    v: Float[Tensor, "b hk n d"]
    seen: Bool[Tensor, "b n"] | None


class Layer(Protocol):
    """A causal decoder layer that takes place ids, and which tokens may be seen as keys (None: all).

    With a cache, x is one token, which sees all that the cache holds and says may be seen.
    """

    def __call__(
        self, x: Tensor, ids: Tensor, seen: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Cache]: ...


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with a rotary code of the ids given: a `Layer`."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.rope = heads, Rope("n")
        self.norm, self.mlp_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = FeedForward(dim)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        ids: Int64[Tensor, "b n"],
        seen: Bool[Tensor, "b n"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "b n c"], Cache]:
        """All tokens of a prompt, or with a cache the next one."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        q, k = self.rope(q, coords=ids[..., None]), self.rope(k, coords=ids[..., None])
        if cache is not None:
            seen = None if cache.seen is None else F.pad(cache.seen, (0, x.shape[1]), value=True)
            k, v = torch.cat((cache.k, k), 2), torch.cat((cache.v, v), 2)
        bias = None if seen is None else _hidden(seen, q)
        where, grid, key_grid = causal() if cache is None else None, Grid(n=x.shape[1]), Grid(n=k.shape[2])
        out = attention(q, k, v, grid=grid, key_grid=key_grid, where=where, bias=bias)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), Cache(k, v, seen)


def _hidden(seen: Bool[Tensor, "b n"], like: Tensor) -> Float[Tensor, "b 1 1 n"]:
    return like.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None, None]
