"""TiC (system 200): attention in a convolution's window, its sizes, cost and reach, and other sizes at test time."""

import itertools
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.pattern.tic import WindowedSelfAttention, menu


def layer(channels=16, seed=0, **options):
    torch.manual_seed(seed)
    return WindowedSelfAttention(channels, **options)


@pytest.mark.parametrize(("kernel", "dilation", "heads"), [(3, 1, 4), (5, 1, 2), (3, 2, 1), (5, 3, 16)])
def test_center_equals_dense_attention_with_a_local_mask(kernel, dilation, heads):
    grid, channels = ct.Grid(h=14, w=11), 16
    module = layer(kernel=kernel, dilation=dilation, heads=heads, padding=dilation * (kernel // 2))
    x = torch.randn(2, channels, *grid.shape, generator=torch.Generator().manual_seed(1))
    coords = grid.coords()
    apart = coords[None] - coords[:, None]
    mask = ((apart.abs() <= dilation * (kernel // 2)) & (apart % dilation == 0)).all(-1)
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in module.qkv(x.flatten(2).mT).chunk(3, -1))
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (module(x) - module.proj(dense.transpose(1, 2).flatten(2)).mT.view_as(x)).abs().max() < 1e-5
    where = ct.window(h=kernel, w=kernel, dilation=dilation)
    assert (ct.attention(q, k, v, grid=grid, where=where) - dense).abs().max() < 1e-5


def one_window(module, x, row, column):
    """All queries of one window, written out: their results [k * k, C] and places."""
    places = [
        (
            row * module.stride - module.padding + i * module.dilation,
            column * module.stride - module.padding + j * module.dilation,
        )
        for i, j in itertools.product(range(module.kernel), repeat=2)
    ]
    places = [(r, c) for r, c in places if 0 <= r < x.shape[2] and 0 <= c < x.shape[3]]
    tokens = torch.stack([x[0, :, r, c] for r, c in places])
    q, k, v = (y.unflatten(-1, (module.heads, -1)).transpose(0, 1) for y in module.qkv(tokens).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1), places


@pytest.mark.parametrize(
    "options", [{"kernel": 3, "padding": 1}, {"kernel": 2, "stride": 2, "padding": 1}, {"kernel": 3, "dilation": 2}]
)
def test_mean_and_fold_equal_windows_one_by_one(options):
    x = torch.randn(1, 16, 7, 8, generator=torch.Generator().manual_seed(1))
    mean, fold = (layer(heads=4, emit=emit, **options) for emit in ("mean", "fold"))
    out, folded = mean(x), fold(x)
    total, count = torch.zeros(7, 8, 16), torch.zeros(7, 8, 1)
    for row, column in itertools.product(*map(range, out.shape[2:])):
        results, places = one_window(mean, x, row, column)
        assert (mean.proj(results.mean(0)) - out[0, :, row, column]).abs().max() < 1e-5
        for result, place in zip(results, places, strict=True):
            total[place] += result
            count[place] += 1
    assert (fold.proj(total / count.clamp(min=1)) - folded[0].permute(1, 2, 0)).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"dilation": 2}, {"padding": 1, "dilation": 2}])
def test_center_with_other_strides_and_paddings_equals_windows_one_by_one(options):
    x = torch.randn(1, 16, 7, 8, generator=torch.Generator().manual_seed(1))
    module = layer(heads=4, **options)
    out = module(x)
    for row, column in itertools.product(*map(range, out.shape[2:])):
        results, places = one_window(module, x, row, column)
        middle = [n * module.stride - module.padding + module.dilation for n in (row, column)]
        result = results[places.index(tuple(middle))]
        assert (module.proj(result) - out[0, :, row, column]).abs().max() < 1e-5


def test_sizes_are_those_of_a_convolution():
    random = np.random.default_rng(0)
    for _ in range(20):
        kernel, stride, dilation = int(random.choice([1, 3, 5])), int(random.integers(1, 4)), int(random.integers(1, 4))
        padding = int(random.integers(0, dilation * (kernel // 2) + 1))
        height, width = (int(random.integers(13, 24)) for _ in range(2))
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        x = torch.zeros(1, 4, height, width)
        for emit in ("center", "mean"):
            out = layer(4, kernel=kernel, emit=emit, **options)(x)
            assert out.shape == nn.Conv2d(4, 4, kernel, **options)(x).shape


def test_shifts_commute_away_from_borders_and_sizes_are_free():
    module = layer(kernel=5, padding=2, heads=4)
    x = torch.randn(1, 16, 20, 22, generator=torch.Generator().manual_seed(1))
    moved = module(x.roll((3, 2), (2, 3))).roll((-3, -2), (2, 3))
    inner = (slice(None), slice(None), slice(2, -5), slice(2, -4))
    assert (moved - module(x))[inner].abs().max() < 1e-5
    for size in ((64, 64), (96, 48)):
        assert module(torch.zeros(1, 16, *size)).shape == (1, 16, *size)
    assert {tuple(p.shape) for p in module.parameters()} == {(48, 16), (48,), (16, 16), (16,)}


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_rolled_groups_link_opposite_borders(groups):
    module = layer(24, kernel=3, padding=1, heads=2, shift_groups=groups)
    x = torch.randn(1, 24, 12, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    (grad,) = torch.autograd.grad(module(x)[0, :, :, 0].square().sum(), x)
    reach = grad.abs().sum((0, 1, 2))
    assert (reach[[-1]] > 0).all() == (groups > 1)
    assert (reach[:2] > 0).all()


@pytest.mark.slow
def test_cost_is_linear(one_thread):
    module = layer(32, kernel=5, padding=2, heads=4)
    maps = {side: torch.randn(8, 32, side, side) for side in (32, 64)}  # enough for the work to outweigh a call
    times = {side: [] for side in maps}
    with torch.no_grad():
        for _, side in itertools.product(range(10), maps):
            start = time.process_time()
            module(maps[side])
            times[side].append(time.process_time() - start)
    ratio = np.median(np.divide(times[64], times[32])[3:])
    assert 3.2 <= ratio <= 5, ratio


def shapes(batch, size, generator):
    """Squares, discs, crosses and rings of random place and radius in noise: [batch, 1, size, size], labels."""
    label = torch.randint(0, 4, (batch,), generator=generator)
    radius = 4 + 3 * torch.rand(batch, 1, 1, generator=generator)
    centre = radius + torch.rand(batch, 2, 1, 1, generator=generator).transpose(0, 1) * (size - 1 - 2 * radius)
    rows, columns = torch.arange(size)[None, :, None] - centre[0], torch.arange(size)[None, None, :] - centre[1]
    far, near = torch.maximum(rows.abs(), columns.abs()), torch.minimum(rows.abs(), columns.abs())
    distance = (rows**2 + columns**2).sqrt()
    kinds = [
        far <= radius,
        distance <= radius,
        (far <= radius) & (near <= 1.5),
        (distance <= radius) & (distance >= radius - 2),
    ]
    picture = torch.stack(kinds)[label, torch.arange(batch)].float()
    return (picture + 0.3 * torch.randn(picture.shape, generator=generator))[:, None], label


class Block(nn.Module):
    """A residual pair of a mixer and an MLP over maps [B, C, H, W]."""

    def __init__(self, channels, mixer):
        super().__init__()
        self.mixer = mixer
        self.norms = nn.ModuleList([nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)])
        self.mlp = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.GELU(), nn.Conv2d(2 * channels, channels, 1))

    def forward(self, x):
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Everywhere(nn.Module):
    """Self-attention of every token with every token."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x):
        grid = ct.Grid(h=x.shape[2], w=x.shape[3])
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x.flatten(2).mT).chunk(3, -1))
        out = ct.attention(q, k, v, grid=grid)
        return self.proj(out.transpose(1, 2).flatten(2)).mT.view_as(x)


class Classifier(nn.Module):
    """Patches of 4 x 4, two blocks, maximum over places. Positions: learned [8 x 8] and interpolated, or none."""

    def __init__(self, mixer, positions, channels=32):
        super().__init__()
        self.patch = nn.Conv2d(1, channels, 4, 4)
        self.place = nn.Parameter(0.5 * torch.randn(1, channels, 8, 8)) if positions else None
        self.blocks = nn.Sequential(*(Block(channels, mixer(channels)) for _ in range(2)))
        self.head = nn.Linear(channels, 4)

    def forward(self, x):
        x = self.patch(x)
        if self.place is not None:
            x = x + F.interpolate(self.place, x.shape[2:], mode="bicubic", align_corners=False)
        return self.head(self.blocks(x).amax((2, 3)))


def accuracies(model, steps=300):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        pictures, label = shapes(32, 32, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(pictures), label).backward()
        optimizer.step()
        schedule.step()
    held_out = torch.Generator().manual_seed(2)
    found = []
    with torch.no_grad():
        for size in (32, 48):
            pictures, label = shapes(1000, size, held_out)
            found.append(100 * (model(pictures).argmax(-1) == label).float().mean().item())
    return found


@pytest.mark.slow
def test_larger_maps_cost_less_accuracy_than_with_interpolated_positions():
    torch.manual_seed(0)
    tic = accuracies(Classifier(lambda c: WindowedSelfAttention(c, 3, padding=1, heads=4), positions=False))
    torch.manual_seed(0)
    vit = accuracies(Classifier(lambda c: Everywhere(c, 4), positions=True))
    assert tic[0] > 70, tic
    assert tic[0] - tic[1] < 5, tic
    assert vit[0] - vit[1] > tic[0] - tic[1], (tic, vit)


def test_menu_fits_any_grid_and_bad_input_is_refused():
    for grid in (ct.Grid(t=1, h=1, w=1), ct.Grid(t=3, h=9, w=8)):
        assert 0 < ct.plan(menu(grid), grid).density <= 1
    with pytest.raises(ct.ChronotopeError, match="odd kernel"):
        WindowedSelfAttention(8, kernel=4)
    with pytest.raises(ct.ChronotopeError, match="8 channels, heads=3"):
        WindowedSelfAttention(8, heads=3)
    with pytest.raises(ct.ChronotopeError, match="2 x 9"):
        layer(kernel=3)(torch.zeros(1, 16, 2, 9))
