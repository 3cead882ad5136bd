# ruff: noqa: E501 (one answer to a line)
"""Bad input is answered with what was given and what was expected; each line here is the text of one answer."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import chronotope as ct

GRID = ct.Grid(t=3, h=4, prefix=1)


def attend(
    q: tuple[int, ...] = (2, 4, 13, 8),
    k: tuple[int, ...] = (2, 2, 13, 8),
    v: tuple[int, ...] = (2, 2, 13, 5),
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3,
    devices: tuple[str, ...] = ("cpu",) * 3,
    **kwargs: Any,
) -> object:
    tensors = [torch.zeros(s, dtype=d, device=x) for s, d, x in zip((q, k, v), dtypes, devices, strict=True)]
    return ct.attention(*tensors, **{"grid": GRID, **kwargs})


HALF, FULL = torch.float16, torch.float32
ANSWERS: list[tuple[Callable[[], object], str]] = [
    # Grids.
    (lambda: ct.Grid(t=0), "Grid axis t=0: an axis needs a size of at least 1"),
    (lambda: ct.Grid(t=8, h=-4), "Grid axis h=-4: an axis needs a size of at least 1"),
    (lambda: ct.Grid.parse("t=8,t=8"), "names the axis 't' twice"),
    # Axes named twice, or unknown to the grid.
    (lambda: ct.causal("t", "t"), "causal('t', 't') names the axis 't' twice"),
    (lambda: ct.along("h", "t", "h"), "along('h', 't', 'h') names the axis 'h' twice"),
    (lambda: ct.plan(ct.window(x=3), GRID), "window(x=3) names 'x', but Grid(t=3, h=4, prefix=1) has the axes 't', 'h'"),
    (lambda: ct.plan(ct.along("x"), GRID), "along('x') names 'x', but Grid(t=3, h=4, prefix=1) has the axes 't', 'h'"),
    (lambda: ct.plan(ct.causal("x"), GRID), "causal('x') names 'x'"),
    (lambda: ct.plan(ct.blocks(x=2), GRID), "blocks(x=2) names 'x'"),
    (lambda: ct.plan(ct.strided(x=2), GRID), "strided(x=2) names 'x'"),
    (lambda: ct.plan(ct.graph([[0], [1]]), GRID), "graph(axis='v') names 'v'"),
    (lambda: ct.plan(ct.full() & ~(ct.window(x=3) | ct.full()), GRID), "window(x=3) names 'x'"),
    (lambda: ct.plan(ct.per_head([ct.full(), ct.window(x=3)]), GRID), "window(x=3) names 'x'"),
    (lambda: ct.plan(ct.window(x=3), GRID, ct.Grid(t=2)), "names the axes ['x'], which neither Grid(t=3, h=4, prefix=1) nor Grid(t=2) has"),
    (lambda: attend(bias=ct.RelativeBias(4, x=1)), "RelativeBias has a table over ['x'], but the grid has the axes ['t', 'h']"),
    (lambda: attend(bias=ct.Alibi(4, axes=("x",))), "Alibi measures distance on ['x'], but the grid has the axes ['t', 'h']"),
    # Windows.
    (lambda: ct.window(t=4), "window(t=4): an even window has no centre; give an odd size such as 5, or (before, after) such as (2, 1)"),
    (lambda: ct.window(t=0), "window(t=0): the size must be a whole number of at least 1"),
    (lambda: ct.window(t=(-1, 2)), "window(t=(-1, 2)): expected (before, after), two counts of 0 or more"),
    (lambda: ct.window(), "window() constrains no axis"),
    (lambda: ct.window(t=3, edge="wrap"), "window(edge='wrap'): expected 'clip' or 'shift'"),
    (lambda: ct.window(t=3, dilation=0), "the dilation must be a whole number of at least 1, got 0"),
    (lambda: ct.window(t=3, dilation={"h": 2}), "names the axis 'h', which has no window"),
    (lambda: ct.plan(ct.window(t=5, edge="shift"), GRID), "5 keys do not fit on axis t=3; with edge='shift' the window must fit inside the axis"),
    (lambda: ct.plan(ct.window(h=3, dilation=2, edge="shift"), GRID), "3 keys at dilation 2 do not fit on axis h=4"),
    (lambda: ct.plan(ct.window(t=3, edge="shift"), GRID, ct.Grid(t=2)), "3 keys do not fit on axis t=2"),
    # Other patterns.
    (lambda: ct.blocks(t=0), "blocks(t=0): the block size must be a whole number of at least 1"),
    (lambda: ct.blocks(t=2, shift={"h": 1}), "blocks(shift={'h': 1}): expected whole numbers for the axes t"),
    (lambda: ct.strided(t=0), "strided(t=0): the stride must be a whole number of at least 1"),
    (lambda: ct.sinks(0), "sinks(0): the number of tokens must be a whole number of at least 1"),
    (lambda: ct.along(), "name at least one axis"),
    (lambda: ct.segments([]), "segments: expected whole numbers of shape [tokens]"),
    (lambda: ct.segments(torch.zeros(3)), "segments: expected whole numbers of shape [tokens], got torch.float32 [3]"),
    (lambda: attend(where=ct.segments([0] * 13)), "segments: 13 ids for Grid(t=3, h=4, prefix=1), which has 12 tokens without its prefix"),
    (lambda: ct.graph([[0, 1, 2]]), "graph: expected edges as whole numbers [2, E], got torch.int64 [1, 3]"),
    (lambda: ct.graph([[0], [1]], hops=0), "the number of hops must be a whole number of at least 1"),
    (lambda: attend(where=ct.graph([[0, 1], [1, 4]], axis="h")), "graph: edge 1 -> 4 is outside the axis h=4; expected nodes 0 to 3"),
    (lambda: attend(where=ct.graph([[-1], [1]], axis="h")), "graph: edge -1 -> 1 is outside the axis h=4"),
    (lambda: ct.plan(ct.predicate(lambda q, k: q.t - k.t), GRID), "returned torch.int64; expected a bool tensor"),
    (lambda: ct.plan(ct.predicate(lambda q, k: True), GRID), "returned bool; expected a bool tensor"),
    # Heads.
    (lambda: ct.per_head([]), "give a list of one plain pattern for each head"),
    (lambda: ct.per_head([ct.per_head([ct.full()])]), "give a list of one plain pattern for each head"),
    (lambda: attend(where=ct.per_head([ct.full(), ct.causal()])), "per_head([full(), causal()]) is for 2 heads, but there are 4"),
    (lambda: ct.per_head([ct.full()] * 2) & ct.per_head([ct.full()] * 3), "per_head patterns for 2 and 3 heads cannot be joined"),
    (lambda: attend(q=(2, 3, 13, 8)), "q has 3 heads, not a multiple of the 2 heads of k and v"),
    (lambda: attend(v=(2, 4, 13, 8)), "k has 2 heads and v has 4; they must have the same number"),
    (lambda: attend(bias=ct.Alibi(2)), "is for 2 heads, q has 4"),
    # Tensors that do not fit the grid or each other.
    (lambda: attend(q=(2, 4, 12, 8)), "q has 12 tokens (shape [2, 4, 12, 8]), but the grid Grid(t=3, h=4, prefix=1) has 13"),
    (lambda: attend(k=(2, 2, 14, 8)), "k has 14 tokens (shape [2, 2, 14, 8]), but the key grid Grid(t=3, h=4, prefix=1) has 13"),
    (lambda: attend(v=(2, 2, 14, 8)), "v has 14 tokens"),
    (lambda: attend(key_grid=ct.Grid(n=5)), "k has 13 tokens (shape [2, 2, 13, 8]), but the key grid Grid(n=5) has 5"),
    (lambda: attend(q=(4, 13, 8)), "q has shape [4, 13, 8]; expected [B, heads, tokens, head size]"),
    (lambda: attend(k=(2, 2, 13, 6)), "q has head size 8 and k has 6; they must be equal"),
    (lambda: attend(k=(1, 2, 13, 8)), "batch sizes differ: q 2, k 1, v 2"),
    (lambda: attend(q=(2, 4, 13, 0), k=(2, 2, 13, 0)), "an empty dimension"),
    (lambda: attend(dtypes=(FULL, HALF, FULL)), "dtypes differ: q torch.float32, k torch.float16, v torch.float32"),
    (lambda: attend(devices=("cpu", "meta", "cpu")), "devices differ: q cpu, k meta, v cpu"),
    # Bias.
    (lambda: attend(bias=torch.zeros(13, 12)), "bias of shape [13, 12] does not broadcast to [B, H, Nq, Nk] = [2, 4, 13, 13]"),
    (lambda: attend(bias=torch.zeros(2, 1, 1)), "bias of shape [2, 1, 1] does not broadcast"),
    (lambda: attend(bias=torch.zeros(1, 1, 1, 1, 1)), "bias of shape [1, 1, 1, 1, 1] does not broadcast"),
    (lambda: attend(bias=torch.zeros(13, device="meta")), "devices differ: q cpu, bias meta"),
    (lambda: attend(bias=torch.ones(13, 13, dtype=torch.bool)), "bias is torch.bool; expected floating point numbers"),
    # Numbers.
    (lambda: attend(scale=math.nan), "scale=nan: expected a finite number; the default is 1 / sqrt(D)"),
    (lambda: attend(scale=math.inf), "scale=inf: expected a finite number"),
    (lambda: attend(softcap=0.0), "softcap=0.0: expected a positive number, or None"),
    (lambda: attend(softcap=-1.0), "softcap=-1.0: expected a positive number"),
    (lambda: attend(softcap=math.nan), "softcap=nan: expected a positive number"),
    # Plans of something else.
    (lambda: attend(where=ct.plan(ct.full(), ct.Grid(n=13))), "the plan is for Grid(n=13) -> Grid(n=13), the call for Grid(t=3, h=4, prefix=1)"),
    (lambda: attend(where=ct.plan(ct.per_head([ct.full(), ct.causal()]), GRID)), "the plan is for 2 heads, q has 4"),
    (lambda: ct.plan(ct.full(), ct.Grid(n=8193)).mask(), "Plan.mask() would hold 67,125,249 pairs of Grid(n=8193)"),
    # Backends.
    (lambda: attend(backend="natve"), "backend 'natve' is unknown; there are: auto"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "text"), ANSWERS, ids=[text for _, text in ANSWERS])
def test_answers(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ct.ChronotopeError) as error:
        make()
    assert text in str(error.value)


def test_one_exception_class() -> None:
    assert issubclass(ct.ChronotopeError, ValueError)
    assert issubclass(ct.UnsupportedError, ct.ChronotopeError)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_a_backend_by_name_refuses_with_every_reason(dtype: torch.dtype) -> None:
    for name in ("torch", "reference", "auto"):
        with pytest.raises(ct.UnsupportedError) as error:
            attend(dtypes=(dtype,) * 3, devices=("meta",) * 3, backend=name)
        text = str(error.value)
        for line in ("torch", "reference") if name == "auto" else (name,):
            assert (
                f"{line}: runs on cpu, cuda, the tensors are on meta; takes float32, bfloat16, float16, float64, got {dtype}"
                in text
            )


def test_the_reference_refuses_what_does_not_fit_in_memory() -> None:
    grid = ct.Grid(n=20_000)
    q = torch.zeros(1, 1, grid.size, 1)
    with pytest.raises(ct.UnsupportedError, match="at most 268,435,456, got 400,000,000"):
        ct.attention(q, q, q, grid=grid, where=ct.window(n=3), backend="reference")


WRONG_KINDS = """
import numpy, torch, chronotope as ct
grid = ct.Grid(t=2, h=2)
x = torch.zeros(1, 1, 4, 2)
for make in (
    lambda: ct.Grid(t=2.0), lambda: ct.Grid(t="2"), lambda: ct.Grid(t=None), lambda: ct.Grid(t=2, prefix=1.0), lambda: ct.Grid(t=True),
    lambda: ct.window(t=3.0), lambda: ct.window(t="3"), lambda: ct.window(t=[1, 0]), lambda: ct.window(t=(1, 0, 0)), lambda: ct.window(t=3, dilation=1.5),
    lambda: ct.blocks(t=2, shift=1), lambda: ct.blocks(t=2, shift={"t": 0.5}), lambda: ct.strided(t=1.5), lambda: ct.sinks("3"),
    lambda: ct.along(["t", "h"]), lambda: ct.along(1), lambda: ct.causal(["t"]), lambda: ct.causal(True),
    lambda: ct.segments(["a", "b"]), lambda: ct.segments("ab"), lambda: ct.graph([[0, 1], [1]]), lambda: ct.graph("ab"), lambda: ct.graph([[0.5], [1.0]]),
    lambda: ct.predicate(3), lambda: ct.per_head(ct.full()), lambda: ct.per_head([None]), lambda: ct.per_head([ct.full(), "causal()"]),
    lambda: ct.full() & None, lambda: ct.full() | "full()", lambda: ct.parse_pattern(5), lambda: ct.parse_pattern(None),
    lambda: ct.plan("full()", grid), lambda: ct.plan(ct.full(), (2, 2)), lambda: ct.plan(ct.full(), grid, 4), lambda: ct.plan(ct.full(), grid, heads=1.5),
    lambda: ct.plan(ct.full(), grid, tile=(1, 2)), lambda: ct.plan(ct.full(), grid, tile={"t": 1.0}),
    lambda: ct.attention(x, x, x, grid=(2, 2)), lambda: ct.attention(x, x, x, grid=None), lambda: ct.attention([0], x, x, grid=grid),
    lambda: ct.attention(x.numpy(), x, x, grid=grid), lambda: ct.attention(x, x, x, grid=grid, where="full()"), lambda: ct.attention(x, x, x, grid=grid, where=[ct.full()]),
    lambda: ct.attention(x, x, x, grid=grid, bias=1.0), lambda: ct.attention(x, x, x, grid=grid, scale="a"), lambda: ct.attention(x, x, x, grid=grid, scale=torch.ones(2)),
    lambda: ct.attention(x, x, x, grid=grid, softcap="a"), lambda: ct.attention(x, x, x, grid=grid, backend=None),
    lambda: ct.RelativeBias(2, t=1.5), lambda: ct.Alibi(2, slopes=[1.0]),
):
    try:
        print("accepted", make())
    except ct.ChronotopeError as error:
        assert len(str(error)) > 20, error
    except Exception as error:
        import inspect
        print(type(error).__name__, error, inspect.getsource(make)[:60])
"""  # fmt: skip


def test_arguments_of_another_kind_are_answered_too() -> None:
    """In a process of its own, because the type checker of the tests would answer first."""
    done = subprocess.run([sys.executable, "-c", WRONG_KINDS], check=True, capture_output=True, text=True)
    assert done.stdout == ""
