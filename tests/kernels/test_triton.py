"""The Triton kernels, run by Triton's interpreter on a CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import chronotope as ct
from attend import Call, random_call
from chronotope.kernels import BACKENDS
from chronotope.kernels.triton import TRITON
from strategies import Case, cases

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from chronotope.kernels.triton import backward_pass, forward_pass
from chronotope.kernels.triton.launch import Shape
from interpreted import interpreted

SLOW = pytest.mark.slow
BLOCKS = Shape(queries=16, keys=16, warps=4, stages=1)  # small, so that tiny grids have several


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    """The backend "triton" runs here, in small blocks."""
    run = (partial(forward_pass.forward, blocks=BLOCKS), partial(backward_pass.backward, blocks=BLOCKS))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    backend = replace(TRITON, devices=("cpu",), dtypes=dtypes, forward=run[0], backward=run[1], priority=-1)
    with interpreted(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "triton", backend)
        yield


def exact(call: Call) -> Call:
    """The same call in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (call.q, call.k, call.v))
    bias, parameters = call.kwargs["bias"], call.parameters
    if isinstance(bias, Tensor):
        bias = bias.detach().double().requires_grad_()
        parameters = [bias]
    elif bias is not None:
        bias = copy.deepcopy(bias).double()
        parameters = list(bias.parameters())
    return Call(q, k, v, call.kwargs | {"bias": bias}, parameters)


def compare(call: Call, given: tuple[bool, bool] = (True, True), roundings: float = 2.0**8) -> None:
    """Forward, lse and every gradient against the reference in float64: up to so many roundings of the largest."""
    torch.manual_seed(0)
    other = exact(call)
    results = other.run(backend="reference")
    douts = [torch.randn_like(y) if want else None for y, want in zip(results, given, strict=True)]
    expected = other.gradients(*douts, backend="reference")
    found = call.gradients(*(None if d is None else d.float() for d in douts), backend="triton")
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        finite = y.isfinite()
        assert torch.equal(x.double()[~finite], y[~finite])
        bound = roundings * 2.0**-24 * max(1.0, float(y[finite].abs().max()) if finite.any() else 0.0)
        torch.testing.assert_close(x.double()[finite], y[finite], rtol=0, atol=bound)


def law(count: int, most: int, given_gradients: tuple[bool, bool]) -> int:
    """Random grids, patterns, heads, biases, softcaps and tiles."""
    done = 0

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(most=most, depth=2))
    def check(case: Case) -> None:
        nonlocal done
        compare(random_call(case, torch.float32), given_gradients)
        done += 1

    check()
    return done


def test_it_equals_the_reference(count_cases: Callable[[str, int], None]) -> None:
    count_cases("attention by triton against the reference, with every gradient", law(5, 14, (True, True)))


@SLOW
@pytest.mark.parametrize("given_gradients", [(True, True), (True, False), (False, True)], ids=str)
def test_it_equals_the_reference_often(
    given_gradients: tuple[bool, bool], count_cases: Callable[[str, int], None]
) -> None:
    count_cases("attention by triton against the reference, with every gradient", law(100, 40, given_gradients))


GRID = ct.Grid(t=2, h=5, w=2, prefix=2)
DILATED = ct.window(t=3, h=3, dilation={"h": 2}) & ct.causal("t")
ALONG = ct.along("t") | ct.along("h")
OTHER = ct.Grid(t=2, h=7, w=1)
SITUATIONS: dict[str, dict[str, Any]] = {
    "separable": {"where": ct.plan(DILATED, GRID, heads=2, tile={"w": 2})},
    "packed": {"key_grid": OTHER, "where": ct.plan(ALONG, GRID, OTHER, heads=2, tile={"h": 3})},
    "relative": {"where": ct.plan(DILATED, GRID, heads=2, tile={}), "bias": ct.RelativeBias(2, t=1, h=1)},
    "alibi": {"where": ct.plan(ALONG, GRID, heads=2, tile={}), "bias": ct.Alibi(2, learned=True), "softcap": 0.7},
    "cross": {"key_grid": ct.Grid(t=5, w=5, prefix=1), "where": ct.window(t=3, w=1), "scale": -0.8},
}


def numbers(
    heads: int = 2, key_heads: int = 1, grid: ct.Grid = GRID, keys: ct.Grid = GRID, *sizes: int
) -> list[Tensor]:
    size, value_size = sizes or (5, 7)
    shapes = [(heads, grid.size, size), (key_heads, keys.size, size), (key_heads, keys.size, value_size)]
    return [torch.randn(1, *shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", SITUATIONS)
def test_tiles_of_several_blocks(name: str) -> None:
    torch.manual_seed(0)
    kwargs = {"grid": GRID, "bias": None} | SITUATIONS[name]
    learned = []
    if isinstance(kwargs["bias"], ct.Bias):
        learned = list(kwargs["bias"].parameters())
        with torch.no_grad():
            learned[0].copy_(torch.randn_like(learned[0]))
    compare(Call(*numbers(keys=kwargs.get("key_grid", GRID)), kwargs, learned))


@pytest.mark.parametrize(
    "shape",
    [(1, 2, GRID.size, GRID.size), (2, 1, GRID.size), (GRID.size, 1), pytest.param((GRID.size,) * 2, marks=SLOW)],
    ids=str,
)
def test_gradient_of_a_bias_tensor(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    bias = torch.randn(*shape).requires_grad_()
    compare(Call(*numbers(), {"grid": GRID, "where": ct.causal(), "bias": bias, "softcap": 2.0}, [bias]))


@pytest.mark.parametrize("layout", ["heads inside", "last dimension apart", pytest.param("expanded", marks=SLOW)])
def test_memory_order(layout: str) -> None:
    torch.manual_seed(0)
    q, k, v = numbers(2, 2)
    if layout == "heads inside":
        q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    elif layout == "expanded":
        k, v = (x.detach()[:, :1].expand_as(x).requires_grad_() for x in (k, v))
    else:
        q, k, v = (x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v))
    call = Call(q, k, v, {"grid": GRID, "where": ct.window(h=3), "bias": None})
    compare(call)
    out, lse = call.run(backend="triton")
    assert (out.stride(1) < out.stride(2)) == (layout == "heads inside")
    assert (lse.dtype, lse.is_contiguous()) == (torch.float32, True)


@pytest.mark.parametrize("sizes", [(20, 40), pytest.param((96, 17), marks=SLOW)], ids=str)
def test_head_sizes_are_padded(sizes: tuple[int, int]) -> None:
    grid = ct.Grid(n=17)
    torch.manual_seed(0)
    compare(Call(*numbers(2, 1, grid, grid, *sizes), {"grid": grid, "where": ct.causal(), "bias": None}))


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(most=12, depth=1))
def test_no_element_is_left_unwritten(case: Case) -> None:
    call = random_call(case, torch.float32)
    out, lse = call.run(backend="triton")
    for found in call.gradients(torch.ones_like(out), torch.ones_like(lse), backend="triton"):
        assert not found.isnan().any()


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=SLOW)])
@pytest.mark.parametrize("where", [ct.window(t=1) & ct.causal("h", strict=True), ~ct.causal()], ids=repr)
def test_unseen_keys_and_blind_queries_do_not_matter(where: ct.Pattern, value: float) -> None:
    grid = ct.Grid(t=2, h=5)
    mask = ct.plan(where, grid).mask()
    unseen, blind = ~mask.any(0), ~mask.any(1)
    assert unseen.any()
    assert blind.any()

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> list[Tensor]:
        call = Call(q, k, v, {"grid": grid, "where": where, "bias": bias}, [bias])
        out, lse = call.run(backend="triton")
        dout = torch.where(blind[:, None], value, torch.ones_like(out)) if q.isnan().any() else torch.ones_like(out)
        return call.gradients(dout, torch.ones_like(lse), backend="triton")

    torch.manual_seed(0)
    given = [*numbers(2, 1, grid, grid), torch.randn(2, grid.size, grid.size).requires_grad_()]
    clean = run(*given)
    q, k, v, bias = (x.detach().clone() for x in given)
    q[:, :, blind] = k[:, :, unseen] = v[:, :, unseen] = value
    found = run(*(x.requires_grad_() for x in (q, k, v, bias.masked_fill(~mask, value))))
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x, y)
    out, lse, dq, dk, dv, dbias = found
    assert (lse[:, :, blind] == -math.inf).all()
    assert not any(x.any() for x in (out[:, :, blind], dq[:, :, blind], dk[:, :, unseen], dv[:, :, unseen]))
    assert not dbias[:, ~mask].any()


def test_nobody_sees_anything() -> None:
    compare(Call(*numbers(), {"grid": GRID, "where": ct.nothing(), "bias": None}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (x.detach().to(dtype) for x in numbers())
    out, lse = ct.attention(q * 100, k * 100, v, grid=GRID, where=DILATED, return_lse=True, backend="triton")
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert float(out.abs().max()) <= float(v.abs().max())


def test_a_bias_of_minus_infinity_hides_keys() -> None:
    torch.manual_seed(0)
    bias = torch.zeros(GRID.size, GRID.size).masked_fill(torch.rand(GRID.size, GRID.size) < 0.5, -math.inf)
    bias[3] = -math.inf
    compare(Call(*numbers(), {"grid": GRID, "bias": bias.requires_grad_()}, [bias]))


def test_two_runs_give_the_same_bits() -> None:
    torch.manual_seed(0)
    bias = ct.RelativeBias(2, h=1)
    call = Call(*numbers(), {"grid": GRID, "where": ct.window(h=3), "bias": bias}, [bias.table])
    douts = torch.randn(1, 2, GRID.size, 7), torch.randn(1, 2, GRID.size)
    first, second = (call.gradients(*douts, backend="triton") for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_gradients_of_tables_do_not_depend_on_the_order_of_additions() -> None:
    """Programs of a GPU run in any order; here they run in order of the batch, so that is what is turned round."""
    torch.manual_seed(0)
    grid = ct.Grid(h=4, w=3)
    bias = ct.RelativeBias(1, h=1, w=0)
    x = torch.randn(4, 4, 1, grid.size, 4)  # q, k, v and dout of a batch of 4

    def gradient(order: list[int]) -> Tensor:
        q, k, v, dout = x[:, order].unbind()
        q.requires_grad_()
        out = ct.attention(q, k, v, grid=grid, where=ct.window(h=3), bias=bias, backend="triton")
        return torch.autograd.grad(out, bias.table, dout)[0]

    assert torch.equal(gradient([0, 1, 2, 3]), gradient([3, 1, 0, 2]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN
@pytest.mark.parametrize("broken", range(4), ids=["q", "k", "v", "dout"])
def test_a_gradient_that_is_not_finite_shows_in_the_tables(broken: int) -> None:
    torch.manual_seed(0)
    grid = ct.Grid(h=5)
    given = list(torch.randn(4, 1, 1, grid.size, 4))
    given[broken][0, 0, 3, 0] = math.nan
    bias = ct.RelativeBias(1, h=1)
    out = ct.attention(*given[:3], grid=grid, bias=bias, backend="triton")
    assert torch.autograd.grad(out, bias.table, given[3])[0].isnan().any()


def test_second_derivatives() -> None:
    torch.manual_seed(0)

    def twice(backend: str, inputs: list[Tensor]) -> list[Tensor]:
        out = ct.attention(*inputs, grid=GRID, where=DILATED, backend=backend)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), inputs))

    inputs = numbers()
    expected = twice("reference", [x.detach().double().requires_grad_() for x in inputs])
    for x, y in zip(twice("triton", inputs), expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=2.0**-14 * float(y.abs().max()))


def errors(found: list[Tensor], expected: list[Tensor]) -> list[tuple[float, float]]:
    """(root mean square, largest) error of each tensor."""
    gaps = [(x.double() - y).abs() for x, y in zip(found, expected, strict=True)]
    return [(float(gap.square().mean().sqrt()), float(gap.max())) for gap in gaps]


def sdpa(*tensors: Tensor, mask: Tensor) -> list[Tensor]:
    *leaves, dout = (x.detach().requires_grad_() for x in tensors)
    out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("size", [1.0, pytest.param(4.0, marks=SLOW)], ids=["usual", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", [DILATED, pytest.param(ALONG, marks=SLOW), pytest.param(ct.full(), marks=SLOW)])
def test_errors_are_at_most_twice_those_of_torch(where: ct.Pattern, dtype: torch.dtype, size: float) -> None:
    """The law of test_precision.py: 2 * (the error of torch's attention in this dtype) + half a rounding step."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, GRID.size, 32).to(dtype) for _ in range(4))
    q = q * size
    mask = ct.plan(where, GRID).mask()
    expected = sdpa(*(x.double() for x in (q, k, v, dout)), mask=mask)
    theirs = errors(sdpa(q, k, v, dout, mask=mask), expected)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ct.attention(*leaves, grid=GRID, where=where, backend="triton")
    found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    assert all(x.dtype == dtype for x in found)
    half = torch.finfo(dtype).eps / 2
    for label, mine, other, value in zip(
        ("out", "dq", "dk", "dv"), errors(found, expected), theirs, expected, strict=True
    ):
        band = half * float(value.square().mean().sqrt()), half * float(value.abs().max())
        assert mine[0] <= 2 * other[0] + band[0], (label, mine, other)
        assert mine[1] <= 2 * other[1] + band[1], (label, mine, other)


def test_what_a_route_chose() -> None:
    torch.manual_seed(0)
    grid = ct.Grid(t=4, h=6, prefix=1)
    where = (ct.route.top_blocks(2, queries={"t": 1}, t=2, h=2) & ct.causal("t")) | ct.window(h=3)
    q, k, v = (torch.randn(2, heads, grid.size, 16, requires_grad=True) for heads in (4, 2, 2))
    expected = ct.attention(q, k, v, grid=grid, where=where, return_lse=True, backend="reference")
    found = ct.attention(q, k, v, grid=grid, where=where, return_lse=True, backend="triton")
    dout = [torch.randn_like(x) for x in expected]
    wanted = torch.autograd.grad(expected, (q, k, v), dout)
    grads = torch.autograd.grad(found, (q, k, v), dout)
    for a, b in zip((*found, *grads), (*expected, *wanted), strict=True):
        assert torch.allclose(a, b, atol=2e-5), (a - b).abs().max()
