"""Buckets by direction, and blocks of sorted orders."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.routing.buckets import gray_place
from chronotope.routing.facing import Facing
from chronotope.routing.tokens import back, take


@given(st.integers(1, 14))
def test_buckets_that_follow_each_other_differ_in_one_side(bits):
    order = gray_place(torch.arange(1 << bits)).argsort()
    assert torch.equal(order.sort().values, torch.arange(1 << bits))
    changed = order[1:] ^ order[:-1]
    assert bool(((changed & (changed - 1)) == 0).all())


@given(st.integers(0, (1 << 62) - 1))
def test_the_place_of_a_word_is_the_inverse_of_the_gray_code(place):
    assert int(gray_place(torch.tensor(place ^ (place >> 1)))) == place


def test_the_hash_is_of_the_direction_and_close_ones_meet():
    hashed = ct.route.Buckets(8, seed=3)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 400, 32, generator=rng)
    number = hashed(x)
    assert int(number.min()) >= 0 and int(number.max()) < 256
    assert torch.equal(hashed(7 * x), number)
    near = hashed(x + 0.02 * torch.randn(x.shape, generator=rng))
    assert float((near == number).double().mean()) > 0.8
    assert float((hashed(x.roll(1, 2)) == number).double().mean()) < 0.05
    assert torch.equal(ct.route.Buckets(0)(x), torch.zeros(2, 3, 400, dtype=torch.int64))
    with pytest.raises(ct.ChronotopeError, match="from 0 to 62"):
        ct.route.Buckets(-1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 25), st.sampled_from([None, 1, 3, 8]))
def test_every_key_faces_one_block_or_each_query_as_many_keys(nq, nk, block, step):
    facing = Facing.blocks(nq, nk, block) if step is None else Facing.band(nq, nk, block, step)
    assert len(facing.start) == -(-nq // facing.size)
    keys = facing.keys(torch.tensor([nk, nk // 2]), nk)
    if step is None:
        assert facing.size <= block
        assert sorted(x for x in keys[0].flatten().tolist() if x >= 0) == list(range(nk))
        if nq == nk:
            assert int(facing.width.max()) == facing.size
    else:
        assert bool((facing.width == min(block, nk)).all())
    assert int(keys[1].max()) < max(1, nk // 2)
    beyond = facing.beyond(torch.arange(nk)[None, None], nk)[0, 0]
    faced = torch.zeros(len(facing.start), nk + 1, dtype=torch.bool).scatter_(1, keys[0, 0] % (nk + 1), True)[:, :nk]
    assert torch.equal(beyond, ~faced)


def test_back_undoes_take():
    x = torch.randn(2, 3, 20, 4, generator=torch.Generator().manual_seed(0))
    order = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(1)).argsort(-1)
    assert torch.equal(back(take(x, order), order), x)
