"""Attention over lists of neighbours: against loops and against dense attention, unseen edges, and lists on grids."""

import math

import pytest
import torch

import chronotope as ct
from chronotope.nn.edges import EdgeAttention, neighbours


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(edge_dim=3, seed=0):
    torch.manual_seed(seed)
    return EdgeAttention(8, 2, edge_dim).double()


def by_loops(layer, x, source, lists, edges, seen):
    """Token by token and head by head."""
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for i, row in enumerate(lists.tolist()):
            there = [n for n in range(len(row)) if seen[b, i, n]]
            if not there:
                continue
            q = layer.q(x[b, i]).view(2, 4)
            kv = layer.kv(source[b, [row[n] for n in there]])
            kv = kv + layer.edge(edges[b, i, there]) if edges is not None else kv
            k, v = (part.view(-1, 2, 4) for part in kv.chunk(2, -1))
            share = (torch.einsum("hd,nhd->nh", q, k) / math.sqrt(4)).softmax(0)
            out[b, i] = torch.einsum("nh,nhd->hd", share, v).flatten()
    return layer.out(out)


@pytest.mark.parametrize("edge_dim", [3, None])
def test_equals_loops_over_tokens_heads_and_edges(edge_dim):
    attend = layer(edge_dim)
    x, source = tokens(2, 9, 8).double(), tokens(2, 5, 8, seed=1).double()
    rng = torch.Generator().manual_seed(2)
    lists = torch.randint(5, (9, 4), generator=rng)
    seen = torch.rand(2, 9, 4, generator=rng) > 0.3
    seen[0, 3] = False
    edges = tokens(2, 9, 4, 3, seed=3).double() if edge_dim else None
    got = attend(x, source, lists, edges, seen)
    assert (got - by_loops(attend, x, source, lists, edges, seen)).abs().max() <= 1e-10
    assert torch.equal(got[0, 3], torch.zeros(8).double())
    everything = torch.ones_like(seen)
    assert torch.equal(attend(x, source, lists, edges, everything), attend(x, source, lists, edges))
    assert torch.equal(attend(x, source, lists, edges, seen[:1])[0], got[0])


def test_without_features_a_list_along_an_axis_is_attention_along_it():
    grid, attend = ct.Grid(t=3, v=4, k=2), layer(None)
    x = tokens(2, grid.size, 8).double()
    plain = ct.nn.Attention(8, 2).double()
    plain.qkv.weight.data = torch.cat((attend.q.weight, attend.kv.weight)).data
    plain.out.load_state_dict(attend.out.state_dict())
    for axis in grid.axes:
        plain.where = ct.along(axis)
        assert (attend(x, x, neighbours(grid, axis)) - plain(x, grid)).abs().max() <= 1e-10


def test_lists_are_the_tokens_that_differ_in_one_axis():
    grid = ct.Grid(t=3, v=4, k=2, prefix=1)
    for axis in grid.axes:
        seen = torch.zeros(grid.size, grid.size, dtype=torch.bool)
        seen[1:].scatter_(1, neighbours(grid, axis), True)
        mask = ct.plan(ct.along(axis), grid).mask()
        assert torch.equal(seen[1:, 1:], mask[1:, 1:])
        assert neighbours(grid, axis).diff(dim=1).gt(0).all()


def test_gradients_reach_edges_and_hidden_ones_get_none():
    attend, lists = layer(), neighbours(ct.Grid(t=4), "t")
    x, edges = tokens(1, 4, 8).double().requires_grad_(), tokens(1, 4, 4, 3).double().requires_grad_()
    seen = lists < torch.arange(4)[:, None]  # strictly before
    out = attend(x, x, lists, edges, seen[None])
    assert torch.equal(out[:, 0], torch.zeros(1, 8).double())
    out.square().sum().backward()
    assert edges.grad.isfinite().all()
    assert torch.equal(edges.grad[0].abs().amax(-1) > 0, seen)
    assert all(p.grad is not None for p in attend.parameters())


def test_what_is_refused():
    lists = neighbours(ct.Grid(t=4), "t")
    with pytest.raises(ct.ChronotopeError, match="edges missing"):
        layer()(tokens(1, 4, 8).double(), tokens(1, 4, 8).double(), lists)
    with pytest.raises(ct.ChronotopeError, match="edges not expected"):
        layer(None)(tokens(1, 4, 8).double(), tokens(1, 4, 8).double(), lists, tokens(1, 4, 4, 3).double())
    with pytest.raises(ct.ChronotopeError, match="not a multiple of heads=3"):
        EdgeAttention(8, 3)
    with pytest.raises(ct.ChronotopeError, match="neighbours names 'v'"):
        neighbours(ct.Grid(t=4), "v")
