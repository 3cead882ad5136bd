"""Assignments in files, and on models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import GRID, WHERE, C, N, Stack, masked, near, nothing_is_left, shown_by  # noqa: F401

import chronotope as ct
from chronotope.adapt import Assignment, apply, attach, load
from chronotope.errors import ChronotopeError
from strategies import build, expressions

SEVERAL = {
    "blocks.0": (WHERE, ct.full()),
    "blocks.1": (ct.route.top_blocks(keep=2, h=1, w=2) & ct.causal(), WHERE | ct.sinks(1)),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(expressions(GRID, GRID, depth=2), min_size=1, max_size=3), max_size=3),
    st.floats(0, 1),
    st.lists(st.floats(-1e3, 1e3), max_size=2),
)
def test_what_is_saved_is_read(tmp_path: Path, texts: list[list[str]], number: float, borders: list[float]) -> None:
    layers = {f"layer.{i}": tuple(map(build, own)) for i, own in enumerate(texts)}
    above = dict.fromkeys(borders, layers)
    plan = Assignment(layers, number, number, number, {"grids": {"layer.0": "Grid(h=3)"}, "inputs": 3}, above)
    if "predicate" in str(texts):  # functions have no text
        with pytest.raises(ChronotopeError, match="has to be read again"):
            plan.save(tmp_path / "plan.json")
        return
    assert load(plan.save(tmp_path / "plan.json")) == plan
    assert repr(load(tmp_path / "plan.json")) == repr(plan)


def test_routes_and_heads_are_read(tmp_path: Path) -> None:
    plan = Assignment(SEVERAL, 0.1, 0.5, 0.4)
    assert load(str(plan.save(str(tmp_path / "plan.json")))) == plan
    assert plan.where("blocks.0") == ct.per_head([WHERE, ct.full()])
    assert plan.where("other") is None
    assert Assignment({"a": (ct.full(),) * 2}).where("a") is None
    assert Assignment({"a": (WHERE,) * 2}).where("a") == WHERE


def good() -> dict[str, Any]:
    return json.loads(json.dumps({
        "schema": "chronotope.assignment", "version": 2, "error": 0.1, "density": 0.5, "bound": 0.4, "measured": {},
        "layers": {"blocks.0": ["window(h=3, w=1)", "full()"]}, "above": [[0.5, {"blocks.0": ["full()", "full()"]}]],
    }))  # fmt: skip


BROKEN: list[Any] = [
    b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"null", b"[]", b"3", b'"text"', b"{}",
    *({"layers": layers} for layers in (
        None, 3, [], {"a": None}, {"a": []}, {"a": "full()"}, {"a": [3]}, {"a": [None]}, {"a": [["full()"]]},
        {"a": [""]}, {"a": ["window("]}, {"a": ["window(n=2)"]}, {"a": ["windou(n=3)"]}, {"a": ["print(3)"]},
        {"a": ["__import__('os')"]}, {"a": ["{[1]: 2}"]}, {"a": ["a\0b"]}, {"a": ["1"]}, {"a": ["(" * 500]},
        {"a": ["~" * 9000 + "full()"]}, {"a": ["route.none()"]}, {"a": ["route.top_blocks(keep='x', n=3)"]},
        {"a": ["graph([[1], [2, 3]])"]}, {"a": ["segments('x')"]}, {"a": ["predicate(3)"]},
    )),
    *({name: value} for name in ("error", "density", "bound") for value in (None, "0.1", [1])),
    *({"above": above} for above in (
        None, {}, 3, [3], [[]], [[1]], [["1", {}]], [[math.nan, {}]], [[1, {}, 2]], [[1, []]], [[1, {"a": []}]],
    )),
    {"schema": "other"}, {"schema": None}, {"version": 1}, {"version": "2"}, {"version": None}, {"measured": [1]},
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_says_what_is_wrong(tmp_path: Path, broken: Any) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(broken if isinstance(broken, bytes) else json.dumps(good() | broken).encode())
    with pytest.raises(ChronotopeError) as error:
        load(path)
    assert str(path) in str(error.value)
    path.write_text(json.dumps(good()))
    load(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 400), st.binary(max_size=4), st.integers(0, 9))
def test_a_file_that_is_damaged_is_read_or_refused(tmp_path: Path, at: int, put: bytes, cut: int) -> None:
    text = json.dumps(good()).encode()
    path = tmp_path / "plan.json"
    path.write_bytes(text[:at] + put + text[at + cut :])
    try:
        load(path)
    except ChronotopeError as error:
        assert str(path) in str(error)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ChronotopeError, match="cannot be read"):
        load(tmp_path / "none.json")
    with pytest.raises(ChronotopeError, match="cannot be read"):
        load(tmp_path)


def test_apply_patches_and_restores(tmp_path: Path) -> None:
    model, x = Stack(), torch.randn(1, N, C)
    plain = model(x)
    plan = Assignment({"blocks.0": (WHERE, ct.full()), "blocks.1": (ct.full(), ct.full())})
    with masked(ct.plan(ct.per_head([WHERE, ct.full()]), GRID).mask(), shown_by(ct.full()).expand(2, N, N)):
        expected = model(x)
    for given_ in (plan, plan.save(tmp_path / "plan.json"), str(tmp_path / "plan.json")):
        with apply(model, given_, GRID) as handle:
            near(model(x), expected)
        assert [bool(layer.done) for layer in handle.layers] == [True, False]
        assert torch.equal(model(x), plain)
    with apply(model, Assignment(SEVERAL), GRID):
        found = model(x)
    with attach(model, {name: ct.per_head(list(own)) for name, own in SEVERAL.items()}, GRID):
        near(model(x), found)
    with pytest.raises(
        ChronotopeError, match=r"names blocks\.7, which this model has not; it has blocks\.0, blocks\.1"
    ):
        apply(model, Assignment({"blocks.7": (WHERE,)}))
    more = Assignment({"blocks.0": (WHERE, ct.full(), ct.full())})
    with apply(model, more, GRID), pytest.raises(ChronotopeError, match="3 heads"):
        model(x)
    assert torch.equal(model(x), plain)
