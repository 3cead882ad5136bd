"""Normalized descent: the rate is a share of the error, whatever the size of weights and keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_problems import Problem, error
from torch.nn import functional as F

import chronotope as ct
from chronotope.memories import L2, Decay, Descent, Gates, Keep, Matrix, Memory, Mlp, Momentum, Normalized, memorize
from chronotope.memories import begin as started
from chronotope.memories.learners import applied
from chronotope.nn.memory import DeepMemory


@given(length=st.floats(1e-2, 1e2), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_a_matrix_is_the_delta_rule_for_keys_of_any_length(length, seed):
    q, k, v = torch.randn(3, 2, 2, 17, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rate = torch.rand(2, 2, 17, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    k = F.normalize(k, dim=-1)
    found, _ = memorize(
        q, length * k, v, Memory(Matrix(), L2(), Keep(), Normalized(Descent())), Gates(rate), chunk=1
    )  # fmt: skip
    assert (length * found - ct.recurrence(q, k, v, beta=rate)[0]).abs().max() < 1e-7


@given(
    depth=st.integers(1, 4), sizes=st.lists(st.floats(0.1, 10), min_size=4, max_size=4), length=st.floats(0.1, 10),
    seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_share_of_the_error_goes_to_first_order(depth, sizes, length, seed):
    rng, share = torch.Generator().manual_seed(seed), 1e-8
    memory = Memory(Mlp(depth), L2(), Keep(), Normalized(Descent()))
    weights = [size * x.double() for size, x in zip(sizes, memory.learner.weights(1, 6, 6, rng), strict=False)]
    k, v = torch.randn(2, 1, 1, 1, 6, generator=rng, dtype=torch.float64)
    k = length * F.normalize(k, dim=-1)
    rate = torch.full((1, 1, 1), share, dtype=torch.float64)
    y, _ = memorize(k, k, v, memory, Gates(rate), state=started(memory, weights, 1))
    before, after = (float(memory.loss.value(x, v)) for x in (memory.learner.read(k, applied(weights)), y))
    assert (before - after) / (2 * share * before) == pytest.approx(1, abs=2e-2)


@pytest.mark.parametrize("learner", [Matrix(), Mlp(2)], ids=repr)
@pytest.mark.parametrize("channels", [False, True])
def test_chunks_equal_steps_without_momentum_too(learner, channels):
    problem = Problem.random(Memory(learner, L2(), Decay(), Normalized(Descent())), channels=channels, padding=True)
    found, expected = (problem.results(*problem.run(chunk=4, backend=name)) for name in ("chunked", "reference"))
    assert error(found, expected) < 1e-10


def test_what_is_known_already_and_zeros_change_nothing():
    memory = Memory(Matrix(), L2(), Keep(), Normalized(Momentum()))
    weight = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1).requires_grad_()
    k = F.one_hot(torch.tensor([0, 1, 2]), 4).double().expand(1, 2, 3, 4)
    rate, momentum = torch.full((2, 1, 2, 3), 0.5, dtype=torch.float64).unbind(0)
    for v in (k, torch.zeros_like(k)):
        keys = k if v is k else torch.zeros_like(k)
        out, state = memorize(
            k, keys, v, memory, Gates(rate, momentum=-momentum), state=started(memory, [weight], 1), chunk=2
        )  # fmt: skip
        assert torch.equal(state.memory[0][0], weight)
        (grad,) = torch.autograd.grad(out.sum(), weight)
        assert grad.isfinite().all()


def test_the_layer_reads_nothing_before_anything_is_written():
    layer = DeepMemory(16, 2, chunk=4)
    x = torch.randn(1, 3, 16)
    assert (layer.recall(x, layer.init_state(1, ct.Grid(n=1))) == 0).all()
    assert (layer(x, ct.Grid(n=3)) != 0).any()
