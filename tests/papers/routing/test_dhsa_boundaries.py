"""DHSA (system 92): boundaries are learnt from drops of similarity, and predicted chunks serve better than blocks."""

import pytest
import torch
from _topics import held, topics
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.routing.dhsa import dhsa
from chronotope.papers.routing.dhsa_boundaries import BoundaryPredictor, drops

WINDOW = 4


def sequences(seed, count):
    """Sequences of 12 topics in 512 tokens: (boundaries of each, keys [count, 1, 512, 32])."""
    some = [topics(1000 * seed + i, 512, 12, 20, 70, size=32) for i in range(count)]
    return torch.stack([edges for edges, _, _ in some]), torch.stack([keys for _, _, keys in some])[:, None]


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    predictor = BoundaryPredictor(32, window=WINDOW)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=3e-3)
    for step in range(120):
        _, keys = sequences(step, 4)
        loss = F.binary_cross_entropy_with_logits(
            predictor(keys)[:, WINDOW:-WINDOW],
            drops(keys, WINDOW)[:, WINDOW:-WINDOW],
            pos_weight=torch.tensor(10.0),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return predictor.requires_grad_(False)


def agreement(found, true):
    """F1 of boundaries within one token of each other."""
    hits = total = 0
    for ours, theirs in zip(found, true, strict=True):
        mine, real = (edges.unique()[1:-1] for edges in (ours, theirs))
        hits += int(((mine[:, None] - real).abs() <= 1).any(0).sum())
        total += len(mine) + len(real)
    return 2 * hits / total


def test_labels_are_where_topics_change():
    edges, keys = sequences(10**6, 16)
    labels = [torch.cat([torch.tensor([0]), row.nonzero()[:, 0], torch.tensor([512])]) for row in drops(keys, WINDOW)]
    assert agreement(labels, edges) > 0.95  # found: 0.98


def test_the_predictor_learns_boundaries_from_labels_alone(trained):
    edges, keys = sequences(10**6, 16)
    torch.manual_seed(1)
    assert agreement(BoundaryPredictor(32, window=WINDOW).boundaries(keys), edges) < 0.4
    assert agreement(trained.boundaries(keys), edges) > 0.85  # found: 0.92


def test_predicted_chunks_hold_a_needle_better_than_blocks(trained):
    def cut(_, keys):
        return trained.boundaries(keys[None, None])

    chunks, blocks = held(cut, 32, 1.0, seeds=40)
    assert chunks >= 1.06 * blocks, (chunks, blocks)


def test_boundaries_tile_the_sequence_and_lie_apart(trained):
    _, keys = sequences(7, 3)
    found = trained.boundaries(keys, threshold=0.01, apart=12)
    assert bool((found[:, 0] == 0).all() & (found[:, -1] == 512).all())
    sizes = found.diff()
    inner = [row[row > 0][:-1] for row in sizes]  # without the last chunk, which the end cuts off
    assert all(bool((row >= 12).all()) for row in inner)
    few = trained.boundaries(keys, threshold=0.01, most=5)
    assert few.shape[1] == 7 and set(few[0].tolist()) <= set(trained.boundaries(keys, threshold=0.01)[0].tolist())
    q = k = torch.randn(3, 2, 512, 16)
    where = dhsa(found, 32) & ct.causal()
    assert int(where.select(q, k, ct.Grid(n=512)).sum(-1).max()) == 32


def test_late_boundaries_do_not_depend_on_later_keys(trained):
    _, keys = sequences(9, 2)
    # Many places compete where little is asked of them.
    whole = trained.boundaries(keys, threshold=0.01, late=True)
    assert whole.shape[1] > 15
    for end in range(20, 500, 40):
        changed = torch.cat([keys[:, :, :end], 3 * torch.randn(2, 1, 512 - end, 32)], 2)
        for ours, theirs in zip(trained.boundaries(changed, threshold=0.01, late=True), whole, strict=True):
            assert torch.equal(ours[ours < end].unique(), theirs[theirs < end].unique())


@pytest.mark.parametrize("n", [1, 3, 9, 20])
def test_short_sequences_have_boundaries_too(n):
    predictor = BoundaryPredictor(8)
    keys = torch.randn(2, 2, n, 4)
    assert predictor(keys).shape == (2, n)
    for late in (False, True):
        found = predictor.boundaries(keys, threshold=0.0, apart=1, late=late)
        assert bool((found[:, 0] == 0).all() & (found[:, -1] == n).all() & (found.diff() >= 0).all())


def test_bad_input_is_refused():
    with pytest.raises(ct.ChronotopeError, match="apart=0"):
        BoundaryPredictor(8).boundaries(torch.randn(1, 2, 30, 4), apart=0)
