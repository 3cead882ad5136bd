"""Chorales: files, windows that measure each note once, floors by brute force and of the real pieces, and a toy."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from chronotope.data.chorales import KINDS, SILENCE, read_chorales, transposed
from chronotope.errors import ChronotopeError
from chronotope.tasks import chorales
from chronotope.tasks.chorales import ChoraleNotes, windows
from chronotope.tasks.learning import TEST, VALID, learn, settle
from chronotope.tasks.learning.order import generator
from chronotope.tasks.registry import task

DATA = Path(os.environ.get("CHRONOTOPE_DATA", Path(__file__).parents[3] / "shared" / "data"))
REAL = DATA / "music_jsb" / "Jsb16thSeparated.json.gz"
SMALL = {"train": [[[60, 50], [60, -1], [62, 48]], [[70, 55]]], "valid": [[[1, 2]]], "test": [[[0, 127], [-1, -1]]]}


def written(path: Path, given_: object = SMALL) -> Path:
    path.write_bytes(gzip.compress(json.dumps(given_).encode()))
    return path


def tune(path: Path, pieces: int = 12, steps: int = 40) -> Path:
    """Two voices in a canon: each holds its note for two steps and then climbs, the second a fifth below."""
    rng = torch.Generator().manual_seed(0)
    starts = torch.randint(50, 60, (3 * pieces,), generator=rng).tolist()
    every = [[[start + t // 2 % 7, start + t // 2 % 7 - 7] for t in range(steps)] for start in starts]
    parts = {"train": every[:pieces], "valid": every[pieces : 2 * pieces], "test": every[2 * pieces :]}
    return written(path, parts)


def test_pieces_are_read_as_they_are(tmp_path: Path) -> None:
    found = read_chorales(written(tmp_path / "a.json.gz"))
    assert [piece.tolist() for piece in found.train] == [[[60, 50], [60, SILENCE], [62, 48]], [[70, 55]]]
    assert [piece.tolist() for piece in found.test] == [[[0, 127], [SILENCE, SILENCE]]]
    assert found.voices == 2
    (tmp_path / "b.json").write_text(json.dumps(SMALL))
    assert read_chorales(tmp_path / "b.json").valid[0].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("given_", "match"),
    [
        ([1], "expected pieces under each of train, valid, test"),
        ({**SMALL, "test": []}, "expected pieces under each"),
        ({**SMALL, "valid": [[[60, 50], [60]]]}, "valid 0: expected sequence of length 2"),
        ({**SMALL, "valid": [[[60, 128]]]}, "valid 0: expected steps x voices of pitches from 0 to 127"),
        ({**SMALL, "valid": [[60, 50]]}, "steps x voices"),
        ({**SMALL, "valid": [[[60.5, 50]]]}, "steps x voices"),
        ({**SMALL, "valid": [[["a", 50]]]}, "valid 0"),
        ({**SMALL, "valid": [[[60, 50, 40]]]}, r"pieces have \[2, 3\] voices"),
    ],
)
def test_other_files_are_named(tmp_path: Path, given_: object, match: str) -> None:
    with pytest.raises(ChronotopeError, match=match):
        read_chorales(written(tmp_path / "a.json.gz", given_))


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ChronotopeError, match="no such file"):
        read_chorales(tmp_path / "none.json")
    (tmp_path / "a.json.gz").write_bytes(b"no gzip")
    (tmp_path / "b.json").write_text("{")
    for name in ("a.json.gz", "b.json"):
        with pytest.raises(ChronotopeError, match="expected JSON, plain or packed"):
            read_chorales(tmp_path / name)


def test_keys_change_and_rests_stay() -> None:
    piece = torch.tensor([[60, SILENCE], [0, 127]])
    assert transposed(piece[:1], 3).tolist() == [[63, SILENCE]]
    assert transposed(piece[:1], -60).tolist() == [[0, SILENCE]]
    for semitones in (1, -1):
        with pytest.raises(ChronotopeError, match="leaves the 128 pitches"):
            transposed(piece, semitones)


def test_a_batch_is_a_function_of_examples_and_generator(tmp_path: Path) -> None:
    own = ChoraleNotes(data=tune(tmp_path / "a.json.gz"), length=16)
    index = torch.tensor([3, 5, 3])
    found = own.batch(index, generator(0, 7))
    assert torch.equal(found, own.batch(index, generator(0, 7)))
    assert not torch.equal(found, own.batch(index, generator(0, 8)))
    whole, shifts = own.chorales.train[3], set()
    for step in range(100):
        crop = own.batch(torch.tensor([3]), generator(0, step)).view(16, 2)
        parts = [whole[first : first + 16] for first in range(len(whole) - 15)]
        fits = {shift for shift in range(-20, 20) for part in parts if torch.equal(part + shift, crop)}
        assert len(fits) == 1  # a canon that climbs and falls back is in one key only
        shifts |= fits
    assert shifts == set(range(-5, 7))
    still = ChoraleNotes(data=own.data, length=16, transpose=False)
    crop = still.batch(torch.tensor([3]), generator(0, 0)).view(16, 2)
    assert any(torch.equal(part, crop) for part in parts)


def test_a_short_piece_is_padded_and_its_padding_costs_nothing(tmp_path: Path) -> None:
    own = ChoraleNotes(data=written(tmp_path / "a.json.gz"), length=3, transpose=False)
    found = own.batch(torch.tensor([1, 0]), generator(0, 0))
    assert found.tolist() == [[70, 55, -1, -1, -1, -1], [60, 50, 60, SILENCE, 62, 48]]
    model = own.maker("absolute")(dim=8, heads=2, layers=1).eval()
    expected = [model.nats(found[:1, :2]).flatten(), model.nats(found[1:]).flatten()]
    torch.testing.assert_close(own.loss(model, found), torch.cat(expected).mean())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20))
def test_windows_measure_every_step_once_with_half_a_window_before_it(steps: int, length: int) -> None:
    piece = torch.stack([torch.arange(steps)] * 2, 1)
    seen: list[int] = []
    for number, (window, known) in enumerate(windows(piece, length)):
        assert len(window) == min(length, steps)
        assert known >= length // 2 if number and length > 1 else known == 0
        seen += window[known:, 0].tolist()
    assert seen == list(range(steps))


class Flat(nn.Module):
    """Knows nothing but where in the window it is."""

    def nats(self, events: Tensor) -> Tensor:
        return events + 1000.0 * torch.arange(events.shape[1])


def test_a_measure_is_the_mean_over_all_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chorales, "AT_ONCE", 40)
    monkeypatch.setattr(chorales.math, "exp", lambda x: -x)
    own = ChoraleNotes(data=tune(tmp_path / "a.json.gz", pieces=3, steps=19), length=8)
    for part, pieces in ((VALID, own.chorales.valid), (TEST, own.chorales.test)):
        each: list[float] = []
        for piece in pieces:
            for window, known in windows(piece, 8):
                each += Flat().nats(window.flatten()[None])[0, 2 * known :].tolist()
        found = own.measure(Flat(), part)
        assert found["nats"] == pytest.approx(sum(each) / len(each))
        assert found["perplexity"] == -found["nats"]
    whole = torch.stack([Flat().nats(piece.flatten()[None]) for piece in own.chorales.test])
    assert found["nats at once"] == pytest.approx(float(whole.mean()))


def test_floors_are_counted_by_hand(tmp_path: Path) -> None:
    own = ChoraleNotes(data=tune(tmp_path / "a.json.gz", pieces=3, steps=9))
    counts = [Counter(int(step[voice]) for piece in own.chorales.train for step in piece) for voice in range(2)]
    notes = sum(map(len, own.chorales.train))

    def chance(voice: int, note: int) -> float:
        return (counts[voice][note] + 1) / (notes + KINDS)

    repeats = 4 / 8  # of nine steps that change after every second one
    once, again = [], []
    for piece in own.chorales.test:
        for t, step in enumerate(piece.tolist()):
            for voice, note in enumerate(step):
                once.append(-math.log(chance(voice, note)))
                before = int(piece[t - 1, voice])
                if t == 0:
                    again.append(once[-1])
                elif note == before:
                    again.append(-math.log(repeats))
                else:
                    again.append(-math.log((1 - repeats) * chance(voice, note) / (1 - chance(voice, before))))
    floors = own.floors()
    assert floors["how often each voice sings a note"]["nats"] == pytest.approx(sum(once) / len(once))
    assert floors["the note before, or any other"]["nats"] == pytest.approx(sum(again) / len(again))


def test_the_floors_are_chances() -> None:
    """Of every next note together 1, whatever the note before."""
    piece = torch.tensor([[60, 50], [60, 51], [61, 51], [60, 51]])
    counted = chorales.Counted.of([piece])
    for before in range(0, KINDS, 16):
        nexts = [torch.tensor([[before, before], [note, note]]) for note in range(KINDS)]
        first = counted.again(torch.tensor([[before, before]]))
        # The voices are alike in nothing, so a voice is looked at by giving the other its likeliest.
        total = sum(math.exp(first - counted.again(pair)) for pair in nexts)
        assert 0 < total <= 1 + 1e-9
        each = [sum(math.exp(-one) for one in _of_voice(counted, before, voice)) for voice in range(2)]
        assert each == pytest.approx([1, 1])


def _of_voice(counted: chorales.Counted, before: int, voice: int) -> list[float]:
    own = chorales.Counted(counted.notes[voice : voice + 1], counted.repeats[voice : voice + 1])
    first = own.again(torch.tensor([[before]]))
    return [own.again(torch.tensor([[before], [note]])) - first for note in range(KINDS)]


@pytest.mark.parametrize("model", ChoraleNotes.models)
def test_a_short_training_beats_the_floors(tmp_path: Path, model: str) -> None:
    texts = ["steps=60", "batch=8", "rate=1e-2", "dim=16", "heads=2", "layers=1", "length=16", "every=30", "dropout=0"]
    settled = settle(task("chorales"), tune(tmp_path / "a.json.gz"), model, texts)
    result = learn(settled, tmp_path / "run", Console(file=io.StringIO()))
    assert result.test["nats"] < 0.8 * min(floor["nats"] for floor in result.floors.values())
    assert set(result.valid) < set(result.test)


def test_the_real_pieces_are_those_of_the_published_split() -> None:
    if not REAL.exists():
        pytest.skip(f"{REAL} is absent: set CHRONOTOPE_DATA")
    own = ChoraleNotes(data=REAL)
    found = own.chorales
    assert [len(part) for part in (found.train, found.valid, found.test)] == [229, 76, 77]
    assert [sum(map(len, part)) for part in (found.train, found.valid, found.test)] == [55_228, 18_408, 18_900]
    assert found.voices == 4
    pairs = [(piece[1:] == piece[:-1]).flatten() for piece in found.valid]
    assert float(torch.cat(pairs).double().mean()) == pytest.approx(0.786, abs=5e-4)
    floors = own.floors()
    assert floors["how often each voice sings a note"]["nats"] == pytest.approx(2.640, abs=1e-3)
    assert floors["the note before, or any other"]["nats"] == pytest.approx(1.137, abs=1e-3)
    assert [one.numbers["nats"] for one in own.published] == [0.417, 0.370, 0.335]
