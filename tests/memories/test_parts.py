"""The parts of memories: chunks equal the rule token by token for every combination; gradients equal autograd's."""

from __future__ import annotations

import pytest
import torch
from memory_problems import ALL, Problem, by_channel, error

from chronotope import memories
from chronotope.memories.table import LEARNERS, LOSSES, OPTIMIZERS, RETENTIONS


def test_the_table_has_every_part():
    for base, table in (
        (memories.Learner, LEARNERS), (memories.Loss, LOSSES),
        (memories.Retention, RETENTIONS), (memories.Optimizer, OPTIMIZERS),
    ):  # fmt: skip
        assert {type(part) for part in table} == set(base.__subclasses__())


@pytest.mark.parametrize("learner", LEARNERS, ids=repr)
def test_chunks_equal_the_stepping_reference_for_every_combination(learner, count_cases):
    cases = [(m, c) for m in ALL if m.learner == learner for c in (False, True) if by_channel(learner) or not c]
    for seed, (memory, channels) in enumerate(cases):
        problem = Problem.random(memory, n=6, channels=channels, padding=seed % 3 == 0, seed=seed)
        found, expected = (
            problem.results(*problem.run(chunk=4, backend=backend)) for backend in ("chunked", "reference")
        )
        assert all(x.isfinite().all() for x in found)
        assert error(found, expected) < 1e-10, (memory, channels)
    count_cases("memories in chunks against steps", len(cases))


@pytest.mark.parametrize("learner", LEARNERS, ids=repr)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradients_written_out_equal_autograd(learner, loss):
    rng = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 1, 2, 5, 6, generator=rng, dtype=torch.float64)
    threshold = 8 * torch.rand(1, 2, 5, generator=rng, dtype=torch.float64)
    weights = [w.double()[None].requires_grad_() for w in learner.weights(2, 6, 6, rng)]
    y = learner.read(x, lambda number, x: x @ weights[number])
    expected = torch.autograd.grad(loss.value(y, v, threshold).sum(), weights)
    for (a, g), grad in zip(learner.terms(x, weights, lambda y: loss.slope(y, v, threshold)), expected, strict=True):
        assert (a.mT @ g - grad).abs().max() < 1e-11
    if loss.has_threshold:
        far = (y - v).norm(dim=-1) > threshold
        assert far.any()
        assert not far.all()
