"""Plans: exact numbers, every visible pair in a tile once, nothing that depends on the tile, one plan per value."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import chronotope as ct
from chronotope.planning.search import search
from strategies import Case, build, cases, random_layout, random_tile

fast = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@fast
@given(cases(most=30))
def test_density_is_the_mean_of_the_mask(case: Case) -> None:
    heads = case.where.heads or case.heads
    plans = [
        ct.plan(case.where, case.grid, case.key_grid, heads=heads, tile=tile)
        for tile in (None, random_tile(case.rng, case.grid))
    ]
    for plan in plans:
        assert plan.density == pytest.approx(plan.mask().double().mean().item(), abs=1e-15)
        assert plan.tile_density >= plan.density - 1e-15
        assert plan.bound == (1 / plan.tile_density if plan.tile_density else math.inf)
    assert torch.equal(plans[0].mask(), plans[1].mask())


SEPARABLE = (
    "window(n=5)", "window(n=(3, 0), dilation=2)", "window(n=(1, 2), dilation=4)",
    "window(n=3, dilation=3, edge='shift')", "strided(n=2)", "strided(n=3)", "strided(n=4)",
    "blocks(n=4, shift={'n': 1})", "causal(strict=True)", "causal('n')",
)  # fmt: skip


@pytest.mark.parametrize("key_grid", [ct.Grid(n=13), ct.Grid(n=17, prefix=1)], ids=repr)
def test_density_of_conjunctions_on_one_axis(key_grid: ct.Grid) -> None:
    """Progressions of keys that start, end and step in every way are intersected exactly, without a mask."""
    for one, other, third in itertools.product(SEPARABLE, SEPARABLE, ("full()", "window(n=9)")):
        plan = ct.plan(build(one) & build(other) & build(third), ct.Grid(n=13), key_grid, tile={"n": 5})
        assert plan.density == pytest.approx(plan.mask().double().mean().item(), abs=1e-15), plan.where


@fast
@given(cases(most=30, depth=2))
def test_tiles_hold_every_visible_pair_once(case: Case) -> None:
    """The search drops only what is empty, calls full only what is full, lists each pair of tiles once, in order."""
    for head in range(case.where.heads or 1):
        pattern, rng = case.where.head(head), case.rng
        q, k = random_layout(rng, case.grid), random_layout(rng, case.key_grid)
        assert sorted(q.order.tolist()) == list(range(case.grid.size))
        found = search(pattern, q, k)
        listed = list(zip(found.rows.tolist(), found.cols.tolist(), strict=True))
        assert listed == sorted(set(listed))
        laid_out = ct.plan(pattern, case.grid, case.key_grid, tile={}).mask()[q.order][:, k.order]
        full = dict(zip(listed, found.full.tolist(), strict=True))
        for row, col in ((r, c) for r in range(len(q.sizes)) for c in range(len(k.sizes))):
            block = laid_out[q.start[row] : q.start[row + 1], k.start[col] : k.start[col + 1]]
            assert (row, col) in full or not block.any()
            assert block.all() or not full.get((row, col), False)


@fast
@given(cases(most=30, depth=2))
def test_tile_density_counts_the_tiles(case: Case) -> None:
    heads = case.where.heads or case.heads
    plan = ct.plan(case.where, case.grid, case.key_grid, heads=heads, tile=random_tile(case.rng, case.grid))
    computed = 0
    for part in plan.parts:
        found = part.tiles.found
        computed += len(part.heads) * sum(
            int(part.tiles.q.sizes[r]) * int(part.tiles.k.sizes[c]) for r, c in zip(found.rows, found.cols, strict=True)
        )
    assert sorted(head for part in plan.parts for head in part.heads) == list(range(heads))
    assert plan.tile_density == pytest.approx(computed / (heads * case.grid.size * case.key_grid.size), abs=1e-15)
    assert plan.flops(16) == 4 * 16 * computed
    assert plan.flops(16, batch=3, heads=5 * heads) == 4 * 16 * 3 * 5 * computed


def test_a_primitive_has_no_tile_too_many() -> None:
    """Verdicts on a primitive are exact: a tile that is listed holds something visible."""
    grid = ct.Grid(t=7, h=9, w=5, prefix=2)
    for text in (
        "window(t=3, h=5)",
        "window(h=3, dilation=3)",
        "along('t')",
        "blocks(h=4, w=2, shift={'h': 3})",
        "causal()",
        "strided(t=3, w=2)",
    ):
        plan = ct.plan(build(text), grid, tile={"t": 2, "h": 4, "w": 3})
        tiles = plan.parts[0].tiles
        laid_out = plan.mask()[tiles.q.order][:, tiles.k.order]
        for row, col, full in zip(tiles.found.rows, tiles.found.cols, tiles.found.full, strict=True):
            block = laid_out[tiles.q.start[row] : tiles.q.start[row + 1], tiles.k.start[col] : tiles.k.start[col + 1]]
            assert block.any()
            assert block.all() == full, (text, row, col)


@pytest.mark.parametrize(
    "text", ["full()", "nothing()", "window(t=3)", "causal()", "along('h')", "segments([0] * 6 + [1] * 6)"]
)
def test_plans_are_cached_by_value(text: str) -> None:
    plan = ct.plan(build(text), ct.Grid(t=3, h=4))
    assert ct.plan(build(text), ct.Grid(t=3, h=4)) is plan
    assert ct.plan(build(text), ct.Grid(t=3, h=4), ct.Grid(t=3, h=4), heads=1) is plan
    assert ct.plan(build(text), ct.Grid(t=3, h=4), tile={"t": 1}) is not plan
    assert ct.plan(build(text), ct.Grid(t=3, h=4), tile={"t": 1}) is ct.plan(
        build(text), ct.Grid(t=3, h=4), tile={"t": 1, "h": 4}
    )


def test_no_pattern_means_everybody() -> None:
    assert ct.plan(None, ct.Grid(n=8)) is ct.plan(ct.full(), ct.Grid(n=8))


def test_a_per_head_plan_has_a_mask_for_each_head() -> None:
    near, past = ct.window(n=3), ct.causal()
    plan = ct.plan(ct.per_head([near, past, near]), ct.Grid(n=9))
    assert plan.heads == 3
    assert plan is ct.plan(ct.per_head([near, past, near]), ct.Grid(n=9), heads=3)
    assert plan.mask().shape == (3, 9, 9)
    assert len(plan.parts) == 2, "heads that are alike share their tiles"
    for head, pattern in enumerate([near, past, near]):
        assert torch.equal(plan.mask()[head], ct.plan(pattern, ct.Grid(n=9)).mask())


def test_numbers_of_a_pattern_that_sees_nothing() -> None:
    plan = ct.plan(ct.nothing(), ct.Grid(n=8, prefix=1))
    assert (plan.density, plan.tile_density, plan.bound, plan.flops(64)) == (0.0, 0.0, math.inf, 0)
    assert not plan.mask().any()
    assert "nothing()" in repr(plan)
    assert "nothing()" in plan.explain()


def test_a_window_is_a_few_dense_tiles_in_its_layout() -> None:
    plan = ct.plan(ct.window(t=3, h=5, w=5), ct.Grid(t=8, h=16, w=16))
    assert plan.density < plan.tile_density < 0.5
    assert plan.bound > 2


def test_density_of_a_million_tokens_in_seconds() -> None:
    plan = ct.plan(
        ct.window(t=5, h=9, w=9) & ct.causal("t"), ct.Grid(t=16, h=64, w=64), tile={"t": 4, "h": 16, "w": 16}
    )

    def pairs(n: int, before: int, after: int) -> int:
        return sum(min(n - 1, x + after) - max(0, x - before) + 1 for x in range(n))

    assert plan.density == pytest.approx(pairs(16, 2, 0) * pairs(64, 4, 4) ** 2 / (16 * 64 * 64) ** 2, rel=1e-12)


def test_what_a_plan_says_of_itself() -> None:
    plan = ct.plan(ct.window(t=3) & ct.causal("t"), ct.Grid(t=8, h=4), tile={"t": 2})
    assert repr(plan).startswith("Plan(window(t=3) & causal('t') on Grid(t=8, h=4))\n")
    assert f"density {plan.density:.4f}" in repr(plan)
    text = plan.explain()
    assert "query tiles t 2 x h 4" in text
    assert "as given by the caller" in text
    assert "chosen for the least estimated time" in ct.plan(ct.window(t=3), ct.Grid(t=64, h=8)).explain()
    assert plan.tile == {"t": 2, "h": 4}


def test_a_window_on_a_larger_grid_has_no_more_masks() -> None:
    kinds = []
    for grid in (ct.Grid(t=12, h=32, w=32), ct.Grid(t=16, h=64, w=64)):
        plan = ct.plan(ct.window(t=5, h=9, w=9), grid, tile={"t": 4, "h": 8, "w": 8})
        kinds.append(len(plan.parts[0].tiles.partial_kinds[2].unique()))
    assert kinds[0] == kinds[1] <= 27


def test_masks_of_large_grids_are_refused() -> None:
    text = "67,108,864"
    grid = ct.Grid(n=8193)
    with pytest.raises(ct.ChronotopeError) as error:
        ct.plan(ct.window(n=3), grid, tile={"n": 4096}).mask()
    assert text in str(error.value)
    assert "67,125,249 pairs of Grid(n=8193)" in str(error.value)
    with pytest.raises(ct.ChronotopeError, match="67,108,864"):
        ct.plan(ct.per_head([ct.full(), ct.causal()]), ct.Grid(n=6000), tile={"n": 6000}).mask()


GRID = ct.Grid(t=3, h=4)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ct.plan(ct.full(), GRID, heads=0), "heads=0: expected a number of heads of at least 1"),
        (lambda: ct.plan(ct.full(), GRID, tile={"t": 4}), "t=4 does not fit the axis; expected 1 to 3"),
        (lambda: ct.plan(ct.full(), GRID, tile={"h": 0}), "h=0 does not fit the axis; expected 1 to 4"),
        (
            lambda: ct.plan(ct.full(), GRID, tile={"x": 1}),
            "tile={'x': 1} names 'x', but Grid(t=3, h=4) has the axes 't', 'h'",
        ),
        (
            lambda: ct.plan(ct.per_head([ct.full()] * 3), GRID, heads=2),
            "per_head([full(), full(), full()]) is for 3 heads, but there are 2",
        ),
    ],
)
def test_errors(make: Callable[[], ct.Plan], text: str) -> None:
    with pytest.raises(ct.ChronotopeError) as error:
        make()
    assert text in str(error.value)
