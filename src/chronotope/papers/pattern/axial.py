"""Axial Transformer: full attention along one axis at a time, and an image model that writes pixels in raster order.

    axial layer over axis a:   a query sees the keys equal to it on all OTHER axes      (`ct.along(a)`)
    masked:                    ... and not after it on a                                (`& ct.causal(a)`)

    base_t  = exterior(frames before t)                                    exterior: row, column, masked time layers
    u_r     = base + shift down by a row of outer(e + place + base)        outer: row, then masked column layers
    logits  = inner(shift right by a pixel of e, + u + place)              inner: masked row layers

So position (t, r, c) depends on exactly what comes before it, with no independence assumed between pixels.

Sizes: tokens [B, h, w] or [B, t, h, w]; logits [..., vocab]. A row and a column layer on n x n = N tokens score 2 N n
pairs, against N^2. Sampling computes base once per frame, u once per row, and the inner layers once per pixel.

    >>> model = AxialDecoder(ct.Grid(h=8, w=8), vocab=4, dim=32)
    >>> model(torch.zeros(1, 8, 8, dtype=torch.int64)).shape
    torch.Size([1, 8, 8, 4])

Left out: ImageNet-32/64 and BAIR results. Keys are not cached between pixels of a row. All frames train at once,
through attention masked along time, where the paper encodes the previous ones for one random frame per sample.

Paper: Ho et al. 2019, "Axial Attention in Multidimensional Transformers", arXiv 1912.12180.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, along, causal


def axial(axis: str, masked: bool = False) -> Pattern:
    """The pattern of one axial layer; masked: causal along the axis."""
    return along(axis) & causal(axis) if masked else along(axis)


def menu(grid: Grid) -> Pattern:
    """A row, a column and a time layer in one: the keys that differ on one axis at most."""
    first, *rest = (axial(axis) for axis in grid.axes)
    for other in rest:
        first = first | other
    return first


class AxialLayer(nn.Module):
    """Pre-norm axial attention and MLP with residuals. `init` scales what the residual branches write at first."""

    def __init__(self, dim: int, heads: int, axis: str, masked: bool = False, mlp: int = 1, init: float = 1.0):
        super().__init__()
        if dim % heads:
            raise ChronotopeError(f"AxialLayer: {dim} channels do not divide into {heads} heads.")
        self.heads, self.where = heads, axial(axis, masked)
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, mlp * dim), nn.GELU(), nn.Linear(mlp * dim, dim))
        with torch.no_grad():
            for last in (self.proj, self.mlp[-1]):
                last.weight.mul_(init)  # type: ignore[operator,union-attr]
                last.bias.zero_()  # type: ignore[operator,union-attr]

    def forward(self, x: Float[Tensor, "b t h w c"]) -> Float[Tensor, "b t h w c"]:
        """The layer on x, whose axes are named t, h, w."""
        grid = Grid(t=x.shape[1], h=x.shape[2], w=x.shape[3])
        q, k, v = self.qkv(self.norm(x)).flatten(1, 3).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v, grid=grid, where=self.where)
        x = x + self.proj(out.transpose(1, 2).flatten(2)).view_as(x)  # type: ignore[union-attr]
        return x + self.mlp(x)


@paper(
    system=154,
    name="Axial Transformer",
    family="pattern",
    claim="attention along one axis at a time, O(N n) per layer, and an exact raster-order image and video model of it",
    evidence=["tests/papers/pattern/test_axial.py"],
    menu=menu,
)
class AxialDecoder(nn.Module):
    """An autoregressive model of pictures [h, w] or videos [t, h, w] of tokens.

    Args:
        grid: axes h and w, or t, h and w.
        vocab: number of values of a token.
        dim, heads: channels and heads of every layer.
        exterior, outer, inner: layers of each kind (an outer layer is a row and a column layer). Published: 8 of each,
            2048 channels, 16 heads.
        init: scale of the residual branches and of the logits at first.
        columns: False puts row layers in place of the column layers, for comparison.
    """

    def __init__(
        self,
        grid: Grid,
        vocab: int,
        dim: int = 64,
        heads: int = 4,
        exterior: int = 1,
        outer: int = 1,
        inner: int = 1,
        init: float = 1e-10,
        columns: bool = True,
    ):
        super().__init__()
        if grid.axes not in (("h", "w"), ("t", "h", "w")) or grid.prefix:
            raise ChronotopeError(f"AxialDecoder on {grid!r}: expected the axes h, w or t, h, w, and no prefix.")
        self.grid, self.size = grid, (grid.sizes.get("t", 1), grid.sizes["h"], grid.sizes["w"])

        def stack(count: int, *kinds: tuple[str, bool]) -> nn.Sequential:
            return nn.Sequential(*(AxialLayer(dim, heads, *kind, init=init) for _ in range(count) for kind in kinds))

        self.embed, self.logits = nn.Embedding(vocab, dim), nn.Linear(dim, vocab)
        self.logits.weight.data.mul_(init)
        self.places = nn.ParameterList(0.02 * torch.randn(n, dim) for n in self.size)
        self.exterior = stack(exterior if "t" in grid.axes else 0, ("w", False), ("h", False), ("t", True))
        self.outer = stack(outer, ("w", False), ("h", True) if columns else ("w", False))
        self.inner = stack(inner, ("w", True))

    def forward(self, tokens: Int64[Tensor, "b *grid"]) -> Float[Tensor, "b *grid vocab"]:
        """The logits of every token given all before it in raster order."""
        return self.decode(self.embed(tokens))

    def decode(self, embedded: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid vocab"]:
        """`forward` from embeddings on."""
        e = embedded.view(len(embedded), *self.size, -1)
        place, base = self._place(), self._base(e)
        return self._pixels(e, self._upper(e, place, base), place).view(*embedded.shape[:-1], -1)

    @torch.no_grad()
    def sample(self, noise: Float[Tensor, "b *grid vocab"], fast: bool = True) -> Int64[Tensor, "b *grid"]:
        """Token after token, each argmax(logits + noise): Gumbel noise makes it a sample. Slow: the model per token."""
        given = noise.view(len(noise), *self.size, -1)
        tokens = torch.zeros(given.shape[:-1], dtype=torch.int64, device=noise.device)
        for t in range(self.size[0]):
            frame = slice(t, t + 1)
            place = self._place()[frame]
            base = self._base(self.embed(tokens))[:, frame] if fast else None
            for r in range(self.size[1]):
                row = slice(r, r + 1)
                upper = None if base is None else self._upper(self.embed(tokens[:, frame]), place, base)[:, :, row]
                for c in range(self.size[2]):
                    if upper is None:
                        logits = self(tokens.view(noise.shape[:-1])).view_as(given)[:, t, r, c]
                    else:
                        logits = self._pixels(self.embed(tokens[:, frame, row]), upper, place[:, row])[:, 0, 0, c]
                    tokens[:, t, r, c] = (logits + given[:, t, r, c]).argmax(-1)
        return tokens.view(noise.shape[:-1])

    def _place(self) -> Float[Tensor, "t h w c"]:
        t, h, w = self.places
        return t[:, None, None] + h[:, None] + w

    def _base(self, e: Float[Tensor, "b t h w c"]) -> Float[Tensor, "b t h w c"]:
        """What is known of the frames before; 0 in the first."""
        return F.pad(self.exterior(e + self._place()), (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]

    def _upper(
        self, e: Float[Tensor, "b t h w c"], place: Float[Tensor, "t h w c"], base: Float[Tensor, "b t h w c"]
    ) -> Float[Tensor, "b t h w c"]:
        """What is known of the frames before and the rows above."""
        return base + F.pad(self.outer(e + place + base), (0, 0, 0, 0, 1, 0))[:, :, :-1]

    def _pixels(
        self, e: Float[Tensor, "b t h w c"], upper: Float[Tensor, "b t h w c"], place: Float[Tensor, "t h w c"]
    ) -> Float[Tensor, "b t h w vocab"]:
        """The logits, row by row."""
        before = F.pad(e, (0, 0, 1, 0))[:, :, :, :-1]
        return self.logits(self.inner(before + upper + place))
