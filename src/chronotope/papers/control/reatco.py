r"""ReAtCo: puts the objects of an edited video into boxes, and samples what is edited jointly with what is kept.

$$
P = \mathrm{softmax}_{words}(100\, A), \quad
\mathcal{L} = \sum_k \max(0, 1 - \mathrm{top}_{in}(P_k)) + \max(0, \mathrm{top}_{out}(P_k)), \quad
z \leftarrow z - 20 \sqrt{r_i}\, \nabla_z \mathcal{L}
$$

RAD. A: cross-attention of pixels to words, the mean over heads and layers, without the start token. top: mean over
frames of the mean of the largest fifth of P_k inside, or outside, the box of word k; P_k is smoothed over 3 x 3 x 3
places of space and time first. r falls from 1 to 0.5 over the steps; the update is made in the first 25 of 50. In steps
0, 10 and 20 it is preceded by up to 20 updates that pull the worst word alone, until its top_in is 0.05, 0.5, 0.8.

IRJS. At each step the model and the sampler both get m z + (1 - m) (the source, with fresh noise of that step), so that
both sides of a border are sampled together. Long videos: overlapping windows of frames are denoised, and averaged.

Sizes: frames are members of the batch; z, source [F, C, H, W], mask [F or 1, 1, H, W], maps [F, h, w, T] at 1 / 32 of
the picture's sides, boxes [K, 4] or [F, K, 4] as (left, top, right, bottom) from 0 to 1, one for each word.

    >>> alphas = linear_alphas()
    >>> source, mask = torch.randn(8, 4, 16, 16), torch.zeros(1, 1, 16, 16)
    >>> mask[..., 4:12, 4:12] = 1
    >>> joint_sample(lambda x, t: x / 2, torch.randn(8, 4, 16, 16), alphas, 10, source=source, mask=mask).shape
    torch.Size([8, 4, 16, 16])

With attention: `maps = Capture(grad=True)`, `rad = Refocus(words=[2, 5], boxes=boxes)` and, inside `with control(model,
maps, layers="*cross*")`, `joint_sample(..., pull=refocusing(rad, denoise, maps, (h, w)))`.

The factor of 100 suits texts of 77 tokens; where a text has few words, whose weights differ by more, it leaves no
gradient, and `sharp=5` is about as much. Measured, 25 updates at the published rate, in layers of 6 words: what the
loss sees of a word (P, summed) moves from 0.06 .. 0.33 inside its box to 0.93 .. 0.98, at a factor of 100, while A
itself reaches 0.32 .. 0.39; at 5, and with larger weights, A moves from 0.06 .. 0.26 to 0.82 .. 0.94. A video denoiser
of 4 words, at 5, draws three quarters of the object in its box in all of 64 frames, in 8% of them without RAD.

Left out: the one-shot tuned video model (Tune-A-Video on Stable Diffusion 1.4), its guidance of 12.5 and its prompts.
Noise of IRJS is drawn once a step here, so that windows agree on it; there anew for each window.

The released code (mdswyz/ReAtCo at 9ecd5c0) differs: it drops the last token of the text too; its Gaussian of sigma 0.5
has the variance 0.5, here 0.25; a box of less than five places gives it NaN, here its largest place counts; windows
with a stride over 1 leave out the last frames, here one more is put at the end. Its measures of boxes, copied to run
beside these with its variance and without its last token, differ by 2.4e-7 at
most (40 random cases).

Paper: Yuanzhi Wang, Yong Li, Mengyi Liu, Xiaoya Zhang, Xin Liu, Zhen Cui, Antoni B. Chan, "Re-Attentional Controllable
Video Diffusion Editing", 2024, arXiv 2412.11710.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.adapt.control import Capture
from chronotope.errors import ChronotopeError
from chronotope.papers.control import layouts
from chronotope.papers.control.latents import Model, Rung, averaged, blend, ddim_step, ladder, noised, time_of, views
from chronotope.papers.control.maps import pixel_maps, smoothed, top_mean
from chronotope.papers.registry import paper

Look = Callable[[Tensor], Float[Tensor, "f h w t"]]
"""From a latent [F, C, H, W] to maps that keep their graph."""
Pull = Callable[[Tensor, int, Rung, slice], Tensor]
"""Of the frames of a window: their latent, the step, its rung, which frames they are."""


def inside_and_outside(
    maps: Float[Tensor, "f h w t"],
    words: Sequence[int],
    boxes: Float[Tensor, "*f k four"],
    share: float = 0.2,
    smooth: float | None = 0.25,
    sharp: float | int = 100,
) -> tuple[Float[Tensor, "k"], Float[Tensor, "k"]]:
    """top_in and top_out of each word. words: places in the text, whose start token is 0. smooth: variance, or None."""
    if min(words, default=1) < 1:
        raise ChronotopeError(f"words={list(words)}: place 0 is the start token, which is left out.")
    seen = (sharp * maps[..., 1:]).softmax(-1)[..., [word - 1 for word in words]].movedim(-1, 0)
    if smooth is not None:
        seen = smoothed(seen, smooth, dims=(1, 2, 3))
    region = layouts.boxes(boxes, (maps.shape[1], maps.shape[2]), rounded=True)
    region = (region[:, None] if region.ndim == 3 else region.transpose(0, 1)).expand(seen.shape)
    return top_mean(seen, region, share).mean(1), top_mean(seen, ~region, share).mean(1)


def attention_loss(
    maps: Float[Tensor, "f h w t"],
    words: Sequence[int],
    boxes: Float[Tensor, "*f k four"],
    share: float = 0.2,
    smooth: float | None = 0.25,
    sharp: float | int = 100,
) -> Float[Tensor, ""]:
    """What is missing inside the boxes, and what is too much outside."""
    inside, outside = inside_and_outside(maps, words, boxes, share, smooth, sharp)
    return (1 - inside).clamp(min=0).sum() + outside.clamp(min=0).sum()


def guide_latent(z: Float[Tensor, "*s"], loss: Float[Tensor, ""], eta: float | int) -> Float[Tensor, "*s"]:
    """z - eta grad; z is the one that the loss was computed from."""
    return (z - eta * torch.autograd.grad(loss, z)[0]).detach()


@dataclass(frozen=True)
class Refocus:
    """RAD: `rad(z, step, look)` is the latent whose words look into their boxes.

    words, boxes: as for `attention_loss`. goals: which top_in is asked for before a step, by up to `inner` updates.
    """

    words: Sequence[int]
    boxes: Tensor
    steps: int = 50
    until: int = 25
    rate: float | int = 20
    goals: Mapping[int, float] = field(default_factory=lambda: {0: 0.05, 10: 0.5, 20: 0.8})
    inner: int = 20
    share: float = 0.2
    smooth: float | None = 0.25
    sharp: float | int = 100

    def eta(self, step: int) -> float:
        """20 sqrt(r_i)."""
        return self.rate * (1 - 0.5 * step / max(self.steps - 1, 1)) ** 0.5

    @torch.enable_grad()
    def __call__(
        self, z: Float[Tensor, "f *s"], step: int, look: Look, frames: slice = slice(None)
    ) -> Float[Tensor, "f *s"]:
        boxes = self.boxes[frames] if self.boxes.ndim == 3 else self.boxes
        how = (self.words, boxes, self.share, self.smooth, self.sharp)
        for _ in range(self.inner if step in self.goals else 0):
            z = z.detach().requires_grad_()
            worst = (1 - inside_and_outside(look(z), *how)[0]).clamp(min=0).max()
            if worst <= 1 - self.goals[step]:
                break
            z = guide_latent(z, worst, self.eta(step))
        if step < self.until:
            z = z.detach().requires_grad_()
            z = guide_latent(z, attention_loss(look(z), *how), self.eta(step))
        return z.detach()


def refocusing(rad: Refocus, model: Model, maps: Capture, size: tuple[int, int]) -> Pull:
    """RAD of a model to which `maps`, a `Capture(grad=True)`, is attached."""

    def pull(z: Tensor, step: int, rung: Rung, frames: slice) -> Tensor:
        def look(z: Tensor) -> Tensor:
            maps.clear()
            model(z, time_of(rung, z))
            return pixel_maps([one for kept in maps.kept.values() for one in kept], size)

        z = rad(z, step, look, frames)
        maps.clear()
        return z

    return pull


def joint_region_step(
    model: Model, z: Float[Tensor, "f *s"], noisy: Float[Tensor, "f *s"], mask: Tensor, rung: Rung
) -> Float[Tensor, "f *s"]:
    """IRJS. noisy: the source with the noise of this rung; mask: 1 or True where it is edited."""
    z = blend(z, noisy, mask)
    return ddim_step(z, model(z, time_of(rung, z)), rung.left, rung.after)


@paper(
    system=156,
    name="ReAtCo",
    family="control",
    claim="words of an edited video look into their boxes, and edited and kept regions are sampled jointly",
    evidence=["tests/papers/control/test_reatco.py"],
)
@torch.no_grad()
def joint_sample(
    model: Model,
    noise: Float[Tensor, "f *s"],
    alphas: Float[Tensor, "n"],
    steps: int = 50,
    *,
    pull: Pull | None = None,
    source: Tensor | None = None,
    mask: Tensor | None = None,
    window: int = 4,
    stride: int = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "f *s"]:
    """Samples a video window by window, pulled by `refocusing`, with a `source` where the `mask` is 0.

    Args:
        model: (x, t) -> noise, of some frames.
        noise: where it begins, such as that of `ddim_invert`.
        window, stride: frames of a window, and between the starts of two; they see what `model` makes of them alone.
    """
    if (source is None) != (mask is None):
        raise ChronotopeError("source and mask belong together: what is kept, and where it is not.")
    z, windows = noise, views(len(noise), window, stride)
    region = torch.ones(len(z), dtype=torch.bool, device=z.device).view(-1, *[1] * (z.ndim - 1))
    region = region if mask is None else mask.expand(len(z), *mask.shape[1:])
    for i, rung in enumerate(ladder(alphas, steps)):
        noisy = z if source is None else noised(source, rung.left, generator)

        def act(some: Tensor, frames: slice, i: int = i, rung: Rung = rung, noisy: Tensor = noisy) -> Tensor:
            some = some if pull is None else pull(some, i, rung, frames)
            return joint_region_step(model, some, noisy[frames], region[frames], rung)

        z = averaged(act, z, windows, dim=0)
    return z
