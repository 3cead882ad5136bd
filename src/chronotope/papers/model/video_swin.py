r"""Video Swin for drivers: attention inside windows of space and time that shift by half from block to block.

$$
\mathrm{out}_p = \sum_{r \in W(p)} \mathrm{softmax}_r\!\Big(\frac{q_p k_r}{\sqrt d} + B_{r - p}\Big) v_r, \qquad
W(p) = \{ r : \lfloor (r - s) / (P, M, M) \rfloor = \lfloor (p - s) / (P, M, M) \rfloor \}
$$

with s = 0 in one block and (P, M, M) / 2, rounded down, in the next: windows that the border cuts are smaller, and
nothing wraps around it. B is a learned table of offsets for each head. A window that is longer than an axis is that
axis, and does not shift along it. Between stages, 2 x 2 places become one token; time is never merged. The mean of all
tokens is classified.

Sizes: clips [B, T, C, H, W] -> logits [B, classes]. Pairs: tokens times P M^2, at most.

    >>> model = VideoSwin(2, patch=(2, 2, 2), channels=1, dim=16, depths=(2, 2), heads=(2, 4), window=(2, 4, 4))
    >>> model(torch.rand(1, 4, 1, 16, 16)).shape
    torch.Size([1, 2])

The work that this page is about trained two such models on drivers, drowsy (2 classes) and distracted (9).

Left out: weights and training on NTHU-DDD and DMD (97.5% of distraction found; the model of drowsiness failed, as the
authors report). Unconfirmed: which Video Swin they took; defaults here are Swin-T. Streaming: windows see the future.

Paper: Samay Lakhani, "Applying Spatiotemporal Attention to Identify Distracted and Drowsy Driving with Vision
Transformers", 2022, arXiv 2207.12148; the mechanism: Liu et al. 2021, "Video Swin Transformer", arXiv 2106.13230.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from chronotope.attention import attention
from chronotope.bias import RelativeBias
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.attention import Attention
from chronotope.nn.block import Block
from chronotope.nn.mixer import Context, Whole
from chronotope.nn.patches import PatchEmbed
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, blocks
from chronotope.saving import Saved

AXES = ("t", "h", "w")
Three = Sequence[int]


def shifted_windows(grid: Grid, window: Three, shifted: bool) -> Pattern:
    """W of the formula on a grid over t, h, w."""
    grid.require(AXES, "shifted_windows")
    sizes = {axis: min(size, grid.sizes[axis]) for axis, size in zip(AXES, window, strict=True)}
    shift = {axis: -(size // 2) if shifted and size < grid.sizes[axis] else 0 for axis, size in sizes.items()}
    return blocks(shift=shift, **sizes)


class WindowAttention(Whole):
    """Attention in windows, with a table of relative places."""

    why = "its windows see later frames"

    def __init__(self, dim: int, heads: int, window: Three, shifted: bool):
        super().__init__()
        self.dim, self.window, self.shifted = dim, tuple(window), shifted
        reach = {axis: size - 1 for axis, size in zip(AXES, window, strict=True)}
        self.places = RelativeBias(heads, **reach)
        nn.init.trunc_normal_(self.places.table, std=0.02)
        self.inner = Attention(dim, heads, biases=True)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All frames at once. Takes no context."""
        q, k, v = self.inner.project(x, grid)
        where = shifted_windows(grid, self.window, self.shifted)
        out = attention(q, k, v, grid=grid, where=where, bias=self.places)
        assert isinstance(out, Tensor)
        return self.inner.out(out.transpose(1, 2).flatten(2))


class Merge(nn.Module):
    """2 x 2 neighbouring places of a frame as one token: W LN([x_00, x_10, x_01, x_11]); odd sizes get zeros."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> tuple[Float[Tensor, "b m out"], Grid]:
        """The tokens, and their grid."""
        t, h, w = grid.shape
        x = nn.functional.pad(x.unflatten(1, grid.shape), (0, 0, 0, w % 2, 0, h % 2))
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, t, h, 2, w, 2, C]
        x = x.permute(0, 1, 2, 4, 5, 3, 6).flatten(4)
        grid = Grid(t=t, h=x.shape[2], w=x.shape[3])
        return self.reduce(self.norm(x.flatten(1, 3))), grid


@paper(
    system=42,
    name="Video-Swin driver monitor",
    family="model",
    claim="windows of space and time that shift by half: linear in tokens, tells motions apart",
    evidence=["tests/papers/model/test_video_swin.py"],
)
class VideoSwin(Saved):
    """Logits of clips [B, T, C, H, W] of any length and size that the patch divides.

    Args:
        classes: how many.
        patch: (pt, ph, pw); channels: of a frame.
        dim: of the first stage; it doubles with each.
        depths, heads: blocks and heads of the stages.
        window: (P, M, M) tokens.
    """

    def __init__(
        self,
        classes: int,
        patch: Three = (2, 4, 4),
        channels: int = 3,
        dim: int = 96,
        depths: tuple[int, ...] | list[int] = (2, 2, 6, 2),
        heads: tuple[int, ...] | list[int] = (3, 6, 12, 24),
        window: Three = (8, 7, 7),
    ):
        super().__init__()
        if len(depths) != len(heads) or not depths:
            raise ChronotopeError(
                f"VideoSwin: depths={depths}, heads={heads}; give one number of each for every stage."
            )
        sizes = [dim * 2**stage for stage in range(len(depths))]
        self.embed = PatchEmbed(dim, tuple(patch), channels)  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(dim)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Block([WindowAttention(size, count, window, shifted=index % 2 == 1)], mlp="gelu")
                for index in range(depth)
            )
            for size, depth, count in zip(sizes, depths, heads, strict=True)
        )
        self.merges = nn.ModuleList(Merge(size, 2 * size) for size in sizes[:-1])
        self.last, self.head = nn.LayerNorm(sizes[-1]), nn.Linear(sizes[-1], classes)

    def forward(self, clips: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b classes"]:
        """Logits."""
        x, grid = self.embed(clips)
        x = self.norm(x)
        for index, stage in enumerate(self.stages):
            if index:
                x, grid = self.merges[index - 1](x, grid)
            for block in stage:  # type: ignore[attr-defined]
                x = block(x, grid)
        return self.head(self.last(x).mean(1))
