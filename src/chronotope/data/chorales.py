"""Music for voices: what each sings at each step of time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from chronotope.data.files import unpacked
from chronotope.errors import ChronotopeError

PITCHES = 128
SILENCE = PITCHES
"""What stands for a voice that rests."""
KINDS = PITCHES + 1
"""Of notes."""

Piece = Int64[Tensor, "_steps _voices"]


@dataclass(frozen=True)
class Chorales:
    """Pieces: note numbers of MIDI, or `SILENCE`, by step and voice."""

    train: list[Piece]
    valid: list[Piece]
    test: list[Piece]

    @property
    def voices(self) -> int:
        """Of each piece."""
        return self.train[0].shape[1]


def read_chorales(path: str | Path) -> Chorales:
    """A file of JSON (.json, .json.gz): train, valid, test -> pieces -> steps -> the pitch of each voice, -1: a rest.

    Raises ChronotopeError: no such file, or another format, such as steps with unequal numbers of voices.
    """
    path = Path(path)
    if not path.is_file():
        raise ChronotopeError(
            f"chorales {path}: no such file; expected JSON with the pitch of every voice at each step."
        )
    try:
        given = json.loads(unpacked(path))
    except (ValueError, OSError, EOFError) as error:
        raise ChronotopeError(f"{path}: {error}; expected JSON, plain or packed as .gz.") from None
    parts = ("train", "valid", "test")
    if not isinstance(given, dict) or not all(given.get(part) for part in parts):
        raise ChronotopeError(f"{path}: expected pieces under each of {', '.join(parts)}.")
    out = Chorales(*([_piece(path, part, i, piece) for i, piece in enumerate(given[part])] for part in parts))
    odd = {piece.shape[1] for part in (out.train, out.valid, out.test) for piece in part}
    if len(odd) > 1:
        raise ChronotopeError(f"{path}: pieces have {sorted(odd)} voices; expected one number of voices.")
    return out


def _piece(path: Path, part: str, number: int, steps: Any) -> Piece:
    try:
        out = torch.tensor(steps)
    except (ValueError, TypeError) as error:  # rows of unequal length, or no numbers
        raise ChronotopeError(f"{path}: {part} {number}: {error}; expected the pitch of every voice.") from None
    if out.ndim != 2 or out.dtype != torch.int64 or not out.numel() or out.min() < -1 or out.max() >= PITCHES:
        raise ChronotopeError(
            f"{path}: {part} {number}: expected steps x voices of pitches from 0 to {PITCHES - 1}, -1 for a rest."
        )
    return torch.where(out < 0, SILENCE, out)


def transposed(piece: Int64[Tensor, "*b t v"], semitones: int) -> Int64[Tensor, "*b t v"]:
    """Every note higher by so many semitones, rests as they are. Raises ChronotopeError where MIDI has no such note."""
    sung = piece < PITCHES
    out = torch.where(sung, piece + semitones, piece)
    if bool(((out < 0) | (sung & (out >= PITCHES))).any()):
        raise ChronotopeError(f"transposed({semitones}): leaves the {PITCHES} pitches of MIDI.")
    return out
