"""Times of cases against dense attention, or against what else a user has: first checked, then paired."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import chronotope as ct
from chronotope.bench.cases import BACKWARD, BOTH, FORWARD, Case
from chronotope.bench.check import Inputs, Truth, right
from chronotope.bench.competitors import BY_HAND, COMPILED, Competitor, competitors, refusal, sdpa
from chronotope.bench.referee import Lap, Run, paired
from chronotope.bench.results import Row, circumstances, times

AT_ONCE = 0.5  # share of dense that the cases of one batch may compute together
SECONDS = {False: 4.0, True: 8.0}  # for the rounds of a batch: forward, training
FIRST = "first call"
DENSE = Competitor("dense", sdpa)


@dataclass(frozen=True)
class Settings:
    """What was asked for. compiled: which cases kernels take part in that torch compiles for each shape."""

    threads: int = 2
    rounds: int = 5
    quick: bool = False
    device: str = "cpu"
    compiled: str = "window"

    @property
    def dtype(self) -> torch.dtype:
        """What attention is usually computed in on this device."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


@dataclass
class Entry:
    """A competitor in a case. errors: by pass, of those that ran. refused: why the others did not."""

    case: Case
    competitor: Competitor
    errors: dict[str, float] = field(default_factory=dict)
    refused: str | None = None
    first: float | None = None

    @property
    def label(self) -> str:
        """As its runs are called."""
        return f"{self.case.name} | {self.competitor.name}"

    @property
    def trains(self) -> bool:
        """Whether its backward pass is timed."""
        return BACKWARD in self.errors


Bound = Callable[[Row, Case], Row]
"""Fills in the bound of a row, and what was reached of it."""


def table(
    name: str,
    cases: list[Case],
    settings: Settings,
    yardstick: Callable[[Case], Competitor] = lambda case: DENSE,
    bound: Bound | None = None,
) -> Iterator[list[Row] | str]:
    """For each shape the rows of dense, then those of each competitor in each case; lines on what did not run."""
    shown = None
    for batch in batches(cases):
        inputs = Inputs.random(batch[0].shape, settings.dtype, settings.device)
        entries = []
        for case in batch:
            truth = Truth(case, inputs)
            entries += [checked(truth, one) for one in competitors(case, settings.device, settings.compiled)]
        fair = [entry for entry in entries if entry.errors and right(entry.errors, settings.dtype)]
        whole = replace(batch[0], patterns=(ct.full(),))
        against = Entry(whole, yardstick(batch[0]), dict.fromkeys((FORWARD, BACKWARD, BOTH), 0.0))
        seconds = timed([against, *fair], inputs, settings, new=shown != whole.shape)
        reference = seconds[against.label]
        if shown != whole.shape:
            shown = whole.shape
            plain = replace(against, errors={})
            made = [_row(plain, phase, settings, found, found) for phase, found in reference.items()]
            yield [(bound or tiles_bound)(replace(row, table=name, row=against.competitor.name), whole) for row in made]
        for entry in entries:
            found = seconds.get(entry.label, {})
            phases = found or entry.errors
            rows = [_row(entry, phase, settings, found.get(phase), reference.get(phase)) for phase in phases]
            rows = [(bound or tiles_bound)(replace(row, table=name), entry.case) for row in rows]
            if rows:
                yield rows + ([replace(row, table=name) for row in once(entry, settings)] if found else [])
            if entry.refused is not None:
                yield f"  {entry.label}: {entry.refused}"


def batches(cases: list[Case]) -> Iterator[list[Case]]:
    """Cases that follow each other, share a dense run, and together take no longer than about as much."""
    batch: list[Case] = []
    load = 0.0
    for case in cases:
        share = tile_density(case)
        if batch and ((case.shape, case.trains) != (batch[0].shape, batch[0].trains) or load + share > AT_ONCE):
            yield batch
            batch, load = [], 0.0
        batch.append(case)
        load += share
    if batch:
        yield batch


def checked(truth: Truth, competitor: Competitor) -> Entry:
    """Runs a competitor once, which plans and compiles, and compares with the truth."""
    entry, _ = Entry(truth.case, competitor), truth.exact
    for trains in (True, False) if competitor.trains and truth.case.trains else (False,):
        start = time.perf_counter()
        try:
            entry.errors = truth.errors(competitor, trains)
        except Exception as error:
            entry.refused = refusal(competitor, error)
            if entry.refused is None:
                raise
        else:
            entry.first = time.perf_counter() - start
            break
    return entry


def timed(entries: list[Entry], inputs: Inputs, settings: Settings, new: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds in each round, by label and pass. The first entry has not been checked; `new`: nor run at this shape."""
    cold = [entries[0].label] if new else []  # the check has warmed up all others
    forward = {entry.label: _forward(entry, inputs) for entry in entries}
    found = paired(forward, settings.rounds, SECONDS[False], settings.device, cold)
    out = {label: {FORWARD: [parts[0] for parts in rounds]} for label, rounds in found.items()}
    training = {entry.label: _training(entry, inputs) for entry in entries if entry.trains}
    if len(training) < 2:  # dense alone
        return out
    for label, rounds in paired(training, settings.rounds, SECONDS[True], settings.device, cold).items():
        out[label] |= {BACKWARD: [parts[1] for parts in rounds], BOTH: [sum(parts) for parts in rounds]}
    return out


def _forward(entry: Entry, inputs: Inputs) -> Run:
    leaves = [x.detach() for x in inputs.leaves(entry.competitor)]

    def run(lap: Lap) -> Tensor:
        return entry.competitor.attend(*leaves[:3])

    return run


def _training(entry: Entry, inputs: Inputs) -> Run:
    *leaves, dout = inputs.leaves(entry.competitor)

    def run(lap: Lap) -> tuple[Tensor, ...]:
        out = entry.competitor.attend(*leaves)
        lap()
        return torch.autograd.grad(out, leaves, dout)

    return run


def tile_density(case: Case) -> float:
    """Pairs in tiles as a share of all, over the passes of a case."""
    return sum(ct.plan(pattern, case.grid).tile_density for pattern in case.patterns)


def tiles_bound(row: Row, case: Case) -> Row:
    """Dense time times the share of pairs in tiles is what computing them takes at dense speed."""
    share = tile_density(case)
    reached = None if row.ratio_to_dense is None else row.ratio_to_dense * share
    density = sum(ct.plan(pattern, case.grid).density for pattern in case.patterns)
    return replace(row, density=density, tile_density=share, bound=1 / share, reached=reached)


def once(entry: Entry, settings: Settings) -> Iterator[Row]:
    """What takes time once for a shape: compiling, with the first call, and a mask."""
    found = dict(entry.competitor.once)
    if entry.competitor.name in (COMPILED, BY_HAND) and entry.first is not None:
        found[FIRST] = entry.first
    for phase, seconds in found.items():
        yield replace(_row(entry, phase, settings, [seconds]), error=None)


def _row(
    entry: Entry,
    phase: str,
    settings: Settings,
    seconds: list[float] | None = None,
    dense: list[float] | None = None,
) -> Row:
    case = entry.case
    return Row(
        table="",
        row=case.name,
        pattern=case.pattern,
        grid=repr(case.grid),
        heads=case.heads,
        head_size=case.head_size,
        dtype=str(settings.dtype).removeprefix("torch."),
        backend=entry.competitor.name,
        phase=phase,
        error=entry.errors.get(phase),
        **times(seconds, dense),
        **circumstances(settings.threads, settings.device),
    )
