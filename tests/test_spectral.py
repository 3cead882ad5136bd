"""Spectral places of graphs: eigenvectors, order on a path, renumbering, and rotary codes over them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope import Grid, Rope
from chronotope.errors import ChronotopeError
from chronotope.nn import Attention, Sinusoidal
from chronotope.spectral import spectral


def path(n):
    return torch.stack([torch.arange(n - 1), torch.arange(1, n)])


def ring(n):
    return torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])


def random_graph(nodes, seed):
    """A connected graph with random weights. Leaves of one node make eigenvalues coincide."""
    rng = torch.Generator().manual_seed(seed)
    tree = torch.stack(
        [torch.arange(1, nodes), torch.tensor([int(torch.randint(i, (), generator=rng)) for i in range(1, nodes)])]
    )
    more = torch.randint(nodes, (2, nodes), generator=rng)
    edges = torch.cat([tree, more[:, more[0] != more[1]]], 1)
    # One weight for a pair, however often it is listed.
    low, high = edges.amin(0), edges.amax(0)
    pairs = torch.unique(torch.stack([low, high]), dim=1)
    return pairs, torch.rand(pairs.shape[1], generator=rng, dtype=torch.float64) + 0.5


def all_to_all(nodes, seed):
    """Every pair with a random weight: no two eigenvalues are equal."""
    edges = torch.combinations(torch.arange(nodes)).T
    return edges, torch.rand(
        edges.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ) ** 3 + 0.01


@settings(max_examples=30, deadline=None)
@given(nodes=st.integers(3, 12), seed=st.integers(0, 999))
def test_columns_are_eigenvectors_of_the_random_walk(nodes, seed):
    edges, weights = random_graph(nodes, seed)
    x = spectral(edges, nodes, nodes - 1, weights)
    a = torch.zeros(nodes, nodes, dtype=torch.float64)
    a[edges[0], edges[1]] = weights
    a = a + a.T
    degree = a.sum(1)
    walked = (a @ x) / degree[:, None]
    rates = (x * walked * degree[:, None]).sum(0) / degree.sum()
    torch.testing.assert_close(walked, x * rates)
    assert bool((rates.diff() <= 1e-9).all()) and float(rates[0]) < 1 - 1e-9
    torch.testing.assert_close(x.T * degree @ x, torch.eye(nodes - 1).double() * degree.sum())


@pytest.mark.parametrize("n", [2, 3, 8, 25])
def test_a_path_is_in_order_in_its_first_vector(n):
    first = spectral(path(n), n, 1)[:, 0]
    expected = math.sqrt(2 if n > 2 else 1) * torch.cos(math.pi * torch.arange(n, dtype=torch.float64) / (n - 1))
    torch.testing.assert_close(first, expected)
    assert bool((first.diff() < 0).all())


@settings(max_examples=30, deadline=None)
@given(nodes=st.integers(4, 12), seed=st.integers(0, 999))
def test_renumbering_nodes_renumbers_their_places(nodes, seed):
    edges, weights = all_to_all(nodes, seed)
    order = torch.randperm(nodes, generator=torch.Generator().manual_seed(seed))
    x = spectral(edges, nodes, 2, weights)
    y = spectral(order[edges], nodes, 2, weights)
    torch.testing.assert_close(y[order], x, rtol=1e-6, atol=1e-6)


def test_where_eigenvalues_coincide_the_basis_comes_from_the_first_nodes():
    x = spectral(ring(7), 7, 2)
    angle = 2 * math.pi * torch.arange(7, dtype=torch.float64) / 7
    expected = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)
    torch.testing.assert_close(x[:, 0], expected[:, 0])
    # The sum of cubes of a sine over the ring is 0: the first entry that is not 0 is positive.
    torch.testing.assert_close(x[:, 1], expected[:, 1])
    assert torch.equal(spectral(ring(7), 7, 1), x[:, :1])


def test_parts_that_are_not_joined_lie_apart():
    edges = [[0, 1, 2, 4, 5], [1, 2, 3, 5, 6]]  # a path of 4, one of 3, and a node by itself
    x = spectral(edges, nodes=8, vectors=2)
    assert bool((x[7] == 0).all())
    for column, (own, other) in enumerate([(slice(0, 4), slice(4, 7)), (slice(4, 7), slice(0, 4))]):
        assert float(x[own, column].abs().max()) > 1 and float(x[other, column].abs().max()) < 1e-9
    with pytest.raises(ChronotopeError, match="8 nodes in 3 parts has 5 eigenvectors"):
        spectral(edges, nodes=8, vectors=6)


GRID = Grid(t=3, v=6)


def test_time_and_graph_share_a_head():
    x = spectral(*random_graph(6, 0)[:1], 6, 2)
    rope = Rope(("t", "v"), places={"v": x}, share={"t": 0.5, "v": 0.5})
    assert rope.pairs(22) == {"t": 5, "v": 4}
    q = torch.randn(2, 3, GRID.size, 22, dtype=torch.float64)
    columns = torch.cat([GRID.coords()[:, :1].double(), x[GRID.coords()[:, 1]]], 1)
    torch.testing.assert_close(rope(q, GRID), rope(q, coords=columns))
    # Three axes of one column each, with the pairs that the columns have.
    apart = Rope(("t", "a", "b"), share={"t": 5 / 11, "a": 2 / 11, "b": 2 / 11})
    torch.testing.assert_close(rope(q, GRID), apart(q, coords=columns))


def test_moving_all_places_changes_no_product():
    x = spectral(*random_graph(6, 1)[:1], 6, 3)
    q, k = (torch.randn(1, 2, 6, 12, dtype=torch.float64) for _ in range(2))
    grid, products = Grid(v=6), []
    for moved in (x, x + torch.tensor([3.0, -7.0, 0.5])):
        rope = Rope("v", places={"v": moved})
        products.append(rope(q, grid) @ rope(k, grid).mT)
    torch.testing.assert_close(products[0], products[1])


def test_a_layer_on_a_renumbered_graph_is_the_layer_renumbered():
    edges, weights = all_to_all(6, 2)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    layers = [
        Attention(24, 2, position=Rope(("t", "v"), places={"v": spectral(e, 6, 2, weights)}), where=ct.along("v"))
        for e in (edges, order[edges])
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 3, 6, 24)
    plain = layers[0](x.flatten(1, 2), GRID).view_as(x)
    moved = torch.empty_like(x)
    moved[:, :, order] = x
    torch.testing.assert_close(layers[1](moved.flatten(1, 2), GRID).view_as(x)[:, :, order], plain)
    layers[1].position = Rope(("t", "v"))
    assert not torch.allclose(layers[1](moved.flatten(1, 2), GRID).view_as(x)[:, :, order], plain)


def test_places_go_through_steps_crossings_and_added_codes():
    places = {"v": spectral(ring(6), 6, 2)}
    layer = Attention(24, 2, where=ct.causal("t"), position=Rope(("t", "v"), places=places)).double()
    x = torch.randn(2, GRID.size, 24, dtype=torch.float64)
    state, out = layer.init_state(2, Grid(t=1, v=6)), []
    for part in x.split(6, 1):
        y, state = layer.step(part, state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), layer(x, GRID))
    own, other = layer.position.between(GRID, Grid(v=6))
    assert torch.equal(own[:6], other) and bool((own[:, 0] == 0).all()) and bool((own[:, 1:] != 0).any())
    code = Sinusoidal(12, ("t", "v"), places=places)
    y = code(torch.zeros(1, GRID.size, 12, dtype=torch.float64), GRID)[0].view(3, 6, 12)
    torch.testing.assert_close(y[0, :, 6], places["v"][:, 0].sin())


def test_codes_with_places_are_values():
    a, b = (Rope("v", places={"v": spectral(ring(5), 5, 2)}) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != Rope("v", places={"v": spectral(path(5), 5, 2)})
    assert repr(a) == "Rope(axes=('v',), places={'v': <5 x 2>})" and a != Rope("v")
    given = torch.arange(5.0)
    rope = Rope("v", places={"v": given})
    q = torch.randn(1, 1, 5, 4)
    before = rope(q, Grid(v=5))
    given.mul_(2)
    assert torch.equal(rope(q, Grid(v=5)), before) and torch.equal(before, Rope("v")(q, Grid(v=5)))


def test_what_is_refused():
    rope = Rope(("t", "v"), places={"v": spectral(path(4), 4, 2)})
    q = torch.zeros(1, 1, 8, 12)
    for call, words in [
        (lambda: spectral([[0], [4]], 4, 1), "edges between 0 and 4 of 4 nodes"),
        (lambda: spectral([0, 1], 4, 1), r"whole numbers \[2, E\]"),
        (lambda: spectral(path(3), 3, 1, torch.tensor([1.0, 0.0])), "positive one"),
        (lambda: spectral(path(3), 3, 3), "3 nodes in 1 parts has 2 eigenvectors"),
        (lambda: Rope("v", places={"w": torch.zeros(3)}), "for some of the axes"),
        (lambda: rope(torch.zeros(1, 1, 10, 12), Grid(t=2, v=5)), "knows 4 places on 'v'"),
        (lambda: rope(q, Grid(t=2, v=4), offset={"v": 1}), r"moved along \['t'\]"),
        (lambda: rope(q, Grid(t=2, v=4), coords={"v": torch.zeros(8)}), r"among \['t'\]"),
        (lambda: rope(q, Grid(t=2, v=4), coords=torch.zeros(8, 2)), r"expected \[N, 3\]"),
        (lambda: rope(torch.zeros(1, 1, 8, 6), Grid(t=2, v=4)), "3 pairs"),
    ]:
        with pytest.raises(ChronotopeError, match=words):
            call()
