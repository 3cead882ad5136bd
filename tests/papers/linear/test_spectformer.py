"""SpectFormer (system 208): the gate as a convolution, other sizes, causal time, cost, and the hybrid on pictures.

The released modules (vanilla_architecture/spectformer.py at commit b6cf487 of badripatro/SpectFormers) with the same
weights, 2026-11-21, float32: the gate on 9 x 8 places and the spectral block on 8 x 8 give the same bits.
"""

import itertools
import time
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.linear.spectformer import CausalGate, SpectralBlock, SpectralGate, spectformer

DOUBLE = torch.float64


def tokens(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gate_with(over, dim=3, std=1.0):
    torch.manual_seed(0)
    gate = SpectralGate(dim, over)
    with torch.no_grad():
        gate.weight.copy_(std * torch.randn(gate.weight.shape))
    return gate


def circular(x, kernel):
    """sum over places of kernel[place] * x rolled by it, written out: [B, *sizes, C]."""
    out, dims = torch.zeros_like(x), tuple(range(1, x.ndim - 1))
    for place in itertools.product(*map(range, kernel.shape[:-1])):
        out = out + kernel[place] * x.roll(place, dims)
    return out


@pytest.mark.parametrize(
    "over", [ct.Grid(h=6, w=8), ct.Grid(h=5, w=7), ct.Grid(h=4, w=5), ct.Grid(t=3, h=4, w=3), ct.Grid(n=9)]
)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (DOUBLE, 1e-12)])
def test_the_gate_is_a_circular_convolution_with_its_kernel(over, dtype, most):
    gate, x = gate_with(over, std=0.3).to(dtype), tokens(2, over.size, 3, dtype=dtype)
    weight = torch.view_as_complex(gate.weight)
    kernel = torch.fft.irfftn(weight, s=over.shape, dim=tuple(range(len(over.shape))))
    expected = circular(x.unflatten(1, over.shape), kernel).flatten(1, -2)
    assert (gate(x, over) - expected).abs().max() < most
    assert torch.equal(gate.kernel(), kernel)


def test_a_weight_of_ones_is_the_identity():
    for over in (ct.Grid(h=6, w=8), ct.Grid(h=5, w=7)):
        gate, x = gate_with(over), tokens(2, over.size, 3)
        with torch.no_grad():
            gate.weight.copy_(torch.tensor([1.0, 0.0]).expand(gate.weight.shape))
        assert (gate(x, over) - x).abs().max() < 1e-6


def test_shifts_around_the_map_commute_with_the_gate():
    for over in (ct.Grid(h=6, w=8), ct.Grid(h=5, w=7)):
        gate, x = gate_with(over, std=0.3), tokens(2, *over.shape, 3)
        for shift in ((1, 0), (2, 5), (-1, 3)):
            moved = gate(x.roll(shift, (1, 2)).flatten(1, 2), over).unflatten(1, over.shape)
            assert (moved - gate(x.flatten(1, 2), over).unflatten(1, over.shape).roll(shift, (1, 2))).abs().max() < 1e-5


def test_axes_besides_those_of_the_gate_are_batch():
    gate, grid = gate_with(ct.Grid(h=3, w=4)), ct.Grid(t=5, h=3, w=4)
    x = tokens(2, 60, 3)
    one_by_one = torch.cat([gate(part, ct.Grid(h=3, w=4)) for part in x.split(12, 1)], 1)
    assert (gate(x, grid) - one_by_one).abs().max() < 1e-6
    state = gate.init_state(2, ct.Grid(t=1, h=3, w=4))
    steps = torch.cat([gate.step(part, state)[0] for part in x.split(12, 1)], 1)
    assert torch.equal(steps, one_by_one)
    assert state.nbytes == 0


def response(gate, cycles):
    """What the gate makes of a wave of so many cycles along h and w, against the wave."""
    (rows, columns), over = (torch.arange(n, dtype=DOUBLE) for n in gate.over.shape), gate.over
    angle = 2 * torch.pi * (cycles[0] * rows[:, None] / over.shape[0] + cycles[1] * columns / over.shape[1])
    wave = angle.cos()[None, ..., None].flatten(1, 2)
    out = gate(wave.expand(1, -1, gate.dim), over)
    return (out * wave).sum(1) / wave.square().sum(1)


@pytest.mark.parametrize(
    ("old", "new"),
    [((14, 14), (28, 28)), ((14, 14), (20, 17)), ((13, 15), (26, 30)), ((28, 28), (14, 14)), ((14, 14), (9, 11))],
)
def test_a_resized_gate_keeps_a_low_pass_response(old, new):
    over, other = ct.Grid(h=old[0], w=old[1]), ct.Grid(h=new[0], w=new[1])
    gate = gate_with(over, dim=2).double()
    # Cycles per map, of both signs along h; the filter falls to 1 / e at 3.
    h, w = torch.fft.fftfreq(old[0], 1 / old[0]), torch.arange(old[1] // 2 + 1)
    low = torch.exp(-(h[:, None] ** 2 + w**2) / 9)
    with torch.no_grad():
        gate.weight.copy_(torch.stack((low, torch.zeros_like(low)), -1)[:, :, None].expand(gate.weight.shape))
    resized = gate.resized(other)
    for cycles in itertools.product(range(5), range(5)):
        before, after = response(gate, cycles), response(resized, cycles)
        assert (after - before).abs().max() <= 0.05 * before.abs().max() + 1e-6, cycles
    assert (resized.kernel().sum() - gate.kernel().sum()).abs() < 1e-6


def test_resizing_interpolates_the_kernel():
    gate = gate_with(ct.Grid(h=5, w=7)).double()
    fine = gate.resized(ct.Grid(h=15, w=14))
    assert (fine.kernel()[::3, ::2] * 6 - gate.kernel()).abs().max() < 1e-12
    assert (fine.resized(ct.Grid(h=5, w=7)).kernel() - gate.kernel()).abs().max() < 1e-12
    even = gate_with(ct.Grid(h=6, w=8)).double()
    again = even.resized(ct.Grid(h=6, w=8))
    assert (again.kernel() - even.kernel()).abs().max() < 1e-12
    x = tokens(1, 48, 3, dtype=DOUBLE)
    assert (again(x, again.over) - even(x, even.over)).abs().max() < 1e-12


@pytest.mark.parametrize("over", [ct.Grid(t=4, h=3, w=5), ct.Grid(t=6, h=2, w=2), ct.Grid(t=3)])
@pytest.mark.parametrize("frames", [1, 3, 9])
def test_a_causal_gate_is_one_sided_in_time_and_streams(over, frames):
    torch.manual_seed(0)
    gate = CausalGate(2, over).double()
    grid = over.replace(t=frames)
    x = tokens(2, grid.size, 2, dtype=DOUBLE)
    y = gate(x, grid)
    space = over.shape[1:] or (1,)
    kernel = torch.fft.irfftn(torch.view_as_complex(gate.weight), s=space, dim=tuple(range(1, 1 + len(space))))
    maps = x.unflatten(1, (frames, *space))
    for t in range(frames):
        expected = sum(circular(maps[:, t - s], kernel[s]) for s in range(min(t + 1, over.shape[0])))
        assert (y.unflatten(1, (frames, *space))[:, t] - expected).abs().max() < 1e-12
    state, out, size = gate.init_state(2, over.replace(t=1)), [], grid.size // frames
    for part in x.split(size, 1):
        before = state
        step, state = gate.step(part, state)
        assert torch.equal(gate.step(part, before)[0], step)
        out.append(step)
    assert (torch.cat(out, 1) - y).abs().max() < 1e-12


def test_the_model_is_its_blocks_and_gradients_are_right():
    torch.manual_seed(0)
    over = ct.Grid(h=4, w=5)
    model, x = spectformer(16, over, heads=2, spectral=1, attention=1), tokens(2, 20, 16)
    early, late = model.blocks
    y = x + early.mlp(early.mlp_norm(early.gate(early.gate_norm(x), over)))
    y = y + late.mixers[0](late.norms[0](y), over)
    y = y + late.mlp(late.mlp_norm(y))
    assert (model(x, over) - model.norm(y)).abs().max() < 1e-6
    model(x, over).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    gate, z = gate_with(ct.Grid(h=3, w=4)).double(), tokens(1, 12, 3, dtype=DOUBLE).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, w: torch.func.functional_call(gate, {"weight": w}, (z, gate.over)), (z, gate.weight)
    )
    published = spectformer(8, ct.Grid(h=14, w=14), heads=2)
    assert [type(block) for block in published.blocks] == [SpectralBlock] * 4 + [ct.nn.Block] * 8
    assert published.blocks[0].gate.weight.shape == (14, 8, 8, 2)


def test_low_precision_transforms_in_float32():
    over = ct.Grid(t=3, h=4, w=5)
    for kind in (SpectralGate, CausalGate):
        torch.manual_seed(0)
        gate, x = kind(3, over).bfloat16(), tokens(1, 60, 3, dtype=torch.bfloat16)
        y = gate(x, over)
        assert y.dtype == torch.bfloat16
        exact = gate.float()(x.float(), over)
        assert (y.float() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_refusals_say_why():
    gate = SpectralGate(3, ct.Grid(h=4, w=4))
    with pytest.raises(ct.ChronotopeError, match=r"got Grid\(h=4, w=5\); make one by resized"):
        gate(torch.zeros(1, 20, 3), ct.Grid(h=4, w=5))
    with pytest.raises(ct.ChronotopeError, match="circular on it"):
        gate.init_state(1, ct.Grid(h=1, w=4))
    with pytest.raises(ct.ChronotopeError, match="prefix tokens have no place"):
        gate(torch.zeros(1, 17, 3), ct.Grid(h=4, w=4, prefix=1))
    with pytest.raises(ct.ChronotopeError, match="axes must be h, w"):
        gate.resized(ct.Grid(w=4, h=4))
    with pytest.raises(ct.ChronotopeError, match="only the first axis"):
        CausalGate(3, ct.Grid(t=4, h=4))(torch.zeros(1, 20, 3), ct.Grid(t=4, h=5))


@pytest.mark.slow
def test_cost_grows_like_that_of_a_transform(one_thread):
    spent = {(name, side): [] for name in ("gate", "attention") for side in (64, 128)}
    with torch.no_grad():
        for _ in range(5):
            for name, side in spent:
                over = ct.Grid(h=side, w=side)
                x, gate = tokens(1, over.size, 64), SpectralGate(64, over)
                q = x.unflatten(2, (1, -1)).transpose(1, 2)
                start = time.process_time()
                gate(x, over) if name == "gate" else sdpa(q, q, q)
                spent[name, side].append(time.process_time() - start)
    ratio = {name: np.median(spent[name, 128]) / np.median(spent[name, 64]) for name in ("gate", "attention")}
    assert ratio["gate"] < 6, ratio
    assert 12 < ratio["attention"] < 20, ratio


def pictures(generator, batch):
    """Gratings in noise with two signs on them, 32 x 32: 2 frequencies times whether the signs are alike.

    A sign is a bright square or a diagonal of 8 x 8 pixels, at one of 16 places; orientation and phase are random.
    Returns patches [B, 64, 16] and labels 0 to 3.
    """
    fast, same = torch.randint(2, (2, batch), generator=generator)
    angle, phase = 2 * torch.pi * torch.rand(2, batch, 1, 1, generator=generator)
    rows, columns = torch.arange(32.0)[:, None], torch.arange(32.0)
    frequency = torch.tensor([0.2, 0.25])[fast][:, None, None]
    wave = torch.cos(2 * torch.pi * frequency * (columns * angle.cos() + rows * angle.sin()) + phase)
    picture = 0.25 * wave + 0.5 * torch.randn(batch, 32, 32, generator=generator)
    parts = picture.view(batch, 4, 8, 4, 8).transpose(2, 3).flatten(1, 2).clone()
    diagonal = (torch.arange(8)[:, None] + torch.arange(8)) % 8 // 4 * 2.0 - 1
    signs, first = torch.stack((torch.ones(8, 8), diagonal)), torch.randint(2, (batch,), generator=generator)
    place = torch.rand(batch, 16, generator=generator).argsort(1)[:, :2]
    for i, sign in enumerate((first, torch.where(same == 1, first, 1 - first))):
        parts[torch.arange(batch), place[:, i]] += 1.5 * signs[sign]
    picture = parts.view(batch, 4, 4, 8, 8).transpose(2, 3).reshape(batch, 8, 4, 8, 4)
    return picture.transpose(2, 3).reshape(batch, 64, 16), 2 * fast + same


class Classifier(nn.Module):
    """Patches of 4 x 4, four layers of width 32, the mean over tokens."""

    def __init__(self, spectral, attention, hidden):
        super().__init__()
        self.grid = ct.Grid(h=8, w=8)
        self.embed, self.head = nn.Linear(16, 32), nn.Linear(32, 4)
        self.place = nn.Parameter(0.02 * torch.randn(64, 32))
        self.stack = spectformer(32, self.grid, 4, spectral, attention, hidden / 32)

    def forward(self, patches):
        return self.head(self.stack(self.embed(patches) + self.place, self.grid).mean(1))


# Layers of each kind, and hidden channels that make the numbers of parameters equal.
KINDS = {"spectral": (4, 0, 88), "attention": (0, 4, 64), "hybrid": (2, 2, 76)}


@cache
def accuracies(kind, steps=1200, lr=3e-3):
    """Per cent of 2000 new pictures, for three seeds."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model, generator = Classifier(*KINDS[kind]), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / 50, 1 - step / steps)
            patches, label = pictures(generator, 32)
            optimizer.zero_grad()
            cross_entropy(model(patches), label).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            patches, label = pictures(torch.Generator().manual_seed(999), 2000)
            found.append(100 * float((model(patches).argmax(-1) == label).float().mean()))
    print(f"{kind}: {', '.join(f'{share:.2f}' for share in found)}", flush=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_learned(kind):
    assert sum(p.numel() for p in Classifier(*KINDS[kind]).parameters()) == 36068
    assert min(accuracies(kind)) > 40  # 25 by chance


# 2026-11-21: spectral 99.80, 99.70, 99.85; attention 80.65, 62.15, 55.90; hybrid 99.65, 99.70, 99.60.
# With three random signs for two, seed 0 only: spectral 83.2, hybrid 48.1, which has not learned the relation.
@pytest.mark.slow
def test_the_hybrid_is_within_a_point_of_the_better_kind():
    mean = {kind: np.mean(accuracies(kind)) for kind in KINDS}
    assert mean["hybrid"] >= mean["spectral"] - 1, mean
    assert mean["hybrid"] >= mean["attention"] - 1, mean
