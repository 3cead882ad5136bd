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
from precision import Bounds, Pool, Problem, Results, Run, attention, random_problem
from strategies import Case, cases

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUNS = [pytest.param(dtype, name, id=f"{name}-{dtype}") for dtype in DTYPES for name in on_cpu(dtype)]
KERNELS = pytest.mark.parametrize("dtype, backend", RUNS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


GRID, TILES, LINE = ct.Grid(t=5, h=9, w=7), ct.Grid(t=4, h=16, w=16), ct.Grid(n=3000)
SPACE, TIME = ct.along("h", "w"), ct.along("t")
# grid, pattern, heads, (B, Hk, D, Dv)
USUAL = {
    "window": (GRID, ct.window(t=3, h=5, w=3), 4, (1, 2, 32, 32)),
    "causal": (GRID, ct.causal(), 2, (2, 2, 32, 32)),
    "divided": (GRID, TIME | SPACE, 2, (2, 1, 32, 20)),
    "along": (GRID, TIME, 2, (2, 2, 32, 32)),
    "strided": (GRID, ct.strided(h=2) & ct.causal("t"), 2, (2, 2, 16, 32)),
}
LARGE = {
    "window of 1024": (TILES, ct.window(t=3, h=5, w=5), 2, (1, 1, 64, 64)),
    "causal of 1024": (TILES, ct.causal(), 2, (1, 1, 64, 64)),
}
LONG = {
    "causal of 3000": (LINE, ct.causal(), 1, (1, 1, 16, 16)),
    "sinks of 3000": (LINE, ct.sinks(4) | ct.window(n=5), 1, (1, 1, 16, 16)),
}
FEW = {"few features": (GRID, TIME, 2, (2, 2, 8, 8))}
TABLE = USUAL | LARGE | LONG | FEW


@lru_cache(maxsize=1)  # the kernels come one after the other
def bounds(name: str, dtype: torch.dtype, size: float) -> Bounds:
    grid, where, heads, sizes = TABLE[name]
    return Bounds.of(Problem.random(ct.plan(where, grid, heads=heads), sizes, dtype, size=size), samples=1)


@KERNELS
@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("size", [1.0, 4.0], ids=["usual", "peaked"])
def test_many_numbers(dtype: torch.dtype, backend: str, name: str, size: float) -> None:
    bounds(name, dtype, size).check(attention(backend), large=True)


@KERNELS
def test_one_key_takes_all(dtype: torch.dtype, backend: str) -> None:
    """A weight of nearly 1 is that exact, however large logits and lse: it is divided by a sum that it is in itself."""
    bounds("few features", dtype, 16.0).check(attention(backend), large=True)


@KERNELS
@pytest.mark.parametrize("name", LARGE)
def test_many_tiles(dtype: torch.dtype, backend: str, name: str) -> None:
    bounds(name, dtype, 1.0).check(attention(backend), large=True)


@pytest.mark.slow
@KERNELS
@pytest.mark.parametrize("name", LONG)
def test_sums_of_thousands(dtype: torch.dtype, backend: str, name: str) -> None:
    bounds(name, dtype, 1.0).check(attention(backend), large=True)


SMALL = ct.Grid(t=4, h=6, w=5, prefix=1)
BIASES: dict[str, Callable[[], Tensor | ct.Bias | None]] = {
    "none": lambda: None,
    "relative": lambda: ct.RelativeBias(4, t=1, h=2, w=1),
    "alibi": lambda: ct.Alibi(4, learned=True),
    "pairs": lambda: torch.randn(2, 4, SMALL.size, SMALL.size),
    "keys": lambda: torch.randn(SMALL.size),
}
SCORES = [(name, softcap) for name in BIASES for softcap in (None, 2.0) if name != "none" or softcap]


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
        out.append(Bounds.of(p, samples=4))
    return out


@KERNELS
@pytest.mark.parametrize("name, softcap", SCORES)
def test_biases(dtype: torch.dtype, backend: str, name: str, softcap: float | None) -> None:
    """Against the formula in torch's operators; the bias and its gradient are in the dtype too."""
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


@lru_cache(maxsize=1)
def blind() -> Bounds:
    """Queries that see nothing, keys that nobody sees; one key takes nearly all."""
    plan = ct.plan(TIME & ct.causal("t", strict=True), ct.Grid(t=4, h=6, w=5))
    return Bounds.of(Problem.random(plan, (2, 1, 4, 4), torch.float32, size=16.0))


@pytest.mark.parametrize("name", BROKEN)
def test_the_law_can_be_broken(name: str) -> None:
    blind().check(attention("reference"))
    with pytest.raises(AssertionError):
        blind().check(BROKEN[name])
