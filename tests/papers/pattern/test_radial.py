"""Radial Attention (system 15): the mask, what it keeps, how it grows, and tuning with it.

Compared once with the mask code of the authors' repository (github.com/mit-han-lab/radial-attention, 72788d4, where
"wan" too sees the whole frame at r = 1; decay 1, block 128). Kernel blocks that differ, of f x n tokens: 8 x 256,
12 x 384, 20 x 130: 0; 9 x 200: 11; 16 x 300: 31; 8 x 1000: 113. There a frame is no whole number of blocks, and their
padding of a pair of frames can end before the frame does.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import chronotope as ct
from chronotope.boxes import Boxes
from chronotope.papers.pattern.radial import block_mask, menu, radial, rounded, scheduled


def dense(q, k, v, mask):
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def tensors(grid, seed=0, heads=2, dim=16):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, grid.size, dim, generator=generator, requires_grad=True) for _ in range(3)]


def by_formula(f, n, block, decay, profile, sink):
    """The mask, pair of frames by pair of frames."""
    places = torch.arange(n)
    out = torch.zeros(f, n, f, n, dtype=torch.bool)
    for i in range(f):
        for j in range(f):
            r = abs(i - j)
            w = decay * 2 ** n.bit_length() / 2 ** r.bit_length()
            width = max(w, block)
            if r == 0 or (r == 1 and profile == "hunyuan"):
                width = n
            elif r == 1:
                width = max(n / 2 * max(1, decay), block)
            seen = (places[:, None] - places[None, :]).abs() <= width
            if w < block and r % int(block / w):
                seen[:] = False
            if sink and j == 0:
                seen[:] = True
            out[i, :, j] = seen
    return out.view(f * n, f * n)


@pytest.mark.parametrize("profile", ["wan", "hunyuan"])
@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(
    ("f", "h", "w", "block", "decay"), [(8, 8, 8, 4, 1.0), (11, 5, 7, 6, 0.6), (9, 1, 13, 1, 0.3), (5, 3, 3, 16, 1.0)]
)
def test_mask_is_the_formula(f, h, w, block, decay, sink, profile):
    pattern = radial(block=block, decay=decay, sink=sink, profile=profile)
    expected = by_formula(f, h * w, block, decay, profile, sink)
    assert torch.equal(ct.plan(pattern, ct.Grid(t=f, h=h, w=w)).mask(), expected)
    assert torch.equal(ct.plan(pattern, ct.Grid(t=f, n=h * w)).mask(), expected)


@pytest.mark.parametrize(
    "grid", [ct.Grid(t=6, h=5, w=7), ct.Grid(t=9, n=33), ct.Grid(t=16, h=4, w=4, prefix=3)], ids=repr
)
def test_output_and_gradients_equal_masked_dense_softmax(grid):
    pattern = radial(block=3)
    q, k, v = tensors(grid)
    expected = dense(q, k, v, ct.plan(pattern, grid).mask())
    out = ct.attention(q, k, v, grid=grid, where=pattern, backend="torch")
    assert (out - expected).abs().max() < 1e-5
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-4


def test_output_rounded_to_blocks_equals_masked_dense_softmax():
    grid = ct.Grid(t=8, n=24)
    pattern = radial(block=8)
    blocks = block_mask(pattern, grid)
    assert 0 < blocks.float().mean() < 1
    mask = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
    q, k, v = tensors(grid)
    out = ct.attention(q, k, v, grid=grid, where=rounded(pattern, grid), backend="torch")
    assert (out - dense(q, k, v, mask)).abs().max() < 1e-5


def test_text_keys_merged_by_lse_equal_one_softmax():
    video, text = ct.Grid(t=8, h=4, w=5), ct.Grid(n=7)
    pattern = radial(block=3)
    whole = ct.Grid(t=8, h=4, w=5, prefix=7)
    q, k, v = tensors(whole)
    joint = dense(q, k, v, ct.plan(pattern, whole).mask())[:, :, 7:]
    seen = ct.attention(q[:, :, 7:], k[:, :, 7:], v[:, :, 7:], grid=video, where=pattern, return_lse=True)
    read = ct.attention(q[:, :, 7:], k[:, :, :7], v[:, :, :7], grid=video, key_grid=text, return_lse=True)
    assert (ct.merge([seen, read])[0] - joint).abs().max() < 1e-5


@pytest.mark.parametrize("profile", ["wan", "hunyuan"])
def test_large_decay_is_dense(profile):
    grid = ct.Grid(t=9, h=4, w=5)
    pattern = radial(block=4, decay=64.0, profile=profile, sink=False)
    q, k, v = tensors(grid)
    assert (ct.attention(q, k, v, grid=grid, where=pattern) - dense(q, k, v, None)).abs().max() < 1e-5


def test_mask_is_symmetric_apart_from_the_sink_and_windows_halve():
    f, n = 16, 256
    pattern = radial(block=16)
    assert pattern.widths(f, n).tolist() == [256, 128, *[128] * 2, *[64] * 4, *[32] * 8]
    assert radial(block=16, profile="hunyuan").widths(f, n).tolist()[:2] == [256, 256]
    # Held at the block of 64 from r = 8 on, where w = 32 and only every second distance is left.
    assert radial(block=64).widths(f, n).tolist()[8:] == [64, -1] * 4
    mask = ct.plan(radial(block=4), ct.Grid(t=16, n=32)).mask()
    assert not torch.equal(mask, mask.T)
    assert torch.equal(mask[32:, 32:], mask[32:, 32:].T)
    assert mask[:, :32].all()


def test_keys_per_query_grow_by_a_constant_with_each_doubling():
    frames = [8, 16, 32, 64, 128, 256]
    densities = [ct.plan(radial(block=4), ct.Grid(t=f, n=64)).density for f in frames]
    keys = np.array([density * f * 64 for density, f in zip(densities, frames, strict=True)])
    assert np.abs(keys - [378, 577, 810, 1067, 1336, 1610]).max() < 1
    steps = np.diff(keys)
    assert steps.min() > 198
    assert steps.max() < 275
    assert np.corrcoef(np.log2(frames), keys)[0, 1] ** 2 >= 0.99
    assert densities[0] == pytest.approx(0.74, abs=0.005) and densities[-1] == pytest.approx(0.098, abs=0.0005)


@pytest.mark.parametrize("slopes", [(0.2, 0.15), (0.5, 0.3)])
def test_kept_mass_beats_a_window_of_like_budget(slopes):
    f, n = 32, 64
    grid, line = ct.Grid(t=f, n=n), ct.Grid(n=f * n)
    coords = grid.coords()
    dt, dx = ((coords[:, None, axis] - coords[None, :, axis]).abs() for axis in (0, 1))
    scores = -(slopes[0] * dt + slopes[1] * dx).float()[None, None]
    flat = torch.zeros(1, 1, f * n, 1)

    def kept(where, on):
        lse = ct.attention(flat, flat, flat, grid=on, where=where, bias=scores, return_lse=True)[1]
        return torch.exp(lse - torch.logsumexp(scores, -1)).mean().item()

    pattern = radial(block=4)
    density = ct.plan(pattern, grid).density
    assert density == pytest.approx(0.395, abs=0.001)
    tokens = f * n
    half = next(x for x in range(tokens) if tokens * (2 * x + 1) - x * (x + 1) >= density * tokens**2)
    random = torch.rand(f * n, f * n, generator=torch.Generator().manual_seed(0)) < density
    by_chance = (torch.softmax(scores[0, 0], -1) * random).sum(-1).mean().item()
    found, window = kept(pattern, grid), kept(ct.window(n=2 * half + 1), line)
    assert found > 0.9
    assert found > window
    assert by_chance == pytest.approx(density, abs=0.01)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_boxes_agree_with_tokens(data):
    integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    shape = {axis: integer(1, 5) for axis in ["t", "h", "w", "c"][: integer(2, 4)]}
    shape["t"] = integer(1, 12)
    grid = ct.Grid(**shape)
    pattern = radial(
        block=integer(1, 20), decay=data.draw(st.sampled_from([0.1, 0.5, 1.0, 3.0])),
        profile=data.draw(st.sampled_from(["wan", "hunyuan"])), sink=data.draw(st.booleans()),
    )  # fmt: skip
    corners = [{axis: sorted((integer(0, n - 1), integer(0, n - 1))) for axis, n in shape.items()} for _ in range(2)]
    q, k = (
        Boxes(grid, *({axis: torch.tensor([pair[end]]) for axis, pair in corner.items()} for end in (0, 1)))
        for corner in corners
    )
    seen = pattern.sees(q.tokens()[0].view(1, -1, 1), k.tokens()[0].view(1, 1, -1))
    some, every = pattern.over(q, k)
    assert (bool(some), bool(every)) == (bool(seen.any()), bool(seen.all()))


@pytest.mark.parametrize("tile", [{"t": 2, "h": 2, "w": 3}, {"t": 3, "h": 5, "w": 1}])
def test_tiles_do_not_change_the_mask(tile):
    grid = ct.Grid(t=9, h=5, w=6, prefix=2)
    pattern = radial(block=3)
    planned = ct.plan(pattern, grid, tile=tile)
    mask = torch.zeros(grid.size, grid.size, dtype=torch.bool)
    for group in planned.parts[0].tiles.groups:
        for queries, keys in zip(group.queries(slice(None)), group.keys(slice(None)), strict=True):
            mask[queries[:, None], keys[None, :]] = True if group.mask is None else group.mask
    assert torch.equal(mask, planned.mask())
    assert planned.density == pytest.approx(planned.mask().float().mean().item(), abs=1e-6)


def test_menu_fits_any_grid_and_bad_input_is_refused():
    for grid in (ct.Grid(t=1, h=1, w=1), ct.Grid(t=3, h=1, w=9), ct.Grid(t=4, h=12, w=20)):
        assert 0 < ct.plan(menu(grid), grid).density <= 1
    with pytest.raises(ct.ChronotopeError, match="profile='sora'"):
        radial(profile="sora")
    with pytest.raises(ct.ChronotopeError, match="decay"):
        radial(decay=0.0)
    with pytest.raises(ct.ChronotopeError, match="block"):
        radial(block=0)
    with pytest.raises(ct.ChronotopeError, match="'t'"):
        ct.plan(radial(), ct.Grid(n=8))
    with pytest.raises(ct.ChronotopeError, match="same axes"):
        ct.plan(radial(), ct.Grid(t=8, n=4), ct.Grid(t=4, n=4))
    with pytest.raises(ct.ChronotopeError, match="first axis"):
        rounded(radial(block=4), ct.Grid(n=8, t=4))


def test_schedule_is_dense_first():
    pattern = radial()
    assert scheduled(pattern, step=11, layer=5) == scheduled(pattern, step=40, layer=0) == ct.full()
    assert scheduled(pattern, step=12, layer=1) is pattern


class Layer(nn.Module):
    """Pre-norm attention and MLP; `rank` adds a low-rank update to each of q, k, v, o."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.proj = nn.ModuleList([nn.Linear(dim, dim) for _ in range(4)])
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.lora = nn.ModuleList()

    def add_lora(self, rank):
        for linear in self.proj:
            down, up = nn.Linear(linear.in_features, rank, bias=False), nn.Linear(rank, linear.out_features, bias=False)
            nn.init.zeros_(up.weight)
            self.lora.append(nn.Sequential(down, up))

    def project(self, i, x):
        return self.proj[i](x) + (self.lora[i](x) if len(self.lora) else 0)

    def forward(self, x, grid, where):
        y = self.norms[0](x)
        q, k, v = (self.project(i, y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for i in range(3))
        out = ct.attention(q, k, v, grid=grid, where=where)
        x = x + self.project(3, out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Denoiser(nn.Module):
    """Predicts clean patches of a noisy video; time is a sinusoidal code, place a learned one."""

    def __init__(self, patches=16, pixels=4, dim=32, heads=2, depth=2):
        super().__init__()
        self.into, self.out = nn.Linear(pixels, dim), nn.Linear(dim, pixels)
        self.place = nn.Parameter(0.02 * torch.randn(patches, dim))
        self.layers = nn.ModuleList([Layer(dim, heads) for _ in range(depth)])

    def forward(self, x, where):
        frames, patches = x.shape[1:3]
        rates = torch.exp(-math.log(100.0) * torch.arange(16) / 16)
        angles = torch.arange(frames)[:, None] * rates
        h = self.into(x) + self.place + torch.cat([angles.sin(), angles.cos()], -1)[:, None]
        h = h.flatten(1, 2)
        for layer in self.layers:
            h = layer(h, ct.Grid(t=frames, n=patches), where)
        return self.out(h).unflatten(1, (frames, patches))


def moving_squares(batch, frames, generator):
    """A 3 x 3 square that moves and wraps around on 8 x 8 pixels, cut in 16 patches of 4: [batch, frames, 16, 4]."""
    start = torch.randint(0, 8, (batch, 2), generator=generator)
    speed = torch.randint(-1, 2, (batch, 2), generator=generator)
    corner = (start[:, None] + speed[:, None] * torch.arange(frames)[None, :, None]) % 8
    inside = ((torch.arange(8) - corner[..., None]) % 8) < 3
    picture = (inside[:, :, 0, :, None] & inside[:, :, 1, None, :]).float()
    return picture.view(batch, frames, 4, 2, 4, 2).permute(0, 1, 2, 4, 3, 5).reshape(batch, frames, 16, 4)


def loss_of(model, frames, where, generator, batch=8):
    clean = moving_squares(batch, frames, generator)
    noisy = clean + 1.0 * torch.randn(clean.shape, generator=generator)
    return nn.functional.mse_loss(model(noisy, where), clean)


def fit(model, frames, where, steps, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, frames, where, generator).backward()
        optimizer.step()
        schedule.step()


def held_out(model, frames, where):
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        return float(np.mean([loss_of(model, frames, where, generator, batch=32).item() for _ in range(5)]))


@pytest.mark.slow
def test_lora_with_the_mask_closes_the_gap_at_twice_the_length():
    torch.manual_seed(0)
    model = Denoiser()
    fit(model, 8, None, steps=300, rate=4e-3, seed=0)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    mask = radial(block=1)
    gap = {}
    for name, where in (("dense", None), ("masked", mask)):
        torch.manual_seed(1)
        tuned = Denoiser()
        tuned.load_state_dict(base)
        tuned.requires_grad_(False)
        before = held_out(tuned, 16, where)
        for layer in tuned.layers:
            layer.add_lora(rank=8)
        fit(tuned, 16, where, steps=120, rate=1e-2, seed=2)
        gap[name] = (before, held_out(tuned, 16, where))

    untuned, best = gap["dense"]
    assert ct.plan(mask, ct.Grid(t=16, n=16)).density < 0.6
    assert untuned - best > 0.05 * untuned, gap
    assert untuned - gap["masked"][1] >= 0.8 * (untuned - best), gap
