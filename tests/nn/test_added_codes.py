"""Codes that are added to tokens: their formulas, prefix, stepping, places between, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope import Grid
from chronotope.errors import ChronotopeError
from chronotope.nn import Attention, Block, Learned, Sinusoidal, Stack

GRID = Grid(t=4, h=2, w=3)


def learned(dim=10, **options):
    return Learned(dim, **{"t": 6, "h": 2, "w": 3, **options}).double()


def zeros(grid, dim=10, batch=1):
    return torch.zeros(batch, grid.size, dim, dtype=torch.float64)


def by_hand(places, pairs, dim, base):
    """The formula of the paper, one number after the other."""
    out = torch.zeros(len(places), dim, dtype=torch.float64)
    for row, place in enumerate(places.tolist()):
        channel = 0
        for p, n in zip(place, pairs, strict=True):
            for i in range(n):
                out[row, channel], out[row, channel + 1] = math.sin(p / base ** (i / n)), math.cos(p / base ** (i / n))
                channel += 2
    return out


@pytest.mark.parametrize(("dim", "pairs"), [(6, (1, 1, 1)), (23, (3, 3, 3))])
def test_sinusoids_are_those_of_the_paper_for_each_axis(dim, pairs):
    code = Sinusoidal(dim, ("t", "h", "w"), base=100)
    torch.testing.assert_close(code(zeros(GRID, dim), GRID)[0], by_hand(GRID.coords(), pairs, dim, 100.0))
    one = Sinusoidal(8, "n")(zeros(Grid(n=5), 8), Grid(n=5))
    torch.testing.assert_close(one[0], by_hand(Grid(n=5).coords(), (4,), 8, 10000.0))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), move=st.floats(-20, 20))
def test_products_of_sinusoids_depend_on_differences_only(seed, move):
    places = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9
    code, x = Sinusoidal(12, ("a", "b")), torch.zeros(2, 6, 12, dtype=torch.float64)
    here, there = (code(x, Grid(n=6), coords=places + shift) for shift in (0.0, move))
    torch.testing.assert_close(here @ here.mT, there @ there.mT)


def test_learned_codes_add_up_over_the_axes():
    code = learned()
    x = torch.randn(2, GRID.size, 10, dtype=torch.float64)
    out = code(x, GRID)
    for t, h, w in GRID.coords().tolist():
        i = GRID.index(t=t, h=h, w=w)
        torch.testing.assert_close(
            out[:, i] - x[:, i], sum(code.tables[a][p] for a, p in zip("thw", (t, h, w), strict=True)).expand(2, -1)
        )
    out.square().sum().backward()
    assert code.tables["t"].grad[:4].ne(0).all() and code.tables["t"].grad[4:].eq(0).all()


@pytest.mark.parametrize("code", [learned(), Sinusoidal(10, ("t", "w"))], ids=lambda code: type(code).__name__)
def test_prefix_tokens_pass_unless_they_have_codes(code):
    grid = Grid(t=2, h=2, w=3, prefix=2)
    x = torch.randn(2, grid.size, 10, dtype=torch.float64)
    out = code(x, grid)
    assert torch.equal(out[:, :2], x[:, :2]) and torch.equal(out[:, 2:], code(x[:, 2:], grid.replace(prefix=0)))
    own = learned(prefix=2)
    out = own(x, grid)
    torch.testing.assert_close(out[:, :2] - x[:, :2], own.prefix.expand(2, -1, -1))
    with pytest.raises(ChronotopeError, match="2 prefix tokens"):
        own(x[:, 1:], Grid(t=2, h=2, w=3, prefix=1))


@pytest.mark.parametrize("code", [learned(), Sinusoidal(10, ("t", "h"))], ids=lambda code: type(code).__name__)
def test_a_slice_with_an_offset_is_that_slice_of_the_whole(code):
    x, one = torch.randn(2, GRID.size, 10, dtype=torch.float64), GRID.replace(t=1)
    whole = code(x, GRID)
    for t, part in enumerate(x.split(one.size, 1)):
        torch.testing.assert_close(code(part, one, offset={"t": t}), whole[:, t * 6 : t * 6 + 6])
    state, out = code.init_state(2, one), []
    for part in x.split(one.size, 1):
        y, state = code.step(part, state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), whole)


def test_a_stack_with_a_code_first_is_stepped():
    space = Attention(10, 2, where=ct.along("h", "w"))
    time = Attention(10, 2, where=ct.along("t") & ct.causal("t"))
    stack = Stack([learned(), Block([time, space])]).double()
    x, one = torch.randn(2, GRID.size, 10, dtype=torch.float64), GRID.replace(t=1)
    state, out = stack.init_state(2, one), []
    for part in x.split(one.size, 1):
        y, state = stack.step(part, state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), stack(x, GRID))
    assert not torch.allclose(stack(x, GRID), Stack(list(stack.blocks)[1:]).double()(x, GRID))
    with pytest.raises(ChronotopeError, match=r"6 codes on 't'.*6 to 6"):
        for _ in range(3):
            _, state = stack.step(x[:, :6], state)


def test_codes_between_entries_are_mixed():
    code = Learned(10, n=5).double()
    x = zeros(Grid(n=3))
    out = code(x, Grid(n=3), coords=torch.tensor([[0.0], [1.25], [4.0]]))[0]
    table = code.tables["n"]
    torch.testing.assert_close(out, torch.stack([table[0], 0.75 * table[1] + 0.25 * table[2], table[4]]))
    for place in (-0.1, 4.01):
        with pytest.raises(ChronotopeError, match="5 codes on 'n'"):
            code(x, Grid(n=3), coords=torch.tensor([[0.0], [place], [1.0]]))


@pytest.mark.parametrize("length", [6, 7, 12, 13])
def test_a_longer_grid_is_refused_or_laid_over_the_table(length):
    grid = Grid(t=length, h=2, w=3)
    if length > 6:
        with pytest.raises(ChronotopeError, match=r"6 codes on 't'.*interpolate=True"):
            learned()(zeros(grid), grid)
    code = learned(interpolate=True)
    with torch.no_grad():
        code.tables["h"].zero_()
        code.tables["w"].zero_()
    expected = torch.nn.functional.interpolate(code.tables["t"].T[None], length, mode="linear")[0].T
    torch.testing.assert_close(code(zeros(grid), grid)[0, ::6], expected)


def test_coords_by_axis_leave_the_others_to_the_grid():
    code = Sinusoidal(12, ("t", "time"))
    grid, stamps = Grid(t=5), torch.rand(2, 5, dtype=torch.float64) * 30
    x = zeros(grid, 12, 2)
    both = torch.stack([torch.arange(5.0, dtype=torch.float64).expand(2, -1), stamps], -1)
    torch.testing.assert_close(code(x, grid, coords={"time": stamps}), code(x, grid, coords=both))


def test_half_precision_keeps_its_dtype():
    x = torch.zeros(1, GRID.size, 10, dtype=torch.bfloat16)
    for code in (learned().bfloat16(), Sinusoidal(10, "t")):
        assert code(x, GRID).dtype == torch.bfloat16


def test_what_is_refused():
    for call, words in [
        (lambda: Learned(8), "an axis or more"),
        (lambda: Learned(8, t=0), "1 or more"),
        (lambda: Sinusoidal(4, ("t", "h", "w")), "every"),
        (lambda: learned()(zeros(GRID, 9), GRID), "expected"),
        (lambda: Sinusoidal(8, "x")(zeros(GRID, 8), GRID), "names 'x'"),
        (lambda: learned()(zeros(GRID), GRID, coords=torch.zeros(24, 2)), r"expected \[N, 3\]"),
    ]:
        with pytest.raises(ChronotopeError, match=words):
            call()
