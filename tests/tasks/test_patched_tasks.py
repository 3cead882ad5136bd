"""Sampling and reading under patches, on models that know nothing: what is compared with what, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import chronotope as ct
from chronotope.cli import app
from chronotope.models.video_dit import VideoDiT
from chronotope.tasks import reading, sampling


def model() -> VideoDiT:
    torch.manual_seed(0)
    own = VideoDiT(patch=2, dim=24, layers=2, heads=2)
    for weight in own.parameters():
        if not weight.any():  # velocities are 0 at first, whatever the attention
            torch.nn.init.normal_(weight, std=0.3)
    return own


def test_samples_are_compared_with_the_dense_ones_of_the_same_noise() -> None:
    own, clips = model(), torch.rand(3, 8, 1, 8, 8)
    before = [weight.clone() for weight in own.parameters()]
    rows = sampling.compare(own, clips, samples=2, steps=2, tuning=2, rounds=1)
    names = ["radial attention", "mixture of blocks", "searched", "searched, half as dense"]
    assert [row.name for row in rows] == [f"{name}{tuned}" for name in names for tuned in ("", ", tuned")]
    assert all(torch.equal(old, new) for old, new in zip(before, own.parameters(), strict=True))
    radial, searched = rows[0], rows[4]
    assert searched.density <= radial.density <= 1
    assert all(0 <= row.distance < 2 and len(row.distances) == 2 and row.speedup > 0 for row in rows)
    assert rows[2].distance > 0


def test_one_clip_is_too_few_to_choose_by() -> None:
    with pytest.raises(ct.ChronotopeError, match="2 or more"):
        sampling.compare(model(), torch.rand(1, 4, 1, 16, 16))


def test_a_reader_is_judged_at_each_density() -> None:
    reader = reading.needle_reader(512, 2, 0)
    rows = reading.read(reader, [0.5, 0.2], console=Console(quiet=True))
    assert [row.patch for row in rows] == ["dense", *["window and sinks", "route", "searched"] * 2]
    assert all(row.density <= asked + 1e-9 for row, asked in zip(rows[1:], [0.5] * 3 + [0.2] * 3, strict=True))
    assert not any(module._forward_hooks for module in reader.model.modules())


def test_the_command_writes_what_was_read(tmp_path: Path) -> None:
    asked = ["reading", "--length", "512", "--steps", "2", "--needles", "0", "--densities", "0.5", "--windows", "1"]
    ran = CliRunner().invoke(app, [*asked, "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    rows = json.loads((tmp_path / "reading.json").read_text())["rows"]
    assert {row["measure"] for row in rows} == {"perplexity of a byte"} and len(rows) == 4
    wrong = CliRunner().invoke(app, ["reading", "--densities", "half"])
    assert wrong.exit_code == 2
