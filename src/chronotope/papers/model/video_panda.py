r"""Video-Panda: frames become tokens of a language model by patches, short convolutions and three small attentions.

$$
u = e + W_2\, \mathrm{conv}_t(W_1\, \mathrm{BN}(e)), \qquad x = u + \mathrm{conv}_{t,h,w}(u), \qquad y = x + e
$$

where e are patches, both convolutions have size 3 and are depthwise, and W_2 = 0 at first (local encoding). Then

$$
g = a + \mathrm{MLP}(\mathrm{LN}(a)), \ \ a = p + A(p, x), \qquad
l_c = \bar y_c + A(\bar y_c, \{y_r : r \in c\}), \qquad
f_t = r + A(r, l_t)
$$

$$
c_t = W\, \mathrm{LN}((1 - \sigma(b))\, g + \sigma(b)\, f_t)
$$

A(q, k): attention of q over k, with a LayerNorm of each. p and r are learned tokens: g is the token of the video, f_t
of a frame; A and MLP of g are 0 at first. A cell c holds s x s patches, and its mean asks. b, one number for each
channel, is 0 at first. A frame is told as c_t, then its rows of cells, a learned token after each row; an MLP of one
hidden layer leads to the width of the language model.

Sizes: clip [B, T, 3, H, W], patch p, cell s -> for each clip, for each frame [1 + h (w + 1), width], h = H / (p s),
w = W / (p s). Linear in T H W. At the published sizes (dim 1024, patch 14, cell 2, width 4096) 45M parameters.

    >>> model = STAB(dim=32, width=48, patch=4, cell=2, heads=4).eval()
    >>> told = model(torch.randn(2, 6, 3, 64, 64))
    >>> len(told), len(told[0]), told[0][0].shape
    (2, 6, torch.Size([73, 48]))

Scores of l and f are q k / sqrt(dim), as in the released code, whatever the heads; those of g q k / sqrt(dim / heads).
`mask` says which pixels are no padding: each frame is told by the rectangle of patches that hold any, without rows and
columns that fill no cell, and a frame of padding alone by no tokens (the released code tells its upper left 16 x 16
patches). Convolutions and g see padding, as there. A clip of one frame is an image: c_1 = f_1, and y = e.
`temporal=False` tells all frames as images.

Beside the released code (commit 995a737, its attentions, local encoding and token of the video run with copied weights,
GELU for its QuickGELU x sigmoid(1.702 x)), outputs of up to 14 differ by 2.9e-6 at most in float32. Its patches have no
bias.

Left out: dropout (0.5 in the MLP of g and before W), the language model, which layers of it are taught. Streaming: both
convolutions see the next frame, together two, and g sees all of them.

Not shown: benchmarks with a language model of 7B parameters, and 3 to 4 times the speed of models with an encoder.
Asked which of four ways a rectangle moves, a small decoder with rotary places answers 100% of clips right after 250
steps; without local encoding and the token of the video 24% after 450, which is chance.

Paper: Jinhui Yi, Syed Talal Wasim, Yanan Luo, Muzammal Naseer, Juergen Gall, "Video-Panda: Parameter-efficient
Alignment for Encoder-free Video-Language Models", 2024, arXiv 2412.18609.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.attention import Attention
from chronotope.nn.feedforward import FeedForward
from chronotope.nn.grid_convolution import GridConv
from chronotope.nn.mixer import Context, Whole
from chronotope.nn.patches import PatchEmbed
from chronotope.papers.registry import paper
from chronotope.patterns import along
from chronotope.saving import Saved


class Ask(nn.Module):
    """q + A(q, k): tokens on a grid of size 1 along some axes ask those that are at the same place of the others."""

    def __init__(self, dim: int, heads: int, scale: float, *, biases: bool = False):
        super().__init__()
        self.scale = scale
        self.q_norm, self.k_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, biases=biases)
        self.attention.out = nn.Linear(self.attention.out.in_features, dim)

    def forward(
        self, x: Float[Tensor, "b m c"], asked: Float[Tensor, "b n c"], grid: Grid, over: tuple[str, ...]
    ) -> Float[Tensor, "b m c"]:
        """x on `grid` with size 1 along the axes `over`; `asked` on `grid`."""
        few = grid.replace(**dict.fromkeys(over, 1))
        q, k, v = self.attention.project(self.q_norm(x), few, (self.k_norm(asked), grid))
        mixed = attention(q, k, v, grid=few, key_grid=grid, where=along(*over), scale=self.scale)
        return x + self.attention.out(mixed.transpose(1, 2).flatten(2))


class GlobalQuery(nn.Module):
    """A learned token that asks all tokens along some axes: r + A(r, x), with `mlp` then a + MLP(LN(a)), 0 at first.

    Args:
        over: the axes that it asks along; there is one answer for each place of the others.
    """

    def __init__(self, dim: int, heads: int, over: tuple[str, ...] = ("h", "w"), *, mlp: bool = False):
        super().__init__()
        self.over = over
        self.query = nn.Parameter(torch.zeros(dim) if mlp else torch.randn(dim))
        self.ask = Ask(dim, heads, ((dim / heads) if mlp else dim) ** -0.5, biases=mlp)
        self.norm = nn.LayerNorm(dim) if mlp else None
        self.mlp = FeedForward(dim, "gelu", biases=True) if mlp else None
        if self.mlp is not None:
            for last in (self.ask.attention.out, self.mlp.leave):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b m c"]:
        """The answers, in the order of the axes that are not asked along."""
        places = grid.replace(**dict.fromkeys(self.over, 1)).size
        out = self.ask(self.query.to(x.dtype).expand(len(x), places, -1), x, grid, self.over)
        return out if self.mlp is None or self.norm is None else out + self.mlp(self.norm(out))


class CellAttentionPool(nn.Module):
    """The mean of every cell of s x s tokens asks these tokens: [B, h w, C] -> [B, h w / s^2, C]."""

    def __init__(self, dim: int, heads: int, cell: int):
        super().__init__()
        self.cell, self.ask = cell, Ask(dim, heads, dim**-0.5)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> tuple[Float[Tensor, "b m c"], Grid]:
        """The cells, and their grid. Raises ChronotopeError where cells do not fill the grid."""
        sizes, s = grid.sizes, self.cell
        if grid.prefix or grid.axes[-2:] != ("h", "w") or sizes["h"] % s or sizes["w"] % s:
            raise ChronotopeError(f"CellAttentionPool({s}): {grid!r}; expected last axes h, w, multiples of {s}.")
        cells = grid.replace(h=sizes["h"] // s, w=sizes["w"] // s)
        inside = Grid(**cells.sizes, row=s, column=s)
        x = x.unflatten(1, (-1, cells.sizes["h"], s, cells.sizes["w"], s)).transpose(3, 4)
        return self.ask(x.mean((4, 5)).flatten(1, 3), x.flatten(1, 5), inside, ("row", "column")), cells


class LocalSTEncoding(Whole):
    """x = u + conv(u), u = e + W_2 conv_t(W_1 BN(e)), W_2 = 0 at first. W_1 divides the channels by `reduction`."""

    why = "its convolutions see the next two frames"

    def __init__(self, dim: int, reduction: float | int = 1.5):
        super().__init__()
        self.dim, inner = dim, int(dim // reduction)
        self.norm = nn.BatchNorm1d(dim)
        self.enter, self.leave = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.time = GridConv(inner, {"t": 3})
        self.place = GridConv(dim, {"t": 3, "h": 3, "w": 3}, residual=True)
        for zero in (self.leave.weight, self.leave.bias, self.place.conv.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All frames at once. Takes no context."""
        normed = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.place(x + self.leave(self.time(self.enter(normed), grid)), grid)


@paper(
    system=41,
    name="Video-Panda",
    family="model",
    claim="no vision encoder: patches, short convolutions, cells and frames pooled by attention, one token for a video",
    evidence=["tests/papers/model/test_video_panda.py"],
)
class STAB(Saved):
    """The spatio-temporal alignment block: clips in, the tokens of every frame for a language model out.

    Args:
        dim: channels of a patch.
        width: channels of the tokens that come out.
        patch, cell: side of a patch in pixels, of a cell in patches.
        heads: of all attentions.
        channels: of the clip.
        temporal: whether frames know of each other; without, each is told as an image.
    """

    def __init__(
        self,
        dim: int = 1024,
        width: int = 4096,
        patch: int = 14,
        cell: int = 2,
        heads: int = 8,
        channels: int = 3,
        temporal: bool = True,
    ):
        super().__init__()
        self.temporal = temporal
        self.patch = PatchEmbed(dim, patch, channels)
        self.local = LocalSTEncoding(dim)
        self.video = GlobalQuery(dim, heads, ("t", "h", "w"), mlp=True)
        self.pool = CellAttentionPool(dim, heads, cell)
        self.frame = GlobalQuery(dim, heads)
        self.balance = nn.Parameter(torch.zeros(dim))
        self.join = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.split = nn.Parameter(torch.randn(dim))
        self.leave = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))

    def forward(
        self, clips: Float[Tensor, "b t c height width"], mask: Bool[Tensor, "..."] | None = None
    ) -> list[list[Float[Tensor, "_ _"]]]:
        """For each clip, for each frame, its tokens. `mask` [B, T, H, W]: pixels that are no padding; None: all."""
        if mask is not None and mask.shape != clips.shape[:2] + clips.shape[3:]:
            raise ChronotopeError(f"mask has shape {list(mask.shape)}; expected one truth for each pixel of the clips.")
        x, grid = self.patch(clips)
        video = None
        if self.temporal and grid.sizes["t"] > 1:
            encoded = self.local(x, grid)
            video, x = self.video(encoded, grid).expand(-1, grid.sizes["t"], -1).flatten(0, 1), encoded + x
        frames = x.unflatten(1, grid.shape).flatten(0, 1)
        told = [x.new_zeros(0, self.leave[0].out_features)] * len(frames)
        for box, which in self._boxes(mask, grid, len(frames)).items():
            top, bottom, left, right = box
            tokens = self.tell(frames[which, top:bottom, left:right], None if video is None else video[which])
            for i, sequence in zip(which, tokens, strict=True):
                told[i] = sequence
        return [told[i : i + grid.sizes["t"]] for i in range(0, len(told), grid.sizes["t"])]

    def tell(self, frames: Float[Tensor, "f h w c"], video: Float[Tensor, "f c"] | None) -> Float[Tensor, "f n width"]:
        """Frames of one size, and the token of the video of each, as [class, rows with a split after each]."""
        cells, grid = self.pool(frames.flatten(1, 2), Grid(h=frames.shape[1], w=frames.shape[2]))
        first = self.frame(cells, grid)
        if video is not None:
            first = self.join(self.mixed(video[:, None], first))
        rows = cells.unflatten(1, grid.shape)
        rows = torch.cat((rows, self.split.to(rows.dtype).expand(*rows.shape[:2], 1, -1)), 2)
        return self.leave(torch.cat((first, rows.flatten(1, 2)), 1))

    def mixed(self, video: Float[Tensor, "*b c"], frame: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """(1 - sigma(b)) g + sigma(b) f."""
        weight = self.balance.sigmoid()
        return (1 - weight) * video + weight * frame

    def _boxes(self, mask: Tensor | None, grid: Grid, count: int) -> dict[tuple[int, int, int, int], list[int]]:
        """Which frames are told by which rectangle of patches: whole cells, from the first patch that is seen on."""
        _, h, w = grid.shape
        cell, side = self.pool.cell, self.patch.patch[1]
        if mask is None:
            return {(0, h // cell * cell, 0, w // cell * cell): list(range(count))}
        seen = F.max_pool2d(mask.flatten(0, 1)[:, None].float(), side)[:, 0] > 0
        boxes: dict[tuple[int, int, int, int], list[int]] = {}
        for i, frame in enumerate(seen.cpu()):
            rows, columns = frame.any(1).nonzero(), frame.any(0).nonzero()
            if not len(rows):
                continue
            top, left = int(rows[0]), int(columns[0])
            high, wide = int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left
            if high < cell or wide < cell:
                raise ChronotopeError(
                    f"mask: frame {i} shows {high} x {wide} patches, less than a cell of {cell} x {cell}."
                )
            boxes.setdefault((top, top + high // cell * cell, left, left + wide // cell * cell), []).append(i)
        return boxes


def distillation(features: Float[Tensor, "*b c"], teacher: Float[Tensor, "*b c"]) -> Float[Tensor, ""]:
    """Mean of 1 - cos(features, teacher): features of a language model taught by those of a vision encoder."""
    return 1 - F.cosine_similarity(features, teacher.detach(), dim=-1).mean()
