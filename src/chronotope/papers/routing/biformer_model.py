"""The classifier of BiFormer: four stages of blocks with a depthwise position code, bi-level routing and an MLP."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from chronotope.grid import Grid
from chronotope.papers.routing.biformer import BiLevelRoutingAttention

Map = Float[Tensor, "b c h w"]


class BiFormerBlock(nn.Module):
    """x + conv3x3(x), then x + attention(LN x), then x + MLP(LN x), on maps [B, C, h, w]."""

    def __init__(self, dim: int, heads: int, topk: int | None, mlp: int = 3):
        super().__init__()
        self.place = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attend = BiLevelRoutingAttention(dim, heads, topk)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp * dim), nn.GELU(), nn.Linear(mlp * dim, dim))

    def forward(self, x: Map) -> Map:
        """The map, refined."""
        grid = Grid(h=x.shape[2], w=x.shape[3])
        y = (x + self.place(x)).flatten(2).transpose(1, 2)
        y = y + self.attend(self.norms[0](y), grid)
        y = y + self.mlp(self.norms[1](y))
        return y.transpose(1, 2).reshape(x.shape)


class BiFormer(nn.Module):
    """Images [B, 3, h, w] -> logits [B, classes], at 1/4, 1/8, 1/16, 1/32. The defaults are BiFormer-T.

    Small: depths=(4, 4, 18, 4). Base: the same with dim=96. Channels double at each stage, in heads of `head_dim`.
    """

    def __init__(
        self,
        dim: int = 64,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        topk: tuple[int | None, ...] = (1, 4, 16, None),
        head_dim: int = 32,
        mlp: int = 3,
        classes: int = 1000,
    ):
        super().__init__()
        widths = [dim * 2**i for i in range(len(depths))]
        self.stem = nn.Sequential(*_halve(3, dim // 2), nn.GELU(), *_halve(dim // 2, dim))
        self.shrink = nn.ModuleList(nn.Sequential(*_halve(a, b)) for a, b in pairwise(widths))
        self.stages = nn.ModuleList(
            nn.Sequential(*(BiFormerBlock(width, width // head_dim, keep, mlp) for _ in range(depth)))
            for width, depth, keep in zip(widths, depths, topk, strict=True)
        )
        self.norm, self.head = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        """Logits."""
        x = self.stem(image)
        for stage, shrink in zip(self.stages, [*self.shrink, nn.Identity()], strict=True):
            x = shrink(stage(x))
        return self.head(self.norm(x).mean((2, 3)))


def _halve(dim: int, wide: int) -> tuple[nn.Module, nn.Module]:
    """A convolution of stride 2 and its norm."""
    return nn.Conv2d(dim, wide, 3, stride=2, padding=1), nn.BatchNorm2d(wide)
