"""Temporal shift and chains: which channel comes from where, stepping, and what stands in a block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import chronotope as ct
from chronotope import Grid
from chronotope.errors import ChronotopeError
from chronotope.nn import Attention, Block, Chain, Cross, GridConv, Learned, Stack, TemporalShift
from stepping import stepped, tokens

GRID = Grid(t=4, h=2, w=3)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    axis=st.sampled_from("thw"),
    causal=st.booleans(),
    count=st.integers(1, 4),
)
def test_channels_come_from_the_neighbours(shape, axis, causal, count):
    grid = Grid(**dict(zip("thw", shape, strict=True)))
    x = tokens(grid, 8)
    out = TemporalShift(8, count / 8, causal, axis)(x, grid)
    for i, place in enumerate(grid.coords().tolist()):
        at = dict(zip(grid.axes, place, strict=True))
        for part, step in ((slice(0, count), -1), (slice(count, 8 if causal else 2 * count), 0 if causal else 1)):
            there = at[axis] + step
            expected = (
                x[:, grid.index(**{**at, axis: there})] if 0 <= there < grid.sizes[axis] else torch.zeros(2, 8).double()
            )
            assert torch.equal(out[:, i, part], expected[:, part])
        if not causal:
            assert torch.equal(out[:, i, 2 * count :], x[:, i, 2 * count :])


@pytest.mark.parametrize("layer", [TemporalShift(16, causal=True), TemporalShift(16, axis="h")])
def test_stepping_a_shift_equals_forward(layer):
    x = tokens(GRID, 16)
    out, state = stepped(layer, x, GRID)
    assert torch.equal(out, layer(x, GRID))
    after, _ = layer.step(x[:, :6], state)
    again, _ = layer.step(x[:, :6], state)
    assert torch.equal(after, again)


def test_prefix_tokens_pass():
    grid = Grid(t=3, h=2, prefix=1)
    x = tokens(grid, 16)
    out = TemporalShift(16)(x, grid)
    assert torch.equal(out[:, :1], x[:, :1]) and torch.equal(out[:, 1:], TemporalShift(16)(x[:, 1:], Grid(t=3, h=2)))


def shifted_block():
    layers = [
        TemporalShift(16, causal=True),
        GridConv(16, {"h": 3, "w": 3}, depthwise=False),
        nn.GELU(),
        nn.Linear(16, 16),
    ]
    return Block([Chain(layers)], mlp=None).double()


def test_a_chain_is_its_layers_one_after_the_other():
    torch.manual_seed(0)
    block, x = shifted_block(), tokens(GRID, 16)
    shift, conv, _, last = block.mixers[0].layers
    expected = x + last(nn.functional.gelu(conv(shift(block.norms[0](x), GRID), GRID)))
    torch.testing.assert_close(block(x, GRID), expected)


def test_a_stack_of_shifted_convolutions_is_stepped_and_has_gradients():
    stack = Stack([shifted_block(), GridConv(16, {"t": 3, "h": 3, "w": 3}, causal="t", residual=True), shifted_block()])
    stack, x = stack.double(), tokens(GRID, 16).requires_grad_()
    inputs = [x, *stack.parameters()]
    whole, (out, _) = stack(x, GRID), stepped(stack, x, GRID)
    torch.testing.assert_close(out, whole)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), inputs), torch.autograd.grad(whole.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert all(bool(g.ne(0).any()) for g in torch.autograd.grad(stack(x, GRID).square().sum(), inputs))


def test_context_and_coords_reach_those_in_a_chain_who_take_them():
    chain = Chain([Learned(16, t=9), TemporalShift(16), Cross(Attention(16, 2))]).double()
    x, text = tokens(GRID, 16), (tokens(Grid(n=5), 16), Grid(n=5))
    layers, late = chain.layers, {"t": torch.arange(4.0).repeat_interleave(6) * 2}
    expected = layers[2](layers[1](layers[0](x, GRID, coords=late), GRID), GRID, text)
    torch.testing.assert_close(chain(x, GRID, text, coords=late), expected)
    assert chain.placed == ("t",)


def test_what_is_refused():
    for call, words in [
        (lambda: TemporalShift(4, 1 / 8), "0 of 4 channels"),
        (lambda: TemporalShift(4, 0.75), "3 of 4 channels"),
        (lambda: TemporalShift(16).init_state(1, Grid(t=1, h=2)), "causal=True"),
        (lambda: TemporalShift(16)(tokens(Grid(n=4), 16), Grid(n=4)), "names 't'"),
        (lambda: TemporalShift(16)(tokens(GRID, 16), GRID, tokens(GRID, 16)), "no context"),
        (lambda: Chain([]), "at least one layer"),
        (
            lambda: shifted_block()(tokens(GRID, 16), GRID, coords={"t": torch.zeros(24)}),
            "position codes are over the axes",
        ),
    ]:
        with pytest.raises(ChronotopeError, match=words):
            call()
    assert ct.nn.Chain is Chain
