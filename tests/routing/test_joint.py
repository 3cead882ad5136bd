"""Selections that compete, thresholds, scores that heads share: against their definitions, and as routes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.routing.route import (
    Blockwise,
    Cut,
    Dot,
    Impartial,
    Joint,
    Mass,
    Mean,
    Selection,
    Shared,
    Threshold,
    TopK,
)
from chronotope.routing.selections import kept_of
from strategies import grid_pairs

LAW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
GRID = ct.Grid(t=4, h=5, w=3)


def problem(seed, batch=2, heads=3, rows=5, cols=7, hidden=0.2):
    """Scores of which some are -inf, and own blocks."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, rows, cols, generator=generator)
    own = torch.rand(rows, cols, generator=generator) < 0.2
    return scores.masked_fill(torch.rand(rows, cols, generator=generator) < hidden, -torch.inf), own


def numbers(grid, key_grid, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, grid.size, 4, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, heads, key_grid.size, 4, generator=generator, dtype=torch.float64)
    return q, k, v


@LAW
@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_threshold_keeps_the_fewest_that_hold_the_share(seed, share):
    scores, own = problem(seed)
    kept = Threshold(share)(scores, own)
    for row, found, first in zip(scores.flatten(0, 2), kept.flatten(0, 2), own.repeat(6, 1), strict=True):
        possible = row > -torch.inf
        assert not found[~possible].any()
        assert found[first & possible].all()
        if possible.sum() < 2:
            continue
        level = torch.where(possible, row - row[possible].min(), 0.0).double()
        needed = share * level.sum()
        assert level[found].sum() >= needed - 1e-5
        added = level[found & ~first]
        if len(added):
            assert level[found].sum() - added.min() < needed + 1e-5
            assert added.min() >= level[possible & ~found].max() if (possible & ~found).any() else True


@LAW
@given(st.integers(0, 10**6), st.floats(0.1, 5.0), st.floats(-5.0, 5.0))
def test_threshold_does_not_depend_on_the_scale_of_scores(seed, scale, shift):
    scores, own = (x.double() if x.is_floating_point() else x for x in problem(seed))
    assert torch.equal(Threshold(0.5)(scores, own), Threshold(0.5)(scale * scores + shift, own))
    assert torch.equal(Threshold(1.0)(scores, own), scores > -torch.inf)
    assert not Threshold(0.5)(torch.full_like(scores, -torch.inf), own).any()


def test_threshold_of_equal_scores_keeps_the_share_of_blocks():
    scores = torch.full((1, 1, 1, 8), 3.0)
    assert Threshold(0.5)(scores, torch.zeros(1, 8, dtype=torch.bool)).sum() == 4


def groups(over, shape):
    """For each pair, the number of the group in which it competes."""
    batch, head, row, col = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    which = {"head": head, "block": col, "all": torch.zeros_like(row)}[over]
    return batch * 100 + which


@pytest.mark.parametrize("over", ["head", "block", "all"])
@LAW
@given(st.integers(0, 10**6))
def test_joint_is_the_selection_in_one_row_of_all_that_compete(over, seed):
    scores, own = problem(seed)
    member, first = groups(over, scores.shape), own.expand_as(scores)
    for selection in (TopK(0.4), TopK(9), Threshold(0.4), Mass(0.6)):
        kept = Joint(selection, over)(scores, own)
        for group in member.unique():
            here = member == group
            expected = selection(scores[here].view(1, 1, 1, -1), first[here].view(1, -1)).flatten()
            assert torch.equal(kept[here], expected)
            assert kept[here][first[here] & (scores[here] > -torch.inf)].all()


def test_impartial_knows_no_own_blocks_and_competes_as_what_it_holds():
    scores = torch.tensor([3.0, 1.0, 2.0]).view(1, 1, 1, 3)
    own = torch.tensor([[False, True, False]])
    assert TopK(1)(scores, own).flatten().tolist() == [False, True, False]
    assert Impartial(TopK(1))(scores, own).flatten().tolist() == [True, False, False]
    assert Impartial(Joint(TopK(1)))(scores, own).flatten().tolist() == [True, False, False]
    assert Impartial(Joint(TopK(1))).together and not Impartial(TopK(1)).together
    with pytest.raises(ct.ChronotopeError, match="over='row'"):
        Joint(TopK(1), "row")
    with pytest.raises(ct.ChronotopeError, match=r"share=1.5"):
        Threshold(1.5)


def test_a_share_of_many_pairs_is_exact():
    assert kept_of(0.3, torch.tensor([10, 100_000, 30_000_000])).tolist() == [3, 30_000, 9_000_000]


def route(selection: Selection, queries=None, score=None, **block):
    return Blockwise(Cut.of("test", block, queries), selection, Mean(), score or Dot(counted=False))


def test_heads_that_share_scores_choose_as_one_wide_head():
    q, k, _ = numbers(GRID, GRID, heads=3)
    one = route(Impartial(TopK(2)), t=2, h=2, w=2)
    shared = route(Impartial(TopK(2)), score=Shared(Dot(counted=False)), t=2, h=2, w=2)
    wide = [x.transpose(1, 2).flatten(2)[:, None] for x in (q, k)]
    assert torch.equal(shared.select(q, k, GRID), one.select(*wide, GRID).expand(-1, 3, -1, -1))
    assert not torch.equal(shared.select(q, k, GRID), one.select(q, k, GRID))


@pytest.mark.parametrize(
    "selection",
    [Threshold(0.4), Joint(Threshold(0.4)), Joint(TopK(0.4), "block"), Joint(Mass(0.4), "all"), Impartial(TopK(0.3))],
    ids=repr,
)
@LAW
@given(st.data())
def test_attention_is_dense_attention_under_what_was_selected(selection, data):
    grid, key_grid = data.draw(grid_pairs(30))
    q, k, v = numbers(grid, key_grid, seed=data.draw(st.integers(0, 99)))
    axes = [axis for axis in grid.axes if axis in key_grid.axes]
    if not axes:
        return
    block = {axis: data.draw(st.integers(1, 4)) for axis in axes}
    where = route(selection, data.draw(st.sampled_from([None, dict.fromkeys(axes, 1)])), **block)
    mask = where.select(q, k, grid, key_grid)
    out = ct.attention(q, k, v, grid=grid, key_grid=key_grid, where=where)
    logits = (q @ k.mT / 2).masked_fill(~mask, -torch.inf)
    assert (out - logits.softmax(-1).nan_to_num() @ v).abs().max() < 1e-10


@pytest.mark.parametrize("selection", [Threshold(0.4), Impartial(TopK(0.4)), Impartial(Threshold(0.4))], ids=repr)
@pytest.mark.parametrize("order", [ct.causal(), ct.causal("t")], ids=repr)
def test_nothing_from_the_future_influences_a_choice(selection, order):
    q, k, _ = numbers(GRID, GRID)
    where = route(selection, t=2, h=2, w=2) & order
    before = where.select(q, k, GRID)
    for frame in range(1, 4):
        past = torch.arange(GRID.size) < frame * 15
        changed = [torch.where(past[:, None], x, 5 * torch.randn(x.shape).double()) for x in (q, k)]
        assert torch.equal(where.select(*changed, GRID)[:, :, past], before[:, :, past])
    with pytest.raises(ct.ChronotopeError, match="compete with each other"):
        (route(Joint(TopK(0.4)), t=2) & order).select(q, k, GRID)
