"""Bias objects: what they add to the logits, and the gradients of their tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import chronotope as ct
from attend import close
from chronotope.grid import Coords

GRID = ct.Grid(t=3, h=4, prefix=2)


def expand(bias: ct.Bias, grid: ct.Grid = GRID, key_grid: ct.Grid = GRID) -> Tensor:
    """Scores [heads, Nq, Nk] of every pair."""
    q, k = Coords.of(grid, torch.arange(grid.size)), Coords.of(key_grid, torch.arange(key_grid.size))
    return bias(q.view(-1, 1), k.view(1, -1))


def test_relative_bias_reads_its_table_by_offset() -> None:
    bias = ct.RelativeBias(2, t=1, h=2)
    assert bias.table.shape == (2, 3 * 5)
    with torch.no_grad():
        bias.table.copy_(torch.randn(2, 15))
    scores = expand(bias)
    for query in ({"t": 0, "h": 0}, {"t": 2, "h": 3}, {"t": 1, "h": 1}):
        for key in ({"t": 0, "h": 0}, {"t": 2, "h": 0}, {"t": 1, "h": 3}):
            dt = max(-1, min(1, key["t"] - query["t"]))
            dh = max(-2, min(2, key["h"] - query["h"]))
            expected = bias.table.view(2, 3, 5)[:, dt + 1, dh + 2]
            assert torch.equal(scores[:, GRID.index(**query), GRID.index(**key)], expected)


def test_prefix_tokens_have_no_distance() -> None:
    for bias in (ct.RelativeBias(2, t=1), ct.Alibi(2)):
        for parameter in bias.parameters():
            torch.nn.init.ones_(parameter)
        scores = expand(bias)
        assert (scores[:, :2] == 0).all()
        assert (scores[:, :, :2] == 0).all()
        assert (scores[:, 2:, 2:] != 0).any()


def test_alibi_is_minus_slope_times_distance() -> None:
    bias = ct.Alibi(4)
    assert bias.slopes.tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    at = GRID.coords()[2:]
    distance = (at[:, None] - at[None]).abs().sum(-1)
    torch.testing.assert_close(expand(bias)[:, 2:, 2:], -bias.slopes[:, None, None] * distance)
    only_t = (at[:, None, 0] - at[None, :, 0]).abs()
    for axes in ("t", ("t",)):
        torch.testing.assert_close(expand(ct.Alibi(4, axes=axes))[:, 2:, 2:], -bias.slopes[:, None, None] * only_t)


def test_learned_slopes_are_parameters() -> None:
    assert [name for name, _ in ct.Alibi(2, learned=True).named_parameters()] == ["slopes"]
    assert not list(ct.Alibi(2).parameters())
    assert list(ct.Alibi(2).state_dict()) == ["slopes"]


def test_cross_grids_measure_between_aligned_places() -> None:
    coarse = ct.Grid(t=3, h=2)
    scores = expand(ct.Alibi(1, axes=("h",), slopes=torch.ones(1)), GRID.replace(prefix=0), coarse)[0]
    for h in range(4):
        for other in range(2):
            assert scores[h, other] == -abs(h // 2 - other)


def test_a_bias_of_no_common_axis_is_zero() -> None:
    assert (expand(ct.Alibi(2), ct.Grid(t=3), ct.Grid(h=2, prefix=1)) == 0).all()
    assert expand(ct.Alibi(2), ct.Grid(t=3), ct.Grid(h=2)).shape == (2, 3, 2)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("make", [lambda: ct.RelativeBias(4, t=2, h=1), lambda: ct.Alibi(4, learned=True)])
def test_an_object_equals_its_expansion(backend: str, make) -> None:
    """Forward, and the gradient of the table, as if every pair of tokens had its own entry."""
    torch.manual_seed(0)
    bias = make().double()
    (table,) = bias.parameters()
    torch.nn.init.normal_(table)
    q, k, v = (torch.randn(2, heads, GRID.size, 4, dtype=torch.float64) for heads in (4, 2, 2))
    where = ct.window(t=3, h=3) & ct.causal("t")
    as_object = ct.attention(q, k, v, grid=GRID, where=where, bias=bias, backend=backend)
    as_tensor = ct.attention(q, k, v, grid=GRID, where=where, bias=expand(bias), backend=backend)
    dout = torch.randn_like(as_object)
    close(as_object.detach(), as_tensor.detach())
    close(*(torch.autograd.grad(out, table, dout)[0] for out in (as_object, as_tensor)))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "shape", [(), (1,), (14,), (14, 1), (14, 14), (4, 1, 1), (4, 1, 14), (1, 14, 14), (2, 1, 14, 14), (2, 4, 1, 1)]
)
def test_tensors_broadcast(backend: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    q, k, v = (torch.randn(2, heads, GRID.size, 4, dtype=torch.float64) for heads in (4, 2, 2))
    found, whole = (
        ct.attention(q, k, v, grid=GRID, where=ct.window(h=3), bias=b, backend=backend)
        for b in (bias, bias.expand(2, 4, GRID.size, GRID.size))
    )
    close(found.detach(), whole.detach())
    dout = torch.randn_like(found)
    close(*(torch.autograd.grad(out, bias, dout)[0] for out in (found, whole)))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_bias", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_bias_may_have_a_dtype_of_its_own(backend: str, dtype: torch.dtype, of_bias: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, GRID.size, 4).to(dtype) for _ in range(3))
    for bias in (torch.randn(GRID.size, GRID.size).to(of_bias).requires_grad_(), ct.RelativeBias(2, t=1).to(of_bias)):
        learned = bias if isinstance(bias, Tensor) else bias.table
        out, lse = ct.attention(q, k, v, grid=GRID, where=ct.window(t=3), bias=bias, return_lse=True, backend=backend)
        assert out.dtype == dtype
        (grad,) = torch.autograd.grad([out.sum(), lse.sum()], learned)
        assert grad.dtype == of_bias
        assert grad.isfinite().all()
        assert grad.any()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ct.RelativeBias(4), "give an extent of 0 or more for at least one axis"),
        (lambda: ct.RelativeBias(4, t=-1), "give an extent of 0 or more"),
        (lambda: ct.Alibi(4, slopes=torch.ones(3)), "expected slopes of shape [4], got [3]"),
    ],
)
def test_errors(make, text: str) -> None:
    with pytest.raises(ct.ChronotopeError) as error:
        make()
    assert text in str(error.value)
