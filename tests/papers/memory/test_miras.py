"""Miras (system 107): Moneta, Yaad and Memora against their rules, and against outliers."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from _memories import learned, pairs
from torch.nn import functional as F

import chronotope as ct
from chronotope.memories import (
    L2,
    Decay,
    Dot,
    Gates,
    Keep,
    Lp,
    Lq,
    Matrix,
    Memory,
    Mlp,
    Residual,
    Softmax,
    Switch,
    begin,
    memorize,
)
from chronotope.papers.memory.miras import MATRIX, MLP2, memora, miras, moneta, yaad

RULES = {
    "Moneta": (Lp(3), Lq(4)),
    "Yaad": (Switch(), Decay()),
    "Memora": (L2(), Softmax(2.0)),
}


def tokens(n=40, d=8, seed=0):
    """q, k, v; alpha in 0.7..1, eta in 0..0.1, delta around the size of the errors. float64."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 3, n, d, generator=rng, dtype=torch.float64)
    alpha, eta, delta = torch.rand(3, 2, 3, n, generator=rng, dtype=torch.float64)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, 0.7 + 0.3 * alpha, 0.1 * eta, 5 * delta


def token_by_token(name, q, k, v, alpha, eta, delta, weight):
    """The three rules of the paper for a matrix, [in, out], as they are written."""
    a = weight
    w = {"Moneta": lambda a: a / a.abs().pow(4).sum((-2, -1), keepdim=True).sqrt(), "Yaad": lambda a: a}
    outs = []
    state = 2 * a.softmax(-2) if name == "Memora" else w[name](a)
    for t in range(q.shape[2]):
        key, value, keep, rate = k[:, :, t, :, None], v[:, :, t, None], alpha[:, :, t], eta[:, :, t]
        keep, rate = keep[..., None, None], rate[..., None, None]
        e = key.mT @ state - value
        if name == "Moneta":
            a = keep * a - rate * key @ (3 * e.sign() * e.abs().square())
            state = w[name](a)
        elif name == "Yaad":
            bound = delta[:, :, t, None, None]
            near = e.norm(dim=-1, keepdim=True) <= bound
            state = keep * state - torch.where(near, rate * 2 * key @ e, rate * bound * key @ e.sign())
        else:
            state = 2 * (keep * state.log() - rate * 2 * key @ e).softmax(-2)
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, 2)


@pytest.mark.parametrize("name", RULES)
def test_chunks_of_1_are_the_rule_token_by_token(name):
    q, k, v, alpha, eta, delta = tokens()
    loss, retention = RULES[name]
    memory = Memory(Matrix(), loss, retention)
    weights = [w.double() for w in memory.learner.weights(3, 8, 8, torch.Generator().manual_seed(0))]
    gates = Gates(eta, alpha.log(), threshold=delta if name == "Yaad" else None)
    out, _ = memorize(q, k, v, memory, gates, state=begin(memory, weights, 2), chunk=1)
    expected = token_by_token(name, q, k, v, alpha, eta, delta, weights[0].expand(2, -1, -1, -1))
    # The power of three is round below 1e-3, which is all that differs.
    assert (out - expected).abs().max() < (1e-6 if name == "Moneta" else 1e-12)


@pytest.mark.parametrize("learner", [MATRIX, MLP2], ids=["matrix", "MLP"])
@pytest.mark.parametrize("name", RULES)
def test_any_cut_equals_one_pass(name, learner):
    q, k, v, alpha, eta, delta = tokens(n=21)
    memory = Memory(learner, *RULES[name])
    weights = [w.double() for w in learner.weights(3, 8, 8, torch.Generator().manual_seed(0))]

    def run(now, state, chunk):
        gates = Gates(eta[:, :, now], alpha[:, :, now].log(), threshold=delta[:, :, now] if name == "Yaad" else None)
        return memorize(q[:, :, now], k[:, :, now], v[:, :, now], memory, gates, state=state, chunk=chunk)

    for chunk in (1, 4, 16):
        whole, last = run(slice(0, 21), begin(memory, weights, 2), chunk)
        for cut in range(1, 21, 3):
            first, state = run(slice(0, cut), begin(memory, weights, 2), chunk)
            second, after = run(slice(cut, 21), state, chunk)
            assert (torch.cat((first, second), 2) - whole).abs().max() < 1e-12
            assert all((a - b).abs().max() < 1e-12 for a, b in zip(after.tensors(), last.tensors(), strict=True))


def test_p_of_2_q_of_2_and_an_infinite_delta_are_the_gated_delta_rule():
    q, k, v, alpha, eta, _ = tokens()
    expected, _ = ct.recurrence(q, k, v, decay=torch.zeros_like(eta), beta=torch.zeros_like(eta))
    w, outs = torch.zeros(2, 3, 8, 8, dtype=torch.float64), []
    for t in range(q.shape[2]):
        key, value = k[:, :, t, :, None], v[:, :, t, None]
        e = key.mT @ w - value
        w = alpha[:, :, t, None, None] * w - 2 * eta[:, :, t, None, None] * key @ e
        outs.append(q[:, :, t, None] @ w)
    expected = torch.cat(outs, 2)
    for memory, threshold in (
        (Memory(Matrix(), Lp(2), Lq(2)), None),
        (Memory(Matrix(), Switch(), Decay()), torch.full_like(eta, math.inf)),
    ):
        out, _ = memorize(q, k, v, memory, Gates(eta, alpha.log(), threshold=threshold), chunk=1)
        assert (out - expected).abs().max() < 1e-10


@pytest.mark.parametrize("learner", [MATRIX, MLP2], ids=["matrix", "MLP"])
def test_memora_stays_positive_and_keeps_its_sums(learner):
    memory = Memory(learner, L2(), Softmax(2.0))
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 4096, 8, generator=rng, dtype=torch.float64)
    k = F.normalize(k, dim=-1)
    weights = [w.double() for w in learner.weights(1, 8, 8, rng)]
    for alpha in (1.0, 0.99):
        gates = Gates(torch.full((1, 1, 4096), 0.1), torch.full((1, 1, 4096), alpha).log())
        with torch.no_grad():
            out, state = memorize(q, k, v, memory, gates, state=begin(memory, weights, 1), chunk=16)
        assert out.isfinite().all()
        for a in state.memory:
            w = memory.retention.weights(a)
            assert w.min() > 0
            assert (w.sum(-2) - 2).abs().max() < 1e-8
            # What is carried is log W itself, which does not drift.
            assert (a[0, 0].exp().sum(0) - 2).abs().max() < 1e-8 or state.place > 0


def outliers(batch=50, n=24, d=32):
    """Pairs of which two values are a hundred times too large, and which these are [B, 1, N]."""
    k, v = pairs(batch, n, d)
    order = torch.rand(batch, n, generator=torch.Generator().manual_seed(1)).argsort(-1)
    wild = torch.zeros(batch, n, dtype=torch.bool).scatter(1, order[:, :2], True)[:, None]
    return k, torch.where(wild[..., None], 100 * v, v), wild


def missed(memory, k, v, rate, counts=None, **gates):
    """Squares of the errors over those of the zero predictor, at the items that count."""
    counts = torch.ones(v.shape[:3], dtype=torch.bool) if counts is None else counts
    errors = (learned(memory, k, v, rate, **gates) - v).square().sum(-1)
    return float(errors[counts].sum() / v.square().sum(-1)[counts].sum())


def test_yaad_stands_outliers_and_the_squared_loss_does_not():
    k, v, wild = outliers()
    squared = Memory(Matrix(), L2(), Keep())
    for delta in (8.0, 10.0, 12.0):
        memory = Memory(Matrix(), Switch(), Keep())
        errors = [missed(memory, k, v, rate, ~wild, threshold=delta) for rate in (0.1, 0.2)]
        # Found 0.58 to 0.69 at the better rate; 0.39 to 0.43 with `Huber`.
        assert min(errors) < 0.8, (delta, errors)
    for rate in (0.05, 0.1, 0.2, 0.3, 0.5):
        assert missed(squared, k, v, rate, ~wild) >= 5


def test_without_outliers_the_delta_rule_beats_linear_attention():
    k, v = pairs(50, 24, 32)
    rates = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    linear = min(missed(Memory(Matrix(), Dot(), Keep()), k, v, rate) for rate in rates)
    for loss in (L2(), Switch(50.0)):
        delta = min(missed(Memory(Matrix(), loss, Keep()), k, v, rate) for rate in rates)
        assert delta < linear - 0.02, (delta, linear)  # found 0.38 against 0.42


@pytest.mark.parametrize("name", RULES)
def test_chunks_come_nearer_to_steps_as_the_rate_falls(name):
    q, k, v, _, eta, _ = tokens(n=64)
    memory = Memory(Matrix(), *RULES[name])
    weights = [w.double() for w in memory.learner.weights(3, 8, 8, torch.Generator().manual_seed(0))]
    # A large threshold: a token that is just beyond it for one and not for the other makes a jump of its own.
    threshold = torch.full_like(eta, 100.0) if name == "Yaad" else None

    def gap(rate):
        outs = [
            memorize(
                q, k, v, memory, Gates(rate * eta, threshold=threshold), state=begin(memory, weights, 2), chunk=chunk
            )[0]
            for chunk in (1, 16)
        ]
        return float((outs[0] - outs[1]).norm())

    gaps = [gap(rate) for rate in (0.2, 0.1, 0.05, 0.025)]
    for large, small in itertools.pairwise(gaps):
        assert small <= large / 2, gaps


@pytest.mark.parametrize("make", [moneta, yaad, memora])
def test_layers_step_as_they_run_and_learn(make):
    torch.manual_seed(0)
    layer, grid = make(16, 2, chunk=4).double(), ct.Grid(t=5, n=3)
    x = torch.randn(2, grid.size, 16, dtype=torch.float64)
    y = layer(x, grid)
    state, outs = layer.init_state(2, grid.replace(t=1)), []
    for part in x.split(3, 1):
        out, state = layer.step(part, state)
        outs.append(out)
    assert (torch.cat(outs, 1) - y).abs().max() < 1e-10
    y.square().sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


def test_parts_are_free_and_outputs_depend_on_the_gradients_of_inner_steps():
    layer = miras(16, 2, memory=MATRIX, bias=Lp(3), retention=Softmax(), by_channel=False)
    assert layer.memory == Memory(Matrix(), Lp(3), Softmax())
    assert miras(16, 2).memory == Memory(Residual(Mlp(2, 4)), L2(), Decay())
    q, k, v, alpha, eta, _ = tokens(n=12)
    memory = Memory(MLP2, L2(), Decay())
    weights = [w.double() for w in MLP2.weights(3, 8, 8, torch.Generator().manual_seed(0))]
    k.requires_grad_()
    out, _ = memorize(q, k, v, memory, Gates(eta, alpha.log()), state=begin(memory, weights, 2), chunk=4)
    # Keys are seen by gradients of the inner descent only.
    (grad,) = torch.autograd.grad(out[:, :, -1].square().sum(), k)
    assert (grad.abs().amax((0, 1, 3)) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("make", [moneta, yaad, memora])
def test_time_is_linear(make, one_thread):
    layer = make(32, 2, chunk=16)
    inputs = {n: torch.randn(1, n, 32) for n in (1024, 4096)}
    times = {n: [] for n in inputs}
    with torch.no_grad():
        for _ in range(5):
            for n, x in inputs.items():
                start = time.process_time()
                layer(x, ct.Grid(n=n))
                times[n].append(time.process_time() - start)
    ratio = np.median(np.divide(times[4096], times[1024])[1:])
    assert 3 <= ratio <= 5.2, ratio
