"""Patterns are values, closed under `& | ~`, and obey the laws of sets of pairs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chronotope as ct
from strategies import Case, build, cases, expressions, grid_pairs

fast = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
three = grid_pairs(24).flatmap(lambda pair: st.tuples(st.just(pair), *[expressions(*pair, depth=1)] * 3))


def mask(pattern: ct.Pattern, pair: tuple[ct.Grid, ct.Grid]) -> torch.Tensor:
    return ct.plan(pattern, *pair, tile={}).mask()


@fast
@given(three)
def test_set_laws(drawn: tuple[tuple[ct.Grid, ct.Grid], str, str, str]) -> None:
    pair, *texts = drawn
    a, b, c = map(build, texts)

    def same(x: ct.Pattern, y: ct.Pattern) -> None:
        assert torch.equal(mask(x, pair), mask(y, pair)), (x, y)

    same(~(a & b), ~a | ~b)
    same(~(a | b), ~a & ~b)
    same(a & a, a)
    same(a | a, a)
    same(a & b, b & a)
    same(a | b, b | a)
    same(a & (a | b), a)
    same(a | (a & b), a)
    same(a & (b | c), (a & b) | (a & c))
    same(a | (b & c), (a | b) & (a | c))
    same((a & b) & c, a & (b & c))
    same(~~a, a)
    same(a & ~a, ct.nothing())
    same(a | ~a, ct.full())
    same(a & ct.full(), a)
    same(a | ct.nothing(), a)
    same(~ct.full(), ct.nothing())
    assert torch.equal(mask(a & b, pair), mask(a, pair) & mask(b, pair))
    assert torch.equal(mask(a | b, pair), mask(a, pair) | mask(b, pair))
    assert torch.equal(mask(~a, pair), ~mask(a, pair))


@fast
@given(cases(most=24, depth=3))
def test_patterns_are_values(case: Case) -> None:
    pattern = case.where
    copies = [copy.copy(pattern)]
    if "predicate" not in case.text:
        copies += [
            case.where,
            copy.deepcopy(pattern),
            pickle.loads(pickle.dumps(pattern)),
            ct.parse_pattern(repr(pattern)),
        ]
        assert repr(ct.parse_pattern(repr(pattern))) == repr(pattern)
    for other in copies:
        assert other == pattern
        assert hash(other) == hash(pattern)
    assert pattern != ~pattern
    assert pattern != case.text
    with pytest.raises(AttributeError):
        pattern.parts = ()


def test_different_meanings_are_different_values() -> None:
    texts = [
        "full()", "nothing()", "along('t')", "along('h')", "along('t', 'h')",
        "window(t=3)", "window(t=5)", "window(h=3)",
        "window(t=3, dilation=2)", "window(t=3, edge='shift')", "window(t=(1, 0))", "window(t=(0, 1))", "blocks(t=3)",
        "blocks(t=3, shift={'t': 1})", "causal()", "causal('t')", "causal(strict=True)", "strided(t=3)", "sinks(3)",
        "segments([0, 1])", "segments([0, 0])", "graph([[0], [1]])", "graph([[1], [0]])", "graph([[0], [1]], hops=2)",
        "graph([[0], [1]], axis='h')", "full() & causal()", "full() | causal()", "causal() & full()", "~causal()",
        "per_head([full(), causal()])", "per_head([causal(), full()])",
    ]  # fmt: skip
    values = [build(text) for text in texts]
    assert len(set(values)) == len(values)
    assert all((a == b) == (i == j) for i, a in enumerate(values) for j, b in enumerate(values))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: ct.window(t=5), lambda: ct.window(t=(2, 2))),
        (lambda: ct.window(t=3, dilation=2), lambda: ct.window(t=3, dilation={"t": 2})),
        (lambda: ct.window(t=3), lambda: ct.window(t=3, dilation=1, edge="clip")),
        (lambda: ct.blocks(t=3), lambda: ct.blocks(t=3, shift={"t": 0})),
        (lambda: ct.segments([0, 0, 1]), lambda: ct.segments(torch.tensor([7, 7, 9], dtype=torch.int32))),
        (lambda: ct.graph([[0, 1], [1, 0]]), lambda: ct.graph(torch.tensor([[1, 0, 0], [0, 1, 1]]))),
        (lambda: (ct.full() & ct.causal()) & ct.sinks(1), lambda: ct.full() & (ct.causal() & ct.sinks(1))),
    ],
)
def test_equal_meanings_that_are_equal_values(one: Callable[[], ct.Pattern], other: Callable[[], ct.Pattern]) -> None:
    assert one() == other()
    assert hash(one()) == hash(other())


def test_reprs_are_the_expressions() -> None:
    for text in (
        "window(t=5, h=9) & causal('t')",
        "window(t=(4, 0))",
        "window(t=3, h=3, dilation=2, edge='shift')",
        "window(t=3, h=3, dilation={'t': 2})",
        "blocks(t=2, h=8, shift={'h': 4})",
        "causal('t', strict=True)",
        "(along('t') | along('h', 'w')) & ~strided(t=4)",
        "~(window(t=3) | sinks(4))",
        "per_head([full(), causal()])",
        "graph([[0, 1], [1, 2]], axis='v', hops=2)",
        "segments([0] * 3 + [1] * 4)",
    ):
        assert repr(build(text)) == text
        assert ct.parse_pattern(text) == build(text)
        assert ct.parse_pattern(f"  {text}\n") == build(text)


def test_parse_takes_the_prefix_of_the_import() -> None:
    assert ct.parse_pattern("ct.window(t=3) & ~ct.causal('t')") == ct.window(t=3) & ~ct.causal("t")


def test_per_head_joins_head_by_head() -> None:
    a, b, near = ct.causal(), ct.along("t"), ct.window(h=3)
    both = ct.per_head([a, b])
    assert both.heads == 2
    for op in (lambda x, y: x & y, lambda x, y: x | y):
        joined = op(both, near)
        assert joined.heads == 2
        assert (joined.head(0), joined.head(1)) == (op(a, near), op(b, near))
    assert (~both).head(1) == ~b
    assert (both & ct.per_head([b, a])).head(0) == a & b


def test_predicates_are_equal_only_to_themselves() -> None:
    def before(q, k):
        return q.t >= k.t

    assert ct.predicate(before) == ct.predicate(before)
    assert ct.predicate(before) != ct.predicate(lambda q, k: q.t >= k.t)
    assert "before" in repr(ct.predicate(before))


def test_a_pattern_has_no_truth_value() -> None:
    with pytest.raises(ct.ChronotopeError, match="neither true nor false: join patterns by"):
        _ = ct.window(t=3) and ct.causal("t")
