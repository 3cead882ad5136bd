"""Sparsifiner: each head predicts for each image which tokens look at which, and looks at those alone.

    coef = softmax(W_q q (W_down^T W_k k)^T / sqrt(c))      [N, r], of which the `terms` largest are kept
    score = coef W_up                                       [N, N], entries of W_up of at most `floor` being 0
    mask_i = the ceil(keep N) best of score_i;  y = softmax(q k^T / sqrt(D) over the mask) v

The first `dense` tokens (class token) look at all. The mask has no gradient: the predictor learns from
`reconstruction`, the mean square error of coef W_up (all terms and entries) and the true map.

Sizes: x [B, N, C], N fixed; r = floor(N / reduce), c = D / 2. Products of queries and keys, and of weights and values,
fall to keep N^2 each; the predictor takes 2 N D c + 2 N c r and `terms` rows of W_up for each query. At N = 197, D = 64
that is 74% fewer of those products, and 47% where the predictor's are counted too, half of W_up being 0.

    >>> layer = Sparsifiner(64, 4, tokens=65)
    >>> grid = ct.Grid(prefix=1, h=8, w=8)
    >>> x = torch.randn(2, grid.size, 64)
    >>> layer(x, grid).shape, layer.mask(x, grid).sum(-1)[0, 0, :3]
    (torch.Size([2, 65, 64]), tensor([65, 17, 17]))

Left out: token pruning (an option of the paper); the accuracy on ImageNet is not shown; scores are computed by a dense
product with zeros in it. The authors' code scales the cheap scores by heads^-1/2, here by c^-1/2 as attention is, and
takes the size of entries of W_up when it chooses and their sign when it learns; here both times the sign.

Paper: Wei et al. 2023, "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
arXiv 2303.13755.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Whole, require_tokens
from chronotope.papers.registry import paper
from chronotope.routing.gathered import gathered
from chronotope.routing.predictors import LowRank
from chronotope.routing.selections import kept_of, require_keep


@paper(
    system=87,
    name="Sparsifiner",
    family="routing",
    claim="a learned low-rank predictor says which keys each query keeps, without the products of queries and keys",
    evidence=["tests/papers/routing/test_sparsifiner.py"],
)
class Sparsifiner(Whole):
    """y = W_o attention(q, k, v), each query over the keys that its head predicts to matter.

    Args:
        dim, heads: channels and heads.
        tokens: N, prefix included; each has its place in the predictor.
        keep: keys of a query, a share (float) or a number (int).
        reduce: N / r.
        terms: learned rows that are mixed for one query.
        floor: entries of learned rows that count as 0 in the choice.
        dense: first tokens that look at all.

    `sparse`: an attribute; False computes dense attention, as in the epochs in which the predictor learns.
    """

    why = "its predictor mixes all tokens"

    def __init__(
        self,
        dim: int,
        heads: int,
        tokens: int,
        keep: float | int = 0.25,
        reduce: int = 6,
        terms: int = 8,
        floor: float = 0.02,
        dense: int = 1,
    ):
        super().__init__()
        require_keep(keep)
        if heads < 1 or dim % heads or not 0 <= dense <= tokens or reduce < 1:
            raise ChronotopeError(
                f"Sparsifiner(dim={dim}, heads={heads}, tokens={tokens}, reduce={reduce}, dense={dense}): expected dim "
                "a multiple of heads, reduce from 1 on, and no more dense tokens than there are."
            )
        self.dim, self.heads, self.keep, self.dense, self.sparse = dim, heads, keep, dense, True
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.predict = LowRank(tokens, dim // heads, max(1, tokens // reduce), terms=terms, floor=floor)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("Sparsifiner takes no context: its predictor knows the places of its own tokens.")
        q, k, v = self.project(x, grid)
        # The first rows see everything, the others their lists.
        split = self.dense if self.sparse else grid.size
        parts = []
        if split:
            parts.append(attention(q[:, :, :split], k, v, grid=Grid(n=split), key_grid=Grid(n=grid.size)))
        if split < grid.size:
            parts.append(gathered(q[:, :, split:], k, v, self.choose(q, k)[:, :, split:])[0])
        return self.out(torch.cat(parts, 2).transpose(1, 2).flatten(2))

    def project(self, x: Float[Tensor, "b n c"], grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, [B, H, N, D] each."""
        require_tokens(x, grid, self.dim, "x")
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    @torch.no_grad()
    def choose(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Int64[Tensor, "b h n keep"]:
        """The keys that each query keeps; those of the dense ones count for nothing."""
        return self.predict.scores(q, k).topk(self.budget, dim=-1).indices

    @property
    def budget(self) -> int:
        """Keys of a query."""
        return int(kept_of(self.keep, torch.tensor(self.predict.tokens)))

    @torch.no_grad()
    def mask(self, x: Float[Tensor, "b n c"], grid: Grid) -> Bool[Tensor, "b h n n"]:
        """Who sees whom: what `ct.route.chosen(mask, n=1)` takes on Grid(n=N)."""
        q, k, _ = self.project(x, grid)
        out = torch.zeros(*q.shape[:3], grid.size, dtype=torch.bool, device=x.device)
        out.scatter_(3, self.choose(q, k), True)
        out[:, :, : self.dense] = True
        return out

    def reconstruction(
        self, x: Float[Tensor, "b n c"], grid: Grid, truth: Float[Tensor, "b h n n"] | None = None
    ) -> Float[Tensor, ""]:
        """The mean square error of the predicted maps of all but dense tokens.

        truth: maps of a teacher; None: the layer's own, on which nothing is changed for the predictor's sake. The
        authors weigh the sum over entries by 0.01.
        """
        q, k, _ = self.project(x, grid)
        if truth is None:
            q, k = q.detach(), k.detach()
            truth = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[3])).softmax(-1)
        return (self.predict(q, k) - truth)[:, :, self.dense :].square().mean()
