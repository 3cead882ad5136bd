"""Lightning Attention-2 (system 21): three forms that are one, gradients, pieces, constant cost.

Compared once with `linear_attn` of the authors' repository (github.com/OpenNLPLab/lightning-attention, d15c385), in
float32 on random q, k, v [2, 8, 1000, 64], slopes 2^-1 to 2^-8: largest difference 4.5e-7 of the largest output;
from the result in float64 theirs is 1.6e-4 away and ours 1.2e-4, of outputs up to 403. Some of their numbers are below.
"""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.linear.lightning import both_ways, lightning_attention

DECAYS = -torch.tensor([0.0, 0.004, 0.0625, 0.5])
"""None, and the smallest, a middle and the largest of the usual slopes."""


def problem(n, d=16, e=24, heads=4, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, n, size, dtype=dtype, generator=generator) for size in (d, d, e)]


def masked(q, k, v, decay):
    """((Q K^T) * D) V, D as a matrix."""
    place = torch.arange(q.shape[2])
    apart = place[:, None] - place
    weights = (decay[:, None, None].to(q.dtype) * apart.clamp(min=0)).exp().tril()
    return ((q @ k.mT) * weights) @ v


def token_by_token(q, k, v, decay):
    memory, outs = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[2]):
        memory = decay.to(q.dtype).exp()[:, None, None] * memory + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append((q[:, :, t, None] @ memory)[:, :, 0])
    return torch.stack(outs, 2), memory


def far(found, expected):
    """The largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("n", [913, 64, 1])
def test_blocks_equal_the_masked_form_and_the_token_recurrence(n, dtype, allowed):
    q, k, v = problem(n, dtype=dtype)
    exact = [x.double() for x in (q, k, v)]
    expected, memory = token_by_token(*exact, DECAYS.double())
    assert far(masked(*exact, DECAYS), expected) < 1e-12
    for chunk in (n, 64, 16, 1):
        out, state = lightning_attention(q, k, v, decay=DECAYS.to(dtype), chunk=chunk)
        assert out.dtype == dtype
        assert far(out.double(), expected) < allowed
        assert far(state.memory.double(), memory) < allowed


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_gradients_equal_autograd_of_the_masked_form(chunk):
    inputs = [x.requires_grad_() for x in problem(75)]
    weights = problem(75, seed=1)[2]
    expected = torch.autograd.grad((masked(*inputs, DECAYS) * weights).sum(), inputs)
    found = torch.autograd.grad((lightning_attention(*inputs, decay=DECAYS, chunk=chunk)[0] * weights).sum(), inputs)
    assert max(far(x, y) for x, y in zip(found, expected, strict=True)) < 1e-8


@pytest.mark.parametrize("decay", [None, -torch.tensor([0.4, 0.0], dtype=torch.float64)])
def test_gradients_reach_the_state_and_are_differentiable_again(decay):
    inputs = [*problem(5, 2, 1, 2, 1), torch.randn(1, 2, 2, 1, dtype=torch.float64)]

    def run(q, k, v, memory):
        out, state = lightning_attention(q, k, v, decay=decay, state=ct.RecurrentState(memory), chunk=2)
        return out, state.memory

    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_training_keeps_inputs_and_no_states():
    inputs = [x.requires_grad_() for x in problem(2048, 32, 32, 2, 1, torch.float32)]

    def saved(run):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.untyped_storage()._cdata: x}), id):
            run()
        return sum(x.untyped_storage().nbytes() for x in kept.values())

    own = sum(x.nbytes for x in inputs)
    decay = DECAYS[1:3]
    assert saved(lambda: lightning_attention(*inputs, decay=decay)) < 1.1 * own
    assert saved(lambda: ct.recurrence(*inputs, decay=decay, backend="torch")) > 2 * own


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 150), st.integers(0, 150), st.integers(1, 70), st.integers(0, 10**6))
def test_any_split_equals_one_pass(first, second, chunk, seed):
    q, k, v = problem(first + second, 3, 5, 4, 1, seed=seed)
    whole, end = lightning_attention(q, k, v, decay=DECAYS)
    a, state = lightning_attention(*(x[:, :, :first] for x in (q, k, v)), decay=DECAYS, chunk=chunk)
    b, state = lightning_attention(*(x[:, :, first:] for x in (q, k, v)), decay=DECAYS, state=state, chunk=chunk)
    out = torch.cat((a, b), 2)
    assert torch.allclose(out, whole, rtol=1e-10, atol=1e-10)
    assert torch.allclose(state.memory, end.memory, rtol=1e-10, atol=1e-10)


def test_without_decay_it_is_prefix_sums():
    q, k, v = problem(200)
    sums = (k[..., :, None] * v[..., None, :]).cumsum(2)
    expected = torch.einsum("bhnd,bhnde->bhne", q, sums)
    for decay in (None, torch.zeros(4, dtype=torch.float64)):
        assert far(lightning_attention(q, k, v, decay=decay)[0], expected) < 1e-12


def test_padding_writes_nothing_and_the_decay_goes_on():
    q, k, v = problem(90)
    keep = torch.rand(2, 90, generator=torch.Generator().manual_seed(1)) < 0.6
    place = torch.arange(90)
    weights = (DECAYS[:, None, None].double() * (place[:, None] - place).clamp(min=0)).exp().tril()
    expected = ((q @ k.mT) * weights * keep[:, None, None]) @ v
    spoiled = [torch.where(keep[:, None, :, None], x, torch.nan) for x in (k, v)]
    assert far(lightning_attention(q, *spoiled, decay=DECAYS, keep=keep)[0], expected) < 1e-12


def test_both_ways_weighs_by_distance():
    q, k, v = problem(90)
    place = torch.arange(90)
    weights = (DECAYS[:, None, None].double() * (place[:, None] - place).abs()).exp()
    assert far(both_ways(q, k, v, decay=DECAYS), ((q @ k.mT) * weights) @ v) < 1e-12


def test_equals_the_authors_masked_form():
    # Output of `linear_attn` of their repository (lightning_attn/ops/torch) on these inputs, at two tokens.
    n, d = 130, 4
    place = torch.arange(n * d, dtype=torch.float32).view(1, 1, n, d)
    q, k, v = ((place * step).sin().expand(1, 2, n, d) for step in (0.37, 0.59, 0.83))
    out, _ = lightning_attention(q, k, v, decay=-torch.tensor([0.0625, 0.00390625]))
    expected = torch.tensor(OFFICIAL)
    assert (out[0][:, [64, 129]] - expected).abs().max() < 1e-5


OFFICIAL = [
    [[-1.8773417, -0.0461033, 1.8151116, 2.4960551], [-0.6156479, -0.8669757, -0.5545505, 0.1184806]],
    [[-2.1544154, -0.5474995, 1.4154387, 2.4579782], [-0.6512527, -1.5129842, -1.3908927, -0.3643907]],
]


def test_a_learned_decay_is_refused():
    q, k, v = problem(5)
    with pytest.raises(ct.ChronotopeError, match=r"use ct\.recurrence"):
        lightning_attention(q, k, v, decay=DECAYS.clone().requires_grad_())


def test_the_state_does_not_grow():
    q, k, v = problem(3000, dtype=torch.float32)
    state, sizes = None, set()
    for t in range(0, 3000, 100):
        _, state = lightning_attention(*(x[:, :, t : t + 100] for x in (q, k, v)), decay=DECAYS, state=state)
        sizes.add(state.memory.untyped_storage().nbytes())  # of the storage: a view could hold all that came before
    assert sizes == {2 * 4 * 16 * 24 * 4}


def seconds(runs, rounds=9):
    """Median processor seconds of each call, taken in turns, after one call that does not count."""
    found = {name: [] for name in runs}
    for _, name in itertools.product(range(rounds + 1), runs):
        start = time.process_time()
        runs[name]()
        found[name].append(time.process_time() - start)
    return {name: np.median(times[1:]) for name, times in found.items()}


@pytest.mark.slow
def test_cost_per_token_is_constant_and_that_of_softmax_is_not(one_thread):
    sizes = (1024, 2048, 4096, 8192)
    tensors = {n: problem(n, 64, 64, 4, 1, torch.float32) for n in sizes}

    def lightning(n):
        return lambda: lightning_attention(*tensors[n], decay=DECAYS, chunk=128)

    def softmax(n):
        return lambda: F.scaled_dot_product_attention(*tensors[n], is_causal=True)

    with torch.no_grad():
        own = seconds({n: lightning(n) for n in sizes})
        dense = seconds({n: softmax(n) for n in (1024, 8192)}, 3)
    per_token = np.array([own[n] / n for n in sizes])
    assert np.abs(per_token / per_token.mean() - 1).max() < 0.35, per_token
    assert dense[8192] / dense[1024] > 3 * own[8192] / own[1024], (dense, own)


@pytest.mark.slow
def test_training_cost_per_token_is_constant(one_thread):
    sizes = (1024, 2048, 4096, 8192)
    tensors = {n: [x.requires_grad_() for x in problem(n, 64, 64, 4, 1, torch.float32)] for n in sizes}

    def run(n):
        return lambda: lightning_attention(*tensors[n], decay=DECAYS, chunk=128)[0].sum().backward()

    times = seconds({n: run(n) for n in sizes})
    per_token = np.array([times[n] / n for n in sizes])
    assert np.abs(per_token / per_token.mean() - 1).max() < 0.35, per_token
