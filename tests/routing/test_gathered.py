"""Attention over lists of keys: the same as under a mask, with gradients; nothing else is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import chronotope as ct


def lists(seed, batch, heads, queries, keys, most):
    """Lists without repeats, some with gaps, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(batch, heads, queries, keys, generator=generator).topk(min(most, keys)).indices
    index[torch.rand(index.shape, generator=generator) < 0.3] = -1
    index[0, 0, 0] = -1
    return index


def inputs(seed, batch, heads, kv_heads, queries, keys, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, 8), (batch, kv_heads, keys, 8), (batch, kv_heads, keys, 5)
    return [torch.randn(*s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999),
    queries=st.integers(1, 20),
    keys=st.integers(1, 30),
    most=st.integers(1, 9),
    group=st.sampled_from([1, 2]),
)
def test_it_is_attention_under_the_same_choice(seed, queries, keys, most, group):
    q, k, v = inputs(seed, 2, 4, 4 // group, queries, keys)
    index = lists(seed, 2, 4, queries, keys, most)
    where = ct.route.chosen(index, n=1)
    grids = {"grid": ct.Grid(n=queries), "key_grid": ct.Grid(n=keys)}
    found, truth = ct.route.gathered(q, k, v, index), ct.attention(q, k, v, where=where, return_lse=True, **grids)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    some = truth[1] > -torch.inf
    grads = [torch.autograd.grad(out.square().sum() + lse[some].sum(), (q, k, v)) for out, lse in (found, truth)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_a_query_without_keys_gets_zero_and_what_nobody_names_is_not_read():
    q, k, v = (x.detach() for x in inputs(0, 1, 1, 1, 3, 6))
    index = torch.tensor([[[[-1, -1], [2, -1], [4, 2]]]])
    out, lse = ct.route.gathered(q, k, v, index)
    assert out[0, 0, 0].abs().max() == 0
    assert lse[0, 0, 0] == -torch.inf
    for x in (k, v):
        x[:, :, [0, 1, 3, 5]] = torch.nan
    for x in (q, k, v):
        x.requires_grad_()
    again = ct.route.gathered(q, k, v, index)
    assert torch.equal(again[0], out)
    grads = torch.autograd.grad(again[0].sum() + again[1][..., 1:].sum(), (q, k, v))
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert grads[0][0, 0, 0].abs().max() == 0


def test_products_are_as_many_as_names():
    q, k, v = (x.detach() for x in inputs(0, 2, 4, 2, 40, 200))
    with FlopCounterMode(display=False) as count:
        ct.route.gathered(q, k, v, lists(0, 2, 4, 40, 200, 7))
    assert count.get_total_flops() == 2 * 2 * 4 * 40 * 7 * (8 + 5)


def test_pieces_of_the_queries_are_the_whole(monkeypatch):
    q, k, v = (x.detach() for x in inputs(1, 2, 2, 1, 33, 20))
    index = lists(1, 2, 2, 33, 20, 5)
    whole = ct.route.gathered(q, k, v, index)
    monkeypatch.setattr("chronotope.routing.gathered.AT_ONCE", 500)
    for a, b in zip(whole, ct.route.gathered(q, k, v, index), strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-14)


def test_bfloat16_and_no_keys_at_all():
    q, k, v = (x.detach() for x in inputs(2, 1, 2, 2, 9, 20, torch.float32))
    index = lists(2, 1, 2, 9, 20, 6)
    out, lse = ct.route.gathered(*(x.bfloat16() for x in (q, k, v)), index)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert (out.float() - ct.route.gathered(q, k, v, index)[0]).abs().max() < 0.05
    out, lse = ct.route.gathered(q, k, v, index[..., :0])
    assert out.abs().max() == 0
    assert bool((lse == -torch.inf).all())


def test_what_is_refused():
    q, k, v = (x.detach() for x in inputs(0, 1, 2, 2, 3, 6))
    with pytest.raises(ct.ChronotopeError, match="from 0 to 5, or -1"):
        ct.route.gathered(q, k, v, torch.full((1, 2, 3, 1), 6))
    with pytest.raises(ct.ChronotopeError, match="H a multiple of Hk"):
        ct.route.gathered(q, *(x.repeat(1, 2, 1, 1)[:, :3] for x in (k, v)), torch.zeros(1, 2, 3, 1, dtype=torch.int64))
