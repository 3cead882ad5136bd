"""BiFormer: regions of a map choose regions by their means; every token then looks at all tokens of those.

    A[I, J] = mean_I(q) . mean_J(k)         over all channels, so that all heads choose alike; no gradient
    out_s   = softmax(q_s k^T / sqrt(d)) v + LCE(v)_s        over the tokens of the `topk` best J, s in I

LCE is a depthwise convolution of the map of v. A region may leave out itself: only A decides.

Sizes: a map of h x w = N tokens in S x S regions, S = 7; C channels in heads of d. 3 N C^2 for projections, 2 C (S^2)^2
for A, 2 N C topk N / S^2 for attention; with the best S, O(N^(4/3)). A map that S does not divide has regions of
ceil(h / S) rows, fewer at its end, and empty ones are none: padding enters neither means nor keys. Regions of fewer
than 16 tokens are computed 16 tokens at a time: 1.27 times these multiplications on 14 x 14 with C = 256, topk 16.

    >>> layer = BiLevelRoutingAttention(32, heads=2, topk=4)
    >>> layer(torch.randn(1, 14 * 14, 32), ct.Grid(h=14, w=14)).shape
    torch.Size([1, 196, 32])

`bilevel` is the route alone. Regions that are frames can stream: bilevel(grid, 4, {"t": grid.sizes["t"]}) & causal("t")
chooses among past frames only.

Left out: results on ImageNet, COCO and ADE. Soft routing weights and pooling of keys in regions, which no released
model uses; drop path. The released models divide logits by the root of all channels, not of one head's
(`scale=dim**-0.5`), let padding enter means and keys, and have 8 heads in their last stage, where the convolution takes
the layer's input instead of v. With that changed, `biformer_model.BiFormer` has the logits of their code to 4e-7.

Paper: Zhu et al. 2023, "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023, arXiv 2303.08810.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Whole
from chronotope.nn.mixer import Context, require_tokens
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, full
from chronotope.routing.route import Blockwise, Cut, Dot, Impartial, Mean, Shared, TopK

REGIONS: Mapping[str, int] = {"h": 7, "w": 7}


def bilevel(grid: Grid, topk: int | None, regions: Mapping[str, int] = REGIONS) -> Pattern:
    """Tokens of a region look at the `topk` regions whose mean key answers its mean query best, for all heads alike.

    regions: their number by axis; an axis that is not named is not cut. topk None: everything.
    """
    grid.require(dict(regions), f"bilevel(regions={dict(regions)!r})")
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in regions.values()):
        raise ChronotopeError(f"bilevel(regions={dict(regions)!r}): expected numbers of regions, ints from 1 on.")
    if topk is None:
        return full()
    cut = Cut.of("bilevel", {axis: -(-grid.sizes[axis] // count) for axis, count in regions.items()})
    return Blockwise(cut, Impartial(TopK(topk)), Mean(), Shared(Dot(counted=False)))


@paper(
    system=36,
    name="BiFormer",
    family="routing",
    claim="regions choose the regions whose mean key answers their mean query best; dense attention inside the choice",
    evidence=["tests/papers/routing/test_biformer.py"],
)
class BiLevelRoutingAttention(Whole):
    """Projections, `bilevel`, and the local context of v, on a grid whose last axes are h, w.

    Args:
        dim, heads: channels, and heads that share them.
        topk: regions that a region looks at; None: all.
        regions: see `bilevel`; frames before h, w, if any, are one map each for the convolution.
        kernel: side of the depthwise convolution of v, an odd number; 0: none.
        scale: of the logits; default 1 / sqrt(dim / heads).
    """

    why = "regions look at regions anywhere in the map, and choose them by means over all of it"

    def __init__(
        self,
        dim: int,
        heads: int,
        topk: int | None,
        regions: Mapping[str, int] = REGIONS,
        kernel: int = 5,
        scale: float | None = None,
    ):
        super().__init__()
        if dim % heads:
            raise ChronotopeError(f"BiLevelRoutingAttention: {dim} channels do not divide into {heads} heads.")
        if kernel < 0 or (kernel and kernel % 2 == 0):
            raise ChronotopeError(f"BiLevelRoutingAttention(kernel={kernel}): expected an odd number, or 0.")
        self.dim, self.heads, self.topk, self.regions, self.scale = dim, heads, topk, dict(regions), scale
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.local = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim) if kernel else None

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """Attention of x over itself."""
        require_tokens(x, grid, self.dim, "x")
        if context is not None:
            raise ChronotopeError("BiLevelRoutingAttention looks at x only; leave out context.")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v, grid=grid, where=bilevel(grid, self.topk, self.regions), scale=self.scale)
        mixed = out.transpose(1, 2).flatten(2)  # type: ignore[union-attr]
        return self.out(mixed if self.local is None else mixed + self._near(v.transpose(1, 2).flatten(2), grid))

    def _near(self, v: Tensor, grid: Grid) -> Tensor:
        """The local context term, [B, N, C]."""
        if grid.prefix or grid.axes[-2:] != ("h", "w"):
            raise ChronotopeError(f"BiLevelRoutingAttention: {grid!r}; expected axes that end in h, w, and no prefix.")
        assert self.local is not None
        maps = v.view(-1, *grid.shape[-2:], self.dim).permute(0, 3, 1, 2)
        return self.local(maps).permute(0, 2, 3, 1).reshape(v.shape)
