r"""Blended Latent Diffusion under Attention Control: edits a video where a word looks, and leaves the rest as it is.

$$
z_t \leftarrow M z_t^{edit} + (1 - M) z_t^{src}, \qquad
M = [\mathrm{norm}(\mathrm{mean}_{heads, layers, steps} A_{word}) > \tau], \qquad
o_i = \mathrm{softmax}(q_i K^T / \sqrt{D})\, V, \quad K, V \text{ of frames } S(i)
$$

z^src: the trajectory of the source under DDIM inversion, kept whole, so that what lies outside M is noised as the
source was and not anew. A: cross-attention of pixels to the words that are edited; norm: 0 to 1 in each frame.
S(i): all frames, or ("first+prev") frame i, the one before it and the first.

Sizes: frames are members of the batch, q, k, v [B F, H, N, D]; trajectory [S + 1, F, C, h, w]; mask [F, 1, h, w]. No
weights are held for the frames: theirs is a pattern on a grid of F x N tokens.

    >>> alphas = linear_alphas()
    >>> model = lambda x, t: x / 2                     # (x, t) -> noise, here one without attention
    >>> source = ddim_invert(model, torch.randn(8, 4, 16, 16), alphas, steps=10)
    >>> mask = torch.zeros(8, 1, 16, 16, dtype=torch.bool)
    >>> torch.equal(blended_sample(model, source, alphas, mask), source[-1])
    True

With a model that has attention, `model` being a module that calls it and `denoise` a function that calls `model`:

    words = MeanMap([3, 4])                            # which tokens of the prompt are edited
    with control(model, CrossFrame(frames=8), layers="*self*"), control(model, words, layers="*cross*"):
        blended_sample(denoise, source, alphas, word_mask(words, (16, 16)))

Left out: the threshold, the resolutions that are averaged, the steps at which latents are blended and the frames S(i)
of the published results are not known; here 0.3, all layers that are named, all steps, and as above. Guidance that
calls the model in one batch for both texts: call it twice, and attach `words` to the call that is told. No released
code was found.

Measured: how far features of noisy copies of a frame lie apart, against attention per frame. Layers with random
weights: 0.51 to 0.71 (all frames), 0.59 to 0.76 (first and previous). The three layers of a small trained denoiser at
noise 0.2: 0.75, 0.94, 0.68; at noise 0.5: 0.88, 0.92, 0.80. What passes by a layer is not touched. In that denoiser the
mask of a word has an IoU of 0.45 with its object at best: its attention to words is not that local.

Not shown: edits of real videos, and what viewers say of them.

Paper: Deyin Liu, Lin Yuanbo Wu, Xianghua Xie, "Blended Latent Diffusion under Attention Control for Real-World Video
Editing", 2024, arXiv 2409.03514.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.adapt.asked import Asked
from chronotope.adapt.control import At, Control
from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.control.latents import Model, blend, ddim
from chronotope.papers.control.maps import MeanMap, mask_of
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, full, sinks, window

Keys = Literal["all", "first+prev"]


def frames_seen(keys: Keys, pixels: int) -> Pattern:
    """Whose keys a frame sees, on Grid(t=frames, n=pixels)."""
    return full() if keys == "all" else window(t=(1, 0)) | sinks(pixels)


def cross_frame_attention(
    q: Float[Tensor, "b f h n d"], k: Float[Tensor, "b f h n d"], v: Float[Tensor, "b f h n dv"], keys: Keys = "all"
) -> Float[Tensor, "b f h n dv"]:
    """Attention of each frame over the keys of several."""
    frames, pixels = q.shape[1], q.shape[3]
    joined = [x.transpose(1, 2).flatten(2, 3) for x in (q, k, v)]
    out = attention(*joined, grid=Grid(t=frames, n=pixels), where=frames_seen(keys, pixels))
    return out.unflatten(2, (frames, pixels)).transpose(1, 2)


class CrossFrame(Control):
    """Turns self-attention over the pixels of each frame into attention over the pixels of several.

    Args:
        frames: F; the batch holds the frames of one video after another.
        keys: whose keys a frame sees.
    """

    def __init__(self, frames: int, keys: Keys = "all"):
        self.frames, self.keys = frames, keys

    def asks(self, at: At, asked: Asked) -> Asked:
        if at.crossed:
            return asked
        if asked.mask is not None or asked.causal or asked.where is not None:
            raise ChronotopeError(f"{at.layer}: CrossFrame joins the frames of layers without mask and pattern alone.")
        if len(asked.q) % self.frames:
            raise ChronotopeError(f"{at.layer}: a batch of {len(asked.q)} is no whole number of {self.frames} frames.")
        pixels = asked.q.shape[2]
        q, k, v = (self._joined(x) for x in (asked.q, asked.k, asked.v))
        where, grid = frames_seen(self.keys, pixels), Grid(t=self.frames, n=pixels)
        return asked.but(q=q, k=k, v=v, where=where, grid=grid)

    def out(self, at: At, asked: Asked, out: Float[Tensor, "b h n dv"]) -> Float[Tensor, "bf h m dv"]:
        if at.crossed:
            return out
        return out.unflatten(2, (self.frames, -1)).transpose(1, 2).flatten(0, 1)

    def _joined(self, x: Float[Tensor, "bf h n d"]) -> Float[Tensor, "b h fn d"]:
        return x.unflatten(0, (-1, self.frames)).transpose(1, 2).flatten(2, 3)


def word_mask(
    words: MeanMap, size: tuple[int, int], threshold: float | int = 0.3, dilate: int = 0
) -> Callable[[int], Bool[Tensor, "f 1 h w"]]:
    """M of what the tokens of an attached `MeanMap` have seen up to a step."""
    return lambda step: mask_of(words.mean(size), threshold, dilate)[:, None]


@paper(
    system=2,
    name="Blended Latent Diffusion under Attention Control",
    family="control",
    claim="edits a video where a word's attention is, on the inverted latents of the source elsewhere",
    evidence=["tests/papers/control/test_blended.py"],
)
def blended_sample(
    model: Model,
    source: Float[Tensor, "steps_and_one f *s"],
    alphas: Float[Tensor, "n"],
    mask: Tensor | Callable[[int], Tensor],
    until: int | None = None,
) -> Float[Tensor, "f *s"]:
    """Samples from the noise of the source; after each step, what lies outside the mask becomes the source's latent.

    Args:
        model: (x, t) -> noise, told what the video shall show.
        source: the trajectory of `ddim_invert`.
        alphas: of the ladder of noise.
        mask: True or 1 where it is edited; or a function of the number of steps done.
        until: blends in so many first steps; None: in all.
    """
    steps = len(source) - 1

    def after(x: Tensor, step: int) -> Tensor:
        if until is not None and step > until:
            return x
        return blend(x, source[step], mask(step) if callable(mask) else mask)

    return ddim(model, source[0], alphas, steps, after=after)
