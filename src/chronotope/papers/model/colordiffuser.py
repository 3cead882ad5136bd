r"""ColorDiffuser: an image denoiser colours each frame of a clip by a look at the one before or after it, in turns.

Colour propagation attention is the self-attention of a frame with the features of one other frame for keys:

$$
A(i) = \mathrm{softmax}\!\Big(\frac{W_q x_i\, (W_k y_i)^T}{\sqrt d}\Big) W_v y_i, \qquad
y_i = \hat x_{r(i)} \ \text{(replace)} \quad \text{or} \quad y_i = [x_i, \hat x_{r(i)}] \ \text{(concat)}
$$

where $\hat x$ are the features of all frames at this layer when each looks at itself. At step s of the sampler

$$
r(i) = i - 1 \ \text{for even } s, \qquad r(i) = i + 1 \ \text{for odd } s,
$$

and r(i) = i where there is no such frame: what a frame shows goes one frame further in each direction in two steps.
Grey frames enter every layer through an adapter, a convolution whose output is 0 at first; what is made gives the
colours, and the grey frames the luminance.

Sizes: latents [B, T, C, h, w], grey [B, T, 1, h, w] -> [B, T, C, h, w]. T (h w)^2 pairs for `replace`, two times as
many for `concat`, and as many again for the pass in which frames look at themselves.

    >>> model = ColorDiffuser(dim=32, heads=2, layers=2)
    >>> noise, grey = torch.randn(1, 5, 3, 8, 6), torch.rand(1, 5, 1, 8, 6)
    >>> colour = ddim_sample(alternated(model.colouring(grey)), noise, linear_alphas(), steps=4)
    >>> with_luminance(colour, grey).shape
    torch.Size([1, 5, 3, 8, 6])

`alternated` makes a clip sampler of any frame denoiser (x, t, r) -> x. `in_chunks` makes clips of any length in chunks,
each of which begins with the last frame of the one before.

Left out: the latent diffusion model and its weights, so that colours of real video are not shown; its U-Net, for which
blocks on patches stand; Lab colours, of which luminance is the weighted sum of red, green and blue here.
Unconfirmed: whether keys are replaced or joined, which layers look at the reference (here all), the first and last
frame, guidance and steps. Streaming: by chunks that share a frame.

Paper: Hanyuan Liu, Minshan Xie, Jinbo Xing, Chengze Li, Tien-Tsin Wong, "Video Colorization with Pre-trained
Text-to-Image Diffusion Models", 2023, arXiv 2306.01732.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.models.diffusion import Model
from chronotope.nn import Attention, FeedForward, GridConv, PatchEmbed, TimeEmbedding, Unpatch, Whole
from chronotope.nn.mixer import Context
from chronotope.papers.registry import paper
from chronotope.patterns import along

Mode = Literal["replace", "concat"]
FrameDenoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, T, ...], t [B], r [T]) -> x: frame i may look at itself and at frame r[i]."""
LUMINANCE = (0.299, 0.587, 0.114)


class ColorPropagation(Whole):
    """Self-attention within frames, over the features of other frames: `context` [B, N, C] on the same grid.

    Args:
        inner: attention of an image model, used as it is but for its `where`.
        mode: whether the reference takes the place of the frame among the keys, or joins it.
    """

    why = "the reference may be the next frame; use in_chunks"

    def __init__(self, inner: Attention, mode: Mode = "replace"):
        super().__init__()
        self.inner, self.mode, self.dim = inner, mode, inner.dim

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """Frame i over frame i of the context; without a context, over itself."""
        y = x if context is None else context[0] if isinstance(context, tuple) else context
        space, keys = [axis for axis in grid.axes if axis != "t"], grid
        if context is not None and self.mode == "concat":
            # The frame and its reference, side by side on an axis of their own.
            y = torch.stack([z.unflatten(1, (grid.sizes["t"], -1)) for z in (x, y)], 2).flatten(1, 3)
            keys = Grid(t=grid.sizes["t"], beside=2, **{axis: grid.sizes[axis] for axis in space})
            space.insert(0, "beside")
        inner = self.inner
        q, k, v = inner.project(x, grid, (y, keys))
        out = attention(q, k, v, grid=grid, key_grid=keys, where=along(*space), backend=inner.backend)
        assert isinstance(out, Tensor)
        return inner.out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Alternation:
    """r(i) = i + ways[s mod len(ways)] at step s; beyond the clip the frame itself, or, by "clamp", the last there is.

    At ways of one frame the two are the same. `Alternation((-1,))` looks back at all steps.
    """

    ways: tuple[int, ...] = (-1, 1)
    edge: Literal["self", "clamp"] = "self"

    def at(self, step: int, frames: int) -> Int64[Tensor, "frames"]:
        """The frame that each looks at."""
        own = torch.arange(frames)
        to = own + self.ways[step % len(self.ways)]
        return torch.where((to < 0) | (to >= frames), own, to) if self.edge == "self" else to.clamp(0, frames - 1)


def alternated(denoiser: FrameDenoiser, schedule: Alternation | None = None) -> Model:
    """A model (x, t) -> x of clips [B, T, ...] for samplers that ask once at each step, from its first call on.

    denoiser: (x, t, r), which makes frame i of x [B, T, ...] from itself and from frame r[i].
    """
    schedule, step = Alternation() if schedule is None else schedule, 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal step
        frames = schedule.at(step, x.shape[1]).to(x.device)
        step += 1
        return denoiser(x, t, frames)

    return model


def in_chunks(
    sample: Callable[[Tensor, Tensor | None, Tensor | None, slice], Tensor],
    noise: Float[Tensor, "b t *s"],
    size: int,
) -> Float[Tensor, "b t *s"]:
    """A long clip in chunks of `size` frames, of which one is known: the last one of the chunk before.

    sample: (noise, known, mask, frames) -> clip, known and mask as for the samplers of `chronotope.models.diffusion`,
    and which frames of the whole they are.
    """
    if size < 2:
        raise ChronotopeError(f"in_chunks(size={size}): expected 2 frames or more, one of which is shared.")
    out = sample(noise[:, :size], None, None, slice(0, min(size, noise.shape[1])))
    while out.shape[1] < noise.shape[1]:
        frames = slice(out.shape[1] - 1, min(out.shape[1] - 1 + size, noise.shape[1]))
        part = noise[:, frames]
        known, mask = torch.zeros_like(part), torch.ones_like(part)
        known[:, 0], mask[:, 0] = out[:, -1], 0
        out = torch.cat((out, sample(part, known, mask, frames)[:, 1:]), 1)
    return out


def with_luminance(colour: Float[Tensor, "b t 3 h w"], grey: Float[Tensor, "b t 1 h w"]) -> Float[Tensor, "b t 3 h w"]:
    """The colours of one clip with the luminance of another."""
    weights = colour.new_tensor(LUMINANCE).view(3, 1, 1)
    return colour + grey - (weights * colour).sum(2, keepdim=True)


class ColorBlock(nn.Module):
    """Colour propagation, attention over the text where there is any, feed-forward; grey features are added first."""

    def __init__(self, dim: int, heads: int, mode: Mode, text: int | None):
        super().__init__()
        self.look = ColorPropagation(Attention(dim, heads, biases=True), mode)
        self.read = None if text is None else Attention(dim, heads)
        self.enter = None if text is None else nn.Linear(text, dim)
        self.mlp, self.norms = FeedForward(dim, "gelu"), nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, reference: Tensor | None, text: Tensor | None
    ) -> Float[Tensor, "b n c"]:
        """x beside the features of its reference."""
        context = None if reference is None else self.norms[0](reference)
        x = x + self.look(self.norms[0](x), grid, context)
        if self.read is not None and self.enter is not None and text is not None:
            x = x + self.read(self.norms[1](x), grid, (self.enter(text), Grid(n=text.shape[1])))
        return x + self.mlp(self.norms[2](x))  # type: ignore[no-any-return]


@paper(
    system=46,
    name="ColorDiffuser",
    family="model",
    claim="clips coloured by an image denoiser whose frames look at the one before and the one after, step by step",
    evidence=["tests/papers/model/test_colordiffuser.py"],
)
class ColorDiffuser(nn.Module):
    """A frame denoiser that is told grey frames and, perhaps, a text.

    Args:
        dim, heads, layers: of the blocks.
        channels, patch: of the latents.
        mode: of `ColorPropagation`.
        text: channels of the text; None: there is none.
        freeze: whether the adapter alone is trained.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layers: int,
        channels: int = 3,
        patch: int = 2,
        mode: Mode = "replace",
        text: int | None = None,
        freeze: bool = True,
    ):
        super().__init__()
        self.embed, self.leave = PatchEmbed(dim, patch, channels), Unpatch(dim, patch, channels)
        self.time = TimeEmbedding(dim)
        self.place = GridConv(dim, {"h": 3, "w": 3}, residual=True)
        self.blocks = nn.ModuleList(ColorBlock(dim, heads, mode, text) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        if freeze:
            self.requires_grad_(False)
        self.grey = PatchEmbed(dim, patch, 1)
        self.adapt = nn.ModuleList(GridConv(dim, {"h": 3, "w": 3}, depthwise=False) for _ in range(layers))
        for values in self.adapt.parameters():
            nn.init.zeros_(values)

    def forward(
        self,
        x: Float[Tensor, "b t c h w"],
        t: Float[Tensor, "b"],
        grey: Float[Tensor, "b t 1 h w"],
        reference: Int64[Tensor, "t"] | None = None,
        text: Float[Tensor, "b l k"] | None = None,
    ) -> Float[Tensor, "b t c h w"]:
        """The noise in x. reference: the frame that each frame looks at; None: itself."""
        tokens, grid = self.embed(x)
        alone = tokens = self.place(tokens + self.time(t)[:, None], grid)
        told = self.grey(grey)[0]
        for block, adapt in zip(self.blocks, self.adapt, strict=True):
            tokens, alone = tokens + adapt(told, grid), alone + adapt(told, grid)
            if reference is None:
                tokens = alone = block(tokens, grid, None, text)
                continue
            seen = alone.unflatten(1, (grid.sizes["t"], -1))[:, reference].flatten(1, 2)
            # The frames alone, so that one step carries what a frame shows to its neighbour and no further.
            tokens, alone = block(tokens, grid, seen, text), block(alone, grid, None, text)
        return self.leave(self.norm(tokens), grid)  # type: ignore[no-any-return]

    def colouring(self, grey: Float[Tensor, "b t 1 h w"], text: Float[Tensor, "b l k"] | None = None) -> FrameDenoiser:
        """This model of one grey clip, for `alternated`."""
        return lambda x, t, reference: self(x, t, grey, reference, text)
