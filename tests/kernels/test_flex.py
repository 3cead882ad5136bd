"""FlexAttention over our tiles: what its kernels are told, and what they give, as far as a CPU can run them.

Its compiled CPU kernel has no lse and no gradients, so the backend is for GPUs; here its formula runs uncompiled, or
compiled down to torch's operators, and the CPU kernel shows that masks and scores compile.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, flex_attention

import chronotope as ct
from attend import close, random_call
from chronotope.kernels import BACKENDS, Backend, Facts, Scores, flex
from chronotope.kernels.relative import only_relative
from strategies import Case, cases

GRID = ct.Grid(t=3, h=5, w=4, prefix=2)
KEYS = ct.Grid(t=2, h=7)
NEAR = ct.window(t=3, h=3) & ct.causal("t")
# Said inside torch, of the tensors that scores look up in.
LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention refuses gradients on CPU for want of a kernel; its formula has them."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> str:
    """The name of a backend that runs the formula of FlexAttention as it is, on tiles padded to a multiple of 4."""
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return register(monkeypatch, partial(flex.attend, inner=flex_attention, block=4))


def register(monkeypatch: pytest.MonkeyPatch, forward: Any) -> str:
    able = replace(flex.FLEX, name="flex here", forward=forward, devices=("cpu",), also=only_relative)
    monkeypatch.setitem(BACKENDS, able.name, replace(able, dtypes=(*able.dtypes, torch.float64)))
    return able.name


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What checks the types of arguments in tests is no part of what is compiled."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch.compiler.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@LEAF
def test_the_formula_equals_the_reference(uncompiled: str, count_cases: Callable[[str, int], None]) -> None:
    done = 0

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(most=30, depth=2))
    def law(case: Case) -> None:
        nonlocal done
        call = random_call(case)
        # Tables of scores are float32; numbers of 24 bits lose nothing there, and everything else is float64.
        with torch.no_grad():
            for x in call.parameters if isinstance(call.kwargs["bias"], ct.Bias) else ():
                x.copy_(x.float())
        out, lse = call.run(backend="reference")
        torch.manual_seed(case.seed)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        found, expected = (call.gradients(dout, dlse, backend=name) for name in (uncompiled, "reference"))
        for x, y in zip(found[:5], expected[:5], strict=True):  # gradients of a bias need the compiler
            near(x, y) if isinstance(call.kwargs["bias"], ct.Alibi) else close(x, y)
        done += 1

    law()
    count_cases("FlexAttention's formula on our tables against the reference", done)


def near(found: Tensor, expected: Tensor) -> None:
    """Equal up to rounding in float32: 2^7 rounding steps of the largest number, at least of 1."""
    finite = expected.isfinite()
    assert torch.equal(found[~finite].double(), expected[~finite].double())
    if finite.any():
        largest = max(1.0, float(expected[finite].detach().abs().max()))
        gap = float((found[finite].double() - expected[finite].double()).detach().abs().max())
        assert gap <= 2**7 * 2.0**-24 * largest


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(most=40, depth=2, per_head=False))
def test_the_blocks_are_the_mask(case: Case) -> None:
    """Full blocks are visible, listed ones where `mask_mod` says so, others are not: as the plan's mask says."""
    tiles = ct.plan(case.where, case.grid, case.key_grid, tile=random_tile_of(case)).parts[0].tiles
    found = flex.tables(tiles, torch.device("cpu"), 4)
    mask, height, width = found.mask, found.q.length, found.k.length
    q, k = torch.arange(len(found.q.token))[:, None], torch.arange(len(found.k.token))[None, :]
    by_rule = mask.mask_mod(torch.tensor(0), torch.tensor(0), q, k)
    told = torch.zeros(len(q), k.shape[1], dtype=torch.bool)
    for counts, indices, full in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        for row in range(len(tiles.q.sizes)):
            for column in indices[0, 0, row, : int(counts[0, 0, row])].tolist():
                block = slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
                assert not told[block].any()  # no pair of tiles is listed twice
                told[block] = torch.ones((), dtype=torch.bool) if full else by_rule[block]
    assert torch.equal(told[found.q.place][:, found.k.place], tiles.mask())
    assert not told[found.q.place][:, ~found.k.real].any()
    assert torch.equal(by_rule[found.q.place][:, found.k.place], tiles.mask())


def random_tile_of(case: Case) -> dict[str, int]:
    return {axis: int(case.rng.integers(1, n + 1)) for axis, n in case.grid.sizes.items()}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_nobody_sees_does_not_matter(uncompiled: str, value: float) -> None:
    where = ct.window(t=1, h=1) & ~ct.sinks(4) & ct.predicate(lambda q, k: k.h != 2)
    where = where & ~ct.full() | ct.predicate(lambda q, k: (q.h > 1) & (k.h < 3))
    mask = ct.plan(where, KEYS).mask()
    unseen, blind = ~mask.any(0), ~mask.any(1)
    assert unseen.any()
    assert blind.any()
    torch.manual_seed(0)
    clean = [torch.randn(1, heads, KEYS.size, 4) for heads in (4, 2, 2)]
    q, k, v = (x.clone() for x in clean)
    q[:, :, blind] = k[:, :, unseen] = v[:, :, unseen] = value

    def run(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in tensors]
        results = ct.attention(*leaves, grid=KEYS, where=where, return_lse=True, backend=uncompiled)
        return [*results, *torch.autograd.grad(list(results), leaves, [torch.ones_like(x) for x in results])]

    for x, y in zip(run([q, k, v]), run(clean), strict=True):
        assert torch.equal(x, y)
    out, lse = run(clean)[:2]
    assert (out[:, :, blind] == 0).all()
    assert (lse[:, :, blind] == -math.inf).all()


BIASES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "relative": lambda: ct.RelativeBias(4, h=2, t=1),
    "alibi": lambda: ct.Alibi(4, learned=True),
    "tensor": lambda: torch.randn(4, 1, GRID.size, requires_grad=True),
    "number": lambda: torch.randn(1, requires_grad=True),
}


@LEAF
@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu", "unchecked")
@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_every_gradient_when_compiled(name: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled to torch's operators, which differentiates scores and masks as for a GPU, without its kernels."""
    compiled = torch.compile(flex_attention, backend="aot_eager", dynamic=False, fullgraph=True)
    backend = register(monkeypatch, partial(flex.attend, inner=compiled, block=8))
    torch.manual_seed(0)
    bias = BIASES[name]()
    learned = list(bias.parameters()) if isinstance(bias, ct.Bias) else [] if bias is None else [bias]
    if isinstance(bias, ct.RelativeBias):
        torch.nn.init.normal_(bias.table)
    q, k, v = (torch.randn(2, heads, GRID.size, 16, requires_grad=True) for heads in (4, 2, 2))
    dout, dlse = torch.randn(2, 4, GRID.size, 16), torch.randn(2, 4, GRID.size)
    where = ct.plan(ct.window(t=3, h=3) & ct.causal("t", strict=True) & ~ct.sinks(3), GRID, heads=4, tile={"h": 2})

    def run(name: str) -> list[Tensor]:
        results = ct.attention(
            q, k, v, grid=GRID, where=where, bias=bias, softcap=softcap, return_lse=True, backend=name
        )
        return [*results, *torch.autograd.grad(list(results), [q, k, v, *learned], [dout, dlse])]

    for x, y in zip(run(backend), run("reference"), strict=True):
        near(x, y)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("case", ["near", "full, softcap, alibi", "segments, relative", "cross grids, tensor"])
@torch.no_grad()
def test_masks_and_scores_compile_to_a_kernel(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ kernel of torch's compiler reads the lists of blocks; it gives out alone."""
    compiled = flex.compiled()

    def inner(*tensors: Tensor, return_aux: AuxRequest, **kwargs: Any) -> tuple[Tensor, AuxOutput]:
        out = compiled(*tensors, **kwargs)
        return out, AuxOutput(lse=out.new_zeros(out.shape[:3]))

    backend = register(monkeypatch, partial(flex.attend, inner=inner, block=16))
    torch.manual_seed(0)
    relative = ct.RelativeBias(4, h=2)
    torch.nn.init.normal_(relative.table)
    keys = KEYS if "cross" in case else GRID
    kwargs: dict[str, Any] = {
        "near": {"where": NEAR | ct.sinks(3)},
        "full, softcap, alibi": {"softcap": 2.0, "bias": ct.Alibi(4)},
        "segments, relative": {"where": ct.segments([i % 3 for i in range(60)]), "bias": relative},
        "cross grids, tensor": {"where": ct.window(t=3, h=3), "bias": torch.randn(2, 1, 1, KEYS.size)},
    }[case]
    kwargs |= {"where": ct.plan(kwargs.get("where"), GRID, keys, heads=4, tile={"t": 2, "h": 3}), "key_grid": keys}
    q, k, v = torch.randn(2, 4, GRID.size, 32), torch.randn(2, 2, keys.size, 32), torch.randn(2, 2, keys.size, 32)
    out = ct.attention(q, k, v, grid=GRID, backend=backend, **kwargs)
    near(out, ct.attention(q, k, v, grid=GRID, backend="reference", **kwargs))


def told(where: ct.Pattern, grid: ct.Grid, tile: dict[str, int], head: int = 64, bias: ct.Bias | None = None) -> str:
    """The reasons against a call on a GPU."""
    (part,) = ct.plan(where, grid, tile=tile).parts
    tensors = () if bias is None else tuple(bias.parameters())
    scores = Scores(1.0, None, bias, bias is not None, tensors, part.heads)
    return "; ".join(flex.FLEX.reasons(Facts("cuda", torch.float16, head, head), part.tiles, scores))


class Odd(ct.Bias):
    heads = 1

    def check(self, axes: tuple[str, ...]) -> None:
        return None

    def score(self, q: Any, k: Any) -> Tensor:
        return (q.t * k.t)[None].float()


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, tile = ct.Grid(t=16, h=16, w=16), {"t": 2, "h": 8, "w": 8}
    assert told(NEAR, grid, tile) == ""
    assert told(NEAR, GRID, {}, bias=ct.RelativeBias(1, t=1)) == ""
    assert "heads of 16 or more, got 8" in told(NEAR, grid, tile, head=8)
    assert "pads every tile to 128 tokens" in told(NEAR, grid, {"t": 2, "h": 2, "w": 2})
    assert "Odd gives no table" in told(NEAR, GRID, {}, bias=Odd())
    monkeypatch.setattr(flex, "MASK_BYTES", 1 << 16)
    assert "the element mask of every kind of tile pair: at most 65,536 bytes" in told(NEAR, grid, tile)
    monkeypatch.setattr(flex, "PAIRS_OF_TILES", 1000)
    assert "lists pairs of tiles in a table: at most 1,000, got 1,024" in told(NEAR, grid, tile)


def test_a_cpu_is_refused() -> None:
    """Where FlexAttention has neither lse nor gradients: see the module."""
    call = "runs on cuda, the tensors are on cpu"
    (part,) = ct.plan(NEAR, GRID).parts
    scores = Scores(1.0, None, None, False, (), part.heads)
    assert flex.FLEX.reasons(Facts("cpu", torch.float32, 64, 64), part.tiles, scores) == [call]
    assert isinstance(flex.FLEX, Backend)


def test_the_compiler_is_imported_when_used() -> None:
    script = "import sys, chronotope.kernels.flex; print('torch._dynamo' in sys.modules, 'sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


@LEAF
def test_what_a_route_chose(uncompiled: str) -> None:
    torch.manual_seed(0)
    grid = ct.Grid(t=4, h=6, prefix=1)
    where = (ct.route.top_blocks(2, queries={"t": 1}, t=2, h=2) & ct.causal("t")) | ct.window(h=3)
    q, k, v = (torch.randn(2, heads, grid.size, 16, requires_grad=True) for heads in (4, 2, 2))
    expected = ct.attention(q, k, v, grid=grid, where=where, return_lse=True, backend="reference")
    found = ct.attention(q, k, v, grid=grid, where=where, return_lse=True, backend=uncompiled)
    dout = [torch.randn_like(x) for x in expected]
    wanted = torch.autograd.grad(expected, (q, k, v), dout)
    grads = torch.autograd.grad(found, (q, k, v), dout)
    for a, b in zip((*found, *grads), (*expected, *wanted), strict=True):
        assert torch.allclose(a, b, atol=2e-5), (a - b).abs().max()
