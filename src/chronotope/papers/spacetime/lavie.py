r"""LaVie: an image denoiser made into one for video by attention over time, added to each of its blocks.

$$
x \mathrel{+}= A_{space}(\mathrm{LN}\, x), \quad x \mathrel{+}= A_{text}(\mathrm{LN}\, x,\, \mathrm{text}), \quad
x \mathrel{+}= W A_{time}(\mathrm{LN}\, x), \quad x \mathrel{+}= \mathrm{MLP}(\mathrm{LN}\, x)
$$

A_time attends over the frames of a place, W = 0 at first: the video model begins as the image model on each frame.
Distance in time is in the logits twice, as rotation of 32 channels of each head and as a learned bias,

$$ l_{ij} = (R_i q_i) \cdot (R_j k_j) / \sqrt d + \beta_{\mathrm{bucket}(j - i)} $$

with 16 buckets for each direction: distances 0 to 7 have one each, those up to 32 share the other 8 by their logarithm.

Trained on clips and images at once: the last k frames are images of their own, with captions of their own, which A_time
leaves out.

Sizes: x [B, T h w, C] on Grid(t, h, w), text [B, L, C'] for all frames or [B, T L, C'] on Grid(t=T, n=L) -> [B, T h w,
C]. T (h w)^2 + h w T^2 pairs, and T h w L. Published: 16 frames of 320 x 512 in latents; 61 after interpolation.

    >>> block, grid = LaVieBlock(64, heads=2, text=32), Grid(t=5, h=4, w=6)
    >>> block(torch.randn(2, grid.size, 64), grid, (torch.randn(2, 7, 32), Grid(n=7)), images=1).shape
    torch.Size([2, 120, 64])

`image=` takes the block that is made into one for video: by default an `ImageBlock`, or `Inflated(block)` for a
transformer block of the diffusers kind; `freeze=True` trains the attention over time alone. `causal=True` lets frames
look back only, and can be stepped; that is not in the paper.

Published sampling: `ddim_sample` over `linear_alphas()` in 50 steps, `guided` by 7.5 (`chronotope.models.diffusion`).

Left out: the U-Net around the blocks, whose convolutions see frames as images; the cascade (interpolation to 61 frames,
super-resolution to 1280 x 2048); weights. The released code gates its MLP by GELU, here SiLU, and has biases in the
matrices after its attentions.

Checked beside the released code (Vchitect/LaVie, commit 6ce851e; weights copied, its matrices after attention without
biases, our MLP in both, 20 frames of 3 x 4 places, none or 4 of them images): outputs of up to 7.7 differ by 2.6e-6 at
most. Its rotation pairs channels 2 i and 2 i + 1, ours i and i + 16.

Paper: Yaohui Wang, Xinyuan Chen, Xin Ma, Shangchen Zhou, Ziqi Huang et al., "LAVIE: High-Quality Video Generation with
Cascaded Latent Diffusion Models", 2023, arXiv 2309.15103.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from chronotope import patterns
from chronotope.bias import Bias, Relative
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.nn import Attention, FeedForward, Mixer
from chronotope.nn.mixer import Context, require_slice, require_tokens
from chronotope.papers.registry import paper
from chronotope.patterns import along
from chronotope.position import Rope


class BucketBias(Bias):
    """A learned score for each head and bucket of the distance on one axis, as in T5 (arXiv 1910.10683).

    Half of the buckets are for keys that come later. Of the others, half hold one distance each, and half are even in
    the logarithm up to `reach`; beyond it all are alike.
    """

    def __init__(self, heads: int, axis: str = "t", buckets: int = 32, reach: int = 32):
        super().__init__()
        if buckets < 4 or buckets % 4 or reach <= buckets // 4:
            raise ChronotopeError(f"BucketBias(buckets={buckets}, reach={reach}): expected 4 n buckets, reach above n.")
        self.heads, self.axis, self.buckets, self.reach = heads, axis, buckets, reach
        self.table = nn.Parameter(torch.randn(buckets, heads))

    def bucket(self, offset: Int64[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
        """The bucket of key - query."""
        half, exact = self.buckets // 2, self.buckets // 4
        far = torch.log(offset.abs().clamp(min=1).float() / exact) / math.log(self.reach / exact) * (half - exact)
        near = torch.where(offset.abs() < exact, offset.abs(), (exact + far.long()).clamp(max=half - 1))
        return near + half * (offset > 0)

    def check(self, axes: tuple[str, ...]) -> None:
        if self.axis not in axes:
            raise ChronotopeError(f"BucketBias is over {self.axis!r}, but the grid has the axes {list(axes)}.")

    def score(self, q: Coords, k: Coords) -> Float[Tensor, "heads ..."]:
        return self.table[self.bucket(k.axes[self.axis] - q.axes[self.axis])].movedim(-1, 0)

    def relative(self, state: Mapping[str, Tensor], grid: Grid, key_grid: Grid) -> list[Relative]:
        table = state["table"]
        offsets = torch.arange(-self.reach, self.reach + 1, device=table.device)
        return [Relative({self.axis: self.reach}, table[self.bucket(offsets)].T)]


class ImageBlock(nn.Module):
    """The block of an image denoiser: attention within a frame and over the text, then a feed-forward.

    Args:
        dim, heads: of x, of both attentions.
        text: channels of the text; None: there is none.
    """

    def __init__(self, dim: int, heads: int, text: int | None = None, mlp_ratio: float | int = 4.0):
        super().__init__()
        self.space = Attention(dim, heads, where=along("h", "w"))
        # Where the text says which frame it is for, t is compared; else every frame sees all of it.
        self.over = None if text is None else Attention(dim, heads, where=along("h", "w", "n"))
        self.enter = nn.Identity() if text in (None, dim) else nn.Linear(text, dim, bias=False)
        self.mlp, self.norms = FeedForward(dim, "swiglu", mlp_ratio), nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def look(self, x: Float[Tensor, "b n c"], grid: Grid, text: Context | None) -> Float[Tensor, "b n c"]:
        """What comes before the attention over time."""
        x = x + self.space(self.norms[0](x), grid)
        if self.over is None:
            return x
        if not isinstance(text, tuple):
            raise ChronotopeError("LaVie: give context=(text, its grid): Grid(n=L), or Grid(t=T, n=L) for each frame.")
        return x + self.over(self.norms[1](x), grid, (self.enter(text[0]), text[1]))  # type: ignore[no-any-return]

    def feed(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """What comes after it."""
        return x + self.mlp(self.norms[2](x))  # type: ignore[no-any-return]


class Inflated(nn.Module):
    """A block made for images, run on each frame: x + attn1(norm1(x)), + attn2(norm2(x), text), + ff(norm3(x)).

    `block` has these modules by these names, on [images, places, C], as `BasicTransformerBlock` of diffusers has;
    attn2 may be None. Its modules are used as they are.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def look(self, x: Float[Tensor, "b n c"], grid: Grid, text: Context | None) -> Float[Tensor, "b n c"]:
        """What comes before the attention over time."""
        block: Any = self.block
        frames, images = grid.sizes["t"], x.unflatten(1, (grid.sizes["t"], -1)).flatten(0, 1)
        images = images + block.attn1(block.norm1(images))
        if block.attn2 is not None and isinstance(text, tuple):
            words, where = text
            words = words.unflatten(1, (frames, -1)) if "t" in where.axes else words[:, None].expand(-1, frames, -1, -1)
            images = images + block.attn2(block.norm2(images), encoder_hidden_states=words.flatten(0, 1))
        return images.view_as(x)

    def feed(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """What comes after it."""
        block: Any = self.block
        images = x.unflatten(1, (grid.sizes["t"], -1)).flatten(0, 1)
        return (images + block.ff(block.norm3(images))).view_as(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LaVieState(Carried):
    """Keys and values of the frames so far, and the text."""

    time: Any
    text: Tensor | None
    text_grid: Grid | None
    grid: Grid


@paper(
    system=146,
    name="LaVie",
    family="spacetime",
    claim="attention over time, of zero output at first, in the blocks of an image denoiser; trained on clips and "
    "images at once",
    evidence=["tests/papers/spacetime/test_lavie.py"],
)
class LaVieBlock(Mixer):
    """The block, on Grid(t, h, w); `context` is the text with its grid.

    Args:
        dim, heads, text: channels, heads, channels of the text or None.
        image: the block made into one for video; None: an `ImageBlock`.
        rotary: channels of each head that time rotates; 0: none.
        buckets, reach: of the bias; 0 buckets: no bias.
        causal: whether frames look back only.
        freeze: whether the image block's parameters take no gradient.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        text: int | None = None,
        *,
        image: ImageBlock | Inflated | None = None,
        rotary: int = 32,
        buckets: int = 32,
        reach: int = 32,
        causal: bool = False,
        freeze: bool = False,
    ):
        super().__init__()
        self.dim = dim
        self.image = ImageBlock(dim, heads, text) if image is None else image
        share = min(1.0, rotary * heads / dim)
        self.time = Attention(
            dim, heads,
            where=along("t") & patterns.causal("t") if causal else along("t"),
            position=Rope("t", share={"t": share}) if rotary else None,
            bias=BucketBias(heads, buckets=buckets, reach=reach) if buckets else None,
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim)
        nn.init.zeros_(self.time.out.weight)
        if freeze:
            self.image.requires_grad_(False)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None, images: int = 0
    ) -> Float[Tensor, "b n c"]:
        """All frames at once, the last `images` of which are images."""
        require_tokens(x, grid, self.dim, "x")
        frames = grid.sizes["t"] - images
        if grid.axes != ("t", "h", "w") or grid.prefix or not 0 <= images <= grid.sizes["t"]:
            raise ChronotopeError(f"LaVieBlock on {grid!r} with images={images}: expected t, h, w, images among t.")
        x = self.image.look(x, grid, context)
        if frames:
            clip, rest = x.split((frames * x.shape[1] // grid.sizes["t"], images * x.shape[1] // grid.sizes["t"]), 1)
            x = torch.cat((clip + self.time(self.norm(clip), grid.replace(t=frames)), rest), 1)
        return self.image.feed(x, grid)

    def init_state(self, batch: int, grid: Grid, context: Context | None = None) -> LaVieState:
        """No frame has come; `context`: the text of all frames. Raises ChronotopeError unless frames look back only."""
        require_slice(grid)
        text, text_grid = context if isinstance(context, tuple) else (None, None)
        if text_grid is not None and "t" in text_grid.axes:
            raise ChronotopeError("LaVieBlock: a step has one text for all frames; give it on Grid(n=L).")
        return LaVieState(self.time.init_state(batch, grid), text, text_grid, grid)

    def step(self, x: Float[Tensor, "b s c"], state: LaVieState) -> tuple[Float[Tensor, "b s c"], LaVieState]:
        """The next frame."""
        text = None if state.text is None or state.text_grid is None else (state.text, state.text_grid)
        x = self.image.look(x, state.grid, text)
        y, time = self.time.step(self.norm(x), state.time)
        return self.image.feed(x + y, state.grid), replace(state, time=time)
