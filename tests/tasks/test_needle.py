"""Needles: the haystacks; that routes act on a trained model as it is; the table; the command's evidence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.report.needle import write_needle
from chronotope.tasks.needle import (
    DENSE,
    DEPTHS,
    Found,
    Haystacks,
    Needles,
    answers,
    ask,
    bound,
    compare,
    finding,
    haystacks,
    learn,
    menu,
    model_of,
    weight,
)
from chronotope.tasks.recall import IGNORED

SMALL = Needles(
    length=200, needles=8, tested=2, first=(24, 4), then=((40, 8), (64, 8)), alone=1, steps=3, tokens=96, keys=16,
    topics=3, words=4, run=6, dim=16, keep=0.25, block=16,
)  # fmt: skip


@settings(max_examples=50)
@given(needles=st.integers(1, 16), spare=st.integers(0, 60), seed=st.integers(0, 2**30))
def test_each_question_has_one_needle_with_its_answer(needles: int, spare: int, seed: int) -> None:
    length = 3 * needles + spare
    tokens, targets, places = haystacks(SMALL, length, needles, 4, torch.Generator().manual_seed(seed))
    hay, keys = length - needles, SMALL.keys
    assert tokens.shape == targets.shape == (4, length) and places.shape == (4, needles)
    assert bool((targets[:, :hay] == IGNORED).all())
    assert torch.equal(tokens.gather(1, places), tokens[:, hay:])
    assert torch.equal(tokens.gather(1, places + 1), targets[:, hay:])
    # Nothing else in the haystack is a key or a value.
    assert bool(((tokens[:, :hay] < keys).sum(1) == needles).all())
    assert bool(((tokens[:, :hay] < 2 * keys).sum(1) == 2 * needles).all())
    assert int(tokens.max()) < SMALL.recipe.vocabulary
    for row in tokens[:, hay:].tolist():
        assert len(set(row)) == needles
    stretch = (places.sort(1).values * needles + needles - 1) // hay
    assert torch.equal(stretch.clamp(max=needles - 1), torch.arange(needles).expand(4, -1))


def test_filler_stays_with_a_topic() -> None:
    tokens, _, _ = haystacks(Needles(), 2048, 8, 4, torch.Generator().manual_seed(0))
    topic = torch.where(tokens >= 2 * 64, (tokens - 2 * 64) // 16, -1)[:, :2000]
    pairs = (topic[:, 1:] >= 0) & (topic[:, :-1] >= 0)
    same = float((topic[:, 1:] == topic[:, :-1])[pairs].float().mean())
    assert abs(same - (1 - 7 / 8 / 32)) < 0.01


def test_longer_sequences_come_after_short_ones() -> None:
    batches = iter(Haystacks(SMALL))
    assert [tuple(next(batches)[0].shape) for _ in range(4)] == [(4, 24), (1, 64), (2, 40), (1, 64)]


def test_more_needles_than_keys_are_refused() -> None:
    with pytest.raises(ct.ChronotopeError, match="17 needles in 200 tokens: expected 1 to 16"):
        replace(SMALL, needles=17)
    with pytest.raises(ct.ChronotopeError, match="3 tokens for each"):
        replace(SMALL, length=23)


@given(seed=st.integers(0, 2**30))
@settings(max_examples=20)
def test_levels_of_blocks(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    q, k = torch.randn(1, 2, 5, 8, generator=rng), torch.randn(1, 2, 3, 4, 8, generator=rng)
    each = torch.einsum("bhqd,bhsmd->bhqsm", q, k)
    assert bool((bound(q, k) >= each.amax(4) - 1e-5).all())
    torch.testing.assert_close(bound(q, k[:, :, :, :1]), each[..., 0])
    torch.testing.assert_close(weight(q, k), (each / 8**0.5).logsumexp(4))


@pytest.mark.parametrize("name", menu(SMALL))
def test_every_route_runs_and_knows_nothing_of_what_comes_later(name: str) -> None:
    torch.manual_seed(0)
    model = model_of(SMALL, menu(SMALL)[name]).eval()
    tokens, _, _ = haystacks(SMALL, 200, 8, 1, torch.Generator().manual_seed(0))
    later = tokens.clone()
    # Queries that vote choose where their block looks: of an earlier block, nothing changes.
    later[:, 160:] = 0
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens)[:, :160], model(later)[:, :160], rtol=1e-4, atol=1e-5)


def test_a_route_that_keeps_all_answers_as_dense_attention_does() -> None:
    torch.manual_seed(0)
    model = model_of(SMALL, ct.causal()).eval()
    tokens, _, _ = haystacks(SMALL, 200, 8, 2, torch.Generator().manual_seed(0))
    said = model(tokens).argmax(-1)
    where = menu(replace(SMALL, keep=1.0))["mean key"]
    assert bool(answers(SMALL, model, where, tokens, said).all())
    assert model.stack.blocks[0].mixers[1].where == ct.causal()


def test_the_oracle_keeps_most() -> None:
    torch.manual_seed(0)
    model = model_of(SMALL, ct.causal()).eval()
    tokens, _, places = haystacks(SMALL, 200, 8, 1, torch.Generator().manual_seed(0))
    layer = finding(SMALL, model, tokens, places)
    assert torch.equal(tokens[0, layer.value[0, 0, :, 0] - 1], tokens[0, -8:])
    assert layer.keeps(ct.causal()) == pytest.approx((1, 1, 1))
    kept = {name: layer.keeps(where) for name, where in menu(SMALL).items()}
    best = kept["oracle: most attention"]
    for name in ("mean key", "largest of each channel", "bounds of each channel", "random blocks"):
        assert kept[name][1] <= best[1] + 1e-6 and kept[name][2] == pytest.approx(best[2]), name
        assert 0.2 < kept[name][2] < 0.35


def test_the_picture_and_the_numbers(tmp_path: Path) -> None:
    said: list[str] = []
    found = compare(SMALL, [DENSE, "mean key"], said.append)
    assert [one.name for one in found] == [DENSE, "mean key"] and len(said) == 4
    assert "mean key" in write_needle(found, SMALL, tmp_path).read_text()
    rows = json.loads((tmp_path / "needle.json").read_text())["rows"]
    assert rows[0]["density"] == 1 and len(rows[1]["depths"]) == DEPTHS and "top" not in rows[0]["where"]
    with pytest.raises(ct.ChronotopeError, match="mean key"):
        compare(SMALL, ["mean kee"])


@pytest.mark.slow
def test_needles_are_found_where_the_route_sees_them() -> None:
    task = Needles(length=2048, tested=4)
    wheres = menu(task)
    names = [DENSE, "mean key", "bounds, blocks of 16", "random blocks", "window and sinks", "oracle: most attention"]
    rows = ask(task, learn(task), {name: wheres[name] for name in names}, lambda _: None)
    found: dict[str, Found] = {one.name: one for one in rows}
    assert found[DENSE].found > 0.95 and found["oracle: most attention"].found > 0.95, found
    assert found["random blocks"].found < 0.5 and found["window and sinks"].found < 0.5, found
    for one in rows:
        # A model says what it sees, and little else.
        assert one.found < one.chosen + 0.25, one
