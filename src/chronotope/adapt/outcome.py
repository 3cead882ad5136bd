"""What a patch does to a model: error on held-out inputs, and time against the model as it was, in one run."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chronotope.adapt.asked import Asked
from chronotope.adapt.assignment import Assignment, apply
from chronotope.adapt.attach import Grids, attach
from chronotope.adapt.inputs import Batch, call, output_of, relative
from chronotope.adapt.tap import Handler, Tap
from chronotope.errors import ChronotopeError
from chronotope.patterns import Pattern

Patch = Assignment | Pattern

# Two-sided 95% of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


@dataclass(frozen=True)
class Outcome:
    """errors: relative error of the output, input by input. Times in seconds are medians of pairs with the model as it
    was; speedups are medians over pairs. memory: the most bytes that a call allocates, weights and inputs left out."""

    name: str
    density: float
    errors: tuple[float, ...]
    seconds: float = math.nan
    attention: float = math.nan
    speedup: float = math.nan
    attention_speedup: float = math.nan
    memory: int = 0

    @property
    def error(self) -> float:
        """The mean over the inputs."""
        return statistics.fmean(self.errors)

    @property
    def spread(self) -> float:
        """Half the width of its 95% interval, by Student's t over the inputs."""
        return interval(self.errors)


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95% interval of a mean."""
    if len(values) < 2:
        return math.nan
    t = STUDENT[len(values) - 2] if len(values) - 2 < len(STUDENT) else 1.96
    return t * statistics.stdev(values) / math.sqrt(len(values))


@torch.no_grad()
def report(
    model: nn.Module,
    patches: Mapping[str, Patch],
    held_out: Sequence[Batch],
    *,
    grid: Grids | None = None,
    rounds: int = 5,
) -> list[Outcome]:
    """Each patch on inputs that nothing was chosen by, against the model as it is.

    patches: assignments or patterns, by name. rounds: pairs of timings of the first input, in turns; 0: none. Planning
    is done before.
    """
    if not held_out:
        raise ChronotopeError("report: no inputs were given.")
    plain = [output_of(call(model, batch)) for batch in held_out]
    return [_outcome(model, name, patch, held_out, plain, grid, rounds) for name, patch in patches.items()]


def _outcome(
    model: nn.Module, name: str, patch: Patch, held_out: Sequence[Batch], plain: list[Tensor], grid: Any, rounds: int
) -> Outcome:
    errors = []
    with _patched(model, patch, grid):
        for batch, expected in zip(held_out, plain, strict=True):
            errors.append(relative([expected], [output_of(call(model, batch))]))
    density = patch.density if isinstance(patch, Assignment) else math.nan
    if not rounds:
        return Outcome(name, density, tuple(errors))
    pairs = [(_timed(model, held_out[0], None, grid), _timed(model, held_out[0], patch, grid)) for _ in range(rounds)]
    return Outcome(
        name,
        density,
        tuple(errors),
        statistics.median(new[0] for _, new in pairs),
        statistics.median(new[1] for _, new in pairs),
        statistics.median(old[0] / new[0] for old, new in pairs),
        statistics.median(old[1] / new[1] for old, new in pairs),
        _memory(model, held_out[0], patch, grid),
    )


def _patched(model: nn.Module, patch: Patch | None, grid: Any) -> Any:
    if patch is None:
        return nullcontext()
    return apply(model, patch, grid) if isinstance(patch, Assignment) else attach(model, patch, grid)


def _timed(model: nn.Module, batch: Batch, patch: Patch | None, grid: Any) -> tuple[float, float]:
    """Seconds of a call, and of the attention in it."""
    timer = Timer()
    with _patched(model, patch, grid):
        tap = Tap.on(model)
        tap.add(timer)
        try:
            start = time.perf_counter()
            call(model, batch)
            whole = time.perf_counter() - start
        finally:
            tap.drop(timer)
    return whole, timer.seconds


def _memory(model: nn.Module, batch: Batch, patch: Patch, grid: Any) -> int:
    with _patched(model, patch, grid):
        return peak_bytes(lambda: call(model, batch))


def peak_bytes(run: Callable[[], Any]) -> int:
    """The highest sum of live allocations of a run: of CUDA's allocator where there is one, else of the CPU's.

    Not counted: what the allocator keeps after it was freed, and buffers that MKL has of its own.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # The library behind the profiler tells of its stages on stderr unless its level is above all of them.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    live = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


class Timer(Handler):
    """Seconds between the request of each layer and its answer. Attached last, it is next to the solver."""

    def __init__(self) -> None:
        self.seconds, self.since = 0.0, 0.0

    def edit(self, layer: str, asked: Asked) -> Asked:
        _wait(asked.q)
        self.since = time.perf_counter()
        return asked

    def seen(self, layer: str, asked: Asked, out: Tensor) -> Tensor:
        _wait(out)
        self.seconds += time.perf_counter() - self.since
        return out


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
