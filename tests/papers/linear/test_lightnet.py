"""LightNet (system 86): one scan for any grid, pieces, weights that add up to 1, positions, cost.

The authors' repository (OpenNLPLab/LightNet) was not to be had, so the forms below are held against the softmax written
out, and not against their code.
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
from chronotope.papers.linear.lightnet import LightNet, MdLrpe, additive_attention, shared_attention

BOTH = pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])


def problem(n, d=8, e=6, heads=3, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, n, size, dtype=torch.float64, generator=generator) for size in (d, d, e))
    return [x.to(dtype) for x in (F.silu(q), 3 * k, v)]


def written_out(q, k, v, keep=None):
    """For each t the softmax over s <= t, channel by channel, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    hidden = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).triu(1)[..., None]
    scores = k[:, :, None].masked_fill(hidden, -torch.inf)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None, :, None], -torch.inf)
    weights = scores.softmax(3).nan_to_num(0.0)  # no key at all: nothing
    return torch.einsum("bhtd,bhtsd,bhse->bhte", q, weights, v), weights


def far(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@BOTH
@pytest.mark.parametrize("chunk", [1, 16, 64, 100])
def test_the_recurrence_equals_the_softmax_over_the_past(dtype, allowed, chunk):
    q, k, v = problem(100, dtype=dtype)
    assert far(additive_attention(q, k, v, chunk=chunk)[0], written_out(q, k, v)[0]) < allowed


def test_the_recurrence_equals_its_own_steps():
    q, k, v = problem(40)
    z, memory, outs = torch.full_like(k[:, :, 0], -torch.inf), torch.zeros(2, 3, 8, 6, dtype=torch.float64), []
    for t in range(40):
        after = torch.logaddexp(z, k[:, :, t])
        memory = (z - after).exp()[..., None] * memory + (k[:, :, t] - after).exp()[..., None] * v[:, :, t, None]
        z = after
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], memory))
    out, state = additive_attention(q, k, v)
    assert far(out, torch.stack(outs, 2)) < 1e-12
    assert (state.total - z).abs().max() < 1e-12
    assert far(state.past.memory, memory) < 1e-12


@BOTH
def test_pieces_equal_one_pass(dtype, allowed):
    q, k, v = problem(64, dtype=dtype)
    whole, end = additive_attention(q, k, v)
    state, outs = None, []
    for pieces in zip(*(x.split([7, 16, 41], 2) for x in (q, k, v)), strict=True):
        out, state = additive_attention(*pieces, state=state)
        outs.append(out)
    assert far(torch.cat(outs, 2), whole.double()) < allowed
    assert far(state.past.memory, end.past.memory.double()) < allowed


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 10**6), st.floats(0, 1))
def test_any_split_with_any_padding_equals_the_softmax(first, second, seed, share):
    q, k, v = problem(first + second, 3, 2, 2, 1, seed=seed)
    keep = torch.rand(1, first + second, generator=torch.Generator().manual_seed(seed)) < share
    expected, _ = written_out(q, k, v, keep)
    spoiled = [torch.where(keep[:, None, :, None], x, torch.nan) for x in (k, v)]
    out, state = additive_attention(*(x[:, :, :first] for x in (q, *spoiled)), keep=keep[:, :first])
    rest, _ = additive_attention(*(x[:, :, first:] for x in (q, *spoiled)), keep=keep[:, first:], state=state)
    assert torch.allclose(torch.cat((out, rest), 2), expected, rtol=1e-10, atol=1e-10)
    alone = shared_attention(q, *spoiled, keep=keep)
    assert torch.allclose(alone, q @ (written_out(q, k, v, keep)[1][:, :, -1].mT @ v), rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_the_softmax():
    inputs = [x.requires_grad_() for x in problem(50)]
    weights = problem(50, seed=1)[2]
    expected = torch.autograd.grad((written_out(*inputs)[0] * weights).sum(), inputs)
    found = torch.autograd.grad((additive_attention(*inputs, chunk=16)[0] * weights).sum(), inputs)
    assert max(far(x, y) for x, y in zip(found, expected, strict=True)) < 1e-12
    small = [x.requires_grad_() for x in problem(9, 2, 2, 1, 1)]

    def halves(q, k, v):
        out, state = additive_attention(*(x[:, :, :4] for x in (q, k, v)))
        return torch.cat((out, additive_attention(*(x[:, :, 4:] for x in (q, k, v)), state=state)[0]), 2)

    assert torch.autograd.gradcheck(halves, small)


def test_both_ways_cells_may_come_in_any_order_and_a_scan_with_decays_minds():
    q, k, v = problem(3 * 5 * 4)
    out, order = shared_attention(q, k, v), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    moved = shared_attention(*(x[:, :, order] for x in (q, k, v)))
    assert far(moved, out[:, :, order]) < 1e-12
    assert far(out, torch.einsum("bhnd,bhde->bhne", q, k.softmax(2).mT @ v)) < 1e-12

    def scanned(q, k, v):
        """A multiplicative decay over the same cells, from both ends."""
        ahead, back = (
            ct.recurrence(*x, decay=torch.tensor([-0.1, -0.05, -0.02]).double())[0]
            for x in ((q, k, v), [y.flip(2) for y in (q, k, v)])
        )
        return ahead + back.flip(2)

    weighed = k.softmax(2)
    scan = scanned(q, weighed, v)
    assert far(scanned(q[:, :, order], weighed[:, :, order], v[:, :, order]), scan[:, :, order]) > 1e-2


def test_weights_of_every_channel_add_up_to_one():
    _, k, _ = problem(300)
    ones, each = torch.ones_like(k[..., :1]), torch.eye(8, dtype=torch.float64)
    for channel in each:
        q = channel.expand_as(k)
        assert (additive_attention(q, k, ones)[0] - 1).abs().max() < 1e-12
        assert (shared_attention(q, k, ones) - 1).abs().max() < 1e-12
    assert (written_out(*problem(100))[1].sum(3) - 1).abs().max() < 1e-12


def test_large_keys_do_not_overflow():
    q, _, v = problem(200, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for k in (
        160 * torch.rand(2, 3, 200, 8, generator=generator) - 80,
        torch.linspace(-80, 80, 200)[:, None].expand(2, 3, 200, 8),
        torch.linspace(80, -80, 200)[:, None].expand(2, 3, 200, 8),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, state = additive_attention(*inputs)
        assert far(out, written_out(q, k, v)[0]) < 1e-4
        grads = torch.autograd.grad(out.sum() + shared_attention(*inputs).sum(), inputs)
        assert all(x.isfinite().all() for x in (*grads, *state.tensors()))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [12, 15, 32])
def test_scores_depend_on_offsets_along_each_axis_only(double, size):
    grid, big = ct.Grid(t=3, h=4, w=5), ct.Grid(t=4, h=6, w=8)
    code = MdLrpe(("t", "h", "w"), 4, size, double=double)
    q, k = torch.randn(2, 2, 4, 1, size, generator=torch.Generator().manual_seed(0))
    coords = grid.coords()
    near = [big.index(**dict(zip("thw", place.tolist(), strict=True))) for place in coords]
    moved = [big.index(**dict(zip("thw", (place + torch.tensor([1, 2, 3])).tolist(), strict=True))) for place in coords]
    # The same two vectors at all places of a larger grid: only where they are differs.
    turned = [code(x.expand(2, 4, big.size, size), big) for x in (q, k)]
    scores = turned[0] @ turned[1].mT
    assert (scores[:, :, near][..., near] - scores[:, :, moved][..., moved]).abs().max() < 1e-5 * scores.abs().max()
    assert (scores[:, 0, near[0], near].std(-1) > 0.1).all()  # and they do depend on them
    if double:
        plain = (q * k).sum(-1)[..., 0]
        assert torch.allclose(scores[:, :, 0, 0], plain, rtol=1e-4, atol=1e-4)
    # Head h is slower than head 0 by base^(-h / heads).
    unit = torch.ones(1, 4, grid.size, size)
    along = code(unit, grid, time=1)[0, :, 0]
    angle = torch.atan2(along[:, size if double else size // 2], along[:, 0]) - (0 if double else torch.pi / 4)
    assert torch.allclose(angle, 10000.0 ** (-torch.arange(4) / 4), rtol=1e-4)


@torch.no_grad()
def test_causal_scores_with_positions_are_cosines_of_offsets():
    grid = ct.Grid(t=3, h=4, w=2)
    code = MdLrpe(("t", "h", "w"), 3, 7, double=True)
    q, k, v = problem(grid.size, 7)
    out, _ = additive_attention(q, k, v, turn=lambda x: code(x, grid))
    weights = written_out(q, k, v)[1]
    axis = torch.tensor([0, 0, 0, 1, 1, 2, 2])  # of each channel
    step = torch.tensor([0, 1 / 3, 2 / 3, 0, 1 / 2, 0, 1 / 2], dtype=torch.float64)
    speed = 10000.0 ** (-(torch.arange(3)[:, None] + step) / 3)
    apart = (grid.coords()[:, None] - grid.coords())[..., axis]
    cosines = (apart[None] * speed[:, None, None]).cos()
    assert far(out, torch.einsum("bhtd,bhtsd,htsd,bhse->bhte", q, weights, cosines, v)) < 1e-12


@pytest.mark.parametrize("axes", [(), ("t", "h", "w"), ("h",)])
@torch.no_grad()
def test_the_causal_layer_steps_over_frames(axes):
    torch.manual_seed(0)
    layer, grid = LightNet(24, 3, causal=True, axes=axes), ct.Grid(t=5, h=3, w=2)
    x = torch.randn(2, grid.size, 24)
    state, out = layer.init_state(2, ct.Grid(t=1, h=3, w=2)), []
    for frame in x.split(6, 1):
        before = {name: y.clone() for name, y in state.to_dict().items()}
        y, after = layer.step(frame, state)
        assert all(torch.equal(y, before[name]) for name, y in state.to_dict().items())
        out.append(y)
        assert after.nbytes == state.nbytes
        state = after
    assert (torch.cat(out, 1) - layer(x, grid)).abs().max() < 1e-5
    changed = x.clone()
    changed[:, 20:] += 1
    assert torch.equal(layer(changed, grid)[:, :20], layer(x, grid)[:, :20])


@torch.no_grad()
def test_the_layer_over_all_tokens_and_its_refusals():
    torch.manual_seed(0)
    layer, grid = LightNet(24, 3, axes=("h", "w")), ct.Grid(h=3, w=4)
    x = torch.randn(2, 12, 24)
    out = layer(x, grid)
    assert out.shape == x.shape
    plain = LightNet(24, 3)
    plain.load_state_dict(layer.state_dict())
    order = torch.randperm(12)
    assert (plain(x[:, order], grid) - plain(x, grid)[:, order]).abs().max() < 1e-5
    assert (plain(x, grid) - out).abs().max() > 1e-3
    with pytest.raises(ct.ChronotopeError, match="later slices"):
        layer.init_state(1, ct.Grid(h=1, w=4))
    with pytest.raises(ct.ChronotopeError, match="not a multiple"):
        LightNet(10, 4)
    with pytest.raises(ct.ChronotopeError, match="1 pairs for 2 axes"):
        LightNet(12, 4, axes=("h", "w"))
    with pytest.raises(ct.ChronotopeError, match="no context"):
        layer(x, grid, x)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["causal", "shared"])
@torch.no_grad()
def test_time_is_linear(form, one_thread):
    tensors = {n: problem(n, 32, 32, 2, 1, torch.float32) for n in (1024, 16384)}
    run = shared_attention if form == "shared" else additive_attention
    times = {n: [] for n in tensors}
    for _, n in itertools.product(range(10), tensors):
        start = time.process_time()
        for _ in range(16384 // n):  # about as long for both
            run(*tensors[n])
        times[n].append((time.process_time() - start) / (16384 // n))
    ratio = np.median(times[16384][1:]) / np.median(times[1024][1:])
    assert ratio < 1.3 * 16, ratio
