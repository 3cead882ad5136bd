"""Attention over disjoint sets of keys joins to the attention over all of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import chronotope as ct
from attend import close


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Plain attention [N, D] over the keys that the mask [Nq, Nk] lets through."""
    logits = (q @ k.T).masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - torch.where(lse == -math.inf, 0.0, lse)[:, None])
    return weights @ v, lse


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 8),
    st.integers(1, 12),
    st.lists(st.integers(0, 12), max_size=4),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_split_of_the_keys(n_query: int, n_key: int, cuts: list[int], seed: int, share: float) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (n_query, n_key, n_key))
    seen = torch.rand(n_query, n_key) < share
    edges = [0, *sorted(min(cut, n_key) for cut in cuts), n_key]
    slices = [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]
    parts = [attend(q, k[s], v[s], seen[:, s]) for s in slices]
    whole = attend(q, k, v, seen)
    for found, expected in zip(ct.merge(parts), whole, strict=True):
        close(found.detach(), expected.detach())
    # The parts that see nothing have lse -inf, through whose logsumexp autograd gives NaN: keep them apart.
    if not (seen.any(1).all() and all(seen[:, s].any(1).all() for s in slices)):
        return
    douts = [torch.randn_like(x) for x in whole]
    for found, expected in zip(
        torch.autograd.grad(ct.merge(parts), [q, k, v], douts),
        torch.autograd.grad(whole, [q, k, v], douts),
        strict=True,
    ):
        close(found, expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_any_split_of_the_keys_of_a_pattern(backend: str) -> None:
    """Patterns over disjoint keys: every gradient through merge equals that of their union."""
    torch.manual_seed(0)
    grid = ct.Grid(t=4, h=3, prefix=1)
    q, k, v = (torch.randn(2, 2, grid.size, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    near, past = ct.window(t=3), ct.causal("t")
    pieces = [near & past, near & ~past, ~near & past & ct.sinks(2), ~near & past & ~ct.sinks(2)]

    def call(where: ct.Pattern) -> tuple[Tensor, Tensor]:
        out, lse = ct.attention(q, k, v, grid=grid, where=where, return_lse=True, backend=backend)
        return out, lse

    whole = call(near | past)
    # One of the parts is blind for some queries: its out is 0 and its lse -inf.
    parts = [call(piece) for piece in pieces]
    assert any((lse == -math.inf).any() for _, lse in parts)
    merged = ct.merge(parts)
    douts = [torch.randn_like(x) for x in whole]
    for found, expected in zip(merged, whole, strict=True):
        close(found.detach(), expected.detach())
    for found, expected in zip(
        torch.autograd.grad(merged, [q, k, v], douts), torch.autograd.grad(whole, [q, k, v], douts), strict=True
    ):
        close(found, expected)


def test_merge_is_associative_and_commutative() -> None:
    torch.manual_seed(0)
    parts = [(torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64) * 20) for _ in range(4)]
    whole = ct.merge(parts)
    for other in (ct.merge(parts[::-1]), ct.merge([ct.merge(parts[:2]), ct.merge(parts[2:])]), ct.merge([whole])):
        for found, expected in zip(other, whole, strict=True):
            close(found, expected)


def test_parts_that_see_nothing() -> None:
    seen = torch.randn(2, 3), torch.randn(2)
    blind = torch.full((2, 3), math.nan), torch.full((2,), -math.inf)
    for found, expected in zip(ct.merge([blind, seen, blind]), ct.merge([seen]), strict=True):
        assert torch.equal(found, expected)
    out, lse = ct.merge([blind, blind])
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_gradients_of_parts_that_see_nothing_are_zero() -> None:
    out, lse = torch.randn(2, 3, requires_grad=True), torch.full((2,), -math.inf, requires_grad=True)
    results = ct.merge([(out, lse), (out, lse)])
    for grad in torch.autograd.grad(results, [out, lse], [torch.ones(2, 3), torch.ones(2)]):
        assert (grad == 0).all()


def test_dtypes() -> None:
    parts = [(torch.randn(2, 3, dtype=torch.bfloat16), torch.randn(2)) for _ in range(2)]
    out, lse = ct.merge(parts)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.autograd.gradcheck(
        lambda a, b, x, y: ct.merge([(a, x), (b, y)]),
        [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (2, 3), (2,), (2,))],
    )


def test_far_apart_lses_do_not_overflow() -> None:
    out, lse = ct.merge([(torch.ones(1, 2), torch.tensor([5000.0])), (torch.zeros(1, 2), torch.tensor([-5000.0]))])
    assert torch.equal(out, torch.ones(1, 2))
    assert lse.item() == 5000


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([], "merge([]): give at least one (out, lse) pair"),
        ([(torch.zeros(2, 3), torch.zeros(3))], "every lse [..., N]; got ([2, 3], [3])"),
        (
            [(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(3, 3), torch.zeros(3))],
            "got ([2, 3], [2]), ([3, 3], [3])",
        ),
    ],
)
def test_errors(parts: list[tuple[Tensor, Tensor]], text: str) -> None:
    with pytest.raises(ct.ChronotopeError) as error:
        ct.merge(parts)
    assert text in str(error.value)
