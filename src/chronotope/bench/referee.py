"""Measuring: paired runs, laps, medians, peak memory in a fresh process, and the machine."""

from __future__ import annotations

import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from chronotope.machine import processor

LEAST = 3  # rounds, however long they take

Lap = Callable[[], None]
Run = Callable[[Lap], object]
"""What is timed; it may call its argument between its parts, which are then timed apart."""


def paired(
    runs: dict[str, Run],
    rounds: int = 5,
    limit: float = math.inf,
    device: str = "cpu",
    cold: Iterable[str] | None = None,
) -> dict[str, list[list[float]]]:
    """Seconds of each part of each run in every round, after runs to warm up those that are `cold`: by default all.

    In a round every run has its turn, and each round starts with another. After `limit` seconds no round begins,
    unless there are fewer than `LEAST`.
    """
    for name in runs if cold is None else cold:
        laps(runs[name], device)
    seconds: dict[str, list[list[float]]] = {name: [] for name in runs}
    names = list(runs)
    start = time.perf_counter()
    for i in range(rounds):
        if i >= LEAST and time.perf_counter() - start > limit:
            break
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(laps(runs[name], device))
    return seconds


def laps(run: Run, device: str = "cpu") -> list[float]:
    """Seconds of each part of one run, as the device sees them."""
    if device != "cuda":
        marks = [time.perf_counter()]
        run(lambda: marks.append(time.perf_counter()))
        marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    torch.cuda.synchronize()
    events: list[Any] = []

    def mark() -> None:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()

    mark()
    run(mark)
    mark()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over the rounds of a / b: what disturbs one round disturbs both."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Fresh:
    """What a process of its own printed, and its peak memory in MB: above `before()`, and in all."""

    printed: str
    added: float
    whole: float


def fresh(code: str, threads: int, device: str = "cpu") -> Fresh:
    """Runs `code` in a new process that has imported torch and chronotope as ct; `device` is its device.

    It may call `before()` at any point: what was in memory by then does not count as added.
    """
    program = (
        "import torch, chronotope as ct\n"
        "from chronotope.bench.referee import forget_peak, peak\n"
        f"torch.set_num_threads({threads})\n"
        f"device, base = {device!r}, []\n"
        "def before(): base[:] = [forget_peak(device)]\n"
        "before()\n"
        f"{code}\n"
        "print(peak(device) - base[0], peak(device))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that was measured ended with code {done.returncode}:\n{done.stderr}")
    *printed, last = done.stdout.strip().split("\n")
    added, whole = last.split()
    return Fresh("\n".join(printed), float(added), float(whole))


def peak(device: str = "cpu") -> float:
    """Highest memory of this process so far, in MB: resident, or what torch has handed out on a GPU.

    Resident by the kernel's account of the address space: getrusage would count what a parent held when it forked.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak(device: str = "cpu") -> float:
    """Memory in use now, in MB, from which the peak is counted anew where the system allows it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return _status("VmRSS") or peak()


def _status(name: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(
        (int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(name)), None
    )


def machine(threads: int, device: str = "cpu") -> str:
    """One line: processor, cores, threads, and versions."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return f"{gpu}{processor()}, {os.cpu_count()} cores, {threads} threads, {versions}"
