"""Between clips of pixels and tokens on a grid."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid

Patch = int | tuple[int, int, int]


class PatchEmbed(nn.Module):
    """Every pt x ph x pw x channels patch of a clip, flattened, times one matrix: a token.

    Args:
        dim: channels of a token.
        patch: (pt, ph, pw), or p for (1, p, p).
        channels: channels of the clip.
        norm: whether a LayerNorm comes before the matrix and another one after it.

    Example:
        >>> embed = PatchEmbed(64, patch=4, channels=3)
        >>> x, grid = embed(torch.randn(2, 8, 3, 32, 24))
        >>> x.shape, grid
        (torch.Size([2, 384, 64]), Grid(t=8, h=8, w=6))

    Source: Arnab et al. 2021 (arXiv 2103.15691), tubelets.
    """

    def __init__(self, dim: int, patch: Patch = 4, channels: int = 1, *, norm: bool = False):
        super().__init__()
        self.patch, self.channels = whole_patch(patch), channels
        pt, ph, pw = self.patch
        size = channels * pt * ph * pw
        matrix = nn.Linear(size, dim)
        self.project = nn.Sequential(nn.LayerNorm(size), matrix, nn.LayerNorm(dim)) if norm else matrix

    def grid(self, clips: Tensor) -> Grid:
        """The grid of the tokens of clips [B, T, C, H, W]. Raises ChronotopeError where sizes do not divide."""
        if clips.ndim != 5 or clips.shape[2] != self.channels:
            raise ChronotopeError(f"clips of shape {list(clips.shape)}; expected [B, T, {self.channels}, H, W].")
        sizes = {"t": clips.shape[1], "h": clips.shape[3], "w": clips.shape[4]}
        for (axis, size), step in zip(sizes.items(), self.patch, strict=True):
            if size % step or size == 0:
                raise ChronotopeError(
                    f"clips of shape {list(clips.shape)}: {axis}={size} is not a multiple of the patch size {step} "
                    f"(patch={self.patch}); crop or pad to {max(1, size // step) * step}, or use another patch."
                )
        return Grid(**{axis: size // step for (axis, size), step in zip(sizes.items(), self.patch, strict=True)})

    def forward(self, clips: Float[Tensor, "b frames c height width"]) -> tuple[Float[Tensor, "b n dim"], Grid]:
        """The tokens, and their grid."""
        grid = self.grid(clips)
        (t, h, w), (pt, ph, pw) = grid.shape, self.patch
        x = clips.reshape(clips.shape[0], t, pt, self.channels, h, ph, w, pw)
        return self.project(x.permute(0, 1, 4, 6, 3, 2, 5, 7).reshape(clips.shape[0], grid.size, -1)), grid


class Unpatch(nn.Module):
    """The way back: every token times one matrix, laid out as a patch of the clip. Sizes as for `PatchEmbed`."""

    def __init__(self, dim: int, patch: Patch = 4, channels: int = 1):
        super().__init__()
        self.patch, self.channels = whole_patch(patch), channels
        pt, ph, pw = self.patch
        self.project = nn.Linear(dim, channels * pt * ph * pw)

    def forward(self, x: Float[Tensor, "b n dim"], grid: Grid) -> Float[Tensor, "b frames c height width"]:
        """Clips [B, t * pt, C, h * ph, w * pw] of tokens on Grid(t, h, w)."""
        if len(grid.shape) != 3 or grid.prefix or x.shape[1] != grid.size:
            raise ChronotopeError(f"Unpatch: {x.shape[1]} tokens on {grid!r}; expected three axes and no prefix.")
        (t, h, w), (pt, ph, pw) = grid.shape, self.patch
        x = self.project(x).view(x.shape[0], t, h, w, self.channels, pt, ph, pw)
        return x.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(x.shape[0], t * pt, self.channels, h * ph, w * pw)


def whole_patch(patch: Patch) -> tuple[int, int, int]:
    """(pt, ph, pw) of a patch size. Raises ChronotopeError where one is not a positive number."""
    sizes = (1, patch, patch) if isinstance(patch, int) else tuple(patch)
    if len(sizes) != 3 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ChronotopeError(f"patch={patch!r}: expected (pt, ph, pw), or one size p for (1, p, p), each 1 or more.")
    return sizes
