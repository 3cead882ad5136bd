"""FNA (system 30): windows, equality with dense softmax, streaming, cost."""

import itertools
import time

import numpy as np
import pytest
import torch
from _meter import Meter
from torch.nn.functional import scaled_dot_product_attention

import chronotope as ct
from chronotope.papers.pattern.fna import Stream, menu, neighborhood, neighborhood_attention


def tensors(grid, seed=0, heads=2, kv_heads=2, dim=16):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, h, grid.size, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def axis_mask(length, size, dilation, causal):
    """[L, L] by the paper's formulas, group by group of the dilation."""
    out = torch.zeros(length, length, dtype=torch.bool)
    left, right = size // 2, size // 2 - 1 + size % 2
    for group in range(dilation):
        places = list(range(group, length, dilation))
        count = len(places)
        for i, query in enumerate(places):
            start = max(i - left, 0) + (i + right >= count) * (count - right - i - 1)
            seen = range(max(i - size + 1, 0), i + 1) if causal else range(start, start + size)
            out[query, [places[j] for j in seen]] = True
    return out


def by_formula(grid, window, dilation, causal):
    out = torch.ones(1, 1, dtype=torch.bool)
    for axis, length in grid.sizes.items():
        out = torch.kron(out, axis_mask(length, window[axis], dilation, axis in causal))
    return out.bool()


CASES = [
    (ct.Grid(n=37), {"n": 5}, ()), (ct.Grid(n=37), {"n": 6}, ()), (ct.Grid(n=37), {"n": 7}, ("n",)),
    (ct.Grid(h=13, w=16), {"h": 3, "w": 4}, ()), (ct.Grid(h=13, w=16), {"h": 4, "w": 5}, ("h",)),
    (ct.Grid(h=15, w=12), {"h": 2, "w": 3}, ("h", "w")), (ct.Grid(t=7, h=9, w=11), {"t": 2, "h": 3, "w": 3}, ("t",)),
    (ct.Grid(t=6, h=9, w=10), {"t": 2, "h": 3, "w": 2}, ()),
]  # fmt: skip


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize(("grid", "window", "causal"), CASES, ids=lambda x: str(x))
def test_tiles_equal_dense_softmax(grid, window, causal, dilation):
    mask = by_formula(grid, window, dilation, causal)
    assert torch.equal(ct.plan(neighborhood(window, dilation, causal), grid).mask(), mask)
    q, k, v = tensors(grid, heads=4)
    out, lse = neighborhood_attention(
        q, k, v, grid=grid, window=window, dilation=dilation, causal=causal, backend="torch"
    )
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert (out - expected).abs().max() < 1e-5
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~mask, -torch.inf)
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-5
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad(y, (q, k, v), upstream) for y in (out, expected))
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) < 1e-4


@pytest.mark.parametrize("window", [{"t": 3, "h": 4, "w": 5}, {"t": 2, "h": 7, "w": 1}])
def test_every_query_has_the_same_number_of_keys(window):
    grid = ct.Grid(t=5, h=8, w=9)
    counts = ct.plan(neighborhood(window), grid).mask().sum(1)
    product = window["t"] * window["h"] * window["w"]
    corners = [grid.index(t=t, h=h, w=w) for t, h, w in itertools.product((0, 4), (0, 7), (0, 8))]
    assert (counts[corners] == product).all()
    assert (counts == product).all()


def test_window_of_the_grid_is_full_and_of_one_is_the_value():
    grid = ct.Grid(t=3, h=4, w=5)
    q, k, v = tensors(grid)
    out, _ = neighborhood_attention(q, k, v, grid=grid, window=grid.sizes)
    assert (out - scaled_dot_product_attention(q, k, v)).abs().max() < 1e-5
    out, _ = neighborhood_attention(q, k, v, grid=grid, window=dict.fromkeys(grid.axes, 1))
    assert (out - v).abs().max() < 1e-6


@pytest.mark.parametrize("dilation", [1, 2])
def test_frame_by_frame_equals_the_batch(dilation):
    grid, window = ct.Grid(t=9, h=7, w=8), {"t": 3, "h": 3, "w": 3}
    q, k, v = tensors(grid)
    whole, _ = neighborhood_attention(q, k, v, grid=grid, window=window, dilation=dilation, causal=("t",))
    stream = Stream(ct.Grid(t=1, h=7, w=8), window, dilation)
    frames = zip(*(x.split(56, 2) for x in (q, k, v)), strict=True)
    out = torch.cat([stream.step(*frame) for frame in frames], 2)
    assert (out - whole).abs().max() < 1e-5
    assert len(stream.frames) == 2 * dilation + 1


def test_translation_moves_the_result_away_from_borders():
    grid, size = ct.Grid(h=20, w=22), 5
    inputs = [x.detach() for x in tensors(grid)]
    moved = [x.unflatten(2, grid.shape).roll((2, 3), (2, 3)).flatten(2, 3) for x in inputs]
    out, shifted = (
        neighborhood_attention(*x, grid=grid, window={"h": size, "w": size})[0].unflatten(2, grid.shape)
        for x in (inputs, moved)
    )
    expected = out.roll((2, 3), (2, 3))
    inner = (slice(None), slice(None), slice(size + 3, -size - 1), slice(size + 4, -size - 1))
    assert (shifted[inner] - expected[inner]).abs().max() < 1e-5
    assert (shifted - expected).abs().max() > 1e-2


def test_extra_tokens_merge_as_one_softmax():
    grid, window = ct.Grid(h=9, w=8), {"h": 4, "w": 3}
    q, k, v = tensors(grid)
    more = tensors(ct.Grid(n=5), seed=3)[1:]
    out, _ = neighborhood_attention(q, k, v, grid=grid, window=window, extra_kv=tuple(more))
    mask = torch.cat([by_formula(grid, window, 1, ()), torch.ones(72, 5, dtype=torch.bool)], 1)
    keys, values = torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2)
    assert (out - scaled_dot_product_attention(q, keys, values, attn_mask=mask)).abs().max() < 1e-5


def slope(sizes, values):
    return np.polyfit(np.log(sizes), np.log(values), 1)[0]


SIDES = [32, 64, 128]
WINDOW = {"h": 7, "w": 7}


@pytest.mark.usefixtures("torch_operators")
def test_peak_memory_is_linear():
    peaks = []
    for side in SIDES:
        grid = ct.Grid(h=side, w=side)
        q, k, v = (x.detach() for x in tensors(grid, dim=32))
        ct.attention(q, k, v, grid=grid, where=neighborhood(WINDOW))  # plans are made once and kept
        with Meter() as memory:
            neighborhood_attention(q, k, v, grid=grid, window=WINDOW)
        peaks.append(memory.peak)
    assert peaks[-1] > 128 * 128 * 2 * 32 * 4
    assert slope([side**2 for side in SIDES], peaks) <= 1.2


@pytest.mark.slow
def test_time_is_linear_and_dense_is_not(one_thread):
    times = {"tiled": {side: [] for side in SIDES}, "dense": {side: [] for side in SIDES}}
    inputs = {
        side: [x.detach() for x in tensors(ct.Grid(h=side, w=side), heads=8, kv_heads=8, dim=32)] for side in SIDES
    }
    # One tile for all sizes: the tiles that a plan would choose differ between them.
    tile = {"h": 8, "w": 8}
    plans = {side: ct.plan(neighborhood(WINDOW), ct.Grid(h=side, w=side), tile=tile) for side in SIDES}
    runs = {
        "tiled": lambda side: ct.attention(*inputs[side], grid=plans[side].grid, where=plans[side]),
        "dense": lambda side: scaled_dot_product_attention(*(x[:, :2] for x in inputs[side])),
    }
    for _, side, (name, run) in itertools.product(range(4), SIDES, runs.items()):
        start = time.process_time()
        run(side)
        times[name][side].append(time.process_time() - start)
    found = {name: slope([s**2 for s in SIDES], [np.median(t[s][1:]) for s in SIDES]) for name, t in times.items()}
    assert found["tiled"] == pytest.approx(1.0, abs=0.2), found
    assert found["dense"] >= 1.7, found


def test_menu_fits_any_grid_and_bad_input_is_refused():
    for grid in (ct.Grid(t=1, h=1, w=1), ct.Grid(t=3, h=6, w=20)):
        counts = ct.plan(menu(grid), grid).mask().sum(1)
        assert (counts == counts[0]).all()
    with pytest.raises(ct.ChronotopeError, match="causal"):
        neighborhood({"h": 3}, causal=("t",))
    with pytest.raises(ct.ChronotopeError, match="h=0"):
        neighborhood({"h": 0})
    with pytest.raises(ct.ChronotopeError, match="one frame"):
        Stream(ct.Grid(t=2, h=4), {"t": 2})
