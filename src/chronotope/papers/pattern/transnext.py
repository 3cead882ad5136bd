"""TransNeXt: each query sees its neighbourhood finely and the whole image coarsely, under one softmax.

    q' = (l2(q) + e) * softplus(tau) * log(n_i)              n_i: keys that query i sees, local and pooled
    logits = [q' l2(K_near)^T + b_offset ; q' l2(K_pool)^T + cpb(place)]
    out = softmax(logits) [V_near ; V_pool]  +  sum over offsets o of (l2(q) T_o + c_o) V_near[o]

    K_pool, V_pool of LN(AvgPool(GELU(Conv1x1 x)));  cpb = MLP(sign(z) log2(1 + |z|) / 3), z = 8 (q - k) / (size - 1)

Near and pooled keys are two attentions joined by `ct.merge`; both share the key and value projection. The positional
tokens T add a weight after the softmax, so their term is linear and is summed offset by offset.

Sizes: x [B, H * W, C] on Grid(h=H, w=W); window odd; pool (ph, pw); e [heads, d], tau [heads], T [heads, d, window^2].
`pool=None` keeps all tokens as keys and no near part: the attention of the last stage. A fixed pool is the linear mode,
O(H W (window^2 + ph pw) C); `pool=(H // s, W // s)`, given in `forward`, is the mode that grows with the image.

    layer = FovealAttention(48, heads=2, pretrain=(14, 14), pool=(7, 7))
    layer(torch.randn(1, 196, 48), Grid(h=14, w=14)).shape  # [1, 196, 48]

Larger images: trained on 32 x 32, tested on 64 x 64 with shapes of the same size in pixels and a pooled map that grows,
accuracy holds where that of absolute places falls (the test; one seed). It does not hold everywhere: in trials that are
not kept it fell with shapes twice as large, more than that of absolute places, and with one shape and a fixed pool.

Left out: the CUDA kernels, the four-stage model with its overlapping patches, dropout; ImageNet, COCO, ADE20K.

Paper: Shi, TransNeXt: Robust Foveal Visual Perception for Vision Transformers, 2023 (arXiv 2311.17132).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.bias import Bias, RelativeBias
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.merge import merge
from chronotope.papers.registry import paper
from chronotope.patterns import window
from chronotope.planning import plan

Tokens = Float[Tensor, "b n c"]
Heads = Float[Tensor, "b heads n d"]


class LogCPB(Bias):
    """A 2-layer MLP (512, ReLU) of log-spaced relative places, for keys that are the means of pooled places.

    pretrain: (h, w) of the query map in training; places are divided by it, so other sizes extrapolate.
    """

    def __init__(self, heads: int, pretrain: tuple[int, int]):
        super().__init__()
        self.heads, self.pretrain = heads, pretrain
        self.mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, heads))

    def check(self, axes: tuple[str, ...]) -> None:
        if not {"h", "w"} <= set(axes):
            raise ChronotopeError(f"LogCPB is a bias over h and w, but the grid has the axes {list(axes)}.")

    def forward(self, q: Coords, k: Coords) -> Float[Tensor, "heads ..."]:
        """Scores of pairs; not aligned onto the key axis, which would round the places of the queries."""
        score = self.score(q, k)
        return torch.where(q.prefix | k.prefix, torch.zeros((), dtype=score.dtype, device=score.device), score)

    def score(self, q: Coords, k: Coords) -> Float[Tensor, "heads ..."]:
        like = next(self.mlp.parameters())
        axes, index = [], torch.zeros((), dtype=torch.int64, device=q.place.device)
        for axis, size in zip(("h", "w"), self.pretrain, strict=True):
            query = torch.arange(q.grid.sizes[axis], dtype=like.dtype, device=like.device)
            offsets = query[:, None] - F.adaptive_avg_pool1d(query[None, None], k.grid.sizes[axis])[0]
            # Few offsets are different, so the MLP sees each of them once and not each pair of places.
            offsets, which = offsets.unique(return_inverse=True)
            z = 8 * offsets / max(1, size - 1)
            axes.append(z.sign() * torch.log2(1 + z.abs()) / 3)
            index = index * len(z) + which[q.axes[axis], k.axes[axis]]
        # In pieces: the hidden layer of all places at once is larger than the cache.
        table = torch.cat([self.mlp(places) for places in torch.cartesian_prod(*axes).split(2048)]).T
        return table.index_select(1, index.flatten()).view(self.heads, *index.shape)


def key_counts(grid: Grid, side: int, pooled: int) -> Float[Tensor, "n 1"]:
    """n_i: places of the side x side window inside the image, plus the pooled keys."""
    counts = [
        torch.arange(n).add(side // 2).clamp(max=n - 1) - torch.arange(n).sub(side // 2).clamp(min=0) + 1
        for n in grid.shape
    ]
    return (counts[0][:, None] * counts[1] + pooled).flatten()[:, None].to(torch.get_default_dtype())


@paper(
    system=202,
    name="TransNeXt (Aggregated Attention)",
    family="pattern",
    claim="3 x 3 neighbours and a pooled map of the whole image under one softmax, length-scaled cosine scores",
    evidence=["tests/papers/pattern/test_transnext.py"],
)
class FovealAttention(nn.Module):
    """Aggregated attention, and for `pool=None` the length-scaled cosine attention of the last stage.

    dim: channels, a multiple of heads. pretrain: (h, w) of the map in training, the unit of the relative places.
    window: odd side of the neighbourhood, in tokens. pool: (ph, pw) of the coarse map; None: no pooling, all keys.
    positional_tokens: whether the weights after the softmax are there.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        pretrain: tuple[int, int],
        window: int = 3,
        pool: tuple[int, int] | None = (7, 7),
        positional_tokens: bool = True,
    ):
        super().__init__()
        if dim % heads:
            raise ChronotopeError(f"FovealAttention: {dim} channels do not split into {heads} heads; give a multiple.")
        self.heads, self.window, self.pool = heads, window, pool
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, 1, dim // heads), std=0.02))
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.exp(1 / 0.24) - 1)))
        self.coarse_bias = LogCPB(heads, pretrain)
        if pool is not None:
            self.coarsen, self.norm = nn.Conv2d(dim, dim, 1), nn.LayerNorm(dim)
            self.near_bias = RelativeBias(heads, h=window // 2, w=window // 2)
            nn.init.trunc_normal_(self.near_bias.table, std=0.0004)
            self.positional = positional_tokens
            if positional_tokens:
                tokens = torch.empty(heads, dim // heads, window**2)
                self.tokens = nn.Parameter(nn.init.trunc_normal_(tokens, std=0.02))
                self.weights = nn.Parameter(torch.zeros(heads, 1, window**2))

    def forward(self, x: Tokens, grid: Grid, pool: tuple[int, int] | None = None) -> Tokens:
        """x [B, H * W, C] on Grid(h=H, w=W) -> the same shape. pool: a coarse map of another size than in training."""
        if grid.prefix or grid.axes != ("h", "w") or x.shape[1] != grid.size:
            raise ChronotopeError(
                f"FovealAttention: {x.shape[1]} tokens on {grid!r}; expected H * W on Grid(h=H, w=W)."
            )
        if pool is not None and self.pool is None:
            raise ChronotopeError(
                f"FovealAttention(pool=None) has no coarse map, got pool={pool}; make it with a pool."
            )
        pool = pool or self.pool
        counts = (
            torch.full((1, 1), float(grid.size)) if pool is None else key_counts(grid, self.window, pool[0] * pool[1])
        )
        q = F.normalize(self._split(self.q(x)), dim=-1)
        scaled = (q + self.embedding) * F.softplus(self.temperature) * counts.to(x).log()
        k, v = self._keys(x)
        if pool is None:
            out = attention(scaled, k, v, grid=grid, bias=self.coarse_bias, scale=1.0)
        else:
            # Small tiles: the work per query stays the same on maps of every size.
            tile = {axis: min(self.window + 1, n) for axis, n in grid.sizes.items()}
            near = plan(window(h=self.window, w=self.window), grid, heads=self.heads, tile=tile)
            parts = [attention(scaled, k, v, grid=grid, where=near, bias=self.near_bias, scale=1.0, return_lse=True)]
            parts.append(self._coarse(scaled, x, grid, pool))
            out = merge(parts)[0]  # type: ignore[arg-type]
            out = out + self._positional(q, v, grid) if self.positional else out
        return self.out(out.transpose(1, 2).flatten(2))  # type: ignore[union-attr]

    def _split(self, x: Tokens) -> Heads:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _keys(self, x: Tokens) -> tuple[Heads, Heads]:
        k, v = self.kv(x).chunk(2, -1)
        return F.normalize(self._split(k), dim=-1), self._split(v)

    def _coarse(
        self, q: Heads, x: Tokens, grid: Grid, pool: tuple[int, int]
    ) -> tuple[Heads, Float[Tensor, "b heads n"]]:
        """(out, lse) over the pooled map."""
        image = F.gelu(self.coarsen(x.transpose(1, 2).unflatten(2, grid.shape)))
        pooled = self.norm(F.adaptive_avg_pool2d(image, pool).flatten(2).transpose(1, 2))
        key_grid, bias = Grid(h=pool[0], w=pool[1]), self.coarse_bias
        return attention(q, *self._keys(pooled), grid=grid, key_grid=key_grid, bias=bias, scale=1.0, return_lse=True)  # type: ignore[return-value]

    def _positional(self, q: Heads, v: Heads, grid: Grid) -> Heads:
        """sum over offsets o of (q T_o + c_o) V[place + o], nothing being outside the image."""
        weights, reach, side = q @ self.tokens + self.weights, self.window // 2, self.window
        image = F.pad(v.unflatten(2, grid.shape), (0, 0, *[reach] * 4))
        out = torch.zeros_like(v)
        for o in range(side**2):
            shifted = image[:, :, o // side :, o % side :][:, :, : grid.shape[0], : grid.shape[1]]
            out = out + weights[..., o : o + 1] * shifted.flatten(2, 3)
        return out


class ConvGLU(nn.Module):
    """W3 (GELU(depthwise3x3(W1 x)) * W2 x), its hidden width 2/3 of ratio * dim."""

    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        hidden = 2 * ratio * dim // 3
        self.up, self.down = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tokens, grid: Grid) -> Tokens:
        """x [B, H * W, C] on Grid(h=H, w=W) -> the same shape."""
        gate, value = self.up(x).chunk(2, -1)
        gate = self.mix(gate.transpose(1, 2).unflatten(2, grid.shape)).flatten(2).transpose(1, 2)
        return self.down(F.gelu(gate) * value)


class TransNeXtBlock(nn.Module):
    """x + FovealAttention(LN x), then x + ConvGLU(LN x); the arguments are those of `FovealAttention`."""

    def __init__(self, dim: int, heads: int, pretrain: tuple[int, int], ratio: int = 4, **options: object):
        super().__init__()
        self.norms = nn.ModuleList((nn.LayerNorm(dim), nn.LayerNorm(dim)))
        self.attend, self.mlp = FovealAttention(dim, heads, pretrain, **options), ConvGLU(dim, ratio)  # type: ignore[arg-type]

    def forward(self, x: Tokens, grid: Grid, pool: tuple[int, int] | None = None) -> Tokens:
        """x [B, H * W, C] -> the same shape."""
        x = x + self.attend(self.norms[0](x), grid, pool)
        return x + self.mlp(self.norms[1](x), grid)
