"""Attention as a layer: projections, position code, pattern; at once or slice by slice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.bias import Bias
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.causality import require_streamable
from chronotope.nn.mixer import Context, Mixer, require_placed, require_slice, require_tokens
from chronotope.nn.stepping import attend_slice
from chronotope.patterns import Pattern, full
from chronotope.position import Places, Rope
from chronotope.routing.decoding import decode
from chronotope.routing.pages import Pages, pages


@dataclass(frozen=True)
class AttentionState(Carried):
    """Keys and values of the slices that a coming slice may still look at.

    k [B, Hk, cached * slice, D], after norm and position code; v likewise. `time`: coordinate of the next slice on the
    first axis; the slices cached are the last ones before it.
    """

    k: Float[Tensor, "b hk n d"]
    v: Float[Tensor, "b hk n d"]
    time: int
    grid: Grid
    where: Pattern


class Attention(Mixer):
    """y = W_o attention(rope(norm(W_q x)), rope(norm(W_k x)), W_v x), over the keys that `where` lets a query see.

    Args:
        dim: channels of x.
        heads: query heads.
        where: who may look at whom; None: everybody. An attribute, which may be set to another pattern later.
        kv_heads: heads of keys and values, dividing `heads`; default: as many.
        head_dim: default dim / heads.
        position: a `ct.Rope`, or None.
        qk_norm: RMS norm of every query and key over its head, with learned weights (after Henry et al. 2020,
            arXiv 2010.04245).
        bias: a `ct.Bias` on coordinates, or None.
        softcap, backend: as for `ct.attention`.
        biases: whether the two projections add learned biases, as those of ViT and BERT do.

    Raises ChronotopeError: sizes that do not divide.

    Example:
        >>> layer = Attention(64, 4, where=window(t=(2, 0), h=5, w=5), position=Rope())
        >>> layer(torch.randn(1, 4 * 8 * 8, 64), Grid(t=4, h=8, w=8)).shape
        torch.Size([1, 256, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        where: Any = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        position: Rope | None = None,
        qk_norm: bool = False,
        bias: Bias | None = None,
        softcap: float | None = None,
        backend: str = "auto",
        biases: bool = False,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or (head_dim is None and dim % heads):
            raise ChronotopeError(
                f"Attention: dim={dim} is not a multiple of heads={heads}; give head_dim, or other sizes."
            )
        if kv_heads < 1 or heads % kv_heads:
            raise ChronotopeError(f"Attention: heads={heads} is not a multiple of kv_heads={kv_heads}.")
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.where, self.position, self.softcap, self.backend = where, position, softcap, backend
        if position is not None:
            position.pairs(self.head_dim)
        # One matrix for queries, keys and values: one pass over x where it attends to itself.
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=biases)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=biases)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.bias = bias

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None, *, coords: Places | None = None
    ) -> Float[Tensor, "b n c"]:
        """Self-attention of x on the grid; with context, attention of x over the context.

        coords: where the tokens of x are, for the position code: see `ct.Rope`. Not with a context.
        """
        q, k, v = self.project(x, grid, context, coords=coords)
        out = attention(
            q,
            k,
            v,
            grid=grid,
            key_grid=context[1] if isinstance(context, tuple) else grid,
            where=self.where,
            bias=self.bias,
            softcap=self.softcap,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return self.out(_joined(out))

    def project(
        self,
        x: Float[Tensor, "b n c"],
        grid: Grid,
        context: Context | None = None,
        *,
        time: int = 0,
        coords: Places | None = None,
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b hk nk d"], Float[Tensor, "b hk nk d"]]:
        """Queries, keys and values as attention takes them: after norm and position code.

        time: where x, without a context, starts on the first axis.
        """
        require_tokens(x, grid, self.dim, "x")
        if coords is not None:
            require_placed(self.placed, coords, "Attention")
        if context is None:
            return self._own(x, grid, time, coords)
        if coords is not None:
            raise ChronotopeError(
                "Attention: coords with a context, whose tokens would have none; give one of the two."
            )
        source, key_grid = context if isinstance(context, tuple) else (context, grid)
        require_tokens(source, key_grid, self.dim, "context")
        return self._over(x, grid, source, key_grid)

    def qk(
        self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b hk nk d"]]:
        """Queries and keys as they meet: after norm and position code."""
        return self.project(x, grid, context)[:2]

    @property
    def placed(self) -> tuple[str, ...]:
        return () if self.position is None else self.position.axes

    def init_state(self, batch: int, grid: Grid) -> AttentionState | Pages:
        """An empty cache, in pages where a route chooses among them.

        Raises ChronotopeError where `where` looks ahead on the first axis, or cannot be stepped.
        """
        require_slice(grid)
        if self.where is not None and not isinstance(self.where, Pattern):
            raise ChronotopeError(f"where={self.where!r} cannot be stepped: it is not a pattern of coordinates.")
        where = full() if self.where is None else self.where
        if where.routes:
            return self._pages(batch, grid, where)
        require_streamable(where, grid)
        empty = self.qkv.weight.new_empty(batch, self.kv_heads, 0, self.head_dim)
        return AttentionState(empty, empty, 0, grid, where)

    def step(
        self, x: Float[Tensor, "b s c"], state: AttentionState | Pages, *, coords: Places | None = None
    ) -> tuple[Float[Tensor, "b s c"], AttentionState | Pages]:
        """The next slice. Slices that the pattern's horizon rules out for all coming queries are dropped."""
        if state.where is not self.where and state.where != self.where:
            raise ChronotopeError(
                f"the state is for where={state.where!r}, the layer has {self.where!r}: call init_state again."
            )
        if isinstance(state, Pages):
            q, k, v = self.project(x, state.grid, time=state.length, coords=coords)
            out, state = decode(q, k, v, state, softcap=self.softcap)
            return self.out(_joined(out)), state
        q, k, v = self.project(x, state.grid, time=state.time, coords=coords)
        # Under autocast the new slice may be of a lower precision than the weights, whose dtype an empty cache has.
        k, v = torch.cat((state.k.to(k.dtype), k), 2), torch.cat((state.v.to(v.dtype), v), 2)
        out = attend_slice(q, k, v, state.time, state.grid, state.where, self.bias, self.softcap)
        horizon = state.where.horizon(state.grid.axes[0])
        spare = 0 if horizon is None else k.shape[2] - horizon * state.grid.size
        if spare > 0:
            # A copy, so that the slices before it can be freed.
            k, v = k[:, :, spare:].clone(), v[:, :, spare:].clone()
        return self.out(_joined(out)), replace(state, k=k, v=v, time=state.time + 1)

    def _pages(self, batch: int, grid: Grid, where: Pattern) -> Pages:
        if self.bias is not None:
            raise ChronotopeError(f"{where!r} with {self.bias!r} cannot be stepped: pages of keys take no bias.")
        sizes = {"batch": batch, "heads": self.heads, "kv_heads": self.kv_heads, "size": self.head_dim}
        return pages(where, grid, **sizes, dtype=self.qkv.weight.dtype, device=self.qkv.weight.device)

    def _own(self, x: Tensor, grid: Grid, time: int, coords: Places | None = None) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, : self.heads]), self.k_norm(qk[:, self.heads :])), 1)
        if self.position is not None:
            streams = time > 0 and grid.axes[0] in self.position.counted(coords)
            qk = self.position(qk, grid, coords=coords, offset={grid.axes[0]: time} if streams else None)
        q, k = qk.split((self.heads, self.kv_heads), 1)
        return q, k, v

    def _over(self, x: Tensor, grid: Grid, source: Tensor, key_grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        own = self.heads * self.head_dim
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x, weight[:own], None if bias is None else bias[:own])
        kv = F.linear(source, weight[own:], None if bias is None else bias[own:])
        q = q.unflatten(2, (self.heads, -1)).transpose(1, 2)
        kv = kv.unflatten(2, (2 * self.kv_heads, -1)).transpose(1, 2)
        k, v = kv.split(self.kv_heads, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.position is not None:
            places, key_places = self.position.between(grid, key_grid)
            q, k = self.position(q, grid, coords=places), self.position(k, key_grid, coords=key_places)
        return q, k, v

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.heads}, where={self.where!r}, kv_heads={self.kv_heads}, position={self.position!r}"


def _joined(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]."""
    return x.transpose(1, 2).flatten(2)
