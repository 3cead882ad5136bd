"""The reader of the Spatially-Aware Transformer: attention inside the chunks of a memory that fit a query best."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention


class HierarchicalChunkAttention(nn.Module):
    """Attention inside the few chunks of a memory whose means fit the query best, weighted by how well they fit.

    Args:
        dim: channels of queries and memories.
        heads, head_dim: of the attention inside a chunk; choosing chunks has one head.
        chunk: tokens of a chunk; the first one is partial where they do not divide the memory.
        top: chunks read by each query.
    """

    def __init__(self, dim: int, heads: int = 2, head_dim: int | None = None, chunk: int = 32, top: int = 4):
        super().__init__()
        if chunk < 1 or top < 1 or heads < 1 or (head_dim is None and dim % heads):
            raise ChronotopeError(
                f"HierarchicalChunkAttention(dim={dim}, heads={heads}, chunk={chunk}, top={top}): expected numbers "
                "of 1 or more, and heads that divide dim, or a head_dim."
            )
        self.heads, self.chunk, self.top = heads, chunk, top
        inner = heads * (head_dim or dim // heads)
        self.summary_q, self.summary_k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.q, self.kv = nn.Linear(dim, inner, bias=False), nn.Linear(dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim)

    def forward(
        self,
        q: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c"],
        mask: Bool[Tensor, "b m"] | None = None,
        top: int | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Reads the memory; `mask`: the tokens that are there. A query that finds nothing there gets 0."""
        mask = memory.new_ones(memory.shape[:2], dtype=torch.bool) if mask is None else mask
        spare = -memory.shape[1] % self.chunk
        seen = F.pad(mask, (spare, 0)).unflatten(1, (-1, self.chunk))
        chunks = F.pad(memory.masked_fill(~mask[..., None], 0.0), (0, 0, spare, 0)).unflatten(1, (-1, self.chunk))
        weight, chosen = self.choose(q, chunks, seen, top)
        out = self.out(self._inside(q, chunks, seen, chosen))
        return (out * weight[..., None]).sum(2)

    def choose(
        self,
        q: Float[Tensor, "b n c"],
        chunks: Float[Tensor, "b m l c"],
        seen: Bool[Tensor, "b m l"],
        top: int | None = None,
    ) -> tuple[Float[Tensor, "b n top"], Int[Tensor, "b n top"]]:
        """Weights and numbers of the chunks that each query reads."""
        mean = chunks.sum(2) / seen.sum(2).clamp(min=1)[..., None]
        scores = self.summary_q(q) @ self.summary_k(mean).mT / math.sqrt(q.shape[2])
        scores = scores.masked_fill(~seen.any(2)[:, None], torch.finfo(scores.dtype).min)
        best, chosen = scores.topk(min(top or self.top, scores.shape[2]))
        there = seen.any(2)[:, None].expand_as(scores).gather(2, chosen)
        return best.softmax(-1) * there, chosen

    def _inside(
        self, q: Tensor, chunks: Tensor, seen: Bool[Tensor, "b m l"], chosen: Int[Tensor, "b n top"]
    ) -> Float[Tensor, "b n top inner"]:
        """Attention of every query inside each of its chunks: one small problem for each pair."""
        rows = torch.arange(len(q), device=q.device)[:, None, None]
        k, v = (
            x[rows, chosen].flatten(0, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in self.kv(chunks).chunk(2, -1)
        )
        queries = self.q(q)[:, :, None].expand(*chosen.shape, -1).flatten(0, 2).unflatten(-1, (self.heads, 1, -1))
        # A chunk without tokens has weight 0 later; a softmax over nothing would be NaN before that.
        seen = (seen | ~seen.any(2, keepdim=True))[rows, chosen].flatten(0, 2)
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)[:, None, None]
        out = attention(queries, k, v, grid=Grid(n=1), key_grid=Grid(n=self.chunk), bias=bias)
        return out.reshape(*chosen.shape, -1)


class ReaderLayer(nn.Module):
    """q = q + attention(norm(q)); q = q + chunks(norm(q)); q = q + mlp(norm(q)), over an unchanging memory."""

    def __init__(self, dim: int, heads: int, chunk: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.own = Attention(dim, heads)
        self.memory = HierarchicalChunkAttention(dim, heads, chunk=chunk)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(
        self, q: Float[Tensor, "b n c"], memory: Float[Tensor, "b m c"], mask: Bool[Tensor, "b m"], top: int
    ) -> Float[Tensor, "b n c"]:
        """The queries after one look at the memory."""
        q = q + self.own(self.norms[0](q), Grid(n=q.shape[1]))
        q = q + self.memory(self.norms[1](q), memory, mask, top)
        return q + self.mlp(self.norms[2](q))  # type: ignore[no-any-return]
