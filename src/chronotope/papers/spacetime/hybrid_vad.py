r"""Anomalies in video as bad predictions: frames in the middle, predicted from those before and from those after.

A token of attention is a whole feature map. With convolutions in place of matrices, for frames i, j and each head,

$$
Q, K, V = \mathrm{conv}_{q,k,v}(x), \quad A_{ij} = \mathrm{softmax}_j \frac{\langle Q_i, K_j \rangle}{\sqrt d}, \quad
H_i = \sum_j A_{ij} V_j, \qquad d = C H W / \mathrm{heads}
$$

so that a score is one number for two frames and V keeps its places. One side (`Side`) encodes its frames at two sizes,
carries them along time in ConvLSTMs, of which that of the finer maps also sees the state of the coarser ones, and asks
the frames by attention for each of the middle ones (their number as a sinusoidal code). The twin (`BothSides`) does the
same on the frames after, in reverse. Each side is taught by

$$ L = |\hat I - I|^2 + \big|\, |\nabla \hat I| - |\nabla I| \,\big| $$

and a frame's score is -10 log_10 of the error, turned around and stretched to 0..1 in each video; the error is that of
the side which explains the frame better.

Sizes: frames [B, T, C, H, W] -> [B, middle, C, H, W] from each side. T^2 scores for any H and W.

    >>> model = BothSides(middle=2, dim=8)
    >>> ahead, back = model(torch.rand(1, 3, 1, 16, 16), torch.rand(1, 3, 1, 16, 16))
    >>> ahead.shape, back.shape
    (torch.Size([1, 2, 1, 16, 16]), torch.Size([1, 2, 1, 16, 16]))

Unconfirmed: numbers of frames, heads and levels, how the ConvLSTMs see each other, how the errors of both sides become
one, weights of the losses. Left out: the other tasks of the paper's detector, Ped2, Avenue, ShanghaiTech. Streaming: a
frame is judged when those after it have come.

Paper: Guodong Shen, Yuqi Ouyang, Junru Lu, Yixuan Yang, Victor Sanchez, "Advancing Video Anomaly Detection: A
Bi-Directional Hybrid Framework for Enhanced Single- and Multi-Task Approaches", IEEE Transactions on Image Processing
33, 2024, arXiv 2504.14753.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import ConvLSTM, Sinusoidal
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern

Maps = Float[Tensor, "b _t _c _h _w"]


class FrameAttention(nn.Module):
    """H of the formula, its heads side by side, through a last convolution.

    Args:
        dim, heads: channels of the maps, which the heads share.
        kernel: of the convolutions, odd.
        where: a pattern on the axis t, such as `causal("t")`; default: all frames.
    """

    def __init__(self, dim: int, heads: int = 2, kernel: int = 3, where: Pattern | None = None):
        super().__init__()
        if dim % heads or kernel % 2 == 0:
            raise ChronotopeError(
                f"FrameAttention({dim}, heads={heads}, kernel={kernel}): heads that divide, odd kernels."
            )
        self.heads, self.where = heads, where
        self.q, self.k, self.v, self.out = (nn.Conv2d(dim, dim, kernel, padding="same") for _ in range(4))

    def forward(self, x: Maps, queries: Maps | None = None, real: Bool[Tensor, "b _t"] | None = None) -> Maps:
        """Maps of the queries' frames (default: x) from those of x, of which some may be missing (`real` false)."""
        asked = x if queries is None else queries
        q, k, v = self._tokens(self.q, asked), self._tokens(self.k, x), self._tokens(self.v, x)
        missing = None if real is None else torch.zeros_like(real, dtype=q.dtype).masked_fill(~real, -torch.inf)
        out = attention(
            q, k, v, grid=Grid(t=asked.shape[1]), key_grid=Grid(t=x.shape[1]), where=self.where,
            bias=None if missing is None else missing[:, None, None],
        )  # fmt: skip
        assert isinstance(out, Tensor)
        shape = (self.heads, asked.shape[2] // self.heads, *asked.shape[3:])
        maps = out.transpose(1, 2).unflatten(3, shape[1:]).flatten(2, 3)
        return self.out(maps.flatten(0, 1)).view_as(asked)

    def weights(self, x: Maps, queries: Maps | None = None) -> Float[Tensor, "b _heads _tq _t"]:
        """A of the formula without a pattern, for pictures: T^2 numbers for each head, whatever the size of a frame."""
        q, k = self._tokens(self.q, x if queries is None else queries), self._tokens(self.k, x)
        return (q @ k.mT / math.sqrt(q.shape[3])).softmax(3)

    def _tokens(self, conv: nn.Module, x: Maps) -> Float[Tensor, "b _heads _t _d"]:
        y = conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return y.unflatten(2, (self.heads, -1)).flatten(3).transpose(1, 2)


class Bridge(nn.Module):
    """ConvLSTMs for maps of several sizes, the coarsest first: each sees its maps and the states of the coarser one."""

    def __init__(self, *dims: int):
        super().__init__()
        pairs = zip(dims[1:], dims[:-1], strict=True)
        self.joins = nn.ModuleList(nn.Conv2d(dim + coarser, dim, 1) for dim, coarser in pairs)
        self.cells = nn.ModuleList(ConvLSTM(dim) for dim in dims)

    def forward(self, *maps: Maps) -> list[Maps]:
        """The states of all frames, for maps of each size."""
        out: list[Tensor] = []
        for index, (cell, x) in enumerate(zip(self.cells, maps, strict=True)):
            if index:
                below = F.interpolate(out[-1].flatten(0, 1), x.shape[3:], mode="nearest")
                x = self.joins[index - 1](torch.cat((x.flatten(0, 1), below), 1)).unflatten(0, x.shape[:2])
            grid = Grid(t=x.shape[1], h=x.shape[3], w=x.shape[4])
            y = cell(x.movedim(2, -1).flatten(1, 3), grid)
            out.append(y.unflatten(1, grid.shape).movedim(-1, 2))
        return out


class Side(nn.Module):
    """The frames that follow: [B, T, C, H, W] -> [B, middle, C, H, W]; H and W even."""

    def __init__(self, middle: int, channels: int = 1, dim: int = 16, heads: int = 2):
        super().__init__()
        self.middle = middle
        self.fine, self.coarse = nn.Conv2d(channels, dim, 3, padding=1), nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
        self.bridge, self.attend = Bridge(2 * dim, dim), FrameAttention(2 * dim, heads)
        self.code, self.ask = Sinusoidal(2 * dim, "t", base=100.0), nn.Conv2d(2 * dim, 2 * dim, 1)
        self.join = nn.Conv2d(4 * dim, dim, 3, padding=1)
        self.leave = nn.Sequential(
            nn.Conv2d(2 * dim, dim, 3, padding=1), nn.SiLU(), nn.Conv2d(dim, channels, 3, padding=1)
        )

    def forward(self, frames: Maps) -> Maps:
        """The next `middle` frames, the nearest first."""
        steps = frames.shape[1]
        fine = F.silu(self.fine(frames.flatten(0, 1)))
        maps = [F.silu(self.coarse(fine)), fine]
        coarse, fine = self.bridge(*(x.unflatten(0, (-1, steps)) for x in maps))
        coarse = self._placed(coarse, 0)
        queries = self._placed(self.ask(coarse[:, -1])[:, None].expand(-1, self.middle, -1, -1, -1), steps)
        seen = torch.cat((self.attend(coarse, queries), queries), 2).flatten(0, 1)
        seen = F.interpolate(F.silu(self.join(seen)), fine.shape[3:], mode="nearest")
        last = fine[:, -1:].expand(-1, self.middle, -1, -1, -1).flatten(0, 1)
        return self.leave(torch.cat((seen, last), 1)).unflatten(0, (-1, self.middle))

    def _placed(self, x: Maps, first: int) -> Maps:
        """With the code of the frame's number added at every place."""
        code = self.code(x.new_zeros(1, x.shape[1], x.shape[2]), Grid(t=x.shape[1]), offset={"t": first})
        return x + code[0, :, :, None, None]


@paper(
    system=197,
    name="Bi-directional hybrid VAD",
    family="spacetime",
    claim="middle frames predicted from both sides in time, by attention between whole frames and ConvLSTMs",
    evidence=["tests/papers/spacetime/test_hybrid_vad.py"],
)
class BothSides(nn.Module):
    """Middle frames, once from those before and once from those after."""

    def __init__(self, middle: int = 2, channels: int = 1, dim: int = 16, heads: int = 2):
        super().__init__()
        self.ahead, self.back = (Side(middle, channels, dim, heads) for _ in range(2))

    def forward(self, before: Maps, after: Maps) -> tuple[Maps, Maps]:
        """The middle frames in order of time, as each side predicts them."""
        return self.ahead(before), self.back(after.flip(1)).flip(1)


def prediction_loss(predicted: Maps, frames: Maps) -> Float[Tensor, ""]:
    """L of the formula, mean over pixels."""
    gradients = sum((predicted.diff(dim=axis).abs() - frames.diff(dim=axis).abs()).abs().mean() for axis in (3, 4))
    return F.mse_loss(predicted, frames) + gradients


def scores(errors: Float[Tensor, "*sides frames"]) -> Float[Tensor, "frames"]:
    """0..1 for each frame of a video, of mean squared errors, those of the better side where there are several."""
    best = errors if errors.ndim == 1 else errors.flatten(0, -2).amin(0)
    loudness = 10 * best.clamp(min=1e-10).log10()
    return (loudness - loudness.min()) / (loudness.max() - loudness.min()).clamp(min=1e-10)
