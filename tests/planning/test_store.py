"""Plan files: what was saved comes back; what cannot be trusted is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import chronotope as ct
from strategies import Case, cases, random_tile


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(most=24, depth=2))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    heads = case.where.heads or case.heads
    for tile in (None, random_tile(case.rng, case.grid)):
        plan = ct.plan(case.where, case.grid, case.key_grid, heads=heads, tile=tile)
        if "predicate" in case.text:
            with pytest.raises(ct.ChronotopeError, match="cannot be saved"):
                plan.save(str(path))
            assert not path.exists()
            continue
        plan.save(str(path))
        again = ct.load_plan(str(path))
        assert again is plan
        assert again is ct.load_plan(path, case.grid)
        assert torch.equal(again.mask(), plan.mask())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    ct.plan(ct.window(t=3) & ct.causal("t"), ct.Grid(t=4, h=2), heads=2).save(str(path))
    return path


def test_the_file_is_small_and_readable(saved: Path) -> None:
    data = json.loads(saved.read_text())
    assert data["where"] == "window(t=3) & causal('t')"
    assert data["grid"] == {"prefix": 0, "axes": [["t", 4], ["h", 2]]}
    assert data["heads"] == 2
    assert len(saved.read_bytes()) < 2000


def refused(path: Path, grid: ct.Grid | None = None) -> str:
    with pytest.raises(ct.ChronotopeError) as error:
        ct.load_plan(str(path), grid)
    return str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    assert "does not exist; write one with Plan.save" in refused(tmp_path / "nowhere.json")
    assert "does not exist" in refused(tmp_path)


def test_truncated_files_anywhere(saved: Path) -> None:
    whole = saved.read_bytes().rstrip()
    for end in range(0, len(whole), 7):
        saved.write_bytes(whole[:end])
        assert "is truncated or not JSON" in refused(saved)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"GIF89a", b"null", b"[1, 2]", b'"text"', b"{}", b'{"chronotope_plan": "one"}']
)
def test_files_that_are_something_else(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    text = refused(saved)
    assert "truncated or not JSON" in text or "is not a plan file" in text


def test_plans_of_another_grid(saved: Path) -> None:
    text = refused(saved, ct.Grid(t=4, h=3))
    assert "is for Grid(t=4, h=2), not for Grid(t=4, h=3)" in text


def test_newer_versions(saved: Path) -> None:
    change(saved, chronotope_plan=99)
    assert "has schema 99, newer than 1" in refused(saved)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_contents_that_do_not_agree(saved: Path) -> None:
    change(saved, where="window(t=5)")
    assert "does not give the pairs it was saved with" in refused(saved)


@pytest.mark.parametrize("key", ["where", "grid", "key_grid", "heads", "tile", "digest"])
def test_missing_entries(saved: Path, key: str) -> None:
    data = json.loads(saved.read_text())
    del data[key]
    saved.write_text(json.dumps(data))
    assert f"{key} missing" in refused(saved)


@pytest.mark.parametrize("key", ["where", "grid", "key_grid", "heads", "tile", "digest"])
@pytest.mark.parametrize("value", [5, "nonsense", [], {}, {"axes": 3}, {"prefix": 0, "axes": [["t"]]}, -1, 1.5])
def test_entries_of_another_kind(saved: Path, key: str, value: Any) -> None:
    if (key, value) == ("tile", {}):
        pytest.skip("an empty tile is one that cuts no axis")
    change(saved, **{key: value})
    refused(saved)


def test_patterns_that_have_no_text_cannot_be_saved(tmp_path: Path) -> None:
    plan = ct.plan(ct.predicate(lambda q, k: q.t >= k.t), ct.Grid(t=4))
    with pytest.raises(ct.ChronotopeError, match=r"cannot be saved.*predicate"):
        plan.save(str(tmp_path / "plan.json"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("windwo(t=3)", "unknown pattern 'windwo': did you mean window?"),
        ("casual('t')", "did you mean causal"),
        ("xyz()", "unknown pattern 'xyz': known are along, band, blocks, causal"),
        ("window(t=3) &", "is not a pattern expression"),
        ("", "is not a pattern expression"),
        ("3", "is not a pattern"),
        ("[window(t=3)]", "is not a pattern"),
        ("window(t=3) & 3", "'3' in 'window(t=3) & 3' is not a pattern"),
        ("window(t=3) + causal()", "is not a list"),
        ("window(3)", "window(3): "),
        ("window(t=4)", "an even window has no centre"),
        ("open('x')", "unknown pattern 'open'"),
        ("__import__('os').remove('x')", "is not part of a pattern expression"),
        ("(lambda: full())()", "is not part of a pattern expression"),
        ("full() if True else nothing()", "is not part of a pattern expression"),
        ("predicate(f)", "unknown pattern 'predicate'"),
        ("~" * 5000 + "full()", "is not a pattern expression"),
    ],
)
def test_text_that_is_no_expression(text: str, said: str) -> None:
    parse: Callable[[str], ct.Pattern] = ct.parse_pattern
    with pytest.raises(ct.ChronotopeError) as error:
        parse(text)
    assert said in str(error.value)
