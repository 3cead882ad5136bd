"""LaTtE-Flow (system 89): maps that go on, one group for each time, layers counted, and a toy flow."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.models.diffusion import flow_loss, flow_sample
from chronotope.papers.model.latte_flow import ExpertLayer, LayerGroups, residual_attention


def lively(module, seed=0):
    """The same module with nothing at 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.double().eval()


def test_without_a_gate_it_is_plain_attention():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    before = torch.rand(2, 3, 5, 7)
    for parts in ((None, None), (before, torch.zeros(2, 3))):
        out, weights = residual_attention(q, k, v, *parts)
        assert (out - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-6
        assert (weights.sum(-1) - 1).abs().max() < 1e-6


def test_maps_go_on_by_their_gates():
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    before, gate = torch.rand(2, 3, 5, 5).double(), torch.randn(2, 3).double()
    out, weights = residual_attention(q, k, v, before, gate)
    plain = torch.stack([F.scaled_dot_product_attention(q[b], k[b], v[b]) for b in range(2)])
    assert (out - plain - gate[..., None, None] * (before @ v)).abs().max() < 1e-12
    assert (weights.sum(-1) - 1 - gate[..., None] * before.sum(-1)).abs().max() < 1e-12
    assert torch.autograd.gradcheck(residual_attention, [x.requires_grad_() for x in (q, k, v, before, gate)],
                                    fast_mode=True)  # fmt: skip


def ordinary(groups, x, t, places):
    """Some layers as a plain transformer steered by the time, in torch alone: gates are 0."""
    condition = groups.time(t)
    c = F.silu(condition)[:, None]
    for place in places:
        layer = groups.layers[place]
        norm = F.layer_norm(x, x.shape[2:], eps=1e-6)
        shift, scale, gate = layer.steer[0].modulation(c).chunk(3, -1)
        q, k, v = (
            part.unflatten(2, (layer.attention.heads, -1)).transpose(1, 2)
            for part in layer.attention.qkv(norm * (1 + scale) + shift).chunk(3, -1)
        )
        x = x + gate * layer.attention.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        shift, scale, gate = layer.steer[1].modulation(c).chunk(3, -1)
        x = x + gate * layer.mlp(F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift)
    return x


def silent(groups):
    """Gates at 0."""
    for layer in groups.layers:
        nn.init.zeros_(layer.gate.weight)
        nn.init.zeros_(layer.gate.bias)
    return groups


def test_one_group_is_an_ordinary_transformer():
    groups = silent(lively(LayerGroups(16, 2, 4, 1)))
    x, t = torch.randn(3, 6, 16).double(), torch.rand(3).double()
    expected = ordinary(groups, x, t, range(4))
    assert (groups(x, t) - expected).abs().max() < 1e-6
    assert (lively(groups, seed=1)(x, t) - ordinary(groups, x, t, range(4))).abs().max() > 1e-3  # gates matter


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.lists(st.floats(0, 1), min_size=1, max_size=5), st.booleans())
def test_each_member_runs_the_layers_of_its_time(count, each, times, told):
    groups = lively(LayerGroups(8, 2, count * each, count))
    x, t = torch.randn(len(times), 3, 8).double(), torch.tensor(times).double()
    text = torch.randn(len(times), 2, 8).double()
    out = groups(x, t, groups.read(text) if told else None)
    for row, at in enumerate(times):
        ran = []
        hooks = [
            layer.register_forward_hook(lambda *_, i=i, ran=ran: ran.append(i)) for i, layer in enumerate(groups.layers)
        ]
        own = slice(row, row + 1)
        alone = groups(x[own], t[own], groups.read(text[own]) if told else None)
        for hook in hooks:
            hook.remove()
        first = min(int(at * count), count - 1) * each
        assert ran == list(range(first, first + each))
        assert (alone - out[own]).abs().max() < 1e-9 * max(1.0, float(out.detach().abs().max()))


def test_a_group_learns_from_its_own_times_only():
    groups = lively(LayerGroups(16, 2, 8, 4))
    for index in range(4):
        groups.zero_grad()
        t = (index + torch.rand(5).double()) / 4
        groups(torch.randn(5, 3, 16).double(), t).square().sum().backward()
        moved = [any(p.grad is not None and bool(p.grad.any()) for p in layer.parameters()) for layer in groups.layers]
        assert moved == [place // 2 == index for place in range(8)]


def test_text_is_read_once_and_seen_by_all():
    layer = lively(ExpertLayer(16, 2))
    x, c, text = (torch.randn(2, n, 16).double() for n in (4, 1, 3))
    out, weights = layer(x, c[:, 0], None, layer.read(text))
    assert weights.shape == (2, 2, 4, 7)
    other = layer(x, c[:, 0], None, layer.read(text + 1))[0]
    assert (out - other).abs().amax(2).min() > 0
    with pytest.raises(ct.ChronotopeError, match="layers=6 are not a multiple of groups=4"):
        LayerGroups(16, 2, 6, 4)


def test_layers_run_in_sampling():
    for count in (1, 2, 4):
        groups, ran = LayerGroups(8, 2, 8, count), []
        for layer in groups.layers:
            layer.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        flow_sample(groups, torch.randn(2, 3, 8), 16)
        assert len(ran) == 16 * 8 // count


@pytest.mark.slow
def test_time_of_sampling(one_thread):
    """16 steps of 256 tokens, 8 layers of width 128."""
    times = {1: [], 4: []}
    for _ in range(3):
        for count, found in times.items():
            groups = LayerGroups(128, 4, 8, count).eval()
            noise = torch.randn(1, 256, 128)
            start = time.process_time()
            flow_sample(groups, noise, 16)
            found.append(time.process_time() - start)
    print(times)
    assert min(times[4]) <= 0.4 * min(times[1])


def ring(count, generator):
    """[count, 2]: eight narrow normal distributions on a circle."""
    angle = torch.pi / 4 * torch.randint(8, (count,), generator=generator)
    return torch.stack((angle.cos(), angle.sin()), 1) + 0.05 * torch.randn(count, 2, generator=generator)


def energy(a, b):
    """The energy distance of two sets of points, 0 on average where they are of one distribution."""

    def apart(x, y):
        return sum(float(torch.cdist(part, y).double().sum()) for part in x.split(1000)) / len(x)

    return 2 * apart(a, b) / len(b) - apart(a, a) / (len(a) - 1) - apart(b, b) / (len(b) - 1)


class Points(nn.Module):
    """Velocities of points [B, 2], each coordinate a token."""

    def __init__(self, layers, groups, dim=32):
        super().__init__()
        self.enter, self.place = nn.Linear(1, dim), nn.Parameter(torch.randn(2, dim))
        self.groups, self.leave = LayerGroups(dim, 2, layers, groups), nn.Linear(dim, 1)

    def forward(self, x, t):
        return self.leave(self.groups(self.enter(x[..., None]) + self.place, t))[..., 0]


def made(layers, groups, steps, count=16000, seed=0):
    """The energy distance of samples after some steps of training."""
    torch.manual_seed(seed)
    model, generator = Points(layers, groups), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        flow_loss(model, ring(256, generator), generator=generator).backward()
        optimizer.step()
        schedule.step()
    noise = torch.randn(count, 2, generator=generator)
    return energy(flow_sample(model.eval(), noise, 48), ring(count, generator))


@pytest.mark.slow
def test_samples_of_a_toy_flow():
    """Eight normal distributions on a circle: four groups of 2 of 8 layers, all 8 layers, 2 layers for all times.

    0.0007, 0.0024 and 0.0048 after 700 steps (2026-11-21). With 4000 points after 1500 steps there was no telling: the
    three lay among the distances of true samples, 0.0003 to 0.0009.
    """
    grouped, full, small = made(8, 4, 700), made(8, 1, 700), made(2, 1, 700)
    print(grouped, full, small)
    assert grouped <= 1.15 * full, (grouped, full)
    assert grouped <= 0.9 * small, (grouped, small)
