"""Grids: values with named axes, in row-major order, prefix first."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings

import chronotope as ct
from chronotope.grid import Coords, align
from strategies import grids


def test_sizes() -> None:
    grid = ct.Grid(t=8, h=32, w=16, prefix=3)
    assert grid.axes == ("t", "h", "w")
    assert grid.shape == (8, 32, 16)
    assert grid.prefix == 3
    assert grid.size == len(grid) == 8 * 32 * 16 + 3
    assert grid.places == 8 * 32 * 16
    assert grid.sizes == {"t": 8, "h": 32, "w": 16}
    assert repr(grid) == "Grid(t=8, h=32, w=16, prefix=3)"
    assert repr(ct.Grid(n=5)) == "Grid(n=5)"


@settings(deadline=None)
@given(grids())
def test_coordinates_are_row_major_after_the_prefix(grid: ct.Grid) -> None:
    expected = [[-1] * len(grid.axes)] * grid.prefix + [list(at) for at in itertools.product(*map(range, grid.shape))]
    coords = grid.coords()
    assert coords.dtype == torch.int64
    assert coords.tolist() == expected
    for token in range(grid.prefix, grid.size):
        assert grid.index(**dict(zip(grid.axes, expected[token], strict=True))) == token
    seen = Coords.of(grid, torch.arange(grid.size))
    assert seen.prefix.tolist() == [token < grid.prefix for token in range(grid.size)]
    for i, axis in enumerate(grid.axes):
        assert getattr(seen, axis)[grid.prefix :].tolist() == coords[grid.prefix :, i].tolist()
    assert seen.place[grid.prefix :].tolist() == list(range(grid.places))


@settings(deadline=None)
@given(grids())
def test_grids_are_values(grid: ct.Grid) -> None:
    twin = eval(repr(grid), {"Grid": ct.Grid})
    for other in (
        twin,
        copy.deepcopy(grid),
        pickle.loads(pickle.dumps(grid)),
        ct.Grid.from_dict(grid.to_dict()),
        grid.replace(),
    ):
        assert other == grid
        assert hash(other) == hash(grid)
    assert ct.Grid.parse(repr(grid)[5:-1]) == grid
    assert grid != grid.replace(prefix=grid.prefix + 1)
    assert grid != "a grid"


def test_the_order_of_axes_counts() -> None:
    assert ct.Grid(t=2, h=3) != ct.Grid(h=3, t=2)


def test_grids_are_frozen() -> None:
    grid = ct.Grid(t=2)
    with pytest.raises(AttributeError, match="frozen"):
        grid.prefix = 3
    with pytest.raises(AttributeError):
        grid.more = 1


def test_replace() -> None:
    grid = ct.Grid(t=8, h=4, prefix=1)
    assert grid.replace(t=1) == ct.Grid(t=1, h=4, prefix=1)
    assert grid.replace(prefix=0, h=2) == ct.Grid(t=8, h=2)


def test_parse() -> None:
    assert ct.Grid.parse("8,16,32") == ct.Grid(t=8, h=16, w=32)
    assert ct.Grid.parse("16, 32") == ct.Grid(h=16, w=32)
    assert ct.Grid.parse("4096") == ct.Grid(n=4096)
    assert ct.Grid.parse("v=25, t=8, prefix=2") == ct.Grid(v=25, t=8, prefix=2)


def test_align_is_the_place_at_the_centre() -> None:
    for n_query, n_key in itertools.product(range(1, 9), repeat=2):
        expected = [int((x + 0.5) * n_key / n_query) for x in range(n_query)]
        assert align(torch.arange(n_query), n_query, n_key).tolist() == expected


@pytest.mark.parametrize("size", [0, -1, True])
def test_axes_need_a_size(size: int) -> None:
    with pytest.raises(ct.ChronotopeError, match=rf"Grid axis t={size}.*at least 1"):
        ct.Grid(t=size)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ct.Grid(), "Grid() has no axis: name at least one"),
        (lambda: ct.Grid(prefix=2), "Grid() has no axis: name at least one"),
        (lambda: ct.Grid(t=1, prefix=-1), "Grid prefix=-1: expected the number of prefix tokens, 0 or more"),
        (lambda: ct.Grid(t=2).index(t=2), "index(t=2) on Grid(t=2): expected 0 to 1"),
        (lambda: ct.Grid(t=2).index(t=-1), "expected 0 to 1"),
        (lambda: ct.Grid(t=2, h=2).index(t=1), "give each of the axes 't', 'h' once"),
        (lambda: ct.Grid(t=2).replace(x=1), "replace names 'x', but Grid(t=2) has the axes 't'"),
        (lambda: ct.Grid.parse(""), "no axis"),
        (lambda: ct.Grid.parse("1,2,3,4"), "4 sizes without names"),
        (lambda: ct.Grid.parse("t=8,t=4"), "names the axis 't' twice"),
        (lambda: ct.Grid.parse("t=eight"), "'t=eight' is not of the form axis=size"),
        (lambda: ct.Grid.parse("t=--8"), "'t=--8' is not of the form axis=size"),
        (lambda: ct.Grid.parse("t=²"), "not of the form axis=size"),
        (lambda: ct.Grid.parse("t=8,4"), "'4' is not of the form axis=size"),
        (lambda: ct.Grid.parse("0,4"), "Grid axis h=0"),
    ],
)
def test_errors(make, text: str) -> None:
    with pytest.raises(ct.ChronotopeError) as error:
        make()
    assert text in str(error.value)


@pytest.mark.parametrize("name", ["place", "grid", "axes"])
def test_axes_must_not_hide_what_coordinates_have(name: str) -> None:
    with pytest.raises(ct.ChronotopeError, match=f"Grid axis '{name}'"):
        ct.Grid(**{name: 2})


def test_no_axis_of_that_name() -> None:
    with pytest.raises(AttributeError, match="no axis 'x'; this grid has 't'"):
        _ = Coords.of(ct.Grid(t=2), torch.arange(2)).x
