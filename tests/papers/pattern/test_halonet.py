"""HaloNet (system 66): windows of blocks, relative places, padding, downsampling, cost."""

import numpy as np
import pytest
import torch
from _meter import Meter
from torch.nn.functional import pad as pad_zeros

import chronotope as ct
from chronotope.papers.pattern.halonet import halo_attention, haloed, menu

SIZES = [(4, 1), (8, 3)]
GRIDS = [ct.Grid(h=16, w=16), ct.Grid(h=15, w=13)]


def tensors(grid, seed=0, dim=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, grid.size, dim, generator=generator) for _ in range(3)]


def tables(block, around, dim=8):
    generator = torch.Generator().manual_seed(5)
    return {axis: dim**-0.5 * torch.randn(2 * (block + 2 * around) - 1, dim, generator=generator) for axis in "hw"}


def written_out(q, k, v, grid, block, around, relative, pad):
    """Softmax over all keys with explicit coordinates; pad="zeros": with explicit zero keys around the picture."""
    h, w = grid.shape
    if pad == "zeros":
        edge = (0, 0, around, around + -w % block, around, around + -h % block)
        k, v = (pad_zeros(x.unflatten(2, grid.shape), edge) for x in (k, v))
        rows, columns = (torch.arange(n) - around for n in k.shape[2:4])
        k, v = k.flatten(2, 3), v.flatten(2, 3)
    else:
        rows, columns = torch.arange(h), torch.arange(w)
    x, y = grid.coords(), torch.cartesian_prod(rows, columns)
    start = x // block * block
    seen = ((y[None] >= start[:, None] - around) & (y[None] < start[:, None] + block + around)).all(-1)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    for i, axis in enumerate("hw"):
        if relative:
            offset = (y[None, :, i] - x[:, None, i]).clamp(-(block + 2 * around) + 1, block + 2 * around - 1)
            vectors = relative[axis][offset + block + 2 * around - 1]
            scores = scores + torch.einsum("bhnd,nmd->bhnm", q, vectors)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("pad", ["mask", "zeros"])
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize(("block", "around"), SIZES)
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_equals_dense_attention_with_gathered_relative_logits(grid, block, around, placed, pad):
    q, k, v = (x.double().requires_grad_() for x in tensors(grid))
    relative = {axis: x.double() for axis, x in tables(block, around).items()} if placed else None
    sizes = {"block": dict.fromkeys("hw", block), "halo": dict.fromkeys("hw", around)}
    expected = written_out(q, k, v, grid, block, around, relative, pad)
    single = {axis: x.float() for axis, x in relative.items()} if relative else None
    out = halo_attention(q.float(), k.float(), v.float(), grid=grid, relative=single, pad=pad, **sizes)
    assert (out - expected).abs().max() < 1e-5
    exact = halo_attention(q, k, v, grid=grid, relative=relative, pad=pad, **sizes)
    ours, theirs = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (exact, expected))
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) < 1e-9


def test_the_paddings_differ_at_the_border_only():
    grid = ct.Grid(h=16, w=16)
    sizes = {"block": {"h": 4, "w": 4}, "halo": {"h": 1, "w": 1}}
    masked, zeros = (halo_attention(*tensors(grid), grid=grid, pad=pad, **sizes) for pad in ("mask", "zeros"))
    differs = (masked - zeros).abs().amax((0, 1, 3)).view(16, 16) > 1e-5
    assert not differs[4:12, 4:12].any()
    assert differs[:4].all()


def test_no_halo_is_blocks_and_a_block_of_one_is_a_window():
    grid = ct.Grid(t=4, h=7, w=9)
    ones = dict.fromkeys(grid.axes, 1)
    mask = ct.plan(haloed({"t": 2, "h": 3, "w": 4}, {}), grid).mask()
    assert torch.equal(mask, ct.plan(ct.blocks(t=2, h=3, w=4), grid).mask())
    mask = ct.plan(haloed(ones, {"t": (2, 0), "h": 1, "w": 2}), grid).mask()
    assert torch.equal(mask, ct.plan(ct.window(t=(2, 0), h=3, w=5), grid).mask())


@pytest.mark.parametrize("pad", ["mask", "zeros"])
def test_stride_subsamples_the_output(pad):
    grid = ct.Grid(h=16, w=12)
    sizes = {"block": {"h": 4, "w": 4}, "halo": {"h": 1, "w": 1}, "relative": tables(4, 1), "pad": pad}
    dense, strided = (halo_attention(*tensors(grid), grid=grid, stride=s, **sizes) for s in (1, 2))
    expected = dense.unflatten(2, grid.shape)[:, :, ::2, ::2].flatten(2, 3)
    assert (strided - expected).abs().max() <= 1e-6


@pytest.mark.usefixtures("torch_operators")
def test_entries_are_exact_and_memory_is_linear():
    sides, peaks = [32, 64, 96], []
    for side in sides:
        grid = ct.Grid(h=side, w=side)
        q, k, v = tensors(grid)
        sizes = {"block": {"h": 8, "w": 8}, "halo": {"h": 3, "w": 3}, "pad": "zeros"}
        halo_attention(q, k, v, grid=grid, **sizes)
        with Meter() as watch:
            halo_attention(q, k, v, grid=grid, **sizes)
        assert watch.scores == 2 * side * side * (8 + 2 * 3) ** 2
        peaks.append(watch.peak)
    assert np.polyfit(np.log(np.square(sides)), np.log(peaks), 1)[0] == pytest.approx(1.0, abs=0.1)


def test_shift_by_a_block_shifts_the_output():
    grid, block = ct.Grid(h=24, w=20), 4
    sizes = {"block": {"h": block, "w": block}, "halo": {"h": 1, "w": 1}, "relative": tables(block, 1)}
    inputs = tensors(grid)

    def run(by):
        moved = [x.unflatten(2, grid.shape).roll((by, by), (2, 3)).flatten(2, 3) for x in inputs]
        return halo_attention(*moved, grid=grid, **sizes).unflatten(2, grid.shape).roll((-by, -by), (2, 3))

    inner = (slice(None), slice(None), slice(block, -2 * block), slice(block, -2 * block))
    assert (run(block) - run(0))[inner].abs().max() <= 1e-5
    assert (run(1) - run(0))[inner].abs().max() > 1e-3


def test_menu_fits_any_grid_and_bad_input_is_refused():
    for grid in (ct.Grid(t=1, h=1, w=1), ct.Grid(t=3, h=9, w=20)):
        assert 0 < ct.plan(menu(grid), grid).density <= 1
    grid = ct.Grid(h=6, w=6)
    q, k, v = tensors(grid)
    sizes = {"block": {"h": 4, "w": 4}, "halo": {"h": 1, "w": 1}}
    with pytest.raises(ct.ChronotopeError, match="stride=3"):
        halo_attention(q, k, v, grid=grid, stride=3, **sizes)
    with pytest.raises(ct.ChronotopeError, match="pad='same'"):
        halo_attention(q, k, v, grid=grid, pad="same", **sizes)
    with pytest.raises(ct.ChronotopeError, match=r"\[11, 8\]"):
        halo_attention(q, k, v, grid=grid, relative={"h": torch.zeros(3, 8)}, **sizes)
    with pytest.raises(ct.ChronotopeError, match="give a block"):
        haloed({"h": 4}, {"w": 1})
    with pytest.raises(ct.ChronotopeError, match="on each side"):
        haloed({"h": 4}, {"h": -1})
