"""Routes from end to end, choosing included: against dense attention, their own bound, and the growth claimed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import chronotope as ct
from chronotope.bench.cases import BACKWARD, FORWARD
from chronotope.bench.referee import Lap, Run, paired
from chronotope.bench.results import Row, circumstances, times
from chronotope.bench.timing import Settings
from chronotope.planning import resolve

HEADS, SIZE = 4, 64
DENSE, CAUSAL = "SDPA", "SDPA is_causal"
CHOOSING = "choosing"
LONGEST_TRAINED = 8192
RIGHT = 1e-4

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Routed:
    """A row: a route by length, and the power of N that its time grows with by its paper (None: no claim)."""

    name: str
    where: Callable[[int], ct.Pattern]
    claim: str


@dataclass(frozen=True)
class Other:
    """A row that is no single pattern: `compute(n)` gives the function of q, k, v; share of pairs by `density(n)`."""

    name: str
    compute: Callable[[int], Compute]
    density: Callable[[int], float]
    claim: str


def _inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that drift from token to token, and queries near them: what is near, and what is alike, answers."""
    rng = torch.Generator().manual_seed(0)
    steps, v = torch.randn(2, 1, HEADS, n, SIZE, generator=rng).unbind(0)
    k = F.layer_norm(steps.cumsum(2), (SIZE,))
    return k + 0.5 * torch.randn(k.shape, generator=rng), k, v


def routes(settings: Settings) -> Iterator[list[Row] | str]:
    """Every route at each length; then how time grew."""
    lengths = (512, 1024) if settings.quick else (8192, 16384, 32768)
    took: dict[str, list[float]] = {}
    cases = _cases()
    for n in lengths:
        for rows in _length(n, cases, settings):
            yield rows
            took.setdefault(rows[0].row, []).append(rows[0].seconds_median or math.nan)
    for name, claim in [(DENSE, "2"), (CAUSAL, "2"), *((case.name, case.claim) for case in cases)]:
        if len(took.get(name, [])) == len(lengths):
            yield f"  {name}: time grows with N^{growth(lengths, took[name]):.2f}; claimed: {claim}"


def growth(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log time over log length, by least squares."""
    slope, _ = statistics.linear_regression([math.log(n) for n in lengths], [math.log(s) for s in seconds])
    return slope


def _length(n: int, cases: list[Routed | Other], settings: Settings) -> Iterator[list[Row]]:
    """All rows of one length, timed in the same rounds."""
    q, k, v = _inputs(n)
    runs: dict[str, Run] = {DENSE: _run(F.scaled_dot_product_attention, q, k, v)}
    runs[CAUSAL] = _run(partial(F.scaled_dot_product_attention, is_causal=True), q, k, v)
    facts: dict[str, Row] = {}
    for case in cases:
        compute, facts[case.name] = _prepared(case, n, q, k, v, settings)
        if (facts[case.name].error or 0) > RIGHT:
            continue
        runs[case.name] = _run(compute, q, k, v)
        if isinstance(case, Routed):
            runs[f"{case.name} | {CHOOSING}"] = _choosing(case.where(n), n, q, k)
            if n <= LONGEST_TRAINED:
                runs[f"{case.name} | {BACKWARD}"] = _training(compute, q, k, v)
    if n <= LONGEST_TRAINED:
        runs[f"{DENSE} | {BACKWARD}"] = _training(F.scaled_dot_product_attention, q, k, v)
    seconds = {name: [laps[-1] for laps in rounds] for name, rounds in paired(runs, settings.rounds, 60.0).items()}
    for name in (DENSE, CAUSAL):
        yield [_timed(_row(name, "", n, settings), seconds[name], seconds[DENSE])]
    for case in cases:
        rows = [facts[case.name]]
        if case.name in seconds:
            rows[0] = _timed(rows[0], seconds[case.name], seconds[DENSE])
            for phase in (CHOOSING, BACKWARD):
                took = seconds.get(f"{case.name} | {phase}")
                if took is not None:
                    dense = seconds[f"{DENSE} | {BACKWARD}"] if phase == BACKWARD else None
                    rows.append(_timed(replace(facts[case.name], phase=phase, error=None), took, dense))
        yield rows


def _prepared(case: Routed | Other, n: int, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> tuple[Compute, Row]:
    """The function to time; and its row without times: pairs computed, and the difference from another kernel."""
    if isinstance(case, Other):
        row = replace(_row(case.name, "", n, settings), tile_density=case.density(n), bound=1 / case.density(n))
        return case.compute(n), row
    grid, where = ct.Grid(n=n), case.where(n)

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ct.attention(q, k, v, grid=grid, where=where)

    tiles = resolve(where, q, k, grid, grid)
    pairs = HEADS * n * n
    row = replace(
        _row(case.name, repr(where), n, settings),
        density=tiles.visible / pairs,
        tile_density=tiles.computed / pairs,
        bound=pairs / tiles.computed,
    )
    other = ct.attention(q, k, v, grid=grid, where=where, backend="torch")
    return compute, replace(row, error=float((compute(q, k, v) - other).abs().max() / other.abs().max()))


def _run(compute: Callable[..., Tensor], *inputs: Tensor) -> Run:
    def run(lap: Lap) -> Tensor:
        return compute(*inputs)

    return run


def _choosing(where: ct.Pattern, n: int, q: Tensor, k: Tensor) -> Run:
    grid = ct.Grid(n=n)

    def run(lap: Lap) -> object:
        return resolve(where, q, k, grid, grid)

    return run


def _training(compute: Callable[..., Tensor], *inputs: Tensor) -> Run:
    """The backward pass is the last lap."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    dout = torch.randn_like(inputs[2])

    def run(lap: Lap) -> object:
        out = compute(*leaves)
        lap()
        return torch.autograd.grad(out, leaves, dout)

    return run


def _row(name: str, pattern: str, n: int, settings: Settings) -> Row:
    return Row(
        table="routes",
        row=name,
        pattern=pattern,
        grid=repr(ct.Grid(n=n)),
        heads=HEADS,
        head_size=SIZE,
        dtype="float32",
        backend="auto",
        phase=FORWARD,
        **circumstances(settings.threads, settings.device),
    )


def _timed(row: Row, seconds: list[float], dense: list[float] | None) -> Row:
    row = replace(row, **times(seconds, dense))
    if row.bound is None or row.ratio_to_dense is None:
        return row
    return replace(row, reached=row.ratio_to_dense / row.bound)


def _cases() -> list[Routed | Other]:
    from chronotope.papers.routing.hip import hip
    from chronotope.papers.routing.hyper import HyperAttention

    def blocks(n: int) -> ct.Pattern:
        return ct.route.top_blocks(0.125, n=64)

    out: list[Routed | Other] = [
        Routed("best eighth of blocks", blocks, "2"),
        Routed("best eighth, causal", lambda n: blocks(n) & ct.causal(), "2"),
        Routed(
            "16 best blocks, causal", lambda n: ct.route.top_blocks(16, n=64) & ct.causal(), "1, and scores of blocks"
        ),
        Routed(
            "each query its 16 best, causal",
            lambda n: ct.route.top_blocks(16, queries={"n": 1}, n=64) & ct.causal(),
            "1, and scores of blocks",
        ),
        Routed("half of the mass", lambda n: ct.route.top_blocks(mass=0.5, n=64), "-"),
        Routed("HiP", lambda n: hip(), "1 (n log n)"),
    ]
    hyper = HyperAttention()
    out.append(
        Other(
            "HyperAttention",
            lambda n: lambda q, k, v: hyper(q, k, v)[0],
            lambda n: min(1.0, (hyper.block + hyper.samples) / n),
            "1",
        )
    )
    return out
