"""TiC (MSA-Conv): self-attention inside the window of a convolution.

A k x k window slides over the map with stride, padding and dilation; output o of the window W(o) is, head by head,

    emit="center"   softmax(q_c K^T / sqrt(d)) V over the keys of W(o), c the window's middle token
    emit="mean"     the mean of that over all queries of W(o)
    emit="fold"     every query's result added back at its own place, over the number of windows that hold the place

Padding places are masked keys, never values. Projections are shared by all windows and nothing has the size of the map,
so any map fits. `shift_groups=g` rolls g groups of channels by half the map in different directions before the windows
and back after, so that one block links opposite borders.

Sizes: x [B, C, H, W] -> [B, C, H', W'], H' = floor((H + 2 p - dil (k - 1) - 1) / stride) + 1; work O(H' W' k^2 C) for
"center", k^2 times that for the other two. "fold" gives [B, C, H, W].

    >>> layer = WindowedSelfAttention(32, kernel=3, padding=1, heads=4)
    >>> layer(torch.randn(2, 32, 16, 20)).shape
    torch.Size([2, 32, 16, 20])

Left out: the ImageNet-1K comparison, the inter-pooling between blocks (its operator is not known to us), the depth-wise
variant beyond heads=C, time axes and streaming. Which of the three outputs, and which shifts, the paper takes is not
known to us either.

Paper: Zhang et al. 2023, "TiC: Exploring Vision Transformer in Convolution", arXiv 2310.04134.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, window

EMITS = ("center", "mean", "fold")


def menu(grid: Grid) -> Pattern:
    """The keys of a query at the centre of its window, 7 on each axis of space and 3 frames."""
    return window(edge="clip", dilation=1, **{axis: 3 if axis == "t" else 7 for axis in grid.axes})


@paper(
    system=200,
    name="TiC",
    family="pattern",
    claim="self-attention inside the sliding window of a convolution, for maps of any size, at linear cost",
    evidence=["tests/papers/pattern/test_tic.py"],
    menu=menu,
)
class WindowedSelfAttention(nn.Module):
    """MSA-Conv: a layer with the sizes of a convolution that attends within its window.

    Args:
        channels: channels in and out.
        kernel, stride, padding, dilation: as in `torch.nn.Conv2d`, one number for both axes.
        heads: number of heads; a divisor of the channels.
        emit: "center" (odd kernels), "mean" or "fold".
        shift_groups: 1 to 4 groups of channels; the second and later ones are rolled along w, h, and both.
    """

    def __init__(
        self,
        channels: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        heads: int = 1,
        emit: str = "center",
        shift_groups: int = 1,
    ):
        super().__init__()
        if emit not in EMITS or (emit == "center" and kernel % 2 == 0):
            raise ChronotopeError(
                f"emit={emit!r} with kernel={kernel}: one of {', '.join(EMITS)}; a centre needs an odd kernel."
            )
        if not 1 <= shift_groups <= 4 or channels % heads or channels % shift_groups:
            raise ChronotopeError(
                f"{channels} channels, heads={heads}, shift_groups={shift_groups}: both must divide the channels, "
                "and there are 1 to 4 groups."
            )
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation
        self.heads, self.emit, self.shift_groups = heads, emit, shift_groups
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """The layer on a map that holds at least one window. Raises ChronotopeError where it does not."""
        height, width = x.shape[2:]
        if min(height, width) + 2 * self.padding < self.dilation * (self.kernel - 1) + 1:
            raise ChronotopeError(
                f"a map of {height} x {width} is smaller than a window: use more padding or a smaller kernel."
            )
        x = self._shifted(x, 1)
        q, k, v = self.qkv(x.movedim(1, -1)).movedim(-1, 1).chunk(3, 1)
        if self.emit == "center" and self.stride == 1 and self.padding == self.dilation * (self.kernel // 2):
            return self._shifted(self._project(self._in_place(q, k, v)), -1)
        inside = self._unfold(torch.ones_like(x[:1, :1]))[:, 0].bool()
        out = self._emit(self._heads(q, k, v, inside), inside, (height, width))
        return self._shifted(self._project(out), -1)

    def _project(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.proj(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]

    def _in_place(
        self, q: Float[Tensor, "b c h w"], k: Float[Tensor, "b c h w"], v: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """One query for each place, in the middle of its window: a pattern, and no copies of the windows."""
        grid = Grid(h=q.shape[2], w=q.shape[3])
        parts = [x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3) for x in (q, k, v)]
        where = window(h=self.kernel, w=self.kernel, dilation=self.dilation)
        return attention(*parts, grid=grid, where=where).transpose(2, 3).reshape(q.shape)  # type: ignore[misc,union-attr]

    def _unfold(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c k2 windows"]:
        """The tokens of every window; 0 outside the map."""
        columns = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        return columns.unflatten(1, (x.shape[1], self.kernel**2))

    def _heads(
        self, q: Tensor, k: Tensor, v: Tensor, inside: Bool[Tensor, "one k2 windows"]
    ) -> Float[Tensor, "b windows n c"]:
        """Attention of the queries that `emit` needs, window by window, over the keys inside the map."""
        x = self._unfold(q)
        if self.emit == "center":
            middle = self.kernel**2 // 2
            x = x[:, :, middle : middle + 1]
        batch, _, _, count = x.shape
        # Windows are the batch; a key outside the map is out of the softmax by a bias of -inf.
        parts = [
            t.permute(0, 3, 2, 1).flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (x, *map(self._unfold, (k, v)))
        ]
        bias = torch.zeros(inside.shape[1:], dtype=q.dtype, device=q.device).masked_fill(~inside[0], -torch.inf)
        bias = bias.T.repeat(batch, 1)[:, None, None, :]
        grids = [Grid(n=part.shape[2]) for part in parts[:2]]
        out = attention(*parts, grid=grids[0], key_grid=grids[1], bias=None if inside.all() else bias)  # type: ignore[misc]
        return out.transpose(1, 2).flatten(2).unflatten(0, (batch, count))  # type: ignore[union-attr]

    def _emit(
        self, out: Float[Tensor, "b windows n c"], inside: Bool[Tensor, "one k2 windows"], size: tuple[int, int]
    ) -> Float[Tensor, "b c h2 w2"]:
        rows, columns = (
            (n + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1 for n in size
        )
        if self.emit == "center":
            return out[:, :, 0].transpose(1, 2).unflatten(2, (rows, columns))
        real = inside.to(out.dtype).transpose(1, 2)[..., None]  # queries outside the map count for nothing
        if self.emit == "mean":
            mean = (out * real).sum(2) / real.sum(2).clamp(min=1)
            return mean.transpose(1, 2).unflatten(2, (rows, columns))
        fold = nn.Fold(size, self.kernel, self.dilation, self.padding, self.stride)
        total = fold((out * real).permute(0, 3, 2, 1).flatten(1, 2))
        return total / fold(real[..., 0].transpose(1, 2)).clamp(min=1)

    def _shifted(self, x: Float[Tensor, "b c h w"], sign: int) -> Float[Tensor, "b c h w"]:
        """Each group of channels rolled by half the map in its own direction; `sign=-1` rolls back."""
        if self.shift_groups == 1:
            return x
        h, w = (sign * (n // 2) for n in x.shape[2:])
        shifts = [(0, 0), (0, w), (h, 0), (h, w)]
        groups = x.chunk(self.shift_groups, 1)
        return torch.cat([group.roll(shift, (2, 3)) for group, shift in zip(groups, shifts, strict=False)], 1)
