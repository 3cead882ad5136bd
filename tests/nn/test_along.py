"""Mixers of sequences along axes of a grid: line by line, stepping, states by example."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope import Grid
from chronotope.errors import ChronotopeError
from chronotope.nn import S4D, S5, Along, Attention, Block, Mamba, Mamba2, Recurrence, Stack
from stepping import stepped, tokens

SEQUENCES = {
    "s4d": lambda: S4D(8, 4),
    "s5": lambda: S5(8, 4),
    "mamba": lambda: Mamba(8, 4),
    "mamba2": lambda: Mamba2(8, 4, head_dim=8),
    "recurrence": lambda: Recurrence(8, 2),
}


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 3)] * 3),
    axes=st.sampled_from([("t",), ("h",), ("w",), ("t", "h"), ("w", "t"), ("h", "w"), ("t", "h", "w")]),
)
def test_lines_are_run_by_themselves(shape, axes):
    torch.manual_seed(0)
    grid = Grid(**dict(zip("thw", shape, strict=True)))
    mixer, x = Recurrence(8, 2).double(), tokens(grid, 8)
    out = Along(mixer, *axes)(x, grid)
    places = grid.coords()
    keys = [i for i, axis in enumerate(grid.axes) if axis not in axes]
    for key in {tuple(row) for row in places[:, keys].tolist()}:
        line = (places[:, keys] == torch.tensor(key, dtype=torch.int64)).all(1).nonzero()[:, 0]
        torch.testing.assert_close(out[:, line], mixer(x[:, line], Grid(n=len(line))))


def test_it_says_what_along_of_a_recurrence_says():
    grid = Grid(t=4, h=2, w=3)
    mixer, x = Recurrence(8, 2).double(), tokens(grid, 8)
    out = Along(mixer, "h")(x, grid)
    mixer.along = "h"
    torch.testing.assert_close(out, mixer(x, grid))


@pytest.mark.parametrize("axes", [("t",), ("w", "t"), ("h", "w")])
@pytest.mark.parametrize("name", SEQUENCES)
def test_stepping_equals_forward(name, axes):
    torch.manual_seed(1)
    grid = Grid(t=4, h=2, w=3)
    layer, x = Along(SEQUENCES[name](), *axes).double(), tokens(grid, 8)
    with torch.no_grad():
        out, state = stepped(layer, x, grid)
        torch.testing.assert_close(out, layer(x, grid), rtol=1e-6, atol=1e-8)
        # States go with their example.
        swapped, _ = layer.step(x[:, :6].flip(0), state.select(torch.tensor([1, 0])))
        torch.testing.assert_close(swapped.flip(0), layer.step(x[:, :6], state)[0])
        twice, _ = layer.step(x[:, 6:12].repeat_interleave(2, 0), state.repeat(2).to("cpu"))
        torch.testing.assert_close(twice[::2], layer.step(x[:, 6:12], state)[0])
    assert (state.nbytes > 0) == ("t" in axes)


def test_time_by_state_and_space_by_attention_is_stepped_with_its_gradients():
    grid = Grid(t=3, h=2, w=2)
    space = Attention(8, 2, where=ct.along("h", "w"))
    stack = Stack([Block([Along(S5(8, 4), "t"), space]), Block([Recurrence(8, 2, along="t"), space])]).double()
    x = tokens(grid, 8).requires_grad_()
    inputs = [x, *stack.parameters()]
    expected = torch.autograd.grad(stack(x, grid).square().sum(), inputs)
    found = torch.autograd.grad(stepped(stack, x, grid)[0].square().sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_what_is_refused():
    grid, x = Grid(t=2, h=2), tokens(Grid(t=2, h=2), 8)
    for call, words in [
        (lambda: Along(Recurrence(8, 2)), "one axis or more"),
        (lambda: Along(Recurrence(8, 2), "w")(x, grid), "names 'w'"),
        (lambda: Along(Recurrence(8, 2), "t")(x, Grid(t=3, prefix=1)), "on no line"),
        (lambda: Along(Recurrence(8, 2), "t")(x, grid, x), "no context"),
        (lambda: Along(Attention(8, 2), "t").init_state(1, Grid(t=1, h=2)), "cannot be stepped"),
    ]:
        with pytest.raises(ChronotopeError, match=words):
            call()
