"""GC ViT: local windows, and windows that ask with queries made from the whole map.

    local block   out = softmax(q k^T / sqrt(d) + b) v    over the w x w window of the token
    global block  out = softmax(g k^T / sqrt(d) + b') v   the same, but query (y, x) is g[y mod w, x mod w]

The w x w tokens g are made once for a stage by `GlobalQuery` and shared by all its windows and global blocks. With
where = blocks(h=w, w=w) both are one call. Blocks alternate local, global; there is no shift.

Sizes: x [B, H, W, C]; g [B, heads, w * w, C / heads]; bias tables (2w - 1)^2 for each head. A map that the window does
not divide has shorter windows at its end, which is padding and masking without the padding. One block takes
2 w^2 H W C multiplications for scores and values and 4 (global: 3) H W C^2 for the projections.

    stage = GCViTStage(64, depth=2, heads=2, window=7, pools=2)
    stage(torch.randn(1, 28, 28, 64)).shape  # [1, 28, 28, 64]

Extensions: `adaptive_max_pool2d` lets maps through that do not halve to the window (the identity where they do), and
`q_global` of an earlier frame may be given to a stage. Left out: dropout, stochastic depth, ImageNet numbers.

Paper: Hatamizadeh et al., Global Context Vision Transformers, 2022 (arXiv 2206.09959).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.bias import RelativeBias
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper
from chronotope.patterns import blocks

Map = Float[Tensor, "b h w c"]
Queries = Float[Tensor, "b heads ww d"]


class WindowAttention(nn.Module):
    """Attention inside windows; `mode="global"` takes its queries from outside and has no query projection.

    dim: channels, a multiple of heads. window: side of a window in tokens. mode: "local" or "global".
    """

    def __init__(self, dim: int, heads: int, window: int, mode: str = "local"):
        super().__init__()
        if mode not in ("local", "global"):
            raise ChronotopeError(f"WindowAttention(mode={mode!r}): expected 'local' or 'global'.")
        if dim % heads:
            raise ChronotopeError(f"WindowAttention: {dim} channels do not split into {heads} heads; give a multiple.")
        self.heads, self.window, self.mode = heads, window, mode
        self.project = nn.Linear(dim, dim * (3 if mode == "local" else 2))
        self.bias = RelativeBias(heads, h=window - 1, w=window - 1)
        nn.init.trunc_normal_(self.bias.table, std=0.02)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Map, q_global: Queries | None = None) -> Map:
        """x [B, H, W, C] -> the same shape; q_global [B, heads, window^2, C / heads] in global mode, else unused."""
        grid = Grid(h=x.shape[1], w=x.shape[2])
        *q, k, v = self.project(x.flatten(1, 2)).unflatten(-1, (-1, self.heads, x.shape[3] // self.heads)).unbind(2)
        q = q[0].transpose(1, 2) if self.mode == "local" else self._shared(x, q_global, grid)
        near = blocks(h=self.window, w=self.window)
        out = attention(q, k.transpose(1, 2), v.transpose(1, 2), grid=grid, where=near, bias=self.bias)
        return self.out(out.transpose(1, 2).reshape(x.shape))  # type: ignore[union-attr]

    def _shared(self, x: Tensor, q_global: Tensor | None, grid: Grid) -> Tensor:
        """The global queries at every place of the grid: (y, x) asks with (y mod window, x mod window)."""
        expected = [x.shape[0], self.heads, self.window**2, x.shape[3] // self.heads]
        if q_global is None or list(q_global.shape) != expected:
            given = None if q_global is None else list(q_global.shape)
            raise ChronotopeError(
                f"WindowAttention: q_global is {given}, expected {expected}; make it with GlobalQuery."
            )
        y, z = (grid.coords(x.device) % self.window).unbind(1)
        return q_global[:, :, y * self.window + z]


class FusedConv(nn.Module):
    """x + conv1x1(SE(GELU(depthwise3x3(x)))) on [B, C, H, W]; SE gates channels by their mean, 1/4 as wide."""

    def __init__(self, dim: int):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.gate = nn.Sequential(
            nn.Linear(dim, dim // 4, bias=False), nn.GELU(), nn.Linear(dim // 4, dim, bias=False), nn.Sigmoid()
        )
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The map, refined."""
        y = F.gelu(self.depthwise(x))
        return x + self.pointwise(y * self.gate(y.mean((2, 3)))[:, :, None, None])


class Downsample(nn.Module):
    """LayerNorm, FusedConv, 3 x 3 convolution of stride 2, LayerNorm: [B, H, W, dim] -> [B, H / 2, W / 2, wide]."""

    def __init__(self, dim: int, wide: int):
        super().__init__()
        self.before, self.refine = nn.LayerNorm(dim), FusedConv(dim)
        self.reduce, self.after = nn.Conv2d(dim, wide, 3, stride=2, padding=1, bias=False), nn.LayerNorm(wide)

    def forward(self, x: Map) -> Float[Tensor, "b h2 w2 c2"]:
        """The map at half its size."""
        x = self.refine(self.before(x).permute(0, 3, 1, 2))
        return self.after(self.reduce(x).permute(0, 2, 3, 1))


class GlobalQuery(nn.Module):
    """[FusedConv, 3 x 3 max-pool of stride 2] `pools` times (one FusedConv alone for 0) -> queries for every window."""

    def __init__(self, dim: int, heads: int, window: int, pools: int):
        super().__init__()
        self.heads, self.window, self.pools = heads, window, pools
        self.refine = nn.ModuleList(FusedConv(dim) for _ in range(max(1, pools)))

    def forward(self, x: Map) -> Queries:
        """x [B, H, W, C] -> [B, heads, window^2, C / heads]."""
        x = x.permute(0, 3, 1, 2)
        for refine in self.refine:
            x = refine(x)
            x = F.max_pool2d(x, 3, stride=2, padding=1) if self.pools else x
        x = F.adaptive_max_pool2d(x, self.window)
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)


class GCViTBlock(nn.Module):
    """x + g1 * WindowAttention(LN x), then x + g2 * MLP(LN x); `layer_scale` is the start of g1 and g2, None: 1."""

    def __init__(self, dim: int, heads: int, window: int, mode: str, mlp: int = 3, layer_scale: float | None = None):
        super().__init__()
        self.norms = nn.ModuleList((nn.LayerNorm(dim), nn.LayerNorm(dim)))
        self.attend = WindowAttention(dim, heads, window, mode)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * mlp), nn.GELU(), nn.Linear(dim * mlp, dim))
        scale = torch.full((2, dim), 1.0 if layer_scale is None else layer_scale)
        self.scale = nn.Parameter(scale, requires_grad=layer_scale is not None)

    def forward(self, x: Map, q_global: Queries | None = None) -> Map:
        """x [B, H, W, C] -> the same shape."""
        x = x + self.scale[0] * self.attend(self.norms[0](x), q_global)
        return x + self.scale[1] * self.mlp(self.norms[1](x))


class GCViTStage(nn.Module):
    """`depth` blocks, local and global in turn, with one set of global queries. pools: see `GlobalQuery`."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        window: int,
        pools: int,
        mlp: int = 3,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.queries = GlobalQuery(dim, heads, window, pools)
        modes = ["local" if i % 2 == 0 else "global" for i in range(depth)]
        self.blocks = nn.ModuleList(GCViTBlock(dim, heads, window, mode, mlp, layer_scale) for mode in modes)

    def forward(self, x: Map, q_global: Queries | None = None) -> Map:
        """x [B, H, W, C] -> the same shape; q_global: queries of another frame in place of this map's own."""
        q_global = self.queries(x) if q_global is None else q_global
        for block in self.blocks:
            x = block(x, q_global)
        return x


@paper(
    system=173,
    name="GC ViT",
    family="pattern",
    claim="window attention whose every second block asks with queries pooled from the whole map, one set for all",
    evidence=["tests/papers/pattern/test_gcvit.py"],
)
class GCViT(nn.Module):
    """The classifier: stem, four stages at 1/4 to 1/32, mean, head. The defaults are GC ViT-Tiny at 224 x 224.

    small: dim=96, heads=(3, 6, 12, 24), mlp=2, layer_scale=1e-5.
    """

    def __init__(
        self,
        dim: int = 64,
        depths: tuple[int, ...] = (3, 4, 19, 5),
        heads: tuple[int, ...] = (2, 4, 8, 16),
        windows: tuple[int, ...] = (7, 7, 14, 7),
        pools: tuple[int, ...] = (3, 2, 0, 0),
        mlp: int = 3,
        layer_scale: float | None = None,
        classes: int = 1000,
    ):
        super().__init__()
        widths = [dim * 2**i for i in range(len(depths))]
        self.stem, self.shrink = nn.Conv2d(3, dim, 3, stride=2, padding=1), Downsample(dim, dim)
        each = zip(widths, depths, heads, windows, pools, strict=True)
        self.stages = nn.ModuleList(GCViTStage(*sizes, mlp, layer_scale) for sizes in each)
        self.between = nn.ModuleList(Downsample(a, b) for a, b in pairwise(widths))
        self.norm, self.head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        """image [B, 3, H, W] -> logits [B, classes]."""
        x = self.shrink(self.stem(image).permute(0, 2, 3, 1))
        for stage, shrink in zip(self.stages, [*self.between, nn.Identity()], strict=True):
            x = shrink(stage(x))
        return self.head(self.norm(x).mean((1, 2)))
