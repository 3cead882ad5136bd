"""Routing Transformer: tokens attend to those of their cluster; centroids follow the tokens by online k-means.

    q, k <- LayerNorm without weights: all on one sphere;  causal layers share them, k <- q
    group c = the w tokens with the largest mu_c . q, and the w with the largest mu_c . k, in order of position
    out_i = mean over the groups of i of softmax(q_i k^T / sqrt(D)) v in the group;  0 for a token of no group
    mu_c <- unit(lambda mu_c + (1 - lambda) (sum of the unit q nearest to c + of the unit k) / 2)

Half of the heads route, the others attend to a window around. No gradient passes through the choice of groups.

Causal, the w best of the WHOLE sequence let the future speak: whether token i is of a group depends on all others.
That is how the paper is written (`routing_attention(causal=True)`, `RoutingAttention(prefix=False)`). The layer's own
way is `prefix_attention`: each query looks at itself and the w - 1 tokens before it that are nearest to its centroid.
The released code decodes likewise among what came before, but in every group of which the new token then is.

Sizes: q, k, v [B, H, N, D], K centroids for each head; O(N K D + N w D), with K = N / w = sqrt(N) O(N^1.5 D).

Example:
    >>> layer = RoutingAttention(64, 8, local=ct.window(n=(31, 0)), clusters=16, window=32, causal=True)
    >>> layer(torch.randn(2, 512, 64), ct.Grid(n=512)).shape
    torch.Size([2, 512, 64])

Left out: relative position codes in routing heads; which layers of the trained models route (the caller builds them).
The algorithm of the paper scatters groups back and does not say what becomes of a token met more than once: the
released code (google-research, routing_transformer/utils.py at 0c1bbe5) divides their sum by count + 0.01, and so gives
a token of one group 0.99 of its output; here it is the mean. That code also divides the sum of a cluster by the average
number of its tokens instead of bringing it to unit length, and its logits are q k^T (`scale=1`).

Paper: Roy, Saffar, Vaswani, Grangier 2020, "Efficient Content-Based Sparse Attention with Routing Transformers",
arXiv 2003.05997.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.causality import require_streamable
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.nn.stepping import attend_slice
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern
from chronotope.patterns import causal as before
from chronotope.routing import route
from chronotope.routing.tokens import take

Heads = Float[Tensor, "b h n d"]


def sphere(x: Heads) -> Heads:
    """Mean 0 and length sqrt(D), so that the nearest centroid is that with the largest product."""
    return F.layer_norm(x, x.shape[-1:])


def routing_attention(
    q: Heads,
    k: Heads | None,
    v: Float[Tensor, "b h n dv"],
    clusters: route.Clusters,
    window: int,
    *,
    causal: bool = False,
    keep: Bool[Tensor, "b n"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n dv"]:
    """Attention inside of groups of `window` tokens, the mean where a token is of several, 0 where it is of none.

    Args:
        q, v: queries and values; they need not lie on the sphere.
        k: keys; None: the queries are the keys too.
        clusters: the centroids, as many heads as q. They are not moved: see `Clusters.update`.
        window: tokens of a group.
        causal: tokens of a group see those before them. The groups are those of the whole sequence even so.
        keep: False leaves a key out, and a token out of all groups while there are others.
        scale: default 1 / sqrt(D).
    """
    queries = sphere(q)
    keys = queries if k is None else sphere(k)
    mine = clusters.members(queries, window, keep)
    theirs = mine if k is None else clusters.members(keys, window, keep)
    gathered = (_groups(x, index) for x, index in ((queries, mine), (keys, theirs), (v, theirs)))
    where = _inside(mine, theirs, causal, keep)
    out, lse = attention(*gathered, grid=Grid(n=mine.shape[3]), where=where, scale=scale, return_lse=True)
    sees = (lse > -torch.inf).to(out).view(*mine.shape[:2], -1, 1)
    at = mine.flatten(2)[..., None]
    total = torch.zeros_like(v).scatter_add(2, at.expand(-1, -1, -1, v.shape[3]), out.view(*sees.shape[:3], -1))
    count = torch.zeros_like(v[..., :1]).scatter_add(2, at, sees)
    return total / count.clamp(min=1)


def prefix_attention(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b h nk d"] | None,
    v: Float[Tensor, "b h nk dv"],
    clusters: route.Clusters,
    window: int,
    *,
    scale: float | None = None,
) -> Float[Tensor, "b h nq dv"]:
    """Each query over its own key and the keys before it that are nearest to its centroid, `window` in all.

    As `routing_attention`, but nothing of a query's future decides what it sees; padding at the end needs no mask. The
    queries are those of the last keys.
    """
    queries = sphere(q)
    keys = queries if k is None else sphere(k)
    return route.gathered(queries, keys, v, clusters.past(queries, keys, window), scale=scale)[0]


def _groups(x: Float[Tensor, "b h n d"], index: Int64[Tensor, "b h k w"]) -> Float[Tensor, "b hk w d"]:
    """The tokens of each group, groups as heads."""
    return take(x, index.flatten(2)).unflatten(2, index.shape[2:]).flatten(1, 2)


def _inside(
    mine: Int64[Tensor, "b h k w"], theirs: Int64[Tensor, "b h k w"], ordered: bool, keep: Tensor | None
) -> Pattern | None:
    """Who looks at whom in a group."""
    if keep is None and (not ordered or mine is theirs):
        return before() if ordered else None
    place = theirs[..., None, :].expand(*mine.shape, -1)
    seen = place <= mine[..., None] if ordered else torch.ones_like(place, dtype=torch.bool)
    if keep is not None:
        batch = torch.arange(len(keep), device=keep.device)[:, None, None, None]
        seen = seen & keep[batch, theirs][..., None, :]
    return route.chosen(seen.flatten(1, 2), n=1)


@dataclass(frozen=True)
class RoutingState(Carried):
    """Keys and values of all tokens so far, routing heads first. `time`: slices so far; `grid`: of one."""

    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n d"]
    time: int
    grid: Grid


@paper(
    system=18,
    name="Routing Transformer",
    family="routing",
    claim="tokens attend inside of clusters of content that online spherical k-means finds, in O(n^1.5)",
    evidence=["tests/papers/routing/test_routing_transformer.py"],
)
class RoutingAttention(Mixer):
    """y = W_o [heads that route, heads that look around].

    In training, each forward moves the centroids after they were used.

    Args:
        dim, heads: channels of x; heads, dividing dim.
        local: what the local heads see; joined with `causal()` where the layer is causal.
        clusters, window: centroids of a head, and tokens of a group.
        routing: heads that route; default half of them.
        causal: tokens see those before them, in token order; routing heads then use their queries as keys.
        prefix: a causal choice is made among what came before; False: the groups are those of the whole sequence.
        decay: lambda of the centroids.
        seed: of the first centroids.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        local: Pattern,
        clusters: int,
        window: int,
        routing: int | None = None,
        causal: bool = False,
        prefix: bool = True,
        decay: float = 0.999,
        seed: int = 0,
    ):
        super().__init__()
        routing = heads // 2 if routing is None else routing
        if heads < 1 or dim % heads or not 1 <= routing <= heads or window < 1:
            raise ChronotopeError(
                f"RoutingAttention(dim={dim}, heads={heads}, routing={routing}, window={window}): heads must divide "
                "dim, 1 <= routing <= heads, and a window has 1 token or more."
            )
        self.dim, self.heads, self.routing, self.window = dim, heads, routing, window
        self.causal, self.prefix = causal, causal and prefix
        self.local = local & before() if causal else local
        size = dim // heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim - (routing * size if causal else 0), bias=False)
        self.v, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.clusters = route.Clusters(routing, clusters, size, decay=decay, seed=seed)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("RoutingAttention takes no context: its clusters are of the tokens themselves.")
        require_tokens(x, grid, self.dim, "x")
        q, k, v = self._project(x)
        r = self.routing
        if self.prefix:
            routed = prefix_attention(q[:, :r], k[:, :r], v[:, :r], self.clusters, self.window)
        else:
            own = None if self.causal else k[:, :r]
            routed = routing_attention(q[:, :r], own, v[:, :r], self.clusters, self.window, causal=self.causal)
        if self.training:
            self.clusters.update(*(sphere(x[:, :r]) for x in ((q,) if self.causal else (q, k))))
        parts = [routed]
        if r < self.heads:
            parts.append(attention(q[:, r:], k[:, r:], v[:, r:], grid=grid, where=self.local))
        return self._leave(parts)

    def init_state(self, batch: int, grid: Grid) -> RoutingState:
        """No token yet. Raises ChronotopeError where a group depends on tokens to come."""
        require_slice(grid)
        if not self.prefix:
            raise ChronotopeError(
                "RoutingAttention cannot be stepped: its groups are the best of the whole sequence. "
                "Use causal=True, prefix=True."
            )
        require_streamable(self.local, grid)
        empty = self.out.weight.new_empty(batch, self.heads, 0, self.dim // self.heads)
        return RoutingState(empty, empty, 0, grid)

    def step(self, x: Float[Tensor, "b s c"], state: RoutingState) -> tuple[Float[Tensor, "b s c"], RoutingState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        q, k, v = self._project(x)
        k, v, r = torch.cat((state.k, k), 2), torch.cat((state.v, v), 2), self.routing
        parts = [prefix_attention(q[:, :r], k[:, :r], v[:, :r], self.clusters, self.window)]
        if r < self.heads:
            looks = (q[:, r:], k[:, r:], v[:, r:], state.time, state.grid, self.local)
            parts.append(attend_slice(*looks, None, None))
        return self._leave(parts), replace(state, k=k, v=v, time=state.time + 1)

    def _project(self, x: Float[Tensor, "b n c"]) -> tuple[Heads, Heads, Heads]:
        """q, k, v of all heads, routing heads first."""
        size = self.dim // self.heads
        q, k, v = (part(x).unflatten(2, (-1, size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return q, torch.cat((q[:, : self.routing], k), 1) if self.causal else k, v

    def _leave(self, parts: list[Tensor]) -> Float[Tensor, "b n c"]:
        return self.out(torch.cat(parts, 1).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
