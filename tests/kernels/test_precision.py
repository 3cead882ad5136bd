"""Rounding: against float64, a kernel errs no more than twice as much as torch's own attention in the same dtype.

Both are given the same mask. The bound is 2 * (torch's error) + half a rounding step of the dtype, relative to the
numbers that are compared: storing the exact result already costs so much, and torch may by luck round the other way.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import chronotope as ct

GRID = ct.Grid(t=5, h=9, w=7)
PATTERNS = {
    "window": ct.window(t=3, h=5, w=3),
    "causal": ct.causal(),
    "divided": ct.along("t") | ct.along("h", "w"),
    "along": ct.along("t"),
    "strided": ct.strided(h=2) & ct.causal("t"),
}


def errors(found: list[Tensor], exact: list[Tensor]) -> list[tuple[float, float]]:
    """(root mean square, largest) error of each tensor."""
    gaps = [(x.double() - y).abs() for x, y in zip(found, exact, strict=True)]
    return [(float(gap.square().mean().sqrt()), float(gap.max())) for gap in gaps]


def sdpa(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def ours(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, where: ct.Pattern, backend: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = ct.attention(*leaves, grid=GRID, where=where, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("size", [1.0, 4.0], ids=["usual", "peaked"])
def test_errors_are_at_most_twice_those_of_torch(backend: str, name: str, dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 2, GRID.size, 32).to(dtype) for _ in range(4))
    q = q * size
    mask = ct.plan(PATTERNS[name], GRID).mask()
    exact = sdpa(q.double(), k.double(), v.double(), dout.double(), mask)
    theirs = errors(sdpa(q, k, v, dout, mask), exact)
    found = ours(q, k, v, dout, PATTERNS[name], backend)
    assert all(x.dtype == dtype for x in found)
    step = torch.finfo(dtype).eps / 2
    for label, mine, other, value in zip(("out", "dq", "dk", "dv"), errors(found, exact), theirs, exact, strict=True):
        band = step * float(value.square().mean().sqrt()), step * float(value.abs().max())
        assert mine[0] <= 2 * other[0] + band[0], (label, mine, other)
        assert mine[1] <= 2 * other[1] + band[1], (label, mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_lse_is_float32_and_as_good(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, GRID.size, 16).to(dtype) for _ in range(3))
    where = PATTERNS["window"]
    out, lse = ct.attention(q, k, v, grid=GRID, where=where, return_lse=True, backend=backend)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    logits = (q.double() @ k.double().mT / 4).masked_fill(~ct.plan(where, GRID).mask(), -torch.inf)
    exact = torch.logsumexp(logits, -1)
    # In float32: a product of 16 terms and a sum over the keys, each term with one rounding.
    terms = 16 + int(ct.plan(where, GRID).mask().sum(1).max())
    bound = terms * torch.finfo(torch.float32).eps * float(logits[logits.isfinite()].abs().max())
    assert float((lse - exact).abs().max()) <= bound
