"""Dropout and drop path of blocks: what is drawn, when, and for whom."""

import pytest
import torch

import chronotope as ct
from chronotope import Grid
from chronotope.errors import ChronotopeError
from chronotope.nn import Attention, Block, Stack
from chronotope.nn.block import DropBranch

GRID = Grid(t=3, h=2, w=2)


def block(mlp="swiglu", **drops):
    torch.manual_seed(0)
    return Block([Attention(8, 2, where=ct.causal("t"))], mlp=mlp, **drops)


def test_the_default_draws_nothing_and_keeps_the_weights_names():
    plain, dropping = block(), block(dropout=0.3, drop_path=0.3)
    x = torch.randn(2, GRID.size, 8)
    state = torch.get_rng_state()
    trained = plain.train()(x, GRID)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(plain.eval()(x, GRID), trained)
    dropping.load_state_dict(plain.state_dict())
    assert not torch.equal(dropping.train()(x, GRID), trained)
    assert torch.equal(dropping.eval()(x, GRID), trained)


def test_dropout_keeps_the_mean_and_drops_its_share():
    torch.manual_seed(1)
    y = DropBranch(0.25)(torch.ones(4, 100, 500))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # 200,000 draws: five standard errors.
    assert abs(float((y == 0).float().mean()) - 0.25) < 5 * (0.25 * 0.75 / y.numel()) ** 0.5


def test_a_path_is_dropped_for_whole_examples():
    torch.manual_seed(2)
    y = DropBranch(path=0.4)(torch.ones(5000, 3, 2))
    dropped = (y == 0).flatten(1)
    assert torch.equal(dropped.all(1), dropped.any(1)) and set(y.unique().tolist()) == {
        0.0,
        torch.tensor(1 / 0.6).item(),
    }
    assert abs(float(dropped[:, 0].float().mean()) - 0.4) < 5 * (0.24 / 5000) ** 0.5


def test_each_branch_draws_for_itself_and_the_stream_stays():
    torch.manual_seed(3)
    layer, x = block(drop_path=0.5).train(), torch.randn(64, GRID.size, 8)
    mixed = x + 2 * layer.mixers[0](layer.norms[0](x), GRID)
    fed = [y + 2 * layer.mlp(layer.mlp_norm(y)) for y in (x, mixed)]
    out = layer(x, GRID)
    kinds = [((out - y).abs().amax((1, 2)) < 1e-5) for y in (x, mixed, *fed)]
    assert torch.stack(kinds).any(0).all() and all(bool(kind.any()) for kind in kinds)


def test_a_dropped_path_is_0_even_of_what_is_infinite():
    torch.manual_seed(4)
    x = torch.full((8, 2), torch.inf)
    assert set(DropBranch(path=0.5)(x).unique().tolist()) == {0.0, torch.inf}


def test_stepping_drops_nothing():
    stack = Stack([block(dropout=0.5, drop_path=0.5), block(dropout=0.5)]).train()
    x = torch.randn(2, GRID.size, 8)
    state, out = stack.init_state(2, GRID.replace(t=1)), []
    for part in x.split(4, 1):
        y, state = stack.step(part, state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), stack.eval()(x, GRID), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drops", [{"dropout": 1.0}, {"dropout": -0.1}, {"drop_path": 1}])
def test_what_is_no_probability_is_refused(drops):
    with pytest.raises(ChronotopeError, match="from 0 to below 1"):
        block(**drops)
