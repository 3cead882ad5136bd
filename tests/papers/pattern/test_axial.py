"""Axial Transformer (system 154): axial layers, autoregression, sampling, cost, and what columns are worth."""

import itertools
import time

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import chronotope as ct
from chronotope.papers.pattern.axial import AxialDecoder, AxialLayer, axial, menu


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", [ct.Grid(h=6, w=9), ct.Grid(t=4, h=5, w=3)], ids=repr)
def test_axial_attention_equals_dense_attention_under_its_mask(grid, masked):
    generator = torch.Generator().manual_seed(0)
    coords = grid.coords()
    for a, axis in enumerate(grid.axes):
        equal = coords[:, None] == coords[None, :]
        mask = torch.stack([equal[..., b] for b in range(len(grid.axes)) if b != a]).all(0)
        if masked:
            mask = mask & (coords[None, :, a] <= coords[:, None, a])
        q, k, v = torch.randn(3, 2, 2, grid.size, 8, generator=generator)
        out = ct.attention(q, k, v, grid=grid, where=axial(axis, masked), backend="torch")
        assert (out - scaled_dot_product_attention(q, k, v, attn_mask=mask)).abs().max() < 1e-5


@pytest.mark.parametrize("grid", [ct.Grid(h=4, w=5), ct.Grid(t=3, h=2, w=3)], ids=repr)
def test_logits_depend_on_exactly_the_tokens_before(grid):
    torch.manual_seed(0)
    model = AxialDecoder(grid, vocab=3, dim=8, heads=2, exterior=2, outer=2, inner=2, init=1.0).double()
    embedded = torch.randn(1, *grid.shape, 8, dtype=torch.float64, requires_grad=True)
    logits = model.decode(embedded).view(grid.size, 3)
    weights = torch.randn(3, dtype=torch.float64)
    for own in range(grid.size):
        (grad,) = torch.autograd.grad((logits[own] * weights).sum(), embedded, retain_graph=True)
        depends = grad.view(grid.size, 8).abs().amax(1)
        assert (depends[own:] == 0).all()
        assert (depends[:own] > 0).all()


@pytest.mark.parametrize("grid", [ct.Grid(h=8, w=8), ct.Grid(t=3, h=4, w=4)], ids=repr)
def test_fast_sampling_equals_slow_sampling(grid):
    torch.manual_seed(0)
    model = AxialDecoder(grid, vocab=5, dim=16, heads=2, init=1.0)
    noise = -torch.log(-torch.log(torch.rand(2, *grid.shape, 5, generator=torch.Generator().manual_seed(1))))
    fast, slow = model.sample(noise, fast=True), model.sample(noise, fast=False)
    assert torch.equal(fast, slow)
    assert not torch.equal(fast, noise.argmax(-1))
    assert torch.equal(fast, (model(fast) + noise).argmax(-1))


@pytest.mark.parametrize("n", [16, 32, 64])
def test_scores_of_a_row_and_a_column_layer_are_counted(n):
    grid = ct.Grid(h=n, w=n)
    computed = sum(ct.plan(axial(axis), grid).flops(head_dim=1) // 4 for axis in "hw")
    assert computed == 2 * n**2 * n
    assert ct.plan(None, grid).flops(head_dim=1) // 4 == n**4


@pytest.mark.slow
def test_time_grows_slower_than_dense(one_thread):
    sizes, times = [16, 32, 64], {}
    inputs = {n: torch.randn(3, 1, 8, n * n, 32, generator=torch.Generator().manual_seed(0)) for n in sizes}
    for _, n in itertools.product(range(8), sizes):
        grid = ct.Grid(h=n, w=n)
        for name, wheres in (("axial", (axial("w"), axial("h"))), ("dense", (None,))):
            start = time.process_time()
            for where in wheres:
                if where is None:
                    scaled_dot_product_attention(*inputs[n])
                else:
                    ct.attention(*inputs[n], grid=grid, where=where)
            times.setdefault((name, n), []).append(time.process_time() - start)
    slopes = {
        name: np.polyfit(np.log(np.square(sizes)), np.log([np.median(times[name, n][2:]) for n in sizes]), 1)[0]
        for name in ("axial", "dense")
    }
    assert slopes["axial"] < 1.7, slopes
    assert slopes["axial"] < slopes["dense"], slopes


def rectangles(batch, generator, size=16):
    """One filled rectangle of random place and size in each picture: int64 [batch, size, size]."""
    corner = torch.randint(0, size - 2, (batch, 2), generator=generator)
    extent = 2 + (torch.rand(batch, 2, generator=generator) * (size - 1 - corner)).long()
    inside = [
        (torch.arange(size) >= corner[:, i, None]) & (torch.arange(size) < (corner + extent)[:, i, None])
        for i in (0, 1)
    ]
    return (inside[0][:, :, None] & inside[1][:, None, :]).long()


def bits_per_pixel(columns):
    torch.manual_seed(0)
    model = AxialDecoder(ct.Grid(h=16, w=16), vocab=2, dim=32, heads=2, outer=1, inner=1, columns=columns)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=700)
    generator = torch.Generator().manual_seed(1)
    for _ in range(700):
        pictures = rectangles(16, generator)
        optimizer.zero_grad()
        cross_entropy(model(pictures).flatten(0, 2), pictures.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    held_out = rectangles(256, torch.Generator().manual_seed(2))
    with torch.no_grad():
        loss = cross_entropy(model(held_out).flatten(0, 2), held_out.flatten()).item()
    return loss / np.log(2), sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_columns_are_worth_their_place_on_rectangles():
    (axial_bits, axial_size), (row_bits, row_size) = bits_per_pixel(True), bits_per_pixel(False)
    assert axial_size == row_size
    assert axial_bits < row_bits


def test_menu_fits_any_grid_and_bad_input_is_refused():
    for grid in (ct.Grid(t=1, h=1, w=1), ct.Grid(t=3, h=6, w=5)):
        counts = ct.plan(menu(grid), grid).mask().sum(1)
        assert (counts == sum(grid.shape) - len(grid.axes) + 1).all()
    with pytest.raises(ct.ChronotopeError, match="expected the axes"):
        AxialDecoder(ct.Grid(n=4), vocab=2)
    with pytest.raises(ct.ChronotopeError, match="6 channels"):
        AxialLayer(6, 4, "w")
