"""Titans (system 25): the memory against its rules, and the three layers made of it."""

import pytest
import torch
from _memories import accuracy, learned, pairs
from torch.nn import functional as F

import chronotope as ct
from chronotope.memories import (
    L2,
    Decay,
    Dot,
    Gates,
    Keep,
    Matrix,
    Memory,
    Mlp,
    Momentum,
    begin,
    memorize,
)
from chronotope.papers.memory.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer, neural_memory

LINEAR = Memory(Matrix(), L2(), Decay(), Momentum())
LAYERS = {"MAL": MemoryAsLayer, "MAG": MemoryAsGate, "MAC": MemoryAsContext}


def tokens(n=70, d=8, seed=0):
    """q, k, v, and theta, alpha, eta of Titans in (0, 1); float64."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 3, n, d, generator=rng, dtype=torch.float64)
    theta, alpha, eta = torch.rand(3, 2, 3, n, generator=rng, dtype=torch.float64)
    return q, F.normalize(k, dim=-1), v, 0.2 * theta, 0.3 * alpha, eta


def sequential(q, k, v, theta, alpha, eta, chunk):
    """The paper's rule, written as it is read: row vectors times a matrix M, one token after the other."""
    m = s = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=q.dtype)
    outs = []
    for t in range(q.shape[2]):
        if t % chunk == 0:
            start = m
        key, value = k[:, :, t, :, None], v[:, :, t, None, :]
        grad = 2 * key @ (key.mT @ start - value)
        s = eta[:, :, t, None, None] * s - theta[:, :, t, None, None] * grad
        m = (1 - alpha[:, :, t, None, None]) * m + s
        outs.append(q[:, :, t, None] @ m)
    return torch.cat(outs, 2), m


@pytest.mark.parametrize("chunk", [1, 8, 32])
def test_chunks_equal_the_sequential_rule_with_gradients_of_the_chunk_start(chunk):
    q, k, v, theta, alpha, eta = tokens()
    out, state = memorize(q, k, v, LINEAR, Gates(theta, torch.log1p(-alpha), eta.log()), chunk=chunk)
    expected, m = sequential(q, k, v, theta, alpha, eta, chunk)
    assert (out - expected).abs().max() < 1e-10
    assert (state.memory[0] - m).abs().max() < 1e-10
    if chunk > 1:
        assert (out - sequential(q, k, v, theta, alpha, eta, 1)[0]).abs().max() > 0.1


def test_orthonormal_keys_are_recalled_exactly_by_the_delta_rule():
    d = 16
    k = torch.linalg.qr(torch.randn(2, 1, d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    v = torch.randn(2, 1, d, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    none = torch.full((2, 1, d), -torch.inf, dtype=torch.float64)
    half, all_kept = torch.full_like(none, 0.5), torch.zeros_like(none)
    out, state = memorize(k, k, v, LINEAR, Gates(half, all_kept, none), chunk=1)
    assert (k @ state.memory[0] - v).abs().max() < 1e-12
    assert (out - v).abs().max() < 1e-12
    assert (out - ct.recurrence(k, k, v, beta=2 * half)[0]).abs().max() < 1e-12


def test_alpha_of_1_forgets_everything():
    q, k, v, theta, alpha, eta = tokens(n=20)
    _, state = memorize(q, k, v, LINEAR, Gates(theta, torch.log1p(-alpha), eta.log()), chunk=8)
    assert state.memory[0].abs().max() > 0.1
    nothing = torch.full((2, 3, 1), -torch.inf, dtype=torch.float64)
    one = [x[:, :, :1] for x in (q, k, v)]
    # alpha = 1 with eta = 0: no surprise is left, old or new where theta = 0, and nothing of the weights.
    out, after = memorize(*one, LINEAR, Gates(nothing.exp(), nothing, nothing), chunk=8, state=state)
    assert out.abs().max() == after.memory[0].abs().max() == after.surprise[0].abs().max() == 0
    # With eta > 0 the weights are the momentum that is left.
    out, after = memorize(*one, LINEAR, Gates(nothing.exp(), nothing, eta[:, :, :1].log()), chunk=8, state=state)
    assert (after.memory[0] - eta[:, :, :1, None] * state.surprise[0]).abs().max() < 1e-12


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_gradients_of_deep_memories_equal_autograd(depth):
    memory = Memory(Mlp(depth), L2(), Keep(), Momentum())
    _, k, v, theta, _, eta = tokens(n=1)
    weights = [w.double().requires_grad_() for w in memory.learner.weights(3, 8, 8, torch.Generator().manual_seed(0))]
    _, state = memorize(k, k, v, memory, Gates(theta, momentum=eta.log()), state=begin(memory, weights, 2))
    x = k
    for number, weight in enumerate(weights):
        x = (F.gelu(x) if number else x) @ weight
    each = [torch.autograd.grad((x - v).square()[b].sum(), weights, retain_graph=True) for b in range(2)]
    for number, found in enumerate(state.surprise):
        for b in range(2):
            expected = -theta[b, :, 0, None, None] * each[b][number]
            assert (found[b] - expected).abs().max() < 1e-12


def test_gradient_memory_recalls_correlated_keys_better_than_hebbian_and_momentum_better_still():
    k, v = pairs(64, 32, 32, common=0.85)
    plain, momentum = Memory(Matrix(), L2(), Keep()), Memory(Matrix(), L2(), Keep(), Momentum())
    rates = (0.05, 0.1, 0.2, 0.3, 0.5)
    hebbian = accuracy(learned(Memory(Matrix(), Dot(), Keep()), k, v, 1.0), v)
    gradient = max(accuracy(learned(plain, k, v, rate), v) for rate in rates)
    surprise = max(
        accuracy(learned(momentum, k, v, rate, momentum=float(torch.tensor(eta).log())), v)
        for rate in rates
        for eta in (0.5, 0.8)
    )
    # Found 0.27, 0.53, 0.67, each at its best rate. At n = 8 all are above 0.8, with tuned rates in the same order.
    assert gradient - hebbian >= 0.1, (hebbian, gradient)
    assert surprise - gradient >= 0.1, (gradient, surprise)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_step_as_they_run_and_see_no_future(kind):
    torch.manual_seed(0)
    options = {"segment": 5} if kind == "MAC" else {"window": 6, "chunk": 5}
    layer = LAYERS[kind](16, 2, persistent=3, **options).double()
    grid = ct.Grid(t=7, n=3)
    x = torch.randn(2, grid.size, 16, dtype=torch.float64)
    y = layer(x, grid)
    state, outs = layer.init_state(2, grid.replace(t=1)), []
    for part in x.split(3, 1):
        before = [z.clone() for z in state.tensors()]
        out, after = layer.step(part, state)
        assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))
        outs.append(out)
        state = after
    assert (torch.cat(outs, 1) - y).abs().max() < 1e-10
    changed = torch.cat((x[:, :13], 1 + x[:, 13:]), 1)
    assert (layer(changed, grid)[:, :13] - y[:, :13]).abs().max() < 1e-12
    y.square().sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", LAYERS)
def test_states_do_not_grow_with_the_sequence(kind):
    options = {"segment": 6} if kind == "MAC" else {"window": 6, "chunk": 5}
    layer = LAYERS[kind](16, 2, persistent=3, **options)
    state, sizes = layer.init_state(1, ct.Grid(n=1)), []
    with torch.no_grad():
        for _ in range(40):
            _, state = layer.step(torch.randn(1, 1, 16), state)
            sizes.append(state.nbytes)
    assert max(sizes[10:]) == max(sizes[:10])


def test_context_without_the_memory_is_attention_within_segments():
    torch.manual_seed(0)
    layer = MemoryAsContext(16, 2, segment=6, persistent=3).double()
    with torch.no_grad():
        layer.gate.fill_(-torch.inf)
        x = torch.randn(2, 20, 16, dtype=torch.float64)
        attend, outs = layer.attend, []
        for part in x.split(6, 1):
            q, k, v = attend.project(part)
            k, v = attend.before(k, v)
            n = part.shape[1]
            seen = torch.ones(n, 3 + n, dtype=torch.bool).tril(3)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            outs.append(attend.out(out.transpose(1, 2).flatten(2)))
        assert (layer(x, ct.Grid(n=20)) - torch.cat(outs, 1)).abs().max() < 1e-12


def test_depths_and_refusals():
    assert isinstance(neural_memory(16, 2, 0).memory.learner, Matrix)
    assert neural_memory(16, 2, 3).memory.learner == Mlp(3)
    with pytest.raises(ct.ChronotopeError, match="depth=5"):
        neural_memory(16, 2, 5)
    with pytest.raises(ct.ChronotopeError, match="heads of an even size"):
        MemoryAsContext(18, 6)
