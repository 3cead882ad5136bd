"""ConvS5 (system 44): scan, steps and pieces, the dense state space it stands for, the released code, bouncing dots."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import chronotope as ct
from chronotope.nn.conv_space import conv_recurrence
from chronotope.papers.linear.convs5 import ConvS5

# Inputs and outputs of apply_convSSM_parallel of NVlabs/ConvSSM at cb08bb3, run with jax 0.10.2 on a CPU.
OFFICIAL = Path(__file__).parents[2] / "data" / "convs5.npz"


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def space(seed, channels=3, states=4, kernel=3, dtype=torch.complex128):
    """(a, write, read) of a stable space."""
    a = torch.polar(0.5 + 0.5 * random(seed, states).sigmoid(), 2 * random(seed + 1, states)).to(dtype)
    write = 0.3 * random(seed + 2, states, channels, kernel, kernel, dtype=dtype)
    return a, write, 0.3 * random(seed + 3, channels, states, kernel, kernel, dtype=dtype)


def made(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return ConvS5(6, 8, **options).to(dtype)


def frames(u, grid):
    return u.unflatten(1, grid.shape).movedim(-1, 2)


@pytest.mark.parametrize(("dtype", "most"), [(torch.complex128, 1e-10), (torch.complex64, 1e-4)])
def test_the_scan_is_the_step_by_step_recurrence(dtype, most):
    a, write, read = space(0, dtype=dtype)
    u, x = random(5, 2, 12, 3, 8, 8, dtype=dtype.to_real()), random(6, 2, 4, 8, 8, dtype=dtype)
    y, after = conv_recurrence(u, a, write, read, state=x)
    for t in range(12):
        x = a[:, None, None] * x + F.conv2d(u[:, t].to(dtype), write, padding=1)
        assert (y[:, t] - 2 * F.conv2d(x, read, padding=1).real).abs().max() <= most
    assert (after - x).abs().max() <= most


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 13), cut=st.integers(1, 12), chunk=st.sampled_from([None, 1, 2, 5]),
    kernel=st.sampled_from([1, 3, 5]), seed=st.integers(0, 99),
)  # fmt: skip
def test_pieces_with_the_state_between_them_equal_the_whole(n, cut, chunk, kernel, seed):
    a, write, read = space(seed, kernel=kernel, dtype=torch.complex64)
    u = random(seed + 5, 1, n, 3, 4, 5, dtype=torch.float32)
    y, after = conv_recurrence(u, a, write, read)
    cut = min(cut, n)
    first, middle = conv_recurrence(u[:, :cut], a, write, read, chunk=chunk)
    parts, last = [first], middle
    if cut < n:
        second, last = conv_recurrence(u[:, cut:], a, write, read, state=middle, chunk=chunk)
        parts.append(second)
    assert (torch.cat(parts, 1) - y).abs().max() <= 1e-5
    assert (last - after).abs().max() <= 1e-5


def test_a_start_forgets_what_was_before_in_its_sequence():
    a, write, read = space(0)
    u, state = random(5, 2, 9, 3, 4, 4), random(6, 2, 4, 4, 4, dtype=torch.complex128)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 4] = starts[1, 0] = starts[1, 8] = True
    y, _ = conv_recurrence(u, a, write, read, state=state, starts=starts, chunk=4)
    whole, _ = conv_recurrence(u, a, write, read, state=state)
    torch.testing.assert_close(y[0, :4], whole[0, :4])
    torch.testing.assert_close(y[:1, 4:], conv_recurrence(u[:1, 4:], a, write, read)[0])
    torch.testing.assert_close(y[1:, :8], conv_recurrence(u[1:, :8], a, write, read)[0])
    torch.testing.assert_close(y[1:, 8:], conv_recurrence(u[1:, 8:], a, write, read)[0])


def test_an_impulse_leaves_earlier_frames_exactly_as_they_were():
    layer, grid = made(), ct.Grid(t=11, h=5, w=4)
    x = random(1, 1, grid.size, 6, dtype=torch.float32)
    other = x.clone()
    other[0, grid.index(t=6, h=2, w=1)] += 10
    change = (layer(other, grid) - layer(x, grid)).abs().unflatten(1, (11, -1)).amax((0, 2, 3))
    assert (change[:6] == 0).all()
    assert (change[6:] > 0).all()


def toeplitz(kernel, size):
    """The matrix [O H W, C H W] of a convolution of the same size, built column by column from unit vectors."""
    channels = kernel.shape[1]
    units = torch.eye(channels * size[0] * size[1], dtype=kernel.dtype).unflatten(1, (channels, *size))
    return F.conv2d(units, kernel, padding="same").flatten(1).T


def test_it_is_a_dense_state_space_on_the_flattened_maps():
    size, space = (4, 5), made(torch.float64).space
    u = random(1, 1, 10, 6, *size)
    with torch.no_grad():
        y, _ = space.maps(u)
        rate, write, read = (torch.view_as_complex(x.detach()) for x in (space.rate, space.write, space.read))
        step = space.log_step.exp()
        # Held in continuous time by the matrix exponential, the states of one channel side by side.
        places = torch.ones(size[0] * size[1], dtype=torch.float64)
        moved = torch.kron(rate * step, places)
        dense = torch.zeros(2 * len(moved), 2 * len(moved), dtype=rate.dtype)
        dense[: len(moved), : len(moved)] = torch.diag(moved)
        dense[: len(moved), len(moved) :] = torch.diag(torch.kron(step, places))
        a, gain = torch.linalg.matrix_exp(dense)[: len(moved)].split(len(moved), 1)
        b, c, d = toeplitz(write, size), toeplitz(read, size), toeplitz(space.skip.weight, size)
        x = torch.zeros(len(moved), dtype=rate.dtype)
        for t in range(10):
            x = a @ x + gain @ b @ u[0, t].flatten().to(x.dtype)
            expected = 2 * (c @ x).real + d @ u[0, t].flatten()
            assert (y[0, t].flatten() - expected).abs().max() <= 1e-6


def test_outputs_of_the_released_code():
    given = {name: torch.from_numpy(x) for name, x in np.load(OFFICIAL).items()}
    u, expected = (given[name].permute(1, 0, 4, 2, 3) for name in ("u", "y"))
    kernels = [given[name].permute(3, 2, 0, 1) for name in ("write", "read")]
    state, last = (given[name].permute(0, 3, 1, 2) for name in ("before", "after"))
    y, after = conv_recurrence(u, given["a"], *kernels, state=state)
    # 4.1e-7 and 2.0e-7 of the largest value; the released scan and its own steps differ by 2.7e-7 of it.
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert (after - last).abs().max() <= 2e-6 * last.abs().max()


@pytest.mark.parametrize("options", [{}, {"chunk": 2}, {"kernels": (1, 5, 3)}, {"blocks": 2}], ids=repr)
@pytest.mark.parametrize("grid", [ct.Grid(t=5, h=4, w=3), ct.Grid(t=1, h=1, w=1)], ids=repr)
def test_frame_by_frame_equals_all_at_once(grid, options):
    layer, x = made(torch.float64, **options), random(1, 2, grid.size, 6)
    state = layer.init_state(2, grid.replace(t=1))
    with torch.no_grad():
        expected = layer(x, grid)
        for t, part in enumerate(x.split(grid.size // grid.shape[0], 1)):
            y, state = layer.step(part, state)
            torch.testing.assert_close(y, expected.unflatten(1, (grid.shape[0], -1))[:, t], rtol=1e-9, atol=1e-9)


def test_steps_cost_and_hold_the_same_at_ten_and_at_a_thousand_frames():
    layer, x = made(), random(0, 1, 12, 6, dtype=torch.float32)
    state, found = layer.init_state(1, ct.Grid(t=1, h=4, w=3)), []
    with torch.no_grad():
        for t in range(1, 1001):
            if t in (10, 1000):
                with FlopCounterMode(display=False) as counter:
                    _, state = layer.step(x, state)
                found.append((state.nbytes, counter.get_total_flops()))
            else:
                _, state = layer.step(x, state)
    assert found[0] == found[1] and found[0] == (8 * 4 * 4 * 3, found[0][1]) and found[0][1] > 0


def test_every_parameter_learns_and_rates_stay_negative():
    layer, grid = made(), ct.Grid(t=4, h=3, w=3)
    layer(random(1, 2, grid.size, 6, dtype=torch.float32), grid).mul(random(2, 6, dtype=torch.float32)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        layer.space.rate[..., 0] = 5.0
        y, _ = layer.space.maps(random(3, 1, 300, 6, 2, 2, dtype=torch.float32))
    assert y.isfinite().all() and y.abs().max() < 1e3


def test_gradients():
    a, write, read = space(0, channels=1, states=2)
    inputs = [x.requires_grad_() for x in (random(5, 1, 3, 1, 2, 2), a, write, read)]
    state = random(6, 1, 2, 2, 2, dtype=torch.complex128).requires_grad_()
    starts = torch.tensor([[False, False, True]])
    assert torch.autograd.gradcheck(lambda *x: conv_recurrence(*x[:4], state=x[4]), (*inputs, state))
    assert torch.autograd.gradcheck(lambda *x: conv_recurrence(*x, starts=starts, chunk=2), inputs)


def test_refusals():
    with pytest.raises(ct.ChronotopeError, match="expected odd sizes"):
        ConvS5(6, 8, (2, 3, 3))
    with pytest.raises(ct.ChronotopeError, match="chunk=0"):
        conv_recurrence(random(0, 1, 2, 3, 4, 4), *space(0), chunk=0)
    with pytest.raises(ct.ChronotopeError, match="two of space"):
        made()(torch.zeros(1, 6, 6), ct.Grid(t=2, h=3))
    with pytest.raises(ct.ChronotopeError, match="two of space"):
        made().init_state(1, ct.Grid(t=1, h=3))
    with pytest.raises(ct.ChronotopeError, match="takes no context"):
        made()(torch.zeros(1, 4, 6), ct.Grid(t=1, h=2, w=2), torch.zeros(1, 4, 6))


class ConvLSTM(nn.Module):
    """The cell that ConvS5 takes the place of; the gates of h and x are one convolution (Shi et al. 2015)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gates, self.out = nn.Conv2d(dim + hidden, 4 * hidden, 3, padding=1), nn.Conv2d(hidden, dim, 1)
        self.norm, self.hidden = nn.LayerNorm(dim), hidden

    def init_state(self, batch, grid):
        return torch.zeros(2, batch, self.hidden, *grid.shape[1:])

    def step(self, x, state):
        maps = x.unflatten(1, state.shape[3:]).movedim(-1, 1)
        i, f, o, g = self.gates(torch.cat((maps, state[0]), 1)).chunk(4, 1)
        cell = (f + 1).sigmoid() * state[1] + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        return self.norm(x + self.out(hidden).movedim(1, -1).flatten(1, 2)), torch.stack((hidden, cell))

    def forward(self, x, grid):
        state, out = self.init_state(len(x), grid), []
        for part in x.split(grid.size // grid.shape[0], 1):
            y, state = self.step(part, state)
            out.append(y)
        return torch.cat(out, 1)


class Predictor(nn.Module):
    """Frames of dots -> logits of the next frame."""

    def __init__(self, layers, dim):
        super().__init__()
        self.enter, self.out = nn.Conv2d(1, dim, 3, padding=1), nn.Conv2d(dim, 1, 3, padding=1)
        self.layers = nn.ModuleList(layers)

    def forward(self, clip):
        grid = ct.Grid(t=clip.shape[1], h=8, w=8)
        x = self.tokens(clip)
        for layer in self.layers:
            x = layer(x, grid)
        return self.logits(x, grid)

    def roll_out(self, context, steps):
        """Probabilities of the frames that follow; the model sees its own frames, of dots where p > 1/2."""
        one = ct.Grid(t=1, h=8, w=8)
        states, out = [layer.init_state(len(context), one) for layer in self.layers], []
        for t in range(context.shape[1] + steps - 1):
            x = self.tokens(context[:, t : t + 1] if t < context.shape[1] else (out[-1] > 0.5).float())
            for i, layer in enumerate(self.layers):
                x, states[i] = layer.step(x, states[i])
            if t >= context.shape[1] - 1:
                out.append(self.logits(x, one).sigmoid())
        return torch.cat(out, 1)

    def tokens(self, clip):
        return self.enter(4 * clip.flatten(0, 1)[:, None]).unflatten(0, clip.shape[:2]).movedim(2, -1).flatten(1, 3)

    def logits(self, x, grid):
        return self.out(frames(x, grid).flatten(0, 1))[:, 0].unflatten(0, (-1, grid.shape[0]))


def dots(size, length, generator):
    """Clips of two dots on a board of 8 x 8 that move by one place on both axes and bounce off the borders."""
    phase = torch.randint(0, 14, (size, 1, 2, 2), generator=generator) + torch.arange(length)[:, None, None]
    place = 7 - (phase % 14 - 7).abs()
    board = torch.zeros(size, length, 64)
    for row, column in (dot.unbind(-1) for dot in place.unbind(2)):
        board.scatter_(2, (8 * row + column)[..., None], 1.0)
    return board.unflatten(2, (8, 8))


@pytest.mark.slow
def test_bouncing_dots_are_rolled_out_better_than_by_a_conv_lstm_of_the_same_size():
    # Trained on 32 frames by the same steps; 32 frames are shown, and 64 follow with no more to see. Found: 5.6e-5
    # against 2.3e-2. After 750 steps the ConvLSTM was below 3e-4 as well.
    found, sizes, steps = {}, {}, 150
    for name, make in {
        "lstm": lambda: ConvLSTM(16, 15),
        "convs5": lambda: ConvS5(16, 32, steps=(0.1, 0.5)),
    }.items():
        torch.manual_seed(0)
        model, generator = Predictor([make(), make()], 16), torch.Generator().manual_seed(0)
        sizes[name] = sum(p.numel() for p in model.parameters())
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        for _ in range(steps):
            clip = dots(8, 33, generator)
            # Two frames are needed to know where a dot is going.
            loss = F.binary_cross_entropy_with_logits(model(clip[:, :-1])[:, 2:], clip[:, 3:])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            clip = dots(64, 96, torch.Generator().manual_seed(99))
            found[name] = float((model.roll_out(clip[:, :32], 64)[:, -1] - clip[:, -1]).square().mean())
    assert 0.95 < sizes["convs5"] / sizes["lstm"] <= 1, sizes
    assert found["convs5"] <= 0.7 * found["lstm"], found
