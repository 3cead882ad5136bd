"""What patterns mean: the mask of a plan is what the words of the design's table say, pair by pair."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import chronotope as ct
import oracle
from strategies import Case, build, cases

CASES = 1000


def test_masks_equal_the_oracle(count_cases: Callable[[str, int], None]) -> None:
    done = 0

    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(most=30))
    def law(case: Case) -> None:
        nonlocal done
        heads = case.where.heads or 1
        found = ct.plan(case.where, case.grid, case.key_grid, heads=heads).mask()
        np.testing.assert_array_equal(found.numpy(), oracle.mask(case.text, case.grid, case.key_grid))
        done += 1

    law()
    count_cases("Plan.mask() against the oracle", done)


GRID = ct.Grid(t=3, h=4, w=5, prefix=2)


@pytest.mark.parametrize(
    ("text", "query", "seen"),
    [
        ("window(n=5)", 4, [2, 3, 4, 5, 6]),
        ("window(n=5)", 0, [0, 1, 2]),
        ("window(n=(4, 0))", 6, [2, 3, 4, 5, 6]),
        ("window(n=(0, 2))", 6, [6, 7, 8]),
        ("window(n=3, dilation=3)", 4, [1, 4, 7]),
        ("window(n=3, dilation=3)", 1, [1, 4]),
        ("window(n=5, edge='shift')", 0, [0, 1, 2, 3, 4]),
        ("window(n=5, edge='shift')", 9, [5, 6, 7, 8, 9]),
        ("window(n=5, edge='shift')", 5, [3, 4, 5, 6, 7]),
        ("window(n=3, dilation=3, edge='shift')", 0, [0, 3, 6]),
        ("window(n=3, dilation=3, edge='shift')", 8, [2, 5, 8]),
        ("window(n=3, dilation=3, edge='shift')", 6, [3, 6, 9]),
        ("blocks(n=4)", 5, [4, 5, 6, 7]),
        ("blocks(n=4)", 9, [8, 9]),
        ("blocks(n=4, shift={'n': 1})", 2, [0, 1, 2]),
        ("blocks(n=4, shift={'n': 1})", 3, [3, 4, 5, 6]),
        ("blocks(n=4, shift={'n': -1})", 0, [0]),
        ("causal()", 3, [0, 1, 2, 3]),
        ("causal('n', strict=True)", 3, [0, 1, 2]),
        ("causal(strict=True)", 0, []),
        ("strided(n=4)", 5, [1, 5, 9]),
        ("sinks(2)", 7, [0, 1]),
        ("segments([0, 0, 0, 1, 1, 0, 0, 2, 2, 2])", 5, [0, 1, 2, 5, 6]),
        ("graph([[0, 1, 2], [1, 2, 3]], axis='n')", 2, [1, 2]),
        ("graph([[0, 1, 2], [1, 2, 3]], axis='n', hops=2)", 3, [1, 2, 3]),
        ("graph([[0, 1, 2], [1, 2, 3]], axis='n', hops=9)", 3, [0, 1, 2, 3]),
        ("predicate(lambda q, k: q.n + k.n == 9)", 2, [7]),
        ("~window(n=5)", 4, [0, 1, 7, 8, 9]),
        ("window(n=3) | sinks(1)", 5, [0, 4, 5, 6]),
        ("window(n=5) & causal()", 5, [3, 4, 5]),
    ],
)
def test_the_keys_of_one_query_on_a_line(text: str, query: int, seen: list[int]) -> None:
    row = ct.plan(build(text), ct.Grid(n=10)).mask()[query]
    assert row.nonzero()[:, 0].tolist() == seen
    assert np.flatnonzero(oracle.mask(text, ct.Grid(n=10))[query]).tolist() == seen


def test_along_keeps_all_other_axes() -> None:
    at = GRID.coords()[2:]
    mask = ct.plan(ct.along("h", "w"), GRID).mask()[2:, 2:]
    assert torch.equal(mask, at[:, None, 0] == at[None, :, 0])
    mask = ct.plan(ct.along("t"), GRID).mask()[2:, 2:]
    assert torch.equal(mask, (at[:, None, 1:] == at[None, :, 1:]).all(-1))
    assert ct.plan(ct.along("t", "h", "w"), GRID).mask().all()


def test_shifted_windows_see_exactly_their_size() -> None:
    plan = ct.plan(ct.window(t=3, h=3, w=5, edge="shift"), GRID)
    assert (plan.mask()[2:, 2:].sum(1) == 3 * 3 * 5).all()


def test_causal_on_named_axes_is_lexicographic() -> None:
    at = [tuple(row) for row in GRID.coords()[2:, [1, 0]].tolist()]
    expected = torch.tensor([[key <= query for key in at] for query in at])
    assert torch.equal(ct.plan(ct.causal("h", "t"), GRID).mask()[2:, 2:], expected)
    strict = torch.tensor([[key < query for key in at] for query in at])
    assert torch.equal(ct.plan(ct.causal("h", "t", strict=True), GRID).mask()[2:, 2:], strict)


def test_causal_without_axes_is_token_order() -> None:
    size = GRID.places
    expected = torch.ones(size, size).tril().bool()
    assert torch.equal(ct.plan(ct.causal(), GRID).mask()[2:, 2:], expected)
    assert torch.equal(ct.plan(ct.causal("t", "h", "w"), GRID).mask()[2:, 2:], expected)


@pytest.mark.parametrize(
    ("text", "of_prefix", "by_prefix"),
    [
        ("full()", True, True),
        ("nothing()", False, False),
        ("window(t=1)", True, True),
        ("segments([0] * 30 + [1] * 30)", True, True),
        ("sinks(1)", True, True),
        ("predicate(lambda q, k: q.t > 9)", True, True),
        ("causal('t')", True, False),
        ("causal(strict=True)", True, False),
        ("window(t=3) & causal('t')", True, False),
        ("window(t=3) | causal('t')", True, True),
        ("~window(t=3)", False, False),
        ("~causal('t')", False, True),
    ],
)
def test_prefix_tokens(text: str, of_prefix: bool, by_prefix: bool) -> None:
    mask = ct.plan(build(text), GRID).mask()
    assert (mask[:, :2] == of_prefix).all(), "who sees the prefix"
    assert (mask[:2, 2:] == by_prefix).all(), "what the prefix sees"


def test_cross_grids_compare_the_centres() -> None:
    mask = ct.plan(ct.window(n=1), ct.Grid(n=3), ct.Grid(n=7)).mask()
    # Centres of 3 places on 7: 3.5 / 3 = 1.17, 10.5 / 3 = 3.5, 17.5 / 3 = 5.83.
    assert mask.nonzero().tolist() == [[0, 1], [1, 3], [2, 5]]
    mask = ct.plan(ct.along("t"), ct.Grid(t=2, h=4), ct.Grid(t=3, h=2)).mask()
    expected = [[(i % 4) // 2 == j % 2 for j in range(6)] for i in range(8)]
    assert mask.tolist() == expected


def test_an_axis_of_one_grid_only_is_unconstrained() -> None:
    video, text = ct.Grid(t=2, h=3), ct.Grid(n=4)
    for text_pattern in (
        "window(t=1)",
        "causal('t', strict=True)",
        "along('n')",
        "blocks(h=1)",
        "strided(n=3)",
        "graph([[], []], axis='t')",
    ):
        assert ct.plan(build(text_pattern), video, text).mask().all(), text_pattern
    frames = ct.Grid(t=2)
    assert torch.equal(
        ct.plan(ct.along("h"), video, frames).mask(), torch.tensor([[True, False]] * 3 + [[False, True]] * 3)
    )


def test_sees_broadcasts_coordinates() -> None:
    from chronotope.grid import Coords

    pattern = ct.window(t=3) & ct.causal()
    every = torch.arange(GRID.size)
    q, k = Coords.of(GRID, every).view(-1, 1), Coords.of(GRID, every).view(1, -1)
    assert torch.equal(pattern.sees(q, k), ct.plan(pattern, GRID).mask())
    pairwise = pattern.sees(Coords.of(GRID, every), Coords.of(GRID, every.flip(0)))
    assert torch.equal(pairwise, ct.plan(pattern, GRID).mask()[every, every.flip(0)])
