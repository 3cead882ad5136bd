"""What is to be made of a clip, drawn at random: the masks by which VDT is taught."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid

TEMPORAL = ("predict", "backward", "interpolate", "unconditional", "one", "random")
KINDS = (*TEMPORAL, "space")
LEAST = 4  # places of a block
TRIES = 10
ENDS = 3  # frames without a spatial mask at each end, at most


@dataclass(frozen=True)
class SpaceTimeMask:
    """Masks [B, T, h, w] of clips on Grid(t, h, w): 1 where something is to be made, 0 where it is given.

    With probability `spatial` the kind is "space": rectangles that cover up to `area` of a frame, of aspects from
    `aspect` to 1 / aspect, the same in a run of frames that leaves out 0 to 3 at each end. Else it is one of six,
    equally likely: "predict" gives the first `given` frames, "backward" the last, "interpolate" each `every`-th from
    the first, "unconditional" none, "one" any single one; "random" asks for each frame with probability `share`.

        >>> mask = SpaceTimeMask(Grid(t=16, h=8, w=8))
        >>> mask(2, "interpolate")[0, :, 0, 0].int().tolist()
        [0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1]

    Raises ChronotopeError: other axes, a clip with nothing to make, a kind that is none of these.
    """

    grid: Grid
    given: int = 8
    every: int = 4
    share: float = 0.8
    spatial: float = 0.2
    area: float = 0.5
    aspect: float = 0.3

    def __post_init__(self) -> None:
        if self.grid.axes != ("t", "h", "w") or self.grid.prefix:
            raise ChronotopeError(f"SpaceTimeMask({self.grid!r}): expected axes t, h, w and no prefix.")
        if not 0 < self.given < self.grid.sizes["t"] or self.every < 2:
            raise ChronotopeError(
                f"SpaceTimeMask(given={self.given}, every={self.every}) of {self.grid.sizes['t']} frames: expected "
                "fewer frames given than there are, 1 or more, and every of 2 or more."
            )
        if self.spatial > 0 and (min(self.grid.shape[1:]) < 3 or self.area * math.prod(self.grid.shape[1:]) < LEAST):
            raise ChronotopeError(
                f"SpaceTimeMask({self.grid!r}, area={self.area}): no block of {LEAST} places fits; use frames of 3 x 3 "
                "or more and a larger area, or spatial=0."
            )

    def __call__(
        self, batch: int, kind: str | None = None, generator: torch.Generator | None = None
    ) -> Bool[Tensor, "b t h w"]:
        """Masks for a batch: of one kind, or of kinds drawn for each."""
        if kind is not None and kind not in KINDS:
            raise ChronotopeError(f"kind={kind!r}: one of {', '.join(KINDS)}, or None.")
        return torch.stack([self._one(kind or self._kind(generator), generator) for _ in range(batch)])

    def _kind(self, generator: torch.Generator | None) -> str:
        if _uniform(0, 1, generator) < self.spatial:
            return "space"
        return TEMPORAL[_below(len(TEMPORAL), generator)]

    def _one(self, kind: str, generator: torch.Generator | None) -> Bool[Tensor, "t h w"]:
        frames, mask = self.grid.sizes["t"], torch.zeros(self.grid.shape, dtype=torch.bool)
        if kind == "predict":
            mask[self.given :] = True
        elif kind == "backward":
            mask[: -self.given] = True
        elif kind == "interpolate":
            mask[torch.arange(frames) % self.every > 0] = True
        elif kind == "random":
            mask[torch.rand(frames, generator=generator) < self.share] = True
        elif kind == "space":
            most = min(ENDS, (frames - 1) // 2)
            before, after = _below(most + 1, generator), _below(most + 1, generator)
            mask[before : frames - after] = self._rectangles(generator)
        else:
            mask[:] = True
            if kind == "one":
                mask[_below(frames, generator)] = False
        return mask

    def _rectangles(self, generator: torch.Generator | None) -> Bool[Tensor, "h w"]:
        """Rectangles one after another, each adding places, until `area` is covered or none fits in ten tries."""
        mask = torch.zeros(self.grid.shape[1:], dtype=torch.bool)
        asked = self.area * mask.numel()
        while mask.sum() < asked:
            before = mask.sum()
            for _ in range(TRIES):
                self._add(mask, float(asked - before), generator)
                if mask.sum() > before:
                    break
            else:
                break
        return mask

    def _add(self, mask: Tensor, most: float, generator: torch.Generator | None) -> None:
        height, width = mask.shape
        places = _uniform(LEAST, most, generator)
        bend = math.exp(_uniform(math.log(self.aspect), -math.log(self.aspect), generator))
        h, w = round(math.sqrt(places * bend)), round(math.sqrt(places / bend))
        if not (0 < h < height and 0 < w < width):
            return
        top, left = _below(height - h + 1, generator), _below(width - w + 1, generator)
        block = mask[top : top + h, left : left + w]
        if int((~block).sum()) <= most:
            block[:] = True


def _uniform(low: float | int, high: float | int, generator: torch.Generator | None) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _below(count: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(count, (), generator=generator))
