"""How long planning takes when nothing is kept from before, and what it needs for a million tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import chronotope as ct
from chronotope.bench import cases
from chronotope.bench.cases import Case
from chronotope.bench.referee import Lap, Run, fresh, paired
from chronotope.bench.results import Row, circumstances, times
from chronotope.bench.timing import Settings

SECONDS = 5.0  # for the rounds of one case
BLOCK_MASK, PLAN, MASKS = "create_block_mask", "ct.plan", "ct.plan + element masks"


def planning(settings: Settings) -> Iterator[list[Row] | str]:
    """A window against torch's block mask of the same relation; every other case; a million tokens."""
    window, *others = cases.attention(settings.quick)
    seconds = paired(
        {BLOCK_MASK: _block_mask(window, settings.device), PLAN: _cold(window), MASKS: _cold(window, masks=True)},
        settings.rounds,
    )
    laps = {name: [parts[-1] for parts in rounds] for name, rounds in seconds.items()}
    yield [_row(window, name, found, settings, laps[BLOCK_MASK]) for name, found in laps.items()]
    for case in others:
        found = paired({PLAN: _cold(case)}, settings.rounds, SECONDS)[PLAN]
        yield [_row(case, PLAN, [parts[-1] for parts in found], settings)]
    yield [million(settings)]


def forget() -> None:
    """Empties what planning keeps from earlier calls."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("chronotope.planning", "chronotope.patterns", "chronotope.papers")):
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()


def _cold(case: Case, masks: bool = False) -> Run:
    def run(lap: Lap) -> object:
        forget()
        lap()
        plans = [ct.plan(pattern, case.grid) for pattern in case.patterns]
        return [plan.parts[0].tiles.groups for plan in plans] if masks else plans

    return run


def _block_mask(case: Case, device: str) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask

    rule, n = case.rule, case.grid.size
    assert rule is not None
    return lambda lap: create_block_mask(rule, None, None, n, n, device=device)


def million(settings: Settings) -> Row:
    """A plan of a million tokens in a process of its own: its seconds, and its peak memory above the imports."""
    size = "t=8, h=16, w=16" if settings.quick else "t=64, h=128, w=128"
    code = f"""
import json, time
grid, where = ct.Grid({size}), ct.window(t=5, h=9, w=9) & ct.causal("t")
start = time.perf_counter()
plan = ct.plan(where, grid)
seconds = time.perf_counter() - start
print(json.dumps([repr(where), repr(grid), seconds, plan.density, plan.tile_density]))
"""
    done = fresh(code, settings.threads)
    pattern, grid, seconds, density, share = json.loads(done.printed)
    return Row(
        table="planning",
        row=f"{ct.Grid(**_sizes(size)).size:,} tokens",
        pattern=pattern,
        grid=grid,
        backend=PLAN,
        phase="plan",
        density=density,
        tile_density=share,
        peak_mb=done.added,
        **times([seconds]),
        **circumstances(settings.threads, settings.device),
    )


def _sizes(text: str) -> dict[str, int]:
    return {axis: int(n) for axis, _, n in (part.strip().partition("=") for part in text.split(","))}


def _row(case: Case, backend: str, seconds: list[float], settings: Settings, against: list[float] | None = None) -> Row:
    return Row(
        table="planning",
        row=case.name,
        pattern=case.pattern,
        grid=repr(case.grid),
        backend=backend,
        phase="plan",
        **times(seconds, against),
        **circumstances(settings.threads, settings.device),
    )
