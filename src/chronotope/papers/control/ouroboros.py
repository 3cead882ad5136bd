r"""Ouroboros-Diffusion: video without an end from a model of short clips, by a queue whose tail begins from its past.

A queue holds T latents, the nearly clean one at its head, pure noise at its tail: latent i lies on rung i of the ladder
of noise. Each step takes all of them one rung down together, lets the head go, and adds a tail:

$$
z_{new} = F_{low}(\hat z) + F_{high}(\eta), \qquad
\hat z = \sqrt{a_T / a_{T-1}}\, z_{tail} + \sqrt{1 - a_T / a_{T-1}}\, \eta'
$$

low frequencies of the tail before, brought back up to the noisiest rung, and high ones of fresh noise: the layout goes
on, what moves is free. F_low keeps the frequencies of space within `cutoff` of the highest, F_high the others. In
between, `SubjectAttention` lets the frames of a segment see the subject in one another, and `Recurrence` draws the
features that it has in noisy frames to those it had in clean ones (both in `ouroboros_subject`).

Sizes: latents [B, T, C, h, w], frames [B, C, h, w]; O(T) memory, however long the video.

    >>> def model(x, t):  # says the noise in x [B, T, C, h, w] at times t [B, T]
    ...     return x
    >>> queue = Fifo(model, torch.randn(1, 8, 4, 6, 6), linear_alphas(), tail=CoherentTail(0.25))
    >>> video = [queue.step() for _ in range(20)]
    >>> video[0].shape, queue.latents.shape
    (torch.Size([1, 4, 6, 6]), torch.Size([1, 8, 4, 6, 6]))

`start` makes the first queue of a clip. The tail of FIFO-Diffusion, noise alone, is `tail=None`. The subject is where
the map of its words lies above a threshold: `mask_of(MeanMap(words).mean(size), threshold)` of `maps`.

    SubjectAttention(masks [B, T, h, w], segment): `ct.adapt.control(model, ..., layers=those within frames)`
    Fifo(..., guidance=Recurrence(LayerFeatures(model, layers), mask, scale))

Unconfirmed, since no code is known: the filter (here ideal, at a cutoff of 0.25 as in FreeInit), that the tail is
brought up again before it is filtered, thresholds, segments (here next to each other), which layers, the loss (here
squared distance), scale and momentum.

On fields that drift, x' = 0.9 x + noise of a natural spectrum, with the best linear denoiser of 4 frames at a time and
a queue of 16: the mean square of what changes at the borders of these windows is 0.187, 0.188, 0.193 (three seeds),
after white tails 0.190, 0.193, 0.199; the variance of the frames, truly 1, is 0.71 to 0.76, after white tails 0.52 to
0.54.

Left out: the windows of a model that is shorter than its queue, and their looking ahead (FIFO-Diffusion), which are the
model's own business here; a trained text-to-video model.

Paper: Jingyuan Chen, Fuchen Long, Jie An, Zhaofan Qiu, Ting Yao, Jiebo Luo, Tao Mei, "Ouroboros-Diffusion: Exploring
Consistent Content Generation in Tuning-free Long Video Diffusion", 2025, arXiv 2501.09019. The queue: Jihwan Kim,
Junoh Kang, Jinyoung Choi, Bohyung Han, "FIFO-Diffusion: Generating Infinite Videos from Text without Training", 2024,
arXiv 2405.11473.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.papers.control.latents import Model, Rung, ddim_step, ladder, noised
from chronotope.papers.registry import paper

Tail = Callable[[Tensor, Rung, torch.Generator | None], Tensor]
"""Of the latent that was the tail, one rung down now, and the noisiest rung."""


@paper(
    system=128,
    name="Ouroboros-Diffusion",
    family="control",
    claim="a queue of latents from clean to noisy; its tail keeps low frequencies, its frames share their subject",
    evidence=["tests/papers/control/test_ouroboros.py"],
)
class Fifo:
    """The queue. Iterating it, without an end, gives frame after frame.

    Args:
        model: (latents [B, T, C, h, w], times [B, T]) -> the noise in them.
        latents: the first queue, head first, each on its rung.
        alphas: the ladder of noise, of which T rungs are used, as by `ddim_sample`.
        tail: makes new tails; None: noise.
        guidance: (latents, times) -> latents, before each step.
        generator: of all noise.
    """

    def __init__(
        self,
        model: Model,
        latents: Float[Tensor, "b t c h w"],
        alphas: Float[Tensor, "_"],
        *,
        tail: Tail | None = None,
        guidance: Callable[[Tensor, Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ):
        self.model, self.latents = model, latents
        self.tail, self.guidance, self.generator = tail, guidance, generator
        self.rungs = ladder(alphas, latents.shape[1])[::-1]
        """Those of the latents, head first."""

    @torch.no_grad()
    def step(self) -> Float[Tensor, "b c h w"]:
        """One rung down for all; the frame that is clean then."""
        x = self.latents
        time = x.new_tensor([rung.time for rung in self.rungs]).expand(len(x), -1)
        if self.guidance is not None:
            x = self.guidance(x, time)
        noise = self.model(x, time)
        down = [ddim_step(x[:, i], noise[:, i], rung.left, rung.after) for i, rung in enumerate(self.rungs)]
        if self.tail is None:
            new = torch.randn(down[-1].shape, generator=self.generator, device=x.device, dtype=x.dtype)
        else:
            new = self.tail(down[-1], self.rungs[-1], self.generator)
        self.latents = torch.stack((*down[1:], new), 1)
        return down[0]

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.step()


class CoherentTail:
    """Low frequencies of the tail before, high ones of noise."""

    def __init__(self, cutoff: float | int = 0.25):
        self.cutoff = cutoff

    def __call__(
        self, previous: Float[Tensor, "b c h w"], rung: Rung, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c h w"]:
        """The new tail, on the noisiest rung; `previous` lies one below."""
        up = noised(previous, rung.left / rung.after, generator)
        fresh = torch.randn(up.shape, generator=generator, device=up.device, dtype=up.dtype)
        return frequency_mix(up, fresh, self.cutoff)


def frequency_mix(
    low: Float[Tensor, "*b h w"], high: Float[Tensor, "*b h w"], cutoff: float | int
) -> Float[Tensor, "*b h w"]:
    """Of one the frequencies within the cutoff, of the other those beyond it."""
    h, w = low.shape[-2:]
    keep = pass_band(h, w, cutoff)[:, : w // 2 + 1].to(low.device)
    return torch.fft.irfft2(torch.where(keep, torch.fft.rfft2(low), torch.fft.rfft2(high)), s=(h, w))


def pass_band(h: int, w: int, cutoff: float | int) -> Bool[Tensor, "h w"]:
    """Frequencies, ordered as by the FFT, whose distance from 0 is `cutoff` at most; the highest of an axis is 1."""
    if cutoff < 0:
        raise ChronotopeError(f"cutoff={cutoff}: expected 0 (the mean alone) or more.")
    rows, columns = (2 * torch.fft.fftfreq(n, dtype=torch.float64) for n in (h, w))
    return rows[:, None].square() + columns.square() <= cutoff**2


def start(
    clip: Float[Tensor, "b t c h w"], alphas: Float[Tensor, "_"], generator: torch.Generator | None = None
) -> Float[Tensor, "b t c h w"]:
    """A first queue: the frames of a clip, each noised as its place in the queue wants it."""
    rungs = ladder(alphas, clip.shape[1])[::-1]
    return torch.stack([noised(clip[:, i], rung.left, generator) for i, rung in enumerate(rungs)], 1)
