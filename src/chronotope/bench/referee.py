"""Measuring: paired runs, medians, peak memory in a fresh process, and the machine."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from chronotope.machine import processor


def paired(runs: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of each run, measured in turn in every round, after one round of warming up."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(a: list[float], b: list[float]) -> float:
    """Median over the rounds of a / b: what disturbs one round disturbs both."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Fresh:
    """What a process of its own printed, and its peak memory in MB: above `before()`, and in all."""

    printed: str
    added: float
    whole: float


def fresh(code: str, threads: int) -> Fresh:
    """Runs `code` in a new process that has imported torch and chronotope as ct.

    The code may call `before()` when its input is ready: what was resident by then does not count as added.
    """
    program = (
        "import torch, chronotope as ct\n"
        "from chronotope.bench.referee import peak\n"
        f"torch.set_num_threads({threads})\n"
        "base = [peak()]\n"
        "def before(): base[0] = peak()\n"
        f"{code}\n"
        "print(peak() - base[0], peak())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *printed, last = done.stdout.strip().split("\n")
    added, whole = last.split()
    return Fresh("\n".join(printed), float(added), float(whole))


def peak() -> float:
    """Highest resident memory of this process so far, in MB.

    From the kernel's account of the address space: getrusage would also count what a parent held when it forked.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine(threads: int) -> str:
    """One line: processor, cores, threads, and versions."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{processor()}, {os.cpu_count()} cores, {threads} threads, {versions}"
