"""What is measured of a pattern, against the written-out meaning on a small grid."""

import pytest
import torch

import chronotope as ct
from chronotope.models import Predictor
from chronotope.tasks import measure

GRID = ct.Grid(t=3, h=4, w=5)
DENSE = ct.causal("t")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Predictor(GRID, patch=2, dim=16, heads=2, layers=2)
    torch.nn.init.normal_(model.head.project.weight, std=0.1)
    return model


def test_error_is_that_of_the_next_frame(model):
    clips = torch.rand(5, 4, 1, 8, 10)
    assert measure.error(model, clips) == pytest.approx(float(model.loss(clips).detach()), rel=1e-5)
    assert measure.predictions(model, clips).shape == (5, 3, 1, 8, 10)


def test_queries_keys_and_values_are_those_of_the_layers(model):
    frames = torch.rand(2, 3, 1, 8, 10)
    found = measure.qkv(model, frames)
    x, grid = model.embed(frames)
    expected = model.attentions()[0].project(model.stack.blocks[0].norms[0](x), grid)
    assert len(found) == 2
    for own, theirs in zip((found[0].q, found[0].k, found[0].v), expected, strict=True):
        assert torch.equal(own, theirs)
    assert not any(layer._forward_pre_hooks for layer in model.attentions())


@pytest.mark.parametrize("where", [ct.window(t=3, h=3, w=3), ct.along("t"), ct.causal("t", strict=True), ct.full()])
def test_mass_is_the_share_of_the_dense_probabilities(where):
    torch.manual_seed(0)
    q, k = 2 * torch.randn(2, 3, GRID.size, 8), torch.randn(2, 3, GRID.size, 8)
    kept = where & DENSE
    logits = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~ct.plan(DENSE, GRID).mask(), -torch.inf)
    expected = (logits.softmax(-1) * ct.plan(kept, GRID).mask()).sum(-1).mean((0, 2))
    torch.testing.assert_close(measure.mass(q, k, GRID, kept, DENSE), expected, atol=1e-5, rtol=1e-5)


def test_timing_sees_that_less_work_is_faster():
    grid = ct.Grid(t=4, h=16, w=16)
    q, k = torch.randn(1, 4, grid.size, 32), torch.randn(1, 4, grid.size, 32)
    dense, few = ct.plan(DENSE, grid, heads=4), ct.plan(ct.along("t") & DENSE, grid, heads=4)
    found = measure.timing(q, k, few, dense)
    assert found.forward_speedup > 1.5 and found.train_speedup > 1.5
    assert 0 < found.forward_ms < found.train_ms


def test_peak_memory_grows_with_the_tokens_and_counts_the_plan():
    peaks = []
    for size in (16, 32):
        grid = ct.Grid(t=2, h=size, w=16)
        planned = ct.plan(ct.window(t=3, h=3, w=3) & DENSE, grid, heads=2)
        q, k = torch.randn(1, 2, grid.size, 16), torch.randn(1, 2, grid.size, 16)
        peaks.append(measure.peak_mb(q, k, planned))
        # out, its gradient, dq, dk, dv live together at the end of the backward pass.
        assert peaks[-1] * 1e6 > 4 * q.nbytes + measure.plan_bytes(planned)
    assert 1.4 < peaks[1] / peaks[0] < 2.6
    assert measure.plan_bytes(planned) > 0


def test_plans_are_of_distinct_patterns_with_their_share_of_layers():
    found = measure.plans([ct.along("t"), ct.full(), ct.along("t")], GRID, 2)
    assert {where: share for where, (_, share) in found.items()} == {ct.along("t"): 2 / 3, ct.full(): 1 / 3}
