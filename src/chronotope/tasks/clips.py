"""The clips that a comparison trains on and is judged by, and their order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.data.digits import moving_digits
from chronotope.data.video import read_video, split
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid

TRAIN, VALID = 512, 16
NUMBERS = 1 << 26  # of all clips together: 256 MiB
SEEDS_APART = 1_000_003  # more than the steps of any training: the generator reads 32 bits
DIGITS = "moving digits"


@dataclass(frozen=True)
class Clips:
    """Clips of t + 1 frames: the first t are given, the last t are to be predicted. float32 in [0, 1]."""

    name: str
    train: Float[Tensor, "train frames channels height width"]
    valid: Float[Tensor, "valid frames channels height width"]

    def floor(self) -> float:
        """Mean squared error of predicting that the next frame is the last one again."""
        return float((self.valid[:, 1:] - self.valid[:, :-1]).square().mean())

    def digest(self) -> str:
        """A short hash of what the clips hold."""
        out = hashlib.sha256(repr((self.train.shape, self.valid.shape)).encode())
        for part in (self.train, self.valid):
            out.update(part.numpy().tobytes())
        return out.hexdigest()[:16]


def load(video: str | Path | None, grid: Grid, *, patch: int, channels: int, seed: int) -> Clips:
    """Clips whose frames are grid.h * patch by grid.w * patch pixels and whose first t frames lie on the grid.

    video: a file; its last fifth is to validate. None: digits that move, the validation ones of another seed.
    Raises ChronotopeError: sizes out of range, and what `read_video`, `split` and `moving_digits` refuse.
    """
    if patch < 1:
        raise ChronotopeError(f"patch={patch}: expected the pixels of a patch, 1 or more.")
    if channels not in (1, 3):
        raise ChronotopeError(f"channels={channels}: expected 1 (gray) or 3 (red, green, blue).")
    height, width, frames = grid.sizes["h"] * patch, grid.sizes["w"] * patch, grid.sizes["t"] + 1
    count = max(VALID, min(TRAIN, NUMBERS // (frames * channels * height * width)))
    if video is None:
        return _digits(count, frames, height, width, channels, seed)
    clips = read_video(video, frames=frames, height=height, width=width, channels=channels, clips=count)
    train, valid = split(clips)
    keep = torch.linspace(0, len(valid) - 1, min(VALID, len(valid))).long()
    return Clips(Path(video).name, train, valid[keep].clone())


def _digits(count: int, frames: int, height: int, width: int, channels: int, seed: int) -> Clips:
    size = max(height, width)
    top, left = (size - height) // 2, (size - width) // 2
    parts = [
        moving_digits(number, frames, size, seed=seed)[..., top : top + height, left : left + width]
        .expand(-1, -1, channels, -1, -1)
        .contiguous()
        for number, seed in ((count, 2 * seed), (VALID, 2 * seed + 1))
    ]
    return Clips(DIGITS, *parts)


class Batches:
    """Batches of clips without end. Batch i depends on the seed and on i alone, so any of them can be the first."""

    def __init__(self, clips: Float[Tensor, "n frames channels height width"], size: int, seed: int, start: int = 0):
        self.clips, self.size, self.seed, self.start = clips, size, seed, start

    def __iter__(self) -> Iterator[Float[Tensor, "b frames channels height width"]]:
        step = self.start
        while True:
            draw = torch.Generator().manual_seed(self.seed * SEEDS_APART + step)
            yield self.clips[torch.randint(len(self.clips), (self.size,), generator=draw)]
            step += 1


class ClipModule(lightning.LightningDataModule):
    """The training clips for Lightning; a run that goes on takes the batch after the last one trained on."""

    def __init__(self, clips: Clips, batch: int, seed: int):
        super().__init__()
        self.clips, self.batch, self.seed = clips, batch, seed

    def train_dataloader(self) -> Batches:
        """Batches from the trainer's step on."""
        start = self.trainer.global_step if self.trainer is not None else 0
        return Batches(self.clips.train, self.batch, self.seed, start)
