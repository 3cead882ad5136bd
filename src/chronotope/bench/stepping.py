"""Stepping: what a token costs, and what is carried, after contexts of growing length."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import chronotope as ct
from chronotope.bench.results import Row, circumstances, times
from chronotope.bench.timing import Settings
from chronotope.nn import S4D, S5, Attention, Decay, DeepMemory, Mamba, Mamba2, Mixer, Recurrence, ShortConv

DIM, HEADS = 256, 4
LAST = 200  # steps that are timed before each context is reached
CACHE = "softmax attention, KV cache"
ONE = ct.Grid(t=1)

MIXERS: dict[str, Callable[[], Mixer]] = {
    CACHE: lambda: Attention(DIM, HEADS, where=ct.causal()),
    "window of 128": lambda: Attention(DIM, HEADS, where=ct.window(t=(127, 0))),
    "linear, elu + 1, normalised": lambda: Recurrence(DIM, HEADS, features=ct.features.Elu(), normalize=True),
    "decay by head": lambda: Recurrence(DIM, HEADS, decay=Decay(DIM, HEADS, "head")),
    "decay by token": lambda: Recurrence(DIM, HEADS, decay=Decay(DIM, HEADS, "token")),
    "decay by channel": lambda: Recurrence(DIM, HEADS, decay=Decay(DIM, HEADS, "channel")),
    "delta rule": lambda: Recurrence(DIM, HEADS, delta=True),
    "delta rule, decay by token": lambda: Recurrence(DIM, HEADS, decay=Decay(DIM, HEADS, "token"), delta=True),
    "taylor features, heads of 16": lambda: Recurrence(
        DIM, HEADS, features=ct.features.Taylor(), normalize=True, head_dim=16, value_dim=64
    ),
    "S4D, 64 states": lambda: S4D(DIM, 64),
    "S5, 256 states": lambda: S5(DIM, 256),
    "Mamba, 16 states": lambda: Mamba(DIM, 16),
    "Mamba-2, 64 states": lambda: Mamba2(DIM, 64),
    "deep memory, chunks of 16": lambda: DeepMemory(DIM, HEADS, chunk=16),
    "short convolution": lambda: ShortConv(DIM, 4),
}


def stepping(settings: Settings) -> Iterator[list[Row] | str]:
    """Every streaming mixer, one token at a time; a line for each with all contexts."""
    contexts = (256, 512) if settings.quick else (1024, 4096, 16384, 65536)
    for name, make in MIXERS.items():
        torch.manual_seed(0)
        layer = make().eval()
        with torch.inference_mode():
            steps = filled(layer, contexts) if name == CACHE else walked(layer, contexts)
        rows = [_row(name, context, seconds, state, settings) for context, seconds, state in steps]
        yield rows
        took = [row.seconds_median or 0 for row in rows]
        sizes = [row.peak_mb or 0 for row in rows]
        yield f"  {'':30}last / first: {took[-1] / took[0]:.2f} of time, {sizes[-1] / sizes[0]:.2f} of state"


def walked(layer: Mixer, contexts: tuple[int, ...]) -> list[tuple[int, list[float], Any]]:
    """Steps through every token up to the longest context; times of the last ones before each."""
    state: Any = layer.init_state(1, ONE)
    found, seconds = [], list[float]()
    x = torch.randn(1, 1, DIM)
    for t in range(1, contexts[-1] + 1):
        start = time.perf_counter()
        _, state = layer.step(x, state)
        seconds.append(time.perf_counter() - start)
        if t in contexts:
            found.append((t, seconds[-LAST:], state))
    return found


def filled(layer: Mixer, contexts: tuple[int, ...]) -> list[tuple[int, list[float], Any]]:
    """A cache of each length, of random keys and values: walking there would copy it at every step."""
    out = []
    for context in contexts:
        empty: Any = layer.init_state(1, ONE)
        k, v = torch.randn(2, 1, HEADS, context - 1, DIM // HEADS).unbind(0)
        before = replace(empty, k=k, v=v, time=context - 1)
        seconds, state = list[float](), before
        for _ in range(20):
            start = time.perf_counter()
            _, state = layer.step(torch.randn(1, 1, DIM), before)
            seconds.append(time.perf_counter() - start)
        out.append((context, seconds[3:], state))
    return out


def _row(name: str, context: int, seconds: list[float], state: Any, settings: Settings) -> Row:
    return Row(
        table="stepping",
        row=name,
        pattern="",
        grid=repr(ct.Grid(n=context)),
        heads=HEADS,
        head_size=DIM // HEADS,
        dtype="float32",
        backend="step",
        phase="step",
        peak_mb=state.nbytes / 2**20,
        **times(seconds),
        **circumstances(settings.threads, settings.device),
    )
