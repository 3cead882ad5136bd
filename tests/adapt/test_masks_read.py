"""Masks that models bring: read as rules, they mean what they meant."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, composite
from torch import Tensor

import chronotope as ct
from chronotope.adapt.asked import Asked
from chronotope.adapt.masks import _READ, Mask, read_mask
from chronotope.adapt.solve import exactly, fronted, rows, solve, weights
from strategies import build, expressions, grids

DTYPES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float64: 1e-11}


@dataclass(frozen=True)
class Ask:
    """A call with a mask, and what it hides as bool [B, H, N, N], which `mask` says too unless it has numbers."""

    grid: ct.Grid
    text: str
    kind: str
    heads: int
    key_heads: int
    batch: int
    dtype: torch.dtype
    additive: bool
    causal: bool
    tail: bool
    seed: int

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


KINDS = (
    "none", "causal", "sliding", "diagonal", "left", "right", "causal left", "causal right", "sliding left", "keys",
    "heads", "blind", "any", "numbers", "gradient", "blocks", "prefix", "columns",
)  # fmt: skip


@composite
def asks(draw: DrawFn, kinds: tuple[str, ...] = KINDS) -> Ask:
    grid = draw(grids(most=30))
    heads = draw(st.sampled_from([1, 2, 4]))
    return Ask(
        grid,
        draw(expressions(grid, grid, depth=1)),
        draw(st.sampled_from(kinds)),
        heads,
        draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        draw(st.integers(1, 2)),
        draw(st.sampled_from(list(DTYPES))),
        draw(st.booleans()),
        draw(st.integers(0, 3)) == 0,
        draw(st.booleans()),
        draw(st.integers(0, 2**32 - 1)),
    )


def hidden_by(ask: Ask) -> Tensor:
    """What the mask of this kind shows, bool, in one of the shapes that models give it."""
    n, rng = ask.grid.size, ask.rng
    at = torch.arange(n)
    causal, reach = at <= at[:, None], int(rng.integers(1, n + 1))
    sliding = causal & (at > at[:, None] - reach)
    lengths = torch.from_numpy(rng.integers(1, n + 1, ask.batch))
    right = (at < lengths[:, None])[:, None, None]
    left = right.flip(-1)
    some = torch.from_numpy(rng.random((ask.batch, ask.heads, n, n)) < 0.6)
    anything = some | torch.eye(n, dtype=torch.bool)
    prefix = causal | (at < max(1, n // 2))
    blocks = at // 3 == at[:, None] // 3
    blind = anything & torch.from_numpy(rng.random((ask.batch, 1, n, 1)) < 0.7)
    columns = torch.from_numpy(rng.random((n, 1)) < 0.7)
    shown = {
        "none": torch.ones(n, n, dtype=torch.bool), "causal": causal[None, None], "sliding": sliding[None, None],
        "diagonal": torch.eye(n, dtype=torch.bool), "left": left.expand(-1, 1, n, n), "right": right,
        "causal left": causal & left, "causal right": causal & right, "sliding left": sliding & left,
        "keys": some[:, :, :1] | (at == 0), "heads": anything, "blind": blind, "any": anything[:, :1],
        "blocks": blocks, "prefix": prefix, "columns": columns,
    }  # fmt: skip
    return shown.get(ask.kind, torch.ones(n, n, dtype=torch.bool))


def mask_of(ask: Ask) -> Tensor:
    shown = hidden_by(ask)
    if ask.kind in ("numbers", "gradient"):
        numbers = torch.from_numpy(ask.rng.standard_normal((ask.batch, 1, ask.grid.size, ask.grid.size)))
        return numbers.to(ask.dtype).requires_grad_(ask.kind == "gradient")
    if not ask.additive:
        return shown
    # Models write -inf, or the least number, or one that is merely very large.
    least = ask.rng.choice([-math.inf, torch.finfo(ask.dtype).min, -1e4])
    return torch.zeros(shown.shape, dtype=ask.dtype).masked_fill(~shown, float(least))


def tensors(ask: Ask) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(ask.seed)
    return tuple(
        torch.randn(ask.batch, heads, ask.grid.size, 4, generator=generator, dtype=torch.float64).to(ask.dtype)
        for heads in (ask.heads, ask.key_heads, ask.key_heads)
    )


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shown: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v over what is shown, in float64; rows that see nothing are 0."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        shown = shown & mask if mask.dtype == torch.bool else shown
        scores = scores if mask.dtype == torch.bool else scores + mask.double()
    return scores.masked_fill(~shown, -torch.inf).softmax(-1).nan_to_num() @ v


def sees(ask: Ask, mask: Tensor) -> Tensor:
    """Pairs of which the mask, if it but hides, and the pattern leave something."""
    n = ask.grid.size
    shown = ct.plan(build(ask.text), ask.grid, heads=ask.heads).mask()
    shown = shown & torch.ones(n, n, dtype=torch.bool).tril() if ask.causal else shown
    return shown


def differ(found: Tensor, expected: Tensor, ask: Ask) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def settled(ask: Ask, mask: Tensor, shown: Tensor) -> Tensor:
    """Rows in which large finite numbers are not all that is left of the pattern.

    There a sum of -1e4 or of the least number with scores weighs keys that a mask means to hide: the reading hides
    them.
    """
    if mask.dtype == torch.bool or ask.kind in ("numbers", "gradient"):
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    left = shown & (mask > -1e3)
    return left.any(-1, keepdim=True) | ~(shown & (mask > -math.inf)).any(-1, keepdim=True)


@settings(max_examples=30, deadline=None)
@given(asks())
def test_a_mask_joins_a_pattern_as_a_dense_one_would(ask: Ask) -> None:
    q, k, v = tensors(ask)
    mask = mask_of(ask)
    asked = Asked(q, k, v, mask, ask.causal, where=build(ask.text), grid=ask.grid)
    shown = sees(ask, mask)
    expected = dense(q, k, v, mask, shown)
    out = solve(asked, lambda _: pytest.fail("the model's own way was taken"))
    assert out.dtype == ask.dtype
    rows = settled(ask, mask, shown)
    assert differ(out * rows, expected * rows, ask) < DTYPES[ask.dtype]


@settings(max_examples=30, deadline=None)
@given(asks(tuple(kind for kind in KINDS if kind != "gradient")))
def test_a_reading_says_what_the_mask_says(ask: Ask) -> None:
    mask, n = mask_of(ask), ask.grid.size
    pattern, added = read_mask(mask, ask.dtype).on(ask.grid)
    shown = ct.plan(pattern, ask.grid).mask()
    found = torch.zeros(1, 1, n, n, dtype=torch.float64).masked_fill(~shown, -torch.inf)
    found = found if added is None else found + added.double()
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    told = zeros.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
    least = torch.finfo(ask.dtype).min / 2
    expected = told.double().masked_fill(told <= least, -torch.inf) if added is None or pattern != ct.full() else told
    both = torch.broadcast_tensors(found, expected.double())
    hides = [x <= least for x in both]
    assert torch.equal(*hides)
    assert torch.equal(*(x.masked_fill(h, 0) for x, h in zip(both, hides, strict=True)))


RULES: list[tuple[str, str]] = [
    ("none", "none"), ("causal", "causal"), ("left", "none"), ("right", "none"), ("causal left", "causal"),
    ("causal right", "causal"), ("keys", "none"), ("any", "other"), ("numbers", "other"), ("gradient", "other"),
    ("blind", "other"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rule"), RULES)
@pytest.mark.parametrize("additive", [False, True])
def test_what_a_rule_says_is_recognised(kind: str, rule: str, additive: bool) -> None:
    grid = ct.Grid(n=12)
    for seed in range(5):
        ask = Ask(grid, "full()", kind, 2, 1, 2, torch.float32, additive, False, False, seed)
        mask = mask_of(ask)
        if mask.dtype != torch.bool and bool((mask == -1e4).any()):
            continue  # scores could outweigh it, so it is no rule
        if additive and not bool((mask.detach() > -1e3).any(-1).all()):
            rule = "other"  # a query that sees nothing weighs all alike where the numbers are finite
        assert read_mask(mask, torch.float32).rule == rule


def test_a_window_into_the_past_is_a_reach() -> None:
    at = torch.arange(9)
    for reach in range(1, 9):
        found = read_mask((at <= at[:, None]) & (at > at[:, None] - reach), torch.float32)
        assert (found.rule, found.reach) == ("reach", reach - 1)
        assert found.on(ct.Grid(n=9)) == (ct.window(n=(reach - 1, 0)), None)
        assert found.on(ct.Grid(h=3, w=3))[0] == ct.full()
        assert found.on(ct.Grid(prefix=1, n=8))[0] == ct.full()


@settings(max_examples=30, deadline=None)
@given(asks(), st.integers(0, 29), st.integers(1, 30))
def test_later_queries_get_rows_of_the_whole(ask: Ask, start: int, count: int) -> None:
    """In decoding, under every mask that has as many rows or one."""
    n = ask.grid.size
    start = start % n
    stop = min(n, start + count)
    q, k, v = tensors(ask)
    mask = mask_of(ask)
    own = mask if mask.shape[-2] == 1 else mask[..., start:stop, :]
    shown = sees(ask, mask)
    part = shown[..., start:stop, :]
    expected = dense(q[:, :, start:stop], k, v, own, part)
    asked = Asked(q[:, :, start:stop], k, v, own, ask.causal, where=build(ask.text), grid=ask.grid, start=start)
    out = solve(asked, lambda _: pytest.fail("the model's own way was taken"))
    rows = settled(ask, own, part)
    assert differ(out * rows, expected * rows, ask) < DTYPES[ask.dtype]


@settings(max_examples=25, deadline=None)
@given(asks())
def test_a_prefix_that_lies_last_is_put_first_and_back(ask: Ask) -> None:
    """With sinks and edits of scores that see the order of the model."""
    tail = ask.grid.prefix
    q, k, v = tensors(ask)
    mask = mask_of(ask)
    asked = Asked(q, k, v, mask, ask.causal, where=build(ask.text), grid=ask.grid, tail=tail)
    shown = ct.plan(build(ask.text), ask.grid, heads=ask.heads).mask().roll((-tail, -tail), (-2, -1))
    shown = shown & torch.ones(shown.shape[-2:], dtype=torch.bool).tril() if ask.causal else shown
    expected = dense(q, k, v, mask, shown)
    rows = settled(ask, mask, shown)
    fail = lambda _: pytest.fail("the model's own way was taken")  # noqa: E731
    assert differ(solve(asked, fail) * rows, expected * rows, ask) < DTYPES[ask.dtype]
    met: list[Tensor] = []

    def edit(scores: Tensor) -> Tensor:
        met.append(scores)
        return scores

    out = solve(asked.but(scores=(edit,)), fail)
    assert differ(out * rows, expected * rows, ask) < DTYPES[ask.dtype]
    assert torch.equal(*torch.broadcast_tensors(met[0] > -torch.inf, shown & hides_nothing(asked)))


def hides_nothing(asked: Asked) -> Tensor:
    """Pairs to which the mask adds a number, or which it shows."""
    assert asked.mask is not None
    return asked.mask if asked.mask.dtype == torch.bool else asked.mask > -torch.inf


@settings(max_examples=20, deadline=None)
@given(asks(("none", "causal", "keys", "heads", "numbers")))
def test_sinks_take_their_share(ask: Ask) -> None:
    """A logit of its own in each head, by the pattern as with weights in memory."""
    q, k, v = (x.double() for x in tensors(ask))
    sinks = torch.from_numpy(ask.rng.standard_normal(ask.heads))
    asked = Asked(q, k, v, mask_of(ask), sinks=sinks, where=build(ask.text), grid=ask.grid)
    found = solve(asked, lambda _: pytest.fail("the model's own way was taken"))
    expected = solve(asked.but(scores=(lambda scores: scores,)), lambda _: pytest.fail("own"))
    group = ask.heads // ask.key_heads
    torch.testing.assert_close(weights(asked) @ v.repeat_interleave(group, 1), expected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # lse is of float64, the share of float32


@settings(max_examples=40, deadline=None)
@given(asks(), st.sampled_from(["copy_", "view", "sum"]))
def test_a_mask_that_was_changed_is_read_again(ask: Ask, how: str) -> None:
    mask = mask_of(ask).detach().clone()
    before = read_mask(mask, ask.dtype)
    assert read_mask(mask, ask.dtype) is before
    new = torch.ones_like(mask) if mask.dtype == torch.bool else torch.full_like(mask, 0.5)
    if how == "copy_":
        mask.copy_(new)
    elif how == "view":
        mask.view(-1)[:] = new.view(-1)
    elif mask.dtype == torch.bool:
        mask.zero_().logical_or_(new)
    else:
        mask.zero_().add_(new)
    again = read_mask(mask, ask.dtype)
    assert again is not before
    assert torch.equal(again.own, torch.zeros_like(again.own) if mask.dtype == torch.bool else new)


@pytest.mark.parametrize("make", [torch.zeros, torch.ones])
def test_a_new_mask_at_the_same_address_is_read_anew(make: Callable[..., Tensor]) -> None:
    """Ids of objects come back; readings do not."""
    for number in range(200):
        shown = torch.ones(6, 6, dtype=torch.bool) if number % 2 else torch.ones(6, 6, dtype=torch.bool).tril()
        assert read_mask(shown, torch.float32).rule == ("none" if number % 2 else "causal")
        del shown


def test_readings_end_with_their_masks() -> None:
    """Neither masks, N x N, nor what was made of them are held for longer than the model holds them."""
    gc.collect()
    _READ.clear()
    masks = [torch.ones(5, 5, dtype=torch.bool).tril(), torch.randn(5, 5), torch.zeros(1, 5), torch.zeros(5, 5)]
    for mask in masks:
        read_mask(mask, torch.float32)
    assert len(_READ) == len(masks)
    del mask, masks
    assert not _READ


def test_each_dtype_has_its_reading() -> None:
    mask = torch.rand(4, 4) < 0.5
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        assert read_mask(mask, dtype).own.dtype == dtype


def test_masks_of_inference_mode_are_read() -> None:
    with torch.inference_mode():
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        assert read_mask(mask, torch.float32).rule == "causal"
        mask.fill_(True)
        assert read_mask(mask, torch.float32).rule == "none"


def test_gradients_reach_a_mask_that_learns() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)
    where, grid = ct.window(n=5), ct.Grid(n=9)
    bias = torch.randn(1, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    out = solve(Asked(q, k, v, bias, where=where, grid=grid), lambda _: pytest.fail("own"))
    weight = torch.randn_like(out)
    (found,) = torch.autograd.grad((out * weight).sum(), bias)
    expected = dense(q, k, v, bias, ct.plan(where, grid).mask())
    torch.testing.assert_close(found, torch.autograd.grad((expected * weight).sum(), bias)[0])


def test_autocast_rounds_no_scores() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    asked = Asked(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        found = weights(asked)
        out, lse = rows(q[:, :, 5:], k, v, ct.full(), ct.Grid(n=9), 5)
        with exactly(q):
            assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(found, weights(asked))
    assert torch.equal(out, rows(q[:, :, 5:], k, v, ct.full(), ct.Grid(n=9), 5)[0])
    assert lse.dtype == torch.float32


def test_fronted_keeps_what_it_does_not_move() -> None:
    asked = Asked(*torch.randn(3, 1, 2, 5, 4), torch.randn(1, 5), grid=ct.Grid(prefix=2, n=3), tail=2)
    front = fronted(asked)
    assert front.tail == 0 and front.mask is not None and torch.equal(front.mask, asked.mask[:, [3, 4, 0, 1, 2]])
    assert isinstance(read_mask(front.mask, torch.float32), Mask)
