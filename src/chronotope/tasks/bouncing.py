"""Clips of bouncing digits, made anew in each step: what the tasks on them share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.data.moving_digits import bouncing, parts_of, read_digits, smaller
from chronotope.tasks.learning import TEST, VALID, Task


@dataclass(frozen=True, kw_only=True)
class Bouncing(Task):
    """`data`: an idx file of digits, or its folder.

    `canvas`: pixels of a frame on each side; `shrink`: so many pixels of a digit on each side become one. `digits`: of
    a clip. `train`, `valid`, `test`: digits in the file of each part, in this order. `checked`, `clips`: clips to
    validate on, and to test on; those to learn from are made anew in each step.
    """

    canvas: int = 16
    shrink: int = 4
    digits: int = 2
    train: int = 8000
    valid: int = 1000
    test: int = 1000
    checked: int = 200
    clips: int = 1000

    @property
    def length(self) -> int:
        """Frames of a clip."""
        raise NotImplementedError

    @property
    def source(self) -> str:
        """Of the clips, for the protocol."""
        return f"fresh clips of {self.train:,} digits to learn from, {self.clips:,} clips of {self.test:,} other digits"

    @cached_property
    def parts(self) -> dict[str, Float[Tensor, "n m m"]]:
        """The digits of "train", "valid" and "test"."""
        digits = smaller(read_digits(self.data), self.shrink)
        return dict(zip(("train", VALID, TEST), parts_of(digits, (self.train, self.valid, self.test)), strict=True))

    @property
    def examples(self) -> int:
        return self.train

    def count(self, part: str) -> int:
        """Clips of a part that are measured on."""
        return self.checked if part == VALID else self.clips

    def whole(self, part: str, count: int, rng: torch.Generator) -> Float[Tensor, "b t c h w"]:
        """Clips of the digits of a part."""
        return bouncing(self.parts[part], count, self.length, self.canvas, rng, self.digits)
