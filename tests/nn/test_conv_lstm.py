"""ConvLSTM: torch's LSTM on 1 x 1 frames, the equations of the paper, steps, what reaches what."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.nn import ConvLSTM


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(dim=5, hidden=None, kernel=3, dtype=torch.float64):
    torch.manual_seed(0)
    return ConvLSTM(dim, hidden, kernel).to(dtype)


@pytest.mark.parametrize("hidden", [4, 7])
def test_on_frames_of_one_place_it_is_the_lstm_of_torch(hidden):
    layer, cell, steps = made(4, hidden, kernel=1, dtype=torch.float32), nn.LSTMCell(4, hidden), 9
    with torch.no_grad():
        cell.weight_ih.copy_(layer.enter.weight[:, :, 0, 0])
        cell.weight_hh.copy_(layer.again.weight[:, :, 0, 0])
        cell.bias_ih.copy_(layer.enter.bias)
        cell.bias_hh.zero_()
    x, state = random(1, 3, steps, 4, dtype=torch.float32), None
    y, after = layer.run(x, ct.Grid(t=steps, h=1, w=1))
    for t in range(steps):
        state = cell(x[:, t], state)
        assert (y[:, t] - layer.out(state[0])).abs().max() <= 1e-6
    assert (after.hidden[..., 0, 0] - state[0]).abs().max() <= 1e-6
    assert (after.cell[..., 0, 0] - state[1]).abs().max() <= 1e-6


def test_the_equations_on_maps_of_odd_size():
    layer, grid = made(3, 4, kernel=5), ct.Grid(t=4, h=3, w=5)
    x = random(1, 2, grid.size, 3)
    h = c = torch.zeros(2, 4, 3, 5, dtype=torch.float64)
    for t, frame in enumerate(x.unflatten(1, grid.shape).unbind(1)):
        both = torch.cat((frame.movedim(-1, 1), h), 1)
        weight = torch.cat((layer.enter.weight, layer.again.weight), 1)
        i, f, g, o = F.conv2d(both, weight, layer.enter.bias, padding=2).split(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        expected = layer.out(h.movedim(1, -1).flatten(1, 2))
        torch.testing.assert_close(layer(x, grid).unflatten(1, (4, -1))[:, t], expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    hidden=st.sampled_from([None, 5, 3]), kernel=st.sampled_from([1, 3, 5]), cut=st.integers(0, 4),
)  # fmt: skip
def test_frame_by_frame_and_in_pieces_equals_all_at_once(shape, hidden, kernel, cut):
    layer, grid = made(5, hidden, kernel), ct.Grid(t=shape[0], h=shape[1], w=shape[2])
    x, one = random(1, 2, grid.size, 5), grid.replace(t=1)
    with torch.no_grad():
        y, after = layer.run(x, grid)
        assert torch.equal(layer(x, grid), y)
        state, out = layer.init_state(2, one), []
        for part in x.split(one.size, 1):
            told, state = layer.step(part, state)
            out.append(told)
        torch.testing.assert_close(torch.cat(out, 1), y, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state.cell, after.cell, rtol=1e-9, atol=1e-9)
        if 0 < cut < shape[0]:
            first, middle = layer.run(x[:, : cut * one.size], grid.replace(t=cut))
            second, _ = layer.run(x[:, cut * one.size :], grid.replace(t=shape[0] - cut), middle)
            torch.testing.assert_close(torch.cat((first, second), 1), y, rtol=1e-9, atol=1e-9)


def test_a_change_reaches_later_frames_one_kernel_further_each():
    layer, grid = made(), ct.Grid(t=4, h=7, w=7)
    x = random(1, 1, grid.size, 5)
    other = x.clone()
    other[0, grid.index(t=1, h=3, w=3)] += 1
    change = (layer(other, grid) - layer(x, grid)).abs().sum(2).view(grid.shape)
    place = torch.arange(7) - 3
    far = torch.maximum(place.abs()[:, None], place.abs()[None])
    for t in range(4):
        assert torch.equal(change[t] > 0, (far <= t) if t >= 1 else torch.zeros(7, 7, dtype=torch.bool))


def test_the_state_stays_as_large_and_is_left_as_it_was():
    layer, one = made(), ct.Grid(t=1, h=2, w=3)
    state = layer.init_state(2, one)
    size = state.nbytes
    assert size == 2 * 2 * 5 * 6 * 8
    for t in range(50):
        before = state.hidden.clone()
        _, after = layer.step(random(t, 2, 6, 5), state)
        assert torch.equal(state.hidden, before)
        state = after
    assert state.nbytes == size


def test_every_parameter_learns_and_gates_begin_open_to_the_past():
    layer, grid = made(), ct.Grid(t=3, h=3, w=3)
    bias = layer.enter.bias.detach()
    assert (bias[5:10] == 1).all() and bias.sum() == 5
    layer(random(1, 2, grid.size, 5), grid).mul(random(2, 5)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_refusals():
    with pytest.raises(ct.ChronotopeError, match=r"kernel=4\): expected an odd size"):
        ConvLSTM(4, kernel=4)
    with pytest.raises(ct.ChronotopeError, match="two of space"):
        made().init_state(1, ct.Grid(t=1, h=3))
    with pytest.raises(ct.ChronotopeError, match="2 slices"):
        made().init_state(1, ct.Grid(t=2, h=3, w=3))
    with pytest.raises(ct.ChronotopeError, match=r"expected \[B, 9, 5\]"):
        made()(random(0, 1, 8, 5), ct.Grid(t=1, h=3, w=3))
    with pytest.raises(ct.ChronotopeError, match="takes no context"):
        made()(random(0, 1, 9, 5), ct.Grid(t=1, h=3, w=3), random(0, 1, 9, 5))
