"""Chorales: every note of four voices from all notes before it, by the Music Transformer's measure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from chronotope.boxes import chunks
from chronotope.data.chorales import KINDS, Chorales, Piece, read_chorales, transposed
from chronotope.models.events import Events
from chronotope.tasks.learning import TEST, VALID, Makes, Numbers, Published, Schedule, Task

DOWN, UP = 5, 6  # semitones by which a piece may be moved: twelve keys
AT_ONCE = 1 << 13  # notes measured at once
NATS = "nats"

SOURCE = "arXiv 1809.04281, table of JSB chorales, validation part; as remembered, the paper was not at hand"
PUBLISHED = (
    Published("Transformer, absolute", {NATS: 0.417}, SOURCE),
    Published("the same with instrument labels", {NATS: 0.370}, SOURCE),
    Published("Music Transformer, relative time and pitch", {NATS: 0.335}, SOURCE),
)


@dataclass(frozen=True, kw_only=True)
class ChoraleNotes(Task):
    """Notes. `length`: steps of a training crop and of a window; `transpose`: whether crops are moved to any key."""

    name: ClassVar[str] = "chorales"
    about: ClassVar[str] = "each note of a chorale from all before it, voice by voice"
    best: ClassVar[str] = NATS
    models: ClassVar[Mapping[str, str]] = {
        "absolute": "sinusoids of time and voice, added to the notes",
        "relative": "learned vectors of relative time and voice, which queries meet beside the keys",
        "rotary": "queries and keys rotated by time and voice",
        "bias": "a learned number for each relative time and voice, added to the scores",
    }

    length: int = 64
    transpose: bool = True

    @property
    def protocol(self) -> str:
        return (
            f"every note of the pieces, step by step and voice by voice, in windows of {self.length} steps that "
            "overlap by half; mean nats of a note; at once: each piece whole"
        )

    @cached_property
    def chorales(self) -> Chorales:
        """What the file holds."""
        return read_chorales(self.data)

    @property
    def examples(self) -> int:
        return len(self.chorales.train)

    def batch(self, index: Int64[Tensor, "b"], rng: torch.Generator) -> Int64[Tensor, "b n"]:
        """A crop of each of these pieces, drawn, in a key that is drawn; -1 after its end."""
        rows = []
        for piece in (self.chorales.train[i] for i in index.tolist()):
            first = int(torch.randint(max(1, len(piece) - self.length + 1), (1,), generator=rng))
            crop = piece[first : first + self.length]
            if self.transpose:
                crop = transposed(crop, int(torch.randint(-DOWN, UP + 1, (1,), generator=rng)))
            rows.append(crop.flatten())
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def maker(self, model: str) -> Makes:
        return partial(_events, self, model)

    def loss(self, model: Any, batch: Any) -> Float[Tensor, ""]:
        return model.nats(batch).sum() / (batch >= 0).sum()

    def measure(self, model: Any, part: str) -> Numbers:
        """Mean nats of a note and their exponential, in windows; of the test part also with each piece whole."""
        pieces = self._part(part)
        out = _numbers(self._windowed(model, pieces), pieces)
        if part == TEST:
            whole = sum(float(model.nats(piece.flatten()[None]).double().sum()) for piece in pieces)
            out["nats at once"] = whole / sum(piece.numel() for piece in pieces)
        return out

    def _part(self, part: str) -> list[Piece]:
        return self.chorales.valid if part == VALID else self.chorales.test

    def _windowed(self, model: Any, pieces: list[Piece]) -> float:
        """The sum over all notes, each measured once."""
        alike: dict[int, list[tuple[Tensor, int]]] = {}
        for piece in pieces:
            for window, known in windows(piece, self.length):
                alike.setdefault(window.numel(), []).append((window.flatten(), known * window.shape[1]))
        total = 0.0
        for size, same in alike.items():
            for some in chunks(len(same), size, AT_ONCE):
                nats = model.nats(torch.stack([window for window, _ in same[some]])).double()
                before = torch.tensor([known for _, known in same[some]])
                total += float(nats[torch.arange(size) >= before[:, None]].sum())
        return total

    def schedule(self, model: str) -> Schedule:
        return Schedule(steps=600, batch=4, rate=3e-3, decay=0.01, warmup=0.1, falls=True, clip=1.0, every=200)

    def floors(self) -> dict[str, Numbers]:
        """How often each voice sings each note; and whether it sings that of the step before once more."""
        counted, test = Counted.of(self.chorales.train), self.chorales.test
        return {
            "how often each voice sings a note": _numbers(sum(counted.once(piece) for piece in test), test),
            "the note before, or any other": _numbers(sum(counted.again(piece) for piece in test), test),
        }

    @property
    def published(self) -> tuple[Published, ...]:
        return PUBLISHED if self.data.name.startswith("Jsb16thSeparated") else ()


def _events(
    task: ChoraleNotes,
    model: str,
    dim: int = 128,
    heads: int = 4,
    layers: int = 4,
    ratio: float = 4.0,
    dropout: float = 0.0,
    tied: bool = False,
) -> nn.Module:
    return Events(KINDS, task.chorales.voices, model, task.length, dim, heads, layers, ratio, dropout, tied)


def _numbers(total: float, pieces: list[Piece]) -> Numbers:
    mean = total / sum(piece.numel() for piece in pieces)
    return {NATS: mean, "perplexity": math.exp(mean)}


def windows(piece: Piece, length: int) -> Iterator[tuple[Piece, int]]:
    """Windows of `length` steps, each half a window after the one before, the last one at the end of the piece; and
    how many steps of each were in those before. A piece that is no longer is one window.
    """
    first, known = 0, 0
    while True:
        first = max(0, min(first, len(piece) - length))
        yield piece[first : first + length], known - first
        known = first + length
        if known >= len(piece):
            return
        first += max(1, length // 2)


@dataclass(frozen=True)
class Counted:
    """What was counted on some pieces: log p of each note of each voice, and how often a voice repeats its note."""

    notes: Float[Tensor, "v kinds"]
    repeats: Float[Tensor, "v"]

    @classmethod
    def of(cls, pieces: list[Piece]) -> Counted:
        """Counts of notes begin at 1."""
        steps = torch.cat(pieces)
        counts = 1.0 + torch.stack([torch.bincount(voice, minlength=KINDS) for voice in steps.T]).double()
        pairs = [(piece[1:] == piece[:-1]).double() for piece in pieces]
        return cls((counts / counts.sum(1, keepdim=True)).log(), torch.cat(pairs).mean(0))

    def once(self, piece: Piece) -> float:
        """Nats of a piece, each note on its own."""
        return -float(self._of(piece).sum())

    def again(self, piece: Piece) -> float:
        """Nats of a piece where a note is that of the step before, with what is left shared among the others."""
        before, now = self._of(piece[:-1]), self._of(piece[1:])
        other = (1 - self.repeats).log() + now - torch.log1p(-before.exp())
        follows = torch.where(piece[1:] == piece[:-1], self.repeats.log(), other)
        return -float(self._of(piece[:1]).sum() + follows.sum())

    def _of(self, piece: Piece) -> Float[Tensor, "t v"]:
        return self.notes[torch.arange(piece.shape[1]), piece]
