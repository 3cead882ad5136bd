"""The U-Net of LaMamba-Diff: levels of blocks, halved and doubled in size, with sums across.

>>> model = LaMambaDiff(32, classes=10, depths=(2, 2), heads=4)
>>> noise, variance = model(torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([1, 2]))
>>> noise.shape
torch.Size([2, 4, 16, 16])
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.modulation import LabelEmbedding, TimeEmbedding
from chronotope.papers.linear.conditioning import sincos
from chronotope.papers.linear.lamamba import LaMambaBlock


class Level(nn.Module):
    """Blocks of one width, every second one with moved windows; the condition comes in the width of the model."""

    def __init__(self, dim: int, condition: int, depth: int, heads: int, window: int, states: int):
        super().__init__()
        self.project = nn.Linear(condition, dim)
        self.blocks = nn.ModuleList(
            LaMambaBlock(dim, heads, shift=i % 2 == 1, window=window, states=states) for i in range(depth)
        )

    def forward(self, x: Float[Tensor, "b c h w"], condition: Float[Tensor, "b one d"]) -> Float[Tensor, "b c h w"]:
        """The same size."""
        grid, steer = Grid(h=x.shape[2], w=x.shape[3]), self.project(condition)
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, grid, steer)
        return tokens.transpose(1, 2).unflatten(2, grid.shape)


class LaMambaDiff(nn.Module):
    """Noise and variance of noisy images [B, channels, H, W] at times [B] with labels [B].

    Args:
        dim: width of the first level; each further one is twice as wide.
        classes: number of labels; `classes` itself is the label for none.
        depths: blocks of each level; the last is the bottleneck, between two levels of every other.
        heads, window, states: as for `LaMambaBlock`, in all levels.
        channels: of an image; H and W are multiples of 2 for each level but the last.
    """

    def __init__(
        self, dim: int, classes: int, depths: Sequence[int] = (2, 2, 2, 2), heads: int = 8, window: int = 8,
        states: int = 1, channels: int = 4,
    ):  # fmt: skip
        super().__init__()
        widths = [dim * 2**i for i in range(len(depths))]
        self.enter, self.time, self.label = (
            nn.Conv2d(channels, dim, 1),
            TimeEmbedding(dim),
            LabelEmbedding(dim, classes),
        )

        def level(width: int, depth: int) -> Level:
            return Level(width, dim, depth, heads, window, states)

        self.down = nn.ModuleList(map(level, widths, depths))
        self.up = nn.ModuleList(map(level, widths[:-1], depths[:-1]))
        self.merge = nn.ModuleList(nn.Conv2d(w, 2 * w, 2, 2, bias=False) for w in widths[:-1])
        self.expand = nn.ModuleList(nn.Conv2d(2 * w, 4 * w, 1, bias=False) for w in widths[:-1])
        self.norm, self.leave = nn.GroupNorm(1, dim), nn.Conv2d(dim, 2 * channels, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], y: Int[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """(noise, variance), each of x's shape."""
        factor = 2 ** len(self.merge)
        if x.shape[2] % factor or x.shape[3] % factor:
            raise ChronotopeError(f"images of shape {list(x.shape)}: height and width must be multiples of {factor}.")
        condition = (self.time(t) + self.label(y))[:, None]
        x = self.enter(x)
        x = x + sincos(Grid(h=x.shape[2], w=x.shape[3]), x.shape[1], x.device).T.unflatten(1, x.shape[2:])
        skips = []
        for level, merge in zip(self.down, self.merge, strict=False):
            x = level(x, condition)
            skips.append(x)
            x = merge(x)
        x = self.down[-1](x, condition)
        for level, expand in zip(reversed(self.up), reversed(self.expand), strict=True):
            x = level(F.pixel_shuffle(expand(x), 2) + skips.pop(), condition)
        noise, variance = self.leave(self.norm(x)).chunk(2, 1)
        return noise, variance
