"""Aaren (system 52): prefix softmax by scan, by blocks, by steps; empty prefixes; streamed stacks; running means."""

import math
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.nn import Block, Stack
from chronotope.papers.linear import aaren
from chronotope.papers.linear.aaren import Aaren, SoftmaxState, merge, prefix_attention


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def prefix_softmax(scores, v):
    """Softmax over every prefix, written out."""
    n = scores.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    return scores[..., None, :].expand(*scores.shape, n).masked_fill(later, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("block", [None, 1, 64])
def test_a_thousand_tokens_with_scores_of_two_hundred(block):
    k, v, q = random(0, 1, 1, 1000, 32), random(1, 1, 1, 1000, 32), random(2, 1, 32)
    scale = float(200 / (k @ q[..., None]).abs().max())
    out, state = prefix_attention(q, k, v, scale=scale, block=block)
    # Scores of 200 are rounded by 1.2e-5 before any softmax: the rounded ones are the oracle's too, in float64.
    scores = (k @ (q * scale)[..., None])[..., 0].double()
    assert scores.min() < -150 and scores.max() > 150
    expected = prefix_softmax(scores, v.double())
    assert (out - expected).abs().max() <= 1e-5  # found: 1.5e-7
    total = state.top.double() + state.total.double().log()
    torch.testing.assert_close(total, scores.logsumexp(-1), rtol=1e-6, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40), block=st.sampled_from([None, 1, 3, 8]), cut=st.integers(0, 40), per_batch=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_blocks_and_pieces_equal_softmax_of_every_prefix(n, block, cut, per_batch, seed):
    k, v = (random(seed + i, 2, 3, n, 4, dtype=torch.float64) for i in range(2))
    q = random(seed + 2, *([2, 3, 4] if per_batch else [3, 4]), dtype=torch.float64)
    expected = prefix_softmax((k @ q[..., None])[..., 0] / 2, v)
    out, state = prefix_attention(q, k, v, block=block)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    first, middle = prefix_attention(q, k[:, :, :cut], v[:, :, :cut], block=block)
    second, last = prefix_attention(q, k[:, :, cut:], v[:, :, cut:], block=block, state=middle)
    torch.testing.assert_close(torch.cat((first, second), 2), expected, rtol=1e-9, atol=1e-9)
    joined = merge(middle, prefix_attention(q, k[:, :, cut:], v[:, :, cut:])[1])
    for name in ("top", "total", "values"):
        torch.testing.assert_close(getattr(joined, name), getattr(state, name), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(getattr(last, name), getattr(state, name), rtol=1e-9, atol=1e-9)


def test_it_is_causal_attention_with_the_same_query_everywhere():
    k, v, q = random(0, 2, 3, 21, 4), random(1, 2, 3, 21, 5), random(2, 3, 4)
    queries = q[:, None].expand(2, 3, 21, 4)
    expected, lse = ct.attention(queries, k, v, grid=ct.Grid(t=3, h=7), where=ct.causal(), return_lse=True)
    out, state = prefix_attention(q, k, v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state.top + state.total.log(), lse[:, :, -1])


@pytest.mark.parametrize("n", [1, 2, 1000, 1024, 1025])
def test_levels_grow_with_the_logarithm(n, monkeypatch):
    sizes = []

    def counted(earlier, later):
        sizes.append(later[0].shape[2])
        return aaren_op(earlier, later)

    aaren_op = aaren.softmax_prefix
    monkeypatch.setattr(aaren, "softmax_prefix", counted)
    prefix_attention(random(0, 1, 4), random(1, 1, 1, n, 4), random(2, 1, 1, n, 4))
    levels = math.ceil(math.log2(n)) if n > 1 else 0
    assert len(sizes) - 1 <= 2 * levels  # one for the state before
    assert sum(sizes) - 1 < 2 * n


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), empty=st.integers(0, 7))
def test_joining_is_associative_and_empty_states_are_neutral(seed, empty):
    parts = []
    for i in range(3):
        top, total, values = 100 * random(seed + i, 2, 3), random(seed + i + 3, 2, 3).exp(), random(seed + i, 2, 3, 4)
        if empty >> i & 1:
            top, total, values = torch.full_like(top, -torch.inf), 0 * total, 0 * values
        parts.append(SoftmaxState(top, total, values))
    a, b, c = parts
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    for x, y in zip(left.tensors(), right.tensors(), strict=True):
        assert not x.isnan().any()
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_tokens_left_out_change_nothing_and_empty_prefixes_are_zero():
    k, v, q = (random(i, *s, dtype=torch.float64) for i, s in enumerate([(1, 2, 9, 4), (1, 2, 9, 4), (2, 4)]))
    keep = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0, 1]]).bool()
    k[:, :, ~keep[0]], v[:, :, ~keep[0]] = torch.nan, torch.inf
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, _ = prefix_attention(*inputs, keep=keep)
    assert torch.equal(out[:, :, :2], torch.zeros(1, 2, 2, 4).double())
    alone, _ = prefix_attention(q, k[:, :, keep[0]], v[:, :, keep[0]])
    torch.testing.assert_close(out[:, :, keep[0]], alone)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert all((g[:, :, ~keep[0]] == 0).all() for g in gradients[1:])


@pytest.mark.parametrize("block", [None, 2])
def test_gradients(block):
    inputs = [
        random(i, *s, dtype=torch.float64).requires_grad_() for i, s in enumerate([(2, 3), (1, 2, 5, 3), (1, 2, 5, 2)])
    ]
    assert torch.autograd.gradcheck(lambda q, k, v: prefix_attention(q, k, v, block=block)[0], inputs)


@pytest.mark.parametrize("grid", [ct.Grid(n=50), ct.Grid(t=7, h=3, w=2)], ids=repr)
def test_a_stack_of_two_layers_streams(grid):
    torch.manual_seed(0)
    stack = Stack([Block([Aaren(12, 3)]), Block([Aaren(12, 3, block=4)])])
    x = random(1, 2, grid.size, 12)
    one = grid.replace(**{grid.axes[0]: 1})
    state, out, sizes = stack.init_state(2, one), [], set()
    with torch.no_grad():
        for part in x.split(one.size, 1):
            y, state = stack.step(part, state)
            out.append(y)
            sizes.add(state.nbytes)
        expected = stack(x, grid)
    assert (torch.cat(out, 1) - expected).abs().max() <= 1e-5
    assert len(sizes) == 1
    extra = sum(p.numel() for p in Aaren(12, 3).parameters()) - (12 * 24 + 12 * 12)
    assert extra == 12  # the query vectors, beside keys, values and output


def test_refusals():
    with pytest.raises(ct.ChronotopeError, match="dim=10 is not a multiple of heads=3"):
        Aaren(10, 3)
    with pytest.raises(ct.ChronotopeError, match="block=0"):
        prefix_attention(torch.ones(1, 2), torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), block=0)
    with pytest.raises(ct.ChronotopeError, match="takes no context"):
        Aaren(4, 1)(torch.ones(1, 2, 4), ct.Grid(n=2), torch.ones(1, 2, 4))


@pytest.mark.slow
def test_the_memory_of_steps_is_constant_up_to_a_hundred_thousand():
    torch.manual_seed(0)
    layer, x = Aaren(16, 2), random(0, 1, 1, 16)
    state = layer.init_state(1, ct.Grid(n=1))
    found = {}
    with torch.no_grad():
        for t in range(1, 100_001):
            _, state = layer.step(x, state)
            if t in (1, 10_000, 100_000):
                found[t] = (state.nbytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert found[1][0] == found[100_000][0] == 4 * 2 * (1 + 1 + 8)
    # 90,000 more tokens of 16 numbers would be 5.8 MB of keys, and as much of values.
    assert found[100_000][1] - found[10_000][1] < 2000, found


@pytest.mark.slow
def test_running_mean_of_the_values_with_one_tag():
    torch.manual_seed(0)
    tags, n = 4, 40
    read_in, layer, read_out = torch.nn.Linear(tags + 1, 32), Aaren(32, 4), torch.nn.Linear(32, 1)
    parameters = [p for part in (read_in, layer, read_out) for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.0)
    steps = 1500
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)

    def batch(size):
        """Tokens (one-hot tag, value); the mean so far of the values whose tag is 2, and where there was one."""
        tag, value = torch.randint(0, tags, (size, n)), torch.randn(size, n)
        mine = (tag == 2).float()
        count = mine.cumsum(1)
        mean = (mine * value).cumsum(1) / count.clamp(min=1)
        return torch.cat((torch.nn.functional.one_hot(tag, tags), value[..., None]), -1), mean, count > 0

    def emitted(x):
        return read_out(layer(read_in(x), ct.Grid(n=n)))[..., 0]

    for _ in range(steps):
        x, mean, asked = batch(32)
        optimizer.zero_grad()
        (emitted(x) - mean)[asked].square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x, mean, asked = batch(2000)
        r2 = 1 - (emitted(x) - mean)[asked].square().mean() / mean[asked].var()
    assert r2 >= 0.98, float(r2)
