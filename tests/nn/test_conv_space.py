"""ConvSpace: the recurrence frame by frame, pieces, S5 on frames of one place, constant cost of a step, refusals.

What it is as a dense state space, the outputs of the released code and gradients: tests/papers/linear/test_convs5.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import chronotope as ct
from chronotope.nn import S5, Block, ConvSpace, Stack
from chronotope.nn.conv_space import conv_recurrence
from stepping import stepped


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return ConvSpace(6, 8, **options).to(dtype)


def test_the_recurrence_frame_by_frame():
    layer, grid = made(steps=(0.1, 0.5)), ct.Grid(t=9, h=4, w=5)
    x = random(1, 2, grid.size, 6)
    rate, write, read = (torch.view_as_complex(w.detach()) for w in (layer.rate, layer.write, layer.read))
    a = (rate * layer.log_step.exp()).exp()[:, None, None]
    gain = (a - 1) / rate[:, None, None]
    h = torch.zeros(2, 4, 4, 5, dtype=torch.complex128)
    with torch.no_grad():
        y = layer(x, grid).unflatten(1, grid.shape)
        for t, frame in enumerate(x.unflatten(1, grid.shape).movedim(-1, 2).unbind(1)):
            h = a * h + gain * F.conv2d(frame.to(h.dtype), write, padding=1)
            out = 2 * F.conv2d(h, read, padding=1).real + F.conv2d(frame, layer.skip.weight, padding=1)
            assert (y[:, t].movedim(-1, 1) - out).abs().max() <= 1e-10


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
    options=st.sampled_from([{}, {"chunk": 2}, {"kernels": (1, 5, 3)}, {"blocks": 2}]),
)  # fmt: skip
def test_frame_by_frame_equals_all_at_once(shape, options):
    layer, grid = made(**options), ct.Grid(t=shape[0], h=shape[1], w=shape[2])
    x = random(1, 2, grid.size, 6)
    with torch.no_grad():
        torch.testing.assert_close(stepped(layer, x, grid)[0], layer(x, grid), rtol=1e-9, atol=1e-9)


def test_on_frames_of_one_place_it_is_the_space_of_s5():
    torch.manual_seed(0)
    space, grid = S5(6, 8).double(), ct.Grid(t=12, h=1, w=1)
    layer = made(kernels=(1, 1, 1))
    with torch.no_grad():
        layer.rate.copy_(torch.view_as_real(space.rate(torch.float64)))
        layer.write.copy_(space.write[:, :, None, None])
        layer.read.copy_(space.read[:, :, None, None])
        layer.log_step.copy_(space.log_step)
        layer.skip.weight.copy_(torch.diag(space.skip)[:, :, None, None])
        x = random(1, 2, 12, 6)
        z = F.gelu(layer(x, grid))
        assert (z * space.gate(z).sigmoid() - space(x, grid)).abs().max() <= 1e-6


def test_blocks_of_it_step_at_constant_cost_and_size():
    torch.manual_seed(0)
    layer = Stack([Block([ConvSpace(6, 8)]) for _ in range(2)])
    x, state, found = random(0, 1, 12, 6, dtype=torch.float32), layer.init_state(1, ct.Grid(t=1, h=4, w=3)), []
    with torch.no_grad():
        for t in range(1, 101):
            if t not in (20, 100):
                _, state = layer.step(x, state)
                continue
            with FlopCounterMode(display=False) as counter:
                _, state = layer.step(x, state)
            found.append((state.nbytes, counter.get_total_flops()))
    assert found[0] == found[1] and found[0][0] == 2 * 8 * 4 * 12 and found[0][1] > 0


def test_later_frames_reach_nothing_earlier():
    layer, grid = made(), ct.Grid(t=5, h=4, w=4)
    x = random(1, 1, grid.size, 6)
    other = x.clone()
    other[:, 3 * 16 :] += 1
    assert torch.equal(layer(other, grid)[:, : 3 * 16], layer(x, grid)[:, : 3 * 16])
    assert (layer(other, grid)[:, 3 * 16 :] != layer(x, grid)[:, 3 * 16 :]).any()


def test_every_parameter_learns():
    layer, grid = made(), ct.Grid(t=4, h=3, w=3)
    layer(random(1, 2, grid.size, 6), grid).mul(random(2, 6)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_refusals():
    with pytest.raises(ct.ChronotopeError, match="expected odd sizes"):
        ConvSpace(6, 8, (2, 3, 3))
    with pytest.raises(ct.ChronotopeError, match="two of space"):
        made()(random(0, 1, 6, 6), ct.Grid(t=2, h=3))
    with pytest.raises(ct.ChronotopeError, match="takes no context"):
        made()(random(0, 1, 4, 6), ct.Grid(t=1, h=2, w=2), random(0, 1, 4, 6))
    a, write = torch.ones(2, dtype=torch.complex128), torch.zeros(2, 1, 2, 2, dtype=torch.complex128)
    with pytest.raises(ct.ChronotopeError, match="expected odd"):
        conv_recurrence(random(0, 1, 2, 1, 4, 4), a, write, write.transpose(0, 1))
