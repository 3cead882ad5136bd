"""No element is left unwritten, and what nobody sees changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import chronotope as ct
from attend import on_cpu, random_call
from strategies import Case, cases

BACKENDS = pytest.mark.parametrize("backend", on_cpu())
GRID = ct.Grid(t=3, h=5, prefix=1)


@pytest.mark.usefixtures("poisoned")
def test_the_poison_works() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.zeros(2).new_empty(2).isnan().all()
    assert torch.empty_like(torch.zeros(2)).isnan().all()


@pytest.mark.usefixtures("poisoned")
@BACKENDS
def test_no_element_is_left_unwritten(backend: str) -> None:
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(most=30, depth=2))
    def law(case: Case) -> None:
        call = random_call(case, torch.float32)
        out, lse = call.run(backend=backend)
        for found in call.gradients(torch.ones_like(out), torch.ones_like(lse), backend=backend):
            assert not found.isnan().any()

    law()


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, GRID.size, 4) for heads in (2, 1, 1)]


@BACKENDS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bias", ["none", "tensor", "relative"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_unseen_keys_and_blind_queries_do_not_matter(
    backend: str, value: float, bias: str, softcap: float | None
) -> None:
    where = ct.window(t=1) & ct.segments([0] * 5 + [1] * 5 + [2] * 5) & ~ct.segments([0] * 5 + [1] * 5 + [2] * 5)
    where = where | (ct.causal("t", strict=True) & ct.along("t") & ~ct.full()) | (~ct.causal("t") & ct.window(t=3))
    mask = ct.plan(where, GRID).mask()
    unseen, blind = ~mask.any(0), ~mask.any(1)
    assert unseen.any()
    assert blind.any()
    given_bias = {"none": None, "tensor": torch.randn(GRID.size, GRID.size), "relative": ct.RelativeBias(2, t=1)}[bias]

    def run(q: Tensor, k: Tensor, v: Tensor, given_bias: Tensor | ct.Bias | None) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = ct.attention(
            *leaves, grid=GRID, where=where, bias=given_bias, softcap=softcap, return_lse=True, backend=backend
        )
        grads = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])
        return [out.detach(), lse.detach(), *grads]

    clean = run(*tensors(), given_bias)
    q, k, v = tensors()
    q[:, :, blind] = k[:, :, unseen] = v[:, :, unseen] = value
    if isinstance(given_bias, Tensor):
        given_bias = given_bias.masked_fill(~mask, value)
    found = run(q, k, v, given_bias)
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x, y)
    out, lse, dq, dk, dv = found
    assert (out[:, :, blind] == 0).all()
    assert (lse[:, :, blind] == -math.inf).all()
    assert (dq[:, :, blind] == 0).all()
    assert (dk[:, :, unseen] == 0).all()
    assert (dv[:, :, unseen] == 0).all()


@BACKENDS
def test_nobody_sees_anything(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out, lse = ct.attention(q, k, v, grid=GRID, where=ct.nothing(), return_lse=True, backend=backend)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    for grad in torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), torch.ones_like(lse)]):
        assert (grad == 0).all()


@BACKENDS
def test_a_bias_of_minus_infinity_hides_keys(backend: str) -> None:
    q, k, v = tensors()
    mask = torch.rand(GRID.size, GRID.size) < 0.5
    mask[3] = False
    hidden = torch.zeros(GRID.size, GRID.size).masked_fill(~mask, -math.inf).requires_grad_()
    q.requires_grad_()
    out, lse = ct.attention(q, k, v, grid=GRID, bias=hidden, return_lse=True, backend=backend)
    for head in range(2):
        for i in range(GRID.size):
            logits = (q[0, head, i] @ k[0, 0].T / 2)[mask[i]]
            expected = torch.softmax(logits, 0) @ v[0, 0][mask[i]]
            torch.testing.assert_close(out[0, head, i], expected)
            torch.testing.assert_close(lse[0, head, i], torch.logsumexp(logits, 0))
    dq, dbias = torch.autograd.grad(out.sum(), [q, hidden])
    assert dq.isfinite().all()
    assert dbias.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_logits_do_not_overflow(backend: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors())
    out, lse = ct.attention(q * 100, k * 100, v, grid=GRID, where=ct.window(t=3, h=3), return_lse=True, backend=backend)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert float(out.abs().max()) <= float(v.abs().max())
