"""LaMamba-Diff (system 26): the scan against its steps, snakes, windows against dense masks, identity, cost.

The four paths are those of the released code (yunxiangfu2001/LaMamba-Diff, commit 27b3c1d, get_continuous_paths): equal
for all even sizes from 2 to 32 (2026-11-21).
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
from chronotope.papers.linear.lamamba import LaMambaBlock, Scan2d, Selective, snakes
from chronotope.papers.linear.lamamba_unet import LaMambaDiff


def stepped(scan, u):
    """The recurrence written out, one token after the other."""
    low, write, read = scan.choose(u).split(scan.sizes, -1)
    step, rate = F.softplus(scan.step(low)), -scan.log_rate.exp()
    h, out = torch.zeros(u.shape[0], *rate.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        h = (step[:, t, :, None] * rate).exp() * h + (step[:, t] * u[:, t])[..., None] * write[:, t, None]
        out.append((h * read[:, t, None]).sum(-1) + scan.skip * u[:, t])
    return torch.stack(out, 1), h


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("states", [1, 4])
def test_the_scan_equals_its_steps(dtype, bound, states):
    torch.manual_seed(0)
    scan, u = Selective(6, states, 2).to(dtype), torch.randn(2, 150, 6, dtype=dtype)
    whole, last = scan(u)
    expected, end = stepped(scan, u)
    assert (whole - expected).abs().max() < bound
    assert (last - end).abs().max() < bound
    state, outs = None, []
    for piece in u.split(41, 1):
        y, state = scan(piece, state)
        outs.append(y)
    assert (whole - torch.cat(outs, 1)).abs().max() < bound
    slopes = [torch.autograd.grad(f(scan, u)[0].square().sum(), list(scan.parameters())) for f in (run, stepped)]
    for found, right in zip(*slopes, strict=True):
        assert (found - right).abs().max() < bound * max(1, float(right.abs().max()))


def run(scan, u):
    return scan(u)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9))
def test_snakes_are_bijections_from_neighbour_to_neighbour(h, w):
    grid = ct.Grid(h=h, w=w)
    corners = []
    for order in snakes(grid):
        coords = grid.coords()[order.visited]
        assert (coords.diff(dim=0).abs().sum(1) == 1).all()
        assert torch.equal(order.visited[order.steps], torch.arange(grid.size))
        corners.append(coords[0].tolist())
    assert corners == [[0, 0], [h - 1, 0], [h - 1, 0], [h - 1, w - 1]]


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 12), (7, 10), (3, 4)])
def test_window_attention_equals_dense_attention_with_mask_and_bias(shift, size):
    torch.manual_seed(0)
    grid = ct.Grid(h=size[0], w=size[1])
    layer = LaMambaBlock(8, 2, shift=shift > 0, window=4, parts=("window",)).mixers[0]
    torch.nn.init.normal_(layer.bias.table)
    x, coords = torch.randn(2, grid.size, 8), grid.coords()
    block = (coords + shift) // 4
    mask = (block[:, None] == block[None, :]).all(-1)
    apart = (coords[None, :] - coords[:, None]).clamp(-3, 3) + 3
    bias = layer.bias.table[:, apart[..., 0] * 7 + apart[..., 1]].masked_fill(~mask, -torch.inf)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    dense = layer.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
    assert (layer(x, grid) - dense).abs().max() < 1e-5


def test_shifted_windows_are_the_masked_roll():
    """Roll by half a window, cut into windows, hide pairs that the roll joined, roll back."""
    torch.manual_seed(0)
    layer = LaMambaBlock(8, 2, shift=True, window=4, parts=("window",)).mixers[0]
    torch.nn.init.normal_(layer.bias.table)
    x = torch.randn(2, 8 * 12, 8)

    def windows(y):
        return y.unflatten(1, (2, 4)).unflatten(3, (3, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    rolled = windows(x.unflatten(1, (8, 12)).roll((-2, -2), (1, 2)))
    rows, columns = torch.meshgrid(*(torch.arange(n).roll(-2) < 2 for n in (8, 12)), indexing="ij")
    wrapped = windows((rows.long() + 2 * columns.long())[None, ..., None])[..., 0]
    mask = wrapped[:, :, :, None] == wrapped[:, :, None, :]
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).flatten(0, 1)
    apart = places[None, :] - places[:, None] + 3
    bias = layer.bias.table[:, apart[..., 0] * 7 + apart[..., 1]]
    q, k, v = layer.qkv(rolled).unflatten(-1, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5)
    scores = bias.masked_fill(~mask[:, :, None], -torch.inf)
    out = layer.out(F.scaled_dot_product_attention(q, k, v, attn_mask=scores).transpose(2, 3).flatten(3))
    out = out.unflatten(1, (2, 3)).unflatten(3, (4, 4)).transpose(2, 3).reshape(2, 8, 12, 8).roll((2, 2), (1, 2))
    assert (layer(x, ct.Grid(h=8, w=12)) - out.flatten(1, 2)).abs().max() < 1e-5


def test_a_new_block_is_the_identity_and_every_token_reaches_every_other():
    torch.manual_seed(0)
    block, grid = LaMambaBlock(8, 2, window=4), ct.Grid(h=5, w=6)
    x, condition = torch.randn(1, 30, 8), torch.randn(1, 1, 8)
    assert torch.equal(block(x, grid, condition), x)
    for steer in block.steer:
        torch.nn.init.normal_(steer.modulation.weight)
    assert not torch.equal(block(x, grid, condition), x)
    slopes = torch.autograd.functional.jacobian(lambda x: block(x, grid, condition).sum(-1)[0], x)[:, 0].abs()
    assert (slopes.amax(-1) > 0).all()
    local = LaMambaBlock(8, 2, window=4, parts=("window",))
    for steer in local.steer:
        torch.nn.init.normal_(steer.modulation.weight)
    slopes = torch.autograd.functional.jacobian(lambda x: local(x, grid, condition).sum(-1)[0], x)[:, 0].abs()
    assert 0 < (slopes.amax(-1) > 0).float().mean() < 0.5


def test_the_u_net_and_what_is_refused():
    torch.manual_seed(0)
    model = LaMambaDiff(16, classes=3, depths=(2, 1, 1), heads=2, window=4)
    torch.nn.init.normal_(model.leave.weight)
    x = torch.randn(2, 4, 8, 12)
    noise, variance = model(x, torch.rand(2), torch.tensor([0, 2]))
    assert noise.shape == variance.shape == x.shape
    (noise.square().mean() + variance.mean()).backward()
    assert model.merge[0].weight.grad.abs().sum() > 0
    with pytest.raises(ct.ChronotopeError, match="multiples of 4"):
        model(torch.randn(1, 4, 6, 8), torch.rand(1), torch.tensor([0]))
    with pytest.raises(ct.ChronotopeError, match="two axes"):
        Scan2d(8)(torch.randn(1, 8, 8), ct.Grid(t=2, h=2, w=2))
    with pytest.raises(ct.ChronotopeError, match="cannot be stepped"):
        Scan2d(8).init_state(1, ct.Grid(h=1, w=2))
    with pytest.raises(ct.ChronotopeError, match="cannot be stepped"):
        LaMambaBlock(8, 2).init_state(1, ct.Grid(h=1, w=2))
    with pytest.raises(ct.ChronotopeError, match="condition as context"):
        LaMambaBlock(8, 2)(torch.randn(1, 4, 8), ct.Grid(h=2, w=2))
    with pytest.raises(ct.ChronotopeError, match="one or both"):
        LaMambaBlock(8, 2, parts=())


@pytest.mark.slow
def test_cost_is_linear(one_thread):
    block = LaMambaBlock(32, 2)
    times = {"block": {}, "dense": {}}
    with torch.no_grad():
        for _, side in itertools.product(range(4), (16, 24, 32, 48, 64)):
            grid, x = ct.Grid(h=side, w=side), torch.randn(1, side * side, 32)
            start = time.process_time()
            block(x, grid, x[:, :1])
            middle = time.process_time()
            heads = x.unflatten(2, (2, 16)).transpose(1, 2).repeat(8, 1, 1, 1)  # work to outweigh the call
            ct.attention(heads, heads, heads, grid=grid)
            times["block"].setdefault(side * side, []).append(middle - start)
            times["dense"].setdefault(side * side, []).append(time.process_time() - middle)
    slopes = {}
    for name, least in (("block", 0), ("dense", 1024)):
        known = {n: min(t) for n, t in times[name].items() if n >= least}
        slopes[name] = np.polyfit(np.log(list(known)), np.log(list(known.values())), 1)[0]
    assert 0.8 <= slopes["block"] <= 1.2, slopes
    assert slopes["dense"] >= 1.6, slopes
