"""Scan orders: bijections, neighbours, corners, prefixes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.recurrences.orders import scan_order


@st.composite
def orders(draw):
    names = draw(st.permutations(("t", "h", "w")))[: draw(st.integers(1, 3))]
    grid = ct.Grid(prefix=draw(st.integers(0, 2)), **{name: draw(st.integers(1, 5)) for name in names})
    options = {
        "axes": tuple(draw(st.permutations(names))),
        "snake": draw(st.booleans()),
        "flip": draw(st.sets(st.sampled_from(names))),
        "reverse": draw(st.booleans()),
    }
    return grid, options


@settings(max_examples=200, deadline=None)
@given(orders())
def test_orders_are_bijections_with_their_inverses(given):
    grid, options = given
    order = scan_order(grid, **options)
    assert order.visited.sort().values.tolist() == list(range(grid.size))
    assert order.visited[: grid.prefix].tolist() == list(range(grid.prefix))
    x = torch.randn(2, grid.size, 3)
    assert torch.equal(order.undo(order(x)), x)
    assert torch.equal(order(order.undo(x)), x)
    assert torch.equal(order(x.mT, 2), order(x).mT)
    back = scan_order(grid, **options | {"reverse": not options["reverse"]})
    assert torch.equal(back.visited[grid.prefix :], order.visited[grid.prefix :].flip(0))


@settings(max_examples=200, deadline=None)
@given(orders())
def test_snakes_go_from_neighbour_to_neighbour_and_rasters_along_the_last_axis(given):
    grid, options = given
    order = scan_order(grid, **options)
    coords = grid.coords()[order.visited][grid.prefix :]
    apart = coords.diff(dim=0).abs()
    if options["snake"]:
        assert (apart.sum(1) == 1).all()
    else:
        fast = grid.axes.index(options["axes"][-1])
        runs = grid.places // grid.shape[fast]
        along = (apart[:, fast] == 1) & (apart.sum(1) == 1)
        assert along.sum() >= grid.places - runs
    first = coords[-1 if options["reverse"] else 0]
    corner = [grid.sizes[axis] - 1 if axis in options["flip"] else 0 for axis in grid.axes]
    assert first.tolist() == corner


def test_orders_written_out():
    grid = ct.Grid(h=2, w=3)
    expected = {
        ("h", "w"): [0, 1, 2, 3, 4, 5],
        ("w", "h"): [0, 3, 1, 4, 2, 5],
    }
    for axes, path in expected.items():
        assert scan_order(grid, axes).visited.tolist() == path
    assert scan_order(grid, snake=True).visited.tolist() == [0, 1, 2, 5, 4, 3]
    assert scan_order(grid, ("w", "h"), snake=True).visited.tolist() == [0, 3, 4, 1, 2, 5]
    assert scan_order(grid, snake=True, flip="h").visited.tolist() == [3, 4, 5, 2, 1, 0]
    assert scan_order(grid) is scan_order(grid)


def test_a_raster_of_16_x_16_has_15_breaks():
    grid = ct.Grid(h=16, w=16)
    for axes, snake in itertools.product((("h", "w"), ("w", "h")), (False, True)):
        coords = grid.coords()[scan_order(grid, axes, snake=snake).visited]
        breaks = int((coords.diff(dim=0).abs().sum(1) != 1).sum())
        assert breaks == (0 if snake else 15)


def test_other_axes_are_refused():
    with pytest.raises(ct.ChronotopeError, match="name each of h, w once"):
        scan_order(ct.Grid(h=2, w=3), ("h",))
    with pytest.raises(ct.ChronotopeError, match="flip some of them"):
        scan_order(ct.Grid(h=2, w=3), flip="t")
