"""Rounding: against float64, a kernel errs no more than twice as much as torch's own attention in the same dtype.

The law and its arithmetic are in `precision`. Memory is poisoned throughout, and NaN lies where nobody looks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import chronotope as ct
from attend import on_cpu
from precision import Bounds, Pool, Problem, Results, Run, attention, check, random_problem
from strategies import Case, cases

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
BACKENDS = pytest.mark.parametrize("backend", on_cpu())


@DTYPES
@pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_plans(dtype: torch.dtype, examples: int, count_cases: Callable[[str, int], None]) -> None:
    pools: dict[str, Pool] = defaultdict(Pool)
    done = 0

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(most=60, depth=2))
    def law(case: Case) -> None:
        nonlocal done
        bounds = Bounds.of(random_problem(case, dtype))
        for backend in on_cpu(dtype):
            pools[backend].add(bounds, bounds.check(attention(backend)))
        done += 1

    law()
    for backend, pool in pools.items():
        pool.check()
        count_cases(f"rounding by {backend} in {str(dtype).removeprefix('torch.')}", done)


GRID = ct.Grid(t=5, h=9, w=7)
SPACE = ct.along("h", "w")
# grid, pattern, heads, (B, Hk, D, Dv)
USUAL = {
    "window": (GRID, ct.window(t=3, h=5, w=3), 4, (1, 2, 32, 32)),
    "causal": (GRID, ct.causal(), 2, (2, 2, 32, 32)),
    "divided": (GRID, ct.along("t") | SPACE, 2, (2, 1, 32, 20)),
    "along": (GRID, ct.along("t"), 2, (2, 2, 32, 32)),
    "strided": (GRID, ct.strided(h=2) & ct.causal("t"), 2, (2, 2, 16, 32)),
}
TILES = ct.Grid(t=4, h=16, w=16)
LARGE = {
    "window": (TILES, ct.window(t=3, h=5, w=5), 2, (1, 1, 64, 64)),
    "causal": (TILES, ct.causal(), 2, (1, 1, 64, 64)),
}
LONG = {
    "causal": (ct.Grid(n=3000), ct.causal(), 1, (1, 1, 16, 16)),
    "sinks": (ct.Grid(n=3000), ct.sinks(4) | ct.window(n=5), 1, (1, 1, 16, 16)),
}
TABLES = {"usual": USUAL, "large": LARGE, "long": LONG}


@lru_cache(maxsize=1)  # the backends come one after the other
def bounds(table: str, name: str, size: float, dtype: torch.dtype) -> Bounds:
    grid, where, heads, sizes = TABLES[table][name]
    return Bounds.of(Problem.random(ct.plan(where, grid, heads=heads), sizes, dtype, size=size), samples=1)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("size", [1.0, 4.0], ids=["usual", "peaked"])
def test_many_numbers(backend: str, name: str, dtype: torch.dtype, size: float) -> None:
    bounds("usual", name, size, dtype).check(attention(backend), large=True)


@BACKENDS
def test_one_key_takes_all(backend: str) -> None:
    """Weights of nearly 1 have errors of their own alone, however large the logits and lse."""
    plan = ct.plan(ct.along("t"), GRID, heads=2)
    Bounds.of(Problem.random(plan, (2, 2, 8, 8), torch.float32, size=16.0)).check(attention(backend), large=True)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_many_tiles(backend: str, name: str, dtype: torch.dtype) -> None:
    bounds("large", name, 1.0, dtype).check(attention(backend), large=True)


@pytest.mark.slow
@BACKENDS
@DTYPES
@pytest.mark.parametrize("name", LONG)
def test_sums_of_thousands(backend: str, name: str, dtype: torch.dtype) -> None:
    bounds("long", name, 1.0, dtype).check(attention(backend), large=True)


SMALL = ct.Grid(t=4, h=6, w=5, prefix=1)
BIASES: dict[str, Callable[[], Tensor | ct.Bias | None]] = {
    "softcap": lambda: None,
    "relative": lambda: ct.RelativeBias(4, t=1, h=2, w=1),
    "alibi": lambda: ct.Alibi(4, learned=True),
    "pairs": lambda: torch.randn(2, 4, SMALL.size, SMALL.size),
    "keys": lambda: torch.randn(SMALL.size),
}


@lru_cache(maxsize=1)
def biased(name: str, softcap: float | None, dtype: torch.dtype) -> list[Bounds]:
    """Four problems: a gradient of the bias may have few numbers."""
    plan, out = ct.plan(ct.window(t=3, h=5, w=3), SMALL, heads=4), []
    for seed in range(4):
        torch.manual_seed(seed)
        bias = BIASES[name]()
        if isinstance(bias, ct.RelativeBias):
            torch.nn.init.normal_(bias.table)
        p = Problem.random(plan, (2, 2, 16, 16), dtype, seed).biased(bias, softcap)
        out.append(Bounds.of(p, samples=2))
    return out


@BACKENDS
@DTYPES
@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
def test_biases(backend: str, name: str, softcap: float | None, dtype: torch.dtype) -> None:
    """Against the formula in torch's operators; the bias and its gradient are in the dtype too."""
    if name == "softcap" and softcap is None:
        pytest.skip("neither bias nor softcap")
    pool = Pool()
    for one in biased(name, softcap, dtype):
        pool.add(one, one.check(attention(backend), large=True))
    pool.check()


def changed(name: str, change: Callable[[Problem, Results], Tensor]) -> Run:
    """The reference, with one result replaced."""

    def run(p: Problem) -> Results:
        found = attention("reference")(p)
        return found | {name: change(p, found)}

    return run


def unnormalised(p: Problem, found: Results) -> Tensor:
    """exp(logits - lse) v: the rounding of lse is not divided out."""
    logits = p.scale * (p.q @ p.k.mT).masked_fill(~p.mask, -torch.inf)
    return torch.exp(logits - found["lse"][..., None].clamp(min=-100)) @ p.v


BROKEN = {
    "a step": changed("out", lambda p, found: found["out"] * (1 + 4 * torch.finfo(p.q.dtype).eps)),
    "unnormalised": changed("out", unnormalised),
    "unseen": changed("dk", lambda p, found: found["dk"].masked_fill(p.unseen, 1e-30)),
    "blind": changed("dq", lambda p, found: found["dq"].masked_fill(p.blind, 1e-30)),
    "leak": changed("dv", lambda p, found: found["dv"] + 0 * p.v),
    "unwritten": changed("lse", lambda p, found: torch.empty_like(found["lse"])),
    "shape": changed("dv", lambda p, found: found["dv"][..., :1]),
    "dtype": changed("dv", lambda p, found: found["dv"].double()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_law_can_be_broken(name: str) -> None:
    blind = ct.along("t") & ct.causal("t", strict=True)
    p = Problem.random(ct.plan(blind, GRID, heads=1), (2, 1, 2, 2), torch.float32, size=16.0)
    check(attention("reference"), p)
    with pytest.raises(AssertionError):
        check(BROKEN[name], p)
