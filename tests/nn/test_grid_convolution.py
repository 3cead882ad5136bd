"""Convolution over grid axes: its formula, what it sees, stepping, prefix, gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chronotope import Grid
from chronotope.errors import ChronotopeError
from chronotope.nn import Block, GridConv, Stack
from stepping import stepped, tokens


def by_hand(layer, x, grid, dilation):
    """The sum of the formula, token by token."""
    weight = layer.conv.weight
    if weight.shape[1] == 1 and layer.dim > 1:
        weight = torch.diag_embed(weight[:, 0].movedim(0, -1)).movedim((-2, -1), (0, 1))
    out = layer.conv.bias.expand_as(x).clone()
    for i, place in enumerate(grid.coords().tolist()):
        for tap in itertools.product(*map(range, layer.size.values())):
            at = dict(zip(grid.axes, place, strict=True))
            for (axis, n), k in zip(layer.size.items(), tap, strict=True):
                at[axis] += (k - (n - 1 if axis in layer.causal else n // 2)) * dilation.get(axis, 1)
            if all(0 <= at[axis] < grid.sizes[axis] for axis in grid.axes):
                out[:, i] += x[:, grid.index(**at)] @ weight[(..., *tap)].T
    return out


CASES = {
    "shape": st.tuples(*[st.integers(1, 5)] * 3),
    "sizes": st.dictionaries(st.sampled_from("thw"), st.sampled_from([1, 3, 5]), min_size=1),
    "causal": st.booleans(),
    "dilated": st.integers(1, 2),
    "depthwise": st.booleans(),
    "seed": st.integers(0, 99),
}


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_a_convolution_is_its_formula(shape, sizes, causal, dilated, depthwise, seed):
    torch.manual_seed(seed)
    grid = Grid(**dict(zip("thw", shape, strict=True)))
    axis = next(iter(sizes))
    dilation = {axis: dilated}
    layer = GridConv(3, sizes, causal=axis if causal else (), dilation=dilation, depthwise=depthwise).double()
    x = tokens(grid, 3, seed=seed)
    torch.testing.assert_close(layer(x, grid), by_hand(layer, x, grid, dilation))


@settings(max_examples=40, deadline=None)
@given(**{**CASES, "causal": st.sampled_from([2, 3, 4])}, residual=st.booleans())
def test_stepping_equals_forward(shape, sizes, causal, dilated, depthwise, seed, residual):
    torch.manual_seed(seed)
    grid = Grid(**dict(zip("thw", shape, strict=True)))
    if "t" in sizes:
        sizes["t"] = causal  # even sizes too
    dilation = {"t": dilated} if "t" in sizes else {}
    past = ("t",) if "t" in sizes else ()
    layer = GridConv(4, sizes, causal=past, dilation=dilation, depthwise=depthwise, residual=residual).double()
    x = tokens(grid, 4)
    with torch.no_grad():
        out, state = stepped(layer, x, grid)
        torch.testing.assert_close(out, layer(x, grid))
    slices = (causal - 1) * dilated if "t" in sizes else 0
    assert state.nbytes == 2 * slices * (grid.size // shape[0]) * 4 * 8


@pytest.mark.parametrize("shape", [{"t": 5}, {"w": 5, "t": 3}, {"a": 2, "t": 4, "h": 3, "w": 2}])
def test_axes_may_stand_in_any_order_and_number(shape):
    grid = Grid(**shape)
    layer = GridConv(3, {"t": 3}, causal="t").double()
    x = tokens(grid, 3)
    torch.testing.assert_close(layer(x, grid), by_hand(layer, x, grid, {}))


def test_prefix_tokens_pass_and_nobody_sees_them():
    grid = Grid(t=3, h=2, prefix=2)
    for layer in (GridConv(4, {"t": 3, "h": 3}).double(), GridConv(4, {"h": 3}, residual=True).double()):
        x = tokens(grid, 4)
        out = layer(x, grid)
        assert torch.equal(out[:, :2], x[:, :2])
        assert torch.equal(out[:, 2:], layer(x[:, 2:], Grid(t=3, h=2)))


def test_a_residual_convolution_tells_borders_from_the_middle():
    grid = Grid(h=5, w=5)
    layer = GridConv(1, {"h": 3, "w": 3}, residual=True).double()
    torch.nn.init.ones_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    out = layer(torch.ones(1, 25, 1, dtype=torch.float64), grid).view(5, 5)
    seen = torch.tensor([2.0, 3, 3, 3, 2], dtype=torch.float64)
    assert torch.equal(out, 1 + torch.outer(seen, seen))


def test_gradients_of_stepping_are_those_of_forward():
    grid = Grid(t=4, h=3)
    stack = Stack([Block([GridConv(4, {"t": 2, "h": 3}, causal="t", depthwise=False)])]).double()
    x = tokens(grid, 4).requires_grad_()
    inputs = [x, *stack.parameters()]
    expected = torch.autograd.grad(stack(x, grid).square().sum(), inputs)
    found = torch.autograd.grad(stepped(stack, x, grid)[0].square().sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda y: stack(y, grid), (tokens(grid, 4, batch=1).requires_grad_(),))


def test_stepping_under_autocast():
    grid = Grid(t=3, h=2)
    layer, x = GridConv(4, {"t": 3, "h": 3}, causal="t"), tokens(grid, 4).float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(stepped(layer, x, grid)[0], layer(x, grid))


def test_what_is_refused():
    grid, x = Grid(t=2, h=2), tokens(Grid(t=2, h=2), 4)
    for call, words in [
        (lambda: GridConv(4, {}), "one to three axes"),
        (lambda: GridConv(4, dict.fromkeys("abcd", 3)), "one to three axes"),
        (lambda: GridConv(4, {"h": 2}), "odd unless causal"),
        (lambda: GridConv(4, {"h": 0}), "1 or more"),
        (lambda: GridConv(4, {"h": 3}, causal="t"), r"\['t'\] are not among"),
        (lambda: GridConv(4, {"h": 3}, dilation={"w": 2}), r"\['w'\] are not among"),
        (lambda: GridConv(4, {"w": 3})(x, grid), "names 'w'"),
        (lambda: GridConv(5, {"h": 3})(x, grid), r"expected \[B, 4, 5\]"),
        (lambda: GridConv(4, {"h": 3})(x, grid, x), "takes no context"),
        (lambda: GridConv(4, {"t": 3}).init_state(1, Grid(t=1, h=2)), "looks ahead"),
        (lambda: GridConv(4, {"h": 3}).init_state(1, grid), "slices of its first axis"),
    ]:
        with pytest.raises(ChronotopeError, match=words):
            call()
