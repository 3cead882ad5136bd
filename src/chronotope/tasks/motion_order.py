r"""Motion that no frame tells: dots that shift by a step per frame, around a field without borders.

$$
f_t(y, x) = [\,(y,\; x - v t \bmod n) \in S\,], \qquad t = 0 \dots n - 1, \qquad v \in \{1, -1, 2, -2, \dots\}
$$

S: dots of an n x n field, drawn anew for each clip, uniformly; n: a prime. The label is v. Because S is uniform on a
ring, each f_t has the same distribution for every v; and because n is prime, v t mod n runs once through all shifts, so
that clips of all labels even have the same frames. They differ in nothing but the order of these: a model that looks at
frames apart, or at frames as a set, cannot be right more often than once in `classes` cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.boxes import chunks
from chronotope.errors import ChronotopeError
from chronotope.models.clip_classifier import ClipClassifier
from chronotope.tasks.learning import TEST, VALID, Makes, Numbers, Schedule, Task

AT_ONCE = 128  # clips asked at once
SEEDS = {VALID: 11, TEST: 12}
KINDS = {
    "time": ("t hw", True, False),
    "frames": ("hw", True, False),
    "unordered": ("t hw", False, False),
    "token": ("t hw", True, True),
}


@dataclass(frozen=True, kw_only=True)
class Motion(Task):
    """Steps of dots. Clips are made here; `data` is not read, any path will do.

    `size`: n, a prime; a clip has n frames of n x n pixels. `classes`: how many steps, of 1, -1, 2, -2 ...; at most
    n - 1. `dots`: of a clip. `clips`: to validate on, and to test on; what is learned from is drawn anew in each step.
    """

    name: ClassVar[str] = "motion"
    about: ClassVar[str] = "the step of moving dots, which only the order of the frames tells"
    best: ClassVar[str] = "cross-entropy"
    models: ClassVar[Mapping[str, str]] = {
        "time": "attention along t, then along h and w",
        "frames": "attention along h and w only: frames apart, the mean of their logits",
        "unordered": "as time, which is not in the position code: frames as a set",
        "token": "as time, read from a class token",
    }

    size: int = 7
    classes: int = 4
    dots: int = 4
    clips: int = 2000

    def __post_init__(self) -> None:
        prime = self.size > 1 and all(self.size % x for x in range(2, self.size))
        if not (prime and 2 <= self.classes < self.size and 1 <= self.dots <= self.size**2):
            raise ChronotopeError(
                f"motion: size={self.size}, classes={self.classes}, dots={self.dots}; expected a prime n, 2 to n - 1 "
                "classes, 1 to n * n dots."
            )

    @property
    def protocol(self) -> str:
        return (
            f"{self.dots} dots on a ring, {self.size} frames of {self.size} x {self.size}, {self.classes} steps; "
            f"fresh clips to learn from, accuracy on {self.clips:,} others"
        )

    @property
    def examples(self) -> int:
        return self.clips

    def batch(self, index: Int64[Tensor, "b"], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """As many fresh clips [B, T, 1, H, W] as there are in the index, and their labels [B]."""
        return self.made(len(index), rng)

    def made(self, count: int, rng: torch.Generator) -> tuple[Float[Tensor, "b t 1 h w"], Int64[Tensor, "b"]]:
        """Clips, and labels from 0 on."""
        n = self.size
        labels = torch.randint(self.classes, (count,), generator=rng)
        places = torch.rand(count, n * n, generator=rng).argsort(1)[:, : self.dots]
        first = torch.zeros(count, n * n).scatter_(1, places, 1.0).view(count, 1, n, n)
        shift = self.steps[labels][:, None] * torch.arange(n)
        source = (torch.arange(n) - shift[:, :, None]) % n
        frames = first.expand(-1, n, -1, -1).gather(3, source[:, :, None].expand(-1, -1, n, -1))
        return frames[:, :, None], labels

    @property
    def steps(self) -> Int64[Tensor, "classes"]:
        """Pixels to the right for each frame, by label."""
        return torch.tensor([(label // 2 + 1) * (1 - 2 * (label % 2)) for label in range(self.classes)])

    def maker(self, model: str) -> Makes:
        return partial(_classifier, self, model)

    def loss(self, model: Any, batch: Any) -> Float[Tensor, ""]:
        clips, labels = batch
        return F.cross_entropy(model(clips), labels)

    def measure(self, model: Any, part: str) -> Numbers:
        """Accuracy, its standard error, and the mean cross-entropy in nats."""
        clips, labels = self.made(self.clips, torch.Generator().manual_seed(SEEDS[part]))
        logits = torch.cat([model(clips[some]) for some in chunks(len(clips), 1, AT_ONCE)])
        share = float((logits.argmax(1) == labels).double().mean())
        return {
            "accuracy": share,
            "standard error": math.sqrt(share * (1 - share) / len(labels)),
            "cross-entropy": float(F.cross_entropy(logits, labels)),
        }

    def schedule(self, model: str) -> Schedule:
        return Schedule(steps=1000, batch=64, rate=2e-3, warmup=0.05, falls=True, clip=1.0, every=100)

    def floors(self) -> dict[str, Numbers]:
        """What is known of single frames, or of frames as a set: nothing."""
        share = 1 / self.classes
        return {"any guess from frames without their order": {"accuracy": share, "cross-entropy": -math.log(share)}}


def _classifier(task: Motion, kind: str, dim: int = 64, heads: int = 2, layers: int = 2, patch: int = 0) -> nn.Module:
    # A frame is one token unless told otherwise: pixels as tokens stay at a guess for more than 300 steps.
    order, ordered, token = KINDS[kind]
    return ClipClassifier(task.classes, patch or task.size, 1, dim, heads, layers, order, ordered, token=token)
