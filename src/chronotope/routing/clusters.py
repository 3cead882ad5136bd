"""Clusters of tokens by direction, whose centroids follow the tokens: online spherical k-means."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError

CHUNK = 64
"""Tokens that choose at once from what came before them."""

Tokens = Float[Tensor, "b h n d"]


class Clusters(nn.Module):
    """Centroids of unit length, K for each head; a token is nearest to that with which it has the largest product.

    `update` moves them by exponential averages, without gradients:

        mu_c <- unit(decay mu_c + (1 - decay) mean over the sets given of (sum of the unit tokens nearest to c))

    centroids [H, K, D]: a buffer. `seed`: of the directions before any token was seen.
    """

    centroids: Tensor

    def __init__(self, heads: int, clusters: int, dim: int, *, decay: float = 0.999, seed: int = 0):
        super().__init__()
        if min(heads, clusters, dim) < 1 or not 0 <= decay < 1:
            raise ChronotopeError(
                f"Clusters(heads={heads}, clusters={clusters}, dim={dim}, decay={decay}): expected sizes of 1 or more "
                "and 0 <= decay < 1."
            )
        self.decay = decay
        drawn = torch.randn(heads, clusters, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("centroids", F.normalize(drawn, dim=-1))

    def scores(self, x: Tokens) -> Float[Tensor, "b h k n"]:
        """The product of each centroid with each token. No gradient comes from it."""
        heads, _, dim = self.centroids.shape
        if x.shape[1] != heads or x.shape[3] != dim:
            raise ChronotopeError(f"Clusters: tokens {list(x.shape)}; expected [B, {heads}, N, {dim}].")
        exact = torch.promote_types(x.dtype, torch.float32)
        return self.centroids.to(exact) @ x.detach().to(exact).transpose(-1, -2)

    def nearest(self, x: Tokens) -> Int64[Tensor, "b h n"]:
        """The cluster of each token."""
        return self.scores(x).argmax(2)

    def members(self, x: Tokens, size: int, keep: Bool[Tensor, "b n"] | None = None) -> Int64[Tensor, "b h k size"]:
        """The `size` tokens nearest to each centroid, first come first; a token may be of several groups or of none.

        keep: False puts a token behind all others.
        """
        scores = self.scores(x)
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
        return scores.topk(min(size, x.shape[2]), dim=-1).indices.sort(-1).values

    def past(
        self, q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b h nk d"], size: int
    ) -> Int64[Tensor, "b h nq size"]:
        """For each query its own key, and of those before it the nearest to the query's centroid; -1: none.

        `size` keys in all. The queries are those of the last keys.
        """
        before, mine, scores = k.shape[2] - q.shape[2], self.nearest(q), self.scores(k)
        best = scores[..., :before].topk(min(size, before), dim=-1).indices
        out = []
        for start in range(0, q.shape[2], CHUNK):
            own = torch.arange(start, min(start + CHUNK, q.shape[2]), device=q.device)
            # What is nearest so far, and the tokens that come now: no other can be chosen from here on.
            near = torch.cat((best, (own + before).expand(*best.shape[:3], -1)), -1)
            reached = scores.gather(3, near)
            row = mine[:, :, own, None].expand(-1, -1, -1, near.shape[3])
            place, score = near.gather(2, row), reached.gather(2, row)
            now = (own + before)[:, None]
            score = score.masked_fill(place > now, -torch.inf).masked_fill(place == now, torch.inf)
            top = score.topk(min(size, near.shape[3]), dim=-1)
            chosen = place.gather(3, top.indices).masked_fill(top.values == -torch.inf, -1)
            out.append(F.pad(chosen, (0, size - chosen.shape[3]), value=-1))
            best = near.gather(3, reached.topk(min(size, near.shape[3]), dim=-1).indices)
        return torch.cat(out, 2)

    @torch.no_grad()
    def update(self, *sets: Tokens, keep: Bool[Tensor, "b n"] | None = None) -> None:
        """Moves the centroids towards the tokens nearest to them, of all members of the batch."""
        total = torch.zeros_like(self.centroids)
        for x in sets:
            of = F.one_hot(self.nearest(x), self.centroids.shape[1]).to(total)
            if keep is not None:
                of, x = of * keep[:, None, :, None], torch.where(keep[:, None, :, None], x, 0.0)
            total += torch.einsum("bhnk,bhnd->hkd", of, F.normalize(x.to(total), dim=-1)) / len(sets)
        self.centroids.copy_(F.normalize(self.decay * self.centroids + (1 - self.decay) * total, dim=-1))

    def extra_repr(self) -> str:
        return f"heads={self.centroids.shape[0]}, clusters={self.centroids.shape[1]}, decay={self.decay}"
