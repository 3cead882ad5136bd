"""Memories: pieces equal the whole, gradients, padding, truncation, states, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_problems import ALL, Problem, error
from torch.nn import functional as F

import chronotope as ct
from chronotope.memories import (
    L2,
    Decay,
    Descent,
    Dot,
    Gates,
    Huber,
    Keep,
    Lp,
    Lq,
    Matrix,
    Memory,
    Mlp,
    Momentum,
    Residual,
    Softmax,
    begin,
    memorize,
    memorize_packed,
    recall,
)
from chronotope.memories.table import OPTIMIZERS


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(ALL), st.integers(1, 12), st.integers(1, 14), st.lists(st.integers(0, 14), max_size=3),
       st.booleans(), st.integers(0, 999))  # fmt: skip
def test_pieces_cut_anywhere_equal_the_whole(memory, chunk, n, cuts, padding, seed):
    problem = Problem.random(memory, n=n, padding=padding, seed=seed)
    whole = problem.results(*problem.run(chunk=chunk))
    state, outs = problem.begin(), []
    for start, stop in itertools.pairwise([0, *sorted(min(cut, n) for cut in cuts), n]):
        before = [x.clone() for x in state.tensors()]
        given = state
        out, state = problem.run(slice(start, stop), state, chunk=chunk)
        assert all(torch.equal(x, y) for x, y in zip(before, given.tensors(), strict=True))
        outs.append(out)
    assert state.place == n % chunk
    assert error(problem.results(torch.cat(outs, 2), state), whole) < 1e-10


@pytest.mark.parametrize("memory", [
    Memory(Mlp(2), Huber(), Decay(), Momentum()), Memory(Residual(Mlp(2, 2)), Lp(), Lq(), Descent()),
    Memory(Matrix(), L2(), Softmax(2.0), Momentum()),
])  # fmt: skip
def test_gradients_equal_differences(memory):
    problem = Problem.random(memory, n=3, size=2)
    names = list(problem.gates)

    def run(*leaves):
        q, k, v, *rest = leaves
        gates = Gates(**dict(zip(names, rest, strict=False)))
        out, state = memorize(q, k, v, memory, gates, state=begin(memory, rest[len(names) :], 2), chunk=2)
        return out, *state.memory

    assert torch.autograd.gradcheck(run, problem.leaves, fast_mode=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_strong_and_weak_forgetting_stay_exact_in_float32(optimizer, chunk):
    memory = Memory(Matrix(), L2(), Decay(), optimizer)
    problem = Problem.random(memory, n=16)
    problem.gates["decay"] = torch.where(torch.arange(16) % 5 == 4, -300.0, -1e-4).expand(2, 2, 16)
    if optimizer.momentum:
        problem.gates["momentum"] = torch.where(torch.arange(16) % 7 == 3, -torch.inf, -0.1).expand(2, 2, 16)
    expected = problem.run(chunk=chunk, backend="reference")[0]
    problem.tokens, problem.weights = ([x.float() for x in part] for part in (problem.tokens, problem.weights))
    problem.gates = {name: x.float() for name, x in problem.gates.items()}
    found = problem.run(chunk=chunk)[0]
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 2e-6


def test_the_matrix_memory_is_the_delta_rule_and_linear_attention():
    q, k, v = torch.randn(3, 2, 2, 33, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = F.normalize(k, dim=-1)
    rng = torch.Generator().manual_seed(1)
    rate, log = (torch.rand(2, 2, 33, generator=rng, dtype=torch.float64) for _ in range(2))
    decay = -0.1 * log
    hebbian, _ = memorize(q, k, v, Memory(Matrix(), Dot(), Decay()), Gates(torch.ones_like(rate), decay), chunk=7)
    assert (hebbian - ct.recurrence(q, k, v, decay=decay)[0]).abs().max() < 1e-12
    delta, _ = memorize(q, k, v, Memory(Matrix(), L2(), Keep()), Gates(0.5 * rate), chunk=1)
    assert (delta - ct.recurrence(q, k, v, beta=rate)[0]).abs().max() < 1e-12


def test_padding_changes_nothing_and_leaks_nothing():
    for memory in (Memory(Mlp(2), Huber(), Softmax(), Momentum()), Memory(Residual(Mlp(2)), L2(), Lq(), Descent())):
        problem = Problem.random(memory, n=12)
        keep = torch.arange(12) % 4 != 2
        alone = Problem.random(memory, n=12)
        alone.tokens = [x[:, :, keep] for x in alone.tokens]
        alone.gates = {name: x[:, :, keep] for name, x in alone.gates.items()}
        out, state = alone.run(chunk=3)
        problem.keep = keep.expand(2, 12)
        hidden = ~keep[:, None]
        problem.tokens = [x.masked_fill(hidden, torch.nan) for x in problem.tokens]
        problem.gates = {name: x.masked_fill(~keep, torch.nan) for name, x in problem.gates.items()}
        padded, after = problem.run(chunk=4)
        assert (
            error([padded[:, :, keep], *after.memory, *after.surprise], [out, *state.memory, *state.surprise]) < 1e-12
        )
        assert (padded[:, :, ~keep] == 0).all()
        grads = torch.autograd.grad(padded.sum(), problem.weights)
        assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("memory", [
    Memory(Mlp(2), L2(), Decay(), Momentum()), Memory(Residual(Mlp(2)), L2(), Softmax()), Memory(),
])  # fmt: skip
def test_packed_sequences_equal_separate_ones(memory):
    problem = Problem.random(memory, n=12)
    state = None if memory == Memory() else problem.begin()
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 2]])
    gates = Gates(**problem.gates)
    packed = memorize_packed(*problem.tokens, memory, gates, segments, state=state, chunk=3)
    for member, cuts in enumerate([[0, 5, 7, 12], [0, 11, 12]]):
        for start, stop in itertools.pairwise(cuts):
            part = (slice(None), slice(None), slice(start, stop))
            alone = Gates(**{name: x[part] for name, x in problem.gates.items()})
            out, _ = memorize(*(x[part] for x in problem.tokens), memory, alone, state=state, chunk=3)
            assert (packed[member][:, start:stop] - out[member]).abs().max() < 1e-12
    alike = memorize_packed(*problem.tokens, memory, gates, segments[0], state=state, chunk=3)
    assert (alike[0] - packed[0]).abs().max() < 1e-12
    hidden = [x.clone() for x in problem.tokens]
    for x in hidden:
        x.data[0, :, :5] = torch.nan
    assert torch.equal(
        memorize_packed(*hidden, memory, gates, segments, state=state, chunk=3)[0, :, 5:], packed[0, :, 5:]
    )


def test_truncation_cuts_the_state_from_its_past():
    memory = Memory(Mlp(2), L2(), Decay(), Momentum())
    problem = Problem.random(memory, n=14)
    whole = problem.results(*problem.run(chunk=3))
    cut = problem.results(*problem.run(chunk=3, truncate=2))
    state, outs = problem.begin(), []
    for now in (slice(0, 6), slice(6, 12), slice(12, 14)):
        out, state = problem.run(now, state.detach() if outs else state, chunk=3)
        outs.append(out)
    pieces = problem.results(torch.cat(outs, 2), state)
    assert error(cut, pieces) < 1e-12
    values = 1 + len(state.tensors())
    assert error(cut[:values], whole[:values]) == 0
    assert error(cut[values:], whole[values:]) > 1e-3


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_nothing_is_asked(inference):
    problem = Problem.random(Memory(Residual(Mlp(2)), Huber(), Softmax(), Momentum()))
    out = problem.run(chunk=4)[0]
    with inference():
        found, state = problem.run(chunk=4)
    assert not found.requires_grad
    assert (found - out).abs().max() < 1e-12
    assert state.nbytes == 3 * sum(x.nbytes for x in problem.weights) * 2


def test_recall_reads_and_writes_nothing():
    for memory in (Memory(Mlp(3), L2(), Softmax(), Momentum()), Memory(Residual(Mlp(2)), L2(), Lq())):
        problem = Problem.random(memory, n=6)
        out, state = problem.run(chunk=4)
        found = recall(problem.tokens[0][:, :, -1:], memory, state)
        assert (found - out[:, :, -1:]).abs().max() < 1e-12


def test_states_are_selected_and_go_to_dictionaries_and_back():
    problem = Problem.random(Memory(Mlp(2), L2(), Decay(), Momentum()), n=10)
    out, state = problem.run(slice(0, 6), chunk=4)
    again = problem.begin().from_dict(state.to_dict())
    assert again.place == 2
    rest, twice = (problem.run(slice(6, 10), x, chunk=4)[0] for x in (state, again))
    assert torch.equal(rest, twice)
    swapped = state.select(torch.tensor([1, 0]))
    assert all(torch.equal(x.flip(0), y) for x, y in zip(state.tensors(), swapped.tensors(), strict=True))
    assert problem.run(slice(0, 10), chunk=4)[1].nbytes == state.nbytes
    assert out.shape == (2, 2, 6, 4)


def test_low_precision_and_no_tokens():
    memory = Memory()
    q, k, v = torch.randn(3, 1, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    gates = Gates(torch.full((1, 2, 9), 0.1))
    out, state = memorize(*(x.bfloat16() for x in (q, k, v)), memory, gates)
    assert (out.dtype, state.memory[0].dtype) == (torch.bfloat16, torch.float32)
    assert (out - memorize(*(x.bfloat16().float() for x in (q, k, v)), memory, gates)[0]).abs().max() < 2e-2
    empty, same = memorize(*(x[:, :, :0] for x in (q, k, v)), memory, Gates(gates.rate[:, :, :0]), state=state)
    assert empty.shape == (1, 2, 0, 4)
    assert torch.equal(same.memory[0], state.memory[0])


def refusals():
    x, rate = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    deep = Memory(Mlp(3))
    ready = begin(deep, deep.learner.weights(2, 4, 4), 1)
    two = begin(Memory(Mlp(2)), Mlp(2).weights(2, 4, 4), 1)
    return [
        ((x, x.double(), x, Memory(), Gates(rate)), {}, "convert them to one"),
        ((x, x, x, Memory(), Gates(rate[:, :1])), {}, r"gates.rate is \[1, 1, 3\] on cpu; expected \[1, 2, 3\] or"),
        ((x, x, x, Memory(), Gates(rate, rate + 0.5)), {}, "gates.decay has 0.5 in it"),
        ((x, x, x, Memory(retention=Keep()), Gates(rate, rate)), {}, r"Keep\(\) does not decay"),
        ((x, x, x, Memory(optimizer=Momentum()), Gates(rate)), {}, "gates.momentum is missing"),
        ((x, x, x, Memory(), Gates(rate, momentum=rate)), {}, "gates.momentum is given, and the optimizer is Descent"),
        ((x, x, x, deep, Gates(rate)), {}, r"state=None begins from zeros, where Mlp\(depth=3"),
        ((x, x, x, deep, Gates(torch.zeros_like(x))), {"state": ready}, "has layers without these channels"),
        ((x, x, x, deep, Gates(rate)), {"state": two}, r"has \[B, H, in, out\]"),
        ((x, x, x, Memory(), Gates(rate)), {"chunk": 0}, "chunk=0: expected at least 1"),
        ((x, x, x, Memory(), Gates(rate)), {"backend": "fast"}, "backend='fast': there are chunked, reference"),
    ]  # fmt: skip


@pytest.mark.parametrize(("inputs", "options", "text"), refusals())
def test_refusals_say_what_was_given_and_what_is_expected(inputs, options, text):
    with pytest.raises(ct.ChronotopeError, match=text):
        memorize(*inputs, **options)


def test_parts_refuse_numbers_that_they_cannot_have():
    for make in (lambda: Mlp(0), lambda: Lp(0.5), lambda: Lq(1), lambda: Softmax(0.0)):
        with pytest.raises(ct.ChronotopeError, match="expected"):
            make()
    with pytest.raises(ct.ChronotopeError, match="a residual needs them equal"):
        Residual(Matrix()).sizes(4, 6)
    memory = Memory()
    x, rate = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    with pytest.raises(ct.ChronotopeError, match="2 tokens into a chunk, and chunk=2"):
        memorize(
            x,
            x,
            x,
            memory,
            Gates(rate),
            chunk=2,
            state=memorize(x[:, :, :2], x[:, :, :2], x[:, :, :2], memory, Gates(rate[:, :, :2]), chunk=4)[1],
        )
    assert math.isinf(Huber(math.inf).threshold)
    assert Descent() == Descent()
