"""SEA (system 79): cells and budgets, the dense limit, causality, stepping, padding, and what learns from what.

The authors' choice of cells (`causal_topk_masking`, commit 5609413 of gmlwns2000/sea-attention), not causal, 3 heads,
32 cells, 32 to 160 keys, 2026-11-21: the same cells wherever it keeps as many; it rounds k w / T before it multiplies
by H. Their network was not compared.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.routing.sea import SEA
from chronotope.routing.cells import cell_of, first_keys


def tokens(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_of(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return SEA(32, 2, **{"width": 16, "keep": 4, "causal": True, "length": 128, **options}).to(dtype)


def open_gates(layer):
    """s0 = s1 = 1."""
    torch.nn.init.zeros_(layer.estimate.scales.weight)
    torch.nn.init.constant_(layer.estimate.scales.bias, 40.0)
    return layer


def stepped(layer, x, grid):
    state, out = layer.init_state(len(x), grid), []
    for part in x.split(grid.size, 1):
        y, state = layer.step(part, state)
        out.append(y)
    return torch.cat(out, 1), state


def test_cells_of_the_row_have_1_3_and_4_keys():
    for n, width in ((32, 1), (96, 3), (128, 4)):
        sizes = first_keys(torch.tensor(n), 32).diff()
        assert int(sizes.min()) == int(sizes.max()) == width
        assert torch.equal(cell_of(torch.tensor(n), 32, n).bincount(minlength=32), sizes)


@pytest.mark.parametrize("causal", [True, False])
def test_keeping_all_with_open_gates_is_dense_attention(causal):
    layer = open_gates(layer_of(causal=causal, keep=60))
    x, grid = tokens(2, 60, 32), ct.Grid(n=60)
    q, k, v = layer.qkv(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    dense = layer.out(sdpa(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))
    assert (layer(x, grid) - dense).abs().max() <= 1e-5


@pytest.mark.parametrize("together", ["query", "heads"])
def test_pairs_of_each_query_are_within_a_cell_of_the_budget_and_linear_in_all(together):
    heads, keep, width, totals = 4, 16, 128, []
    groups = 1 if together == "heads" else heads
    for n in (256, 512, 1024, 2048):
        visible = torch.arange(1, n + 1)[None]
        kept = ct.route.keep_cells(tokens(1, heads, n, width, seed=n), visible, keep, together)
        index = ct.route.keys_of(kept, visible)
        pairs = (index >= 0).sum((0, 3)).view(groups, -1, n).sum(1)
        cell = -(-visible // width)
        assert bool(((pairs - keep * heads // groups).abs() <= cell)[:, width:].all())
        totals.append(int(pairs.sum()))
    ratios = [after / before for before, after in pairwise(totals)]
    print(f"{together}: pairs {totals}, ratios {[round(ratio, 4) for ratio in ratios]}")
    assert all(abs(ratio - 2) <= 0.06 for ratio in ratios)


@pytest.mark.parametrize("n", [64, 96, 128])
def test_where_cells_are_even_the_number_of_cells_is_that_of_the_authors(n):
    heads, keep, width = 3, 5, 32
    kept = ct.route.keep_cells(tokens(2, heads, n, width), torch.full((1, n), n), keep, "heads")
    assert bool((kept.sum((1, 3)) == math.ceil(heads * keep * width / n - 0.5)).all())


def test_nothing_comes_from_the_future():
    layer, n = layer_of(torch.float64), 30
    x = tokens(1, n, 32, dtype=torch.float64).requires_grad_()
    for i in (0, 8, 27):
        for out in (layer(x, ct.Grid(n=n)), stepped(layer, x, ct.Grid(n=1))[0]):
            (grad,) = torch.autograd.grad(out[:, i].square().sum(), x)
            assert grad[:, : i + 1].abs().max() > 0
            assert grad[:, i + 1 :].abs().max() == 0
    changed = x.detach().clone()
    changed[:, 25:] += 1
    before, after = layer.look(x, ct.Grid(n=n)), layer.look(changed, ct.Grid(n=n))
    assert (before.out - after.out)[:, :, :25].abs().max() < 1e-12
    assert choices(before)[:25] == choices(after)[:25]


def choices(look):
    """The keys of each query, head by head."""
    return [[[j for j in row if j >= 0] for row in head] for head in look.keys[0].transpose(0, 1).tolist()]


@pytest.mark.parametrize("grid", [ct.Grid(n=60), ct.Grid(t=12, h=5)])
def test_steps_equal_the_whole(grid):
    position = ct.Rope(axes=(grid.axes[0],))
    layer, x = layer_of(position=position), tokens(2, grid.size, 32)
    slice_ = grid.replace(**{grid.axes[0]: 1})
    steps, state = stepped(layer, x, slice_)
    assert (steps - layer(x, grid)).abs().max() <= 1e-4
    assert state.time == grid.shape[0]
    again = layer.init_state(2, slice_).from_dict(state.to_dict())
    more = tokens(2, slice_.size, 32, seed=1)
    assert torch.equal(layer.step(more, replace(again, k=state.k, v=state.v))[0], layer.step(more, state)[0])


def test_padded_sequences_are_as_those_alone():
    layer, x = layer_of(torch.float64, causal=False), tokens(2, 50, 32, dtype=torch.float64)
    lengths = torch.tensor([50, 37])
    both = layer.look(x, ct.Grid(n=50), lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = layer.look(x[i : i + 1, :n], ct.Grid(n=n))
        assert (both.out[i, :, :n] - alone.out[0]).abs().max() < 1e-10
        assert (both.logits[i, :, :n] - alone.logits[0]).abs().max() < 1e-10
    assert int(both.keys[1, :, :37].max()) < 37


def test_places_are_the_identity_sampled_between():
    layer = layer_of(causal=False)
    n, d = 23, 16
    at = torch.linspace(-1, 1, n)[:, None].expand(n, d), torch.linspace(-1, 1, d).expand(n, d)
    eye, where = torch.eye(d)[None, None], torch.stack((at[1], at[0]), -1)[None]
    sampled = F.grid_sample(eye, where, mode="bilinear", align_corners=True)[0, 0]
    code = layer.estimate._places(torch.zeros(1, 2, n, d), None, 0)[0, 0]
    assert (code / d - sampled).abs().max() < 1e-5
    longer = layer_of(causal=False, code=n).estimate._places(torch.zeros(1, 2, n, d), None, 0)[0, 0]
    assert torch.equal(longer, n * torch.eye(n))


@pytest.mark.parametrize("kernel", ["relu", "exp"])
def test_the_first_map_is_that_of_the_performer_and_a_little_noise(kernel):
    n = 48
    layer = layer_of(torch.float64, causal=False, width=n, code=n, kernel=kernel)
    with torch.no_grad():
        look = layer.look(3 * tokens(2, n, 32, dtype=torch.float64), ct.Grid(n=n))
        q, k = (layer.estimate.features(x) for x in (look.q, look.k))
    performer = (q @ k.mT) / (q @ k.mT).sum(-1, keepdim=True)
    alike = torch.stack([torch.corrcoef(pair)[0, 1] for pair in torch.stack((performer, look.logits), 3).flatten(0, 2)])
    print(f"{kernel}: correlation {float(alike.min()):.3f} at least, {float(alike.mean()):.3f} in the mean")
    assert alike.mean() > 0.9


def test_the_mean_value_is_that_of_the_formula():
    x, grid = tokens(1, 40, 32, dtype=torch.float64), ct.Grid(n=40)
    for causal in (True, False):
        layer = layer_of(torch.float64, causal=causal)
        torch.nn.init.zeros_(layer.estimate.scales.weight)
        torch.nn.init.constant_(layer.estimate.scales.bias, -60.0)  # s1 = 0: the mean alone
        look = layer.look(x, grid)
        v = layer.qkv(x)[..., 64:].unflatten(2, (2, 16)).transpose(1, 2)
        for i in (0, 13, 39):
            if causal:
                mean = v[:, :, : i + 1].mean(2)
            else:
                column = look.logits.softmax(-1).mean(2)[..., cell_of(torch.tensor(40), 16, 40)]
                mean = ((column / column.sum(-1, keepdim=True))[..., None] * v).sum(2)
            assert (look.out[:, :, i] - mean).abs().max() < 1e-12


@pytest.mark.parametrize("causal", [True, False])
def test_the_map_learns_from_the_teacher_and_not_through_the_choice(causal):
    layer, x, grid = layer_of(causal=causal), tokens(2, 40, 32), ct.Grid(n=40)
    drawing = [*layer.estimate.rows.parameters(), *layer.estimate.convolutions.parameters()]
    layer(x, grid).square().sum().backward()
    assert layer.estimate.scales.weight.grad.abs().max() > 0
    if causal:  # else the column means weigh the mean value
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in drawing)
    layer.zero_grad()
    truth = tokens(2, 2, 40, 40, seed=1)
    truth = (truth.masked_fill(~torch.ones(40, 40).bool().tril(), -torch.inf) if causal else truth).softmax(-1)
    loss = layer.distil(layer.look(x, grid), truth, tokens(2, 2, 40, 16, seed=2))
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in drawing)
    assert torch.isfinite(loss)


def test_the_loss_of_a_perfect_map_is_that_of_the_outputs_alone():
    layer, x, grid = layer_of(torch.float64, width=40), tokens(1, 40, 32, dtype=torch.float64), ct.Grid(n=40)
    look = layer.look(x, grid)
    own = (look.q @ look.k.mT / 4).masked_fill(~torch.ones(40, 40).bool().tril(), -torch.inf)
    # What the rows of the map say where every key has a cell: a cell of another key says nothing.
    logits = torch.zeros_like(look.logits)
    for i in range(40):
        logits[:, :, i, cell_of(torch.tensor(i + 1), 40, i + 1)] = own[:, :, i, : i + 1]
    perfect = look._replace(logits=logits)
    assert layer.distil(perfect, own.softmax(-1)).abs() < 1e-12
    assert abs(layer.distil(perfect, own.softmax(-1), look.out + 0.5) - 0.25) < 1e-12
    assert layer.distil(look, own.softmax(-1)) > 1e-3


def test_the_same_seed_gives_the_same_layer_and_what_is_refused():
    x, grid = tokens(1, 30, 32), ct.Grid(n=30)
    assert torch.equal(layer_of()(x, grid), layer_of()(x, grid))
    for options, message in (
        ({"width": 11}, "width=11 is not a multiple of 2"),
        ({"together": "all"}, "together='all'"),
        ({"keep": 0}, "keep=0"),
        ({"kernel": "elu"}, "kernel='elu': expected one of relu, exp"),
        ({"length": 20}, "token 30 of at most length=20"),
    ):
        with pytest.raises(ct.ChronotopeError, match=message):
            layer_of(**options)(x, grid)
    with pytest.raises(ct.ChronotopeError, match="cannot be stepped"):
        layer_of(causal=False).init_state(1, ct.Grid(n=1))
    with pytest.raises(ct.ChronotopeError, match="no lengths"):
        layer_of().look(x, grid, torch.tensor([20]))
