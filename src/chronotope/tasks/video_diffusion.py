"""Clips of bouncing digits made from noise: a flow from noise to clips is learned, and its samples are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from chronotope.boxes import chunks
from chronotope.errors import ChronotopeError
from chronotope.models.diffusion import Model, flow_loss, flow_sample
from chronotope.models.video_dit import VideoDiT
from chronotope.tasks.bouncing import Bouncing
from chronotope.tasks.learning import TEST, VALID, Makes, Numbers, Schedule

AT_ONCE = 25  # clips denoised at once
SEEDS = {VALID: 21, TEST: 22, "train": 23}
FILTERS, SIDE = 64, 5  # of the features by which clips are compared
NOISE = 100  # more than the seed of a part: of the noise from which its samples are made


@dataclass(frozen=True, kw_only=True)
class VideoDiffusion(Bouncing):
    """Generation of clips of bouncing digits [B, T, 1, H, W], 0 .. 1.

    `frames`: of a clip. `samples`: made when testing, each in `euler` steps.
    """

    name: ClassVar[str] = "video-diffusion"
    about: ClassVar[str] = "clips of two digits that bounce in a square, made from noise"
    best: ClassVar[str] = "flow loss"
    models: ClassVar[Mapping[str, str]] = {"dit": "transformer over all tokens of space and time, steered by the noise"}

    frames: int = 8
    samples: int = 100
    euler: int = 32

    @property
    def protocol(self) -> str:
        return (
            f"{self.digits} digits in {self.canvas} x {self.canvas}, {self.frames} frames; {self.source}; "
            f"distances: of {self.samples:,} samples in {self.euler} steps to these clips, by features of one frame "
            "and of three, 0 on average for samples of the same digits"
        )

    @property
    def length(self) -> int:
        return self.frames

    def batch(self, index: Int64[Tensor, "b"], rng: torch.Generator) -> tuple[Tensor, Int64[Tensor, ""]]:
        """As many fresh clips as there are in the index, and the seed of their noise and times."""
        return self.whole("train", len(index), rng), torch.randint(2**62, (), generator=rng)

    def known(self, part: str) -> Float[Tensor, "b t c h w"]:
        """The clips of a part that are measured on, the same each time."""
        return self.whole(part, self.count(part), torch.Generator().manual_seed(SEEDS[part]))

    def noise(self, part: str) -> Float[Tensor, "b t c h w"]:
        """What the samples are made from that are compared with a part, the same each time."""
        rng = torch.Generator().manual_seed(NOISE + SEEDS[part])
        return torch.randn(self.samples, *self._shape, generator=rng)

    def maker(self, model: str) -> Makes:
        return {"dit": _dit}[model]

    def loss(self, model: Any, batch: Any) -> Float[Tensor, ""]:
        clips, seed = batch
        return flow_loss(model, clips, generator=torch.Generator().manual_seed(int(seed)))

    def measure(self, model: Any, part: str) -> Numbers:
        """The loss of the flow at the same noise and times each time; on "test" also the distances of samples."""
        rng, clips = torch.Generator().manual_seed(SEEDS[part]), self.known(part)
        some = chunks(len(clips), 1, AT_ONCE)
        loss = sum(float(flow_loss(model, clips[one], generator=rng)) * (one.stop - one.start) for one in some)
        found = {self.best: loss / len(clips)}
        return found | self.distances(self.sampled(model, self.noise(part)), part) if part == TEST else found

    def sampled(self, model: Model, noise: Float[Tensor, "b *s"]) -> Float[Tensor, "b *s"]:
        """A sample for each member of the noise."""
        return torch.cat([flow_sample(model, noise[one], self.euler) for one in chunks(len(noise), 1, AT_ONCE)])

    def distances(self, samples: Float[Tensor, "b t c h w"], part: str) -> Numbers:
        """How far samples are from the clips of a part: frames on their own, and frames with what goes before."""
        clips = self.known(part)
        return {
            "distance of frames": feature_distance(samples, clips, over=1),
            "distance of motion": feature_distance(samples, clips, over=min(3, self.frames)),
        }

    def schedule(self, model: str) -> Schedule:
        return Schedule(steps=600, batch=8, rate=3e-3, decay=0.01, warmup=0.05, falls=True, clip=1.0, every=150)

    def floors(self) -> dict[str, Numbers]:
        """Noise; each pixel on its own; the mean clip; clips to learn from with their frames exchanged; these clips.

        The last is no floor for a model: it is how near samples can come.
        """
        clips = self.known("train")
        some = clips[: self.samples]
        apart = torch.stack([frame.roll(t, 0) for t, frame in enumerate(some.unbind(1))], 1)
        # As if one more clip were white: ink where none was seen is unlikely, not impossible.
        variance, mean = torch.var_mean(torch.cat((clips, torch.ones_like(clips[:1]))), 0, correction=0)
        return {
            "noise": self.measure(lambda x, t: torch.zeros_like(x), TEST),
            "each pixel a normal on its own": self.measure(normal_flow(mean, variance), TEST),
            "mean clip": self.distances(clips.mean(0).expand_as(some), TEST),
            "frames of different clips": self.distances(apart, TEST),
            "clips to learn from": self.distances(some, TEST),
        }

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.frames, 1, self.canvas, self.canvas


def feature_distance(x: Float[Tensor, "n t c h w"], y: Float[Tensor, "m t c h w"], over: int) -> float:
    """`energy_distance` of the features of clips, each feature in units of its deviation among y.

    A feature is the mean, or the root mean square, of what one of 64 filters finds in a clip: max(0, w . pixels) at
    each place, w: `over` frames x 5 x 5 numbers that are drawn once and add up to 0. It tells strokes and how they
    move, not where in the frame they are.
    """
    a, b = features(x, over), features(y, over)
    deviation, mean = torch.std_mean(b, 0)
    return energy_distance((a - mean) / deviation, (b - mean) / deviation)


def features(clips: Float[Tensor, "b t 1 h w"], over: int) -> Float[Tensor, "b f"]:
    """Means and root mean squares over places, as `feature_distance` has them."""
    w = torch.randn(FILTERS, over * SIDE * SIDE, generator=torch.Generator().manual_seed(0))
    w = F.normalize(w - w.mean(1, keepdim=True)).view(-1, 1, over, SIDE, SIDE)
    found = [F.conv3d(x.transpose(1, 2), w).relu().flatten(2) for x in clips.split(AT_ONCE)]
    return torch.cat([torch.cat((one.mean(2), one.square().mean(2).sqrt()), 1) for one in found])


def energy_distance(x: Float[Tensor, "n f"], y: Float[Tensor, "m f"]) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| over pairs of different members.

    Where x and y are drawn from one distribution it is 0 on average, and may be below 0; otherwise above 0 on average.

    Source: Szekely and Rizzo 2013, "Energy statistics: a class of statistics based on distances".
    """
    # Not by products of matrices: they lose the small distances of members that are alike.
    far = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    x, y, n, m = x.double(), y.double(), len(x), len(y)
    within = far(x, x).sum() / (n * (n - 1)) + far(y, y).sum() / (m * (m - 1))
    return float(2 * far(x, y).mean() - within)


def normal_flow(mean: Float[Tensor, "*s"], variance: Float[Tensor, "*s"]) -> Model:
    """E[x - noise | x_t] where each value is normal on its own: the flow that knows of no other value."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, *[1] * mean.ndim)
        both = t * variance - (1 - t)
        return mean + both / (t**2 * variance + (1 - t) ** 2).clamp(min=1e-12) * (x - t * mean)

    return model


def _dit(
    patch: int = 2, dim: int = 96, layers: int = 4, heads: int = 4, ratio: float = 4.0, start: str | None = None
) -> VideoDiT:
    """`start`: the folder of a model whose weights are the first ones, such as one trained on shorter clips."""
    model = VideoDiT(patch, 1, dim, layers, heads, ratio)
    if start is not None:
        first = VideoDiT.from_pretrained(start)
        if first.config != model.config:
            raise ChronotopeError(f"--set start={start}: that model has {first.config}; set the same here.")
        model.load_state_dict(first.state_dict())
    return model
