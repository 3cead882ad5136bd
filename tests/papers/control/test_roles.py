"""Patterns by roles of tokens: verdicts on boxes, sparse equals dense, and tiles that nobody computes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import chronotope as ct
from chronotope.adapt import Asked, At, Control, attach, control
from chronotope.papers.control import layouts
from chronotope.papers.control.roles import Layout, by_roles, seen_by
from strategies import random_boxes, tokens_in


def drawn_layout(rng, most=3):
    """Regions at random: they overlap, or are a place each, or empty; as may be the texts."""
    n, places = int(rng.integers(1, most + 1)), int(rng.integers(1, 13))
    regions = rng.random((n, places)) < rng.random((n, 1))
    return Layout(tuple(rng.integers(0, 5, n + 1).tolist()), torch.from_numpy(regions))


def random_rule(seed):
    """Any relation between roles, drawn once for each pair of them."""
    drawn = {}
    rng = torch.Generator().manual_seed(seed)
    return lambda q, k: drawn.setdefault((q, k), bool(torch.rand(1, generator=rng) < 0.5))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10000), st.booleans())
def test_verdicts_on_boxes_are_exact(seed, image_first):
    rng = np.random.default_rng(seed)
    pattern = by_roles(drawn_layout(rng).roles(image_first), random_rule(seed))
    grid = ct.Grid(n=len(pattern.ids))
    mask = pattern.mask.numpy()
    assert np.array_equal(ct.plan(pattern, grid).mask().numpy(), mask)
    q, k = random_boxes(rng, grid, 12), random_boxes(rng, grid, 12)
    blocks = [mask[np.ix_(tokens_in(q, i), tokens_in(k, i))] for i in range(12)]
    some, every = pattern.over(q, k)
    assert some.tolist() == [bool(b.any()) for b in blocks]
    assert every.tolist() == [bool(b.all()) for b in blocks]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10000))
def test_sparse_attention_equals_dense_attention(seed):
    pattern = by_roles(drawn_layout(np.random.default_rng(seed)).roles(), random_rule(seed))
    n = len(pattern.ids)
    q, k, v = torch.randn(3, 1, 2, n, 8, generator=torch.Generator().manual_seed(seed))
    out = ct.attention(q, k, v, grid=ct.Grid(n=n), where=pattern)
    blind = ~pattern.mask.any(1)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=pattern.mask | blind[:, None])
    assert (out - dense.masked_fill(blind[:, None], 0.0)).abs().max() < 1e-5


def test_equal_rules_are_equal_patterns_and_others_are_not():
    layout = Layout((2, 2), torch.ones(1, 4, dtype=torch.bool))
    own, again = (by_roles(layout.roles(), lambda q, k: q == k) for _ in range(2))
    assert own == again and hash(own) == hash(again)
    assert own != by_roles(layout.roles(), lambda q, k: True)
    with pytest.raises(
        ct.ChronotopeError, match=r"by_roles\(8 tokens of 3 roles\) on Grid\(n=7\); expected Grid\(n=8\)"
    ):
        ct.plan(own, ct.Grid(n=7))


def test_a_layout_says_what_does_not_fit():
    region = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ct.ChronotopeError, match="1 regions with 1 texts"):
        Layout((2,), region)
    with pytest.raises(ct.ChronotopeError, match=r"\[2, 4\]"):
        Layout((2, 2), region, copies=region)


class Roled(Control):
    """A pattern by roles, as pages set it."""

    def __init__(self, pattern):
        self.pattern = pattern

    def asks(self, at: At, asked: Asked) -> Asked:
        return seen_by(asked, self.pattern)


@pytest.mark.parametrize("given_mask", [None, "bool", "added"])
@pytest.mark.parametrize("attached", [False, True])
def test_it_joins_masks_and_patterns_that_are_there(given_mask, attached):
    torch.manual_seed(0)
    region = layouts.boxes(torch.tensor([[0.0, 0, 0.5, 1]]), (3, 4)).flatten(1)
    pattern = by_roles(Layout((3, 2), region).roles(), lambda q, k: not q.of or not q.of.isdisjoint(k.of))
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    x, n = torch.randn(2, 17, 16), 17
    mask = torch.rand(n, n) < 0.3
    mask.fill_diagonal_(False)
    near = ct.window(n=9) if attached else ct.full()
    allowed = pattern.mask & ct.plan(near, ct.Grid(n=n)).mask()
    hidden = ~allowed | (mask if given_mask else False)
    expected = layer(x, x, x, attn_mask=hidden, need_weights=False)[0]
    own = None if given_mask is None else mask if given_mask == "bool" else torch.where(mask, -torch.inf, 0.0)
    handle = attach(layer, where=near) if attached else None
    with control(layer, Roled(pattern)):
        found = layer(x, x, x, attn_mask=own, need_weights=False)[0]
    if handle:
        handle.remove()
    assert (found - expected).abs().max() < 1e-5


def test_tiles_of_other_regions_are_not_computed():
    regions = layouts.boxes(torch.tensor([[0.0, 0, 1, 0.5], [0.0, 0.5, 1, 1]]), (32, 32)).flatten(1)
    pattern = by_roles(Layout((0, 64, 64), regions).roles(), lambda q, k: not q.of.isdisjoint(k.of))
    plan = ct.plan(pattern, ct.Grid(n=1152), tile={"n": 64})
    assert plan.density == 0.5 and not (plan.mask() & ~pattern.mask).any()
