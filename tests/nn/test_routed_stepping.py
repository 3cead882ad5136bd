"""Law: an attention layer under a route steps token by token, or frame by frame, to what forward gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stepping_law import close, stepped, tokens

import chronotope as ct
from chronotope.nn import Attention, Block


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 14),
    places=st.sampled_from([(), (2,), (2, 2)]),
    page=st.integers(1, 4),
    alone=st.booleans(),
    keep=st.sampled_from([1, 2, 0.5, 1.0]),
    kv_heads=st.sampled_from([1, 2, 4]),
    rope=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 1000),
)
def test_stepping_equals_forward(length, places, page, alone, keep, kv_heads, rope, softcap, seed):
    grid = ct.Grid(**dict(zip("thw", (length, *places), strict=False)))
    where = ct.route.top_blocks(keep, t=page, queries={"t": 1} if alone else None) & ct.causal("t")
    torch.manual_seed(seed)
    position = ct.Rope(grid.axes, base=30.0) if rope else None
    layer = Attention(
        12, 4, where=where, kv_heads=kv_heads, head_dim=8, position=position, qk_norm=True, softcap=softcap
    ).double()
    x = tokens(grid, seed=seed)
    with torch.no_grad():
        out, state = stepped(layer, x, grid)
        close(out, layer(x, grid))
    assert state.length == length


def test_gradients_and_blocks_of_layers():
    grid = ct.Grid(n=9)
    where = ct.route.top_blocks(2, n=2, queries={"n": 1}) & ct.causal()
    layer = Block([Attention(12, 2, where=where, position=ct.Rope("n"), head_dim=6)], 12).double()
    x = tokens(grid).requires_grad_()
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x, grid).square().sum(), inputs)
    for a, b in zip(torch.autograd.grad(stepped(layer, x, grid)[0].square().sum(), inputs), expected, strict=True):
        close(a, b)


def test_under_autocast():
    grid = ct.Grid(n=12)
    layer = Attention(16, 2, where=ct.route.top_blocks(2, n=3) & ct.causal(), position=ct.Rope("n"))
    x = tokens(grid, 16).float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out, state = stepped(layer, x, grid)
        assert out.dtype == state.k.dtype == torch.bfloat16
        torch.testing.assert_close(out, layer(x, grid), rtol=0.02, atol=0.02)


def test_what_cannot_be_stepped_says_why():
    one = ct.Grid(n=1)
    with pytest.raises(ct.ChronotopeError, match=r"expected a route & causal\('n'\)"):
        Attention(12, 2, where=ct.route.top_blocks(2, n=4)).init_state(1, one)
    where = ct.route.top_blocks(2, n=4) & ct.causal()
    with pytest.raises(ct.ChronotopeError, match="take no bias"):
        Attention(12, 2, where=where, bias=ct.Alibi(2)).init_state(1, one)
    layer = Attention(12, 2, where=where)
    state = layer.init_state(1, one)
    layer.where = ct.causal()
    with pytest.raises(ct.ChronotopeError, match="init_state again"):
        layer.step(torch.zeros(1, 1, 12), state)
