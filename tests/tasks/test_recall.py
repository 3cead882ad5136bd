"""Multi-query recall: its sequences; that a model can learn it; the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.report.recall import write_recall
from chronotope.tasks.recall import IGNORED, Found, Model, Recall, accuracy, compare, learn, menu, sequences

SMALL = Recall(pairs=(2, 4), length=32, vocabulary=32, dim=16, heads=2, steps=3, batch=4, tested=8)


@settings(max_examples=50)
@given(pairs=st.integers(1, 8), spare=st.integers(0, 9), seed=st.integers(0, 2**30))
def test_every_key_is_asked_once_and_its_value_is_the_target(pairs: int, spare: int, seed: int) -> None:
    task = replace(SMALL, length=4 * pairs + spare)
    tokens, targets = sequences(task, pairs, 5, torch.Generator().manual_seed(seed))
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        known = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        asked = [i for i, value in enumerate(wanted) if value != IGNORED]
        assert len(known) == len(asked) == pairs == len(set(known.values()))
        assert sorted(row[i] for i in asked) == sorted(known)
        assert all(i >= 2 * pairs and known[row[i]] == wanted[i] == row[i + 1] for i in asked)


def test_queries_come_soon_rather_than_late() -> None:
    task = replace(SMALL, length=128)
    _, targets = sequences(task, 2, 2000, torch.Generator().manual_seed(0))
    places = (targets != IGNORED).float().mean(0)
    assert float(places[4:34].sum()) > 2 * float(places[66:126].sum())


@pytest.mark.parametrize("name", menu(SMALL))
def test_every_mixer_of_the_menu_learns_and_steps(name: str) -> None:
    model = Model(SMALL, menu(SMALL)[name])
    tokens, _ = sequences(SMALL, 4, 2, torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 20:] = 0
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens)[:, :20], model(changed)[:, :20], rtol=1e-4, atol=1e-5)
        assert model.state_bytes(8) > 0
    assert 0 <= accuracy(SMALL, learn(SMALL, menu(SMALL)[name]).eval(), 2) <= 1


def test_the_picture_and_the_numbers(tmp_path: Path) -> None:
    said: list[str] = []
    found = compare(SMALL, ["softmax", "delta rule, 32"], said.append)
    assert [one.name for one in found] == ["softmax", "delta rule, 32"] and len(said) == 3
    path = write_recall(found, SMALL, tmp_path)
    assert "softmax (" in path.read_text()
    rows = json.loads((tmp_path / "recall.json").read_text())["rows"]
    assert rows[1]["name"] == "delta rule, 32" and set(rows[0]["accuracy"]) == {"2", "4"}
    with pytest.raises(ct.ChronotopeError, match="softmax"):
        compare(SMALL, ["softmx"])


@pytest.mark.slow
def test_softmax_the_delta_rule_and_memories_by_descent_solve_what_a_small_sum_does_not() -> None:
    task, small = Recall(), "linear, 8 features"
    solving = ["softmax", "delta rule, 32", "matrix memory by descent", "deep memory"]
    found: dict[str, Found] = {one.name: one for one in compare(task, [*solving, small], lambda _: None)}
    assert found["softmax"].accuracy[16] > 0.95
    assert all(found[name].accuracy[16] > 0.9 for name in solving), found
    assert found[small].accuracy[16] < min(found[name].accuracy[16] for name in solving) - 0.2
