"""`sees` and `over` agree on every box: exactly for a primitive, soundly for an expression."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings

import chronotope as ct
from chronotope.boxes import identify
from chronotope.patterns import And, Not, Or
from strategies import Case, cases, random_boxes, random_layout, tokens_in

CASES = 2000


def primitive(pattern: ct.Pattern) -> bool:
    """Whether `over` must be exact: a primitive, or the complement of one."""
    return not isinstance(pattern.part if isinstance(pattern, Not) else pattern, And | Or | Not)


def agree(some: torch.Tensor, every: torch.Tensor, any_seen: np.ndarray, all_seen: np.ndarray, exact: bool) -> None:
    """Verdicts against what the element masks of the same boxes hold."""
    if exact:
        np.testing.assert_array_equal(some.numpy(), any_seen)
        np.testing.assert_array_equal(every.numpy(), all_seen)
    assert not (any_seen & ~some.numpy()).any(), "a verdict of 'nothing is visible' where something is"
    assert not (every.numpy() & ~all_seen).any(), "a verdict of 'everything is visible' where something is not"
    assert not (every & ~some).any()


def test_sees_and_over_agree(count_cases: Callable[[str, int], None]) -> None:
    done = 0

    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(most=40))
    def law(case: Case) -> None:
        nonlocal done
        for head in range(case.where.heads or 1):
            pattern, rng = case.where.head(head), case.rng
            mask = ct.plan(pattern, case.grid, case.key_grid, tile={}).mask().numpy()
            on_boxes(pattern, mask, case, rng)
            on_tiles(pattern, mask, case, rng)
        done += 1

    law()
    count_cases("sees against over", done)


def on_boxes(pattern: ct.Pattern, mask: np.ndarray, case: Case, rng: np.random.Generator) -> None:
    q, k = random_boxes(rng, case.grid, 12), random_boxes(rng, case.key_grid, 12)
    blocks = [mask[np.ix_(tokens_in(q, i), tokens_in(k, i))] for i in range(12)]
    any_seen, all_seen = np.array([b.any() for b in blocks]), np.array([b.all() for b in blocks])
    agree(*pattern.over(q, k), any_seen, all_seen, primitive(pattern))


def on_tiles(pattern: ct.Pattern, mask: np.ndarray, case: Case, rng: np.random.Generator) -> None:
    """Every pair of tiles, those of the prefix too; and pairs of equal size and key have equal masks."""
    q, k = random_layout(rng, case.grid), random_layout(rng, case.key_grid)
    rows, cols = (
        x.flatten() for x in torch.meshgrid(torch.arange(len(q.sizes)), torch.arange(len(k.sizes)), indexing="ij")
    )
    laid_out = mask[np.ix_(q.order.numpy(), k.order.numpy())]
    starts = q.start[:-1].numpy(), k.start[:-1].numpy()
    seen = np.add.reduceat(np.add.reduceat(laid_out.astype(int), starts[0], axis=0), starts[1], axis=1).flatten()
    q_boxes, k_boxes = q.boxes(rows), k.boxes(cols)
    agree(
        *pattern.over(q_boxes, k_boxes), seen > 0, seen == (q.sizes[rows] * k.sizes[cols]).numpy(), primitive(pattern)
    )
    placed = (rows >= q.prefix_tiles) & (cols >= k.prefix_tiles)
    q_boxes, k_boxes = q.boxes(rows[placed]), k.boxes(cols[placed])
    kinds = identify(pattern.alike(q_boxes, k_boxes), *q_boxes.sizes().values(), *k_boxes.sizes().values())
    first: dict[int, np.ndarray] = {}
    for kind, r, c in zip(kinds.tolist(), rows[placed].tolist(), cols[placed].tolist(), strict=True):
        block = laid_out[q.start[r] : q.start[r + 1], k.start[c] : k.start[c + 1]]
        assert np.array_equal(block, first.setdefault(kind, block))


def test_a_composite_may_be_undecided_but_never_wrong() -> None:
    # No pair is both in the same block and a block apart, but neither part alone rules out the two whole boxes.
    pattern = ct.blocks(n=2) & ~ct.window(n=3)
    from chronotope.boxes import Boxes

    whole = Boxes.whole(ct.Grid(n=8))
    some, every = pattern.over(whole, whole)
    assert (some.tolist(), every.tolist()) == ([True], [False])
    assert not ct.plan(pattern, ct.Grid(n=8)).mask().any()


def test_over_of_predicates_looks_at_small_boxes_only() -> None:
    from chronotope.boxes import Boxes

    never = ct.predicate(lambda q, k: q.n > 10_000_000)
    small, large = Boxes.whole(ct.Grid(n=200)), Boxes.whole(ct.Grid(n=5000))
    assert [x.item() for x in never.over(small, small)] == [False, False]
    assert [x.item() for x in never.over(large, large)] == [True, False]
