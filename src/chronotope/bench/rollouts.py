"""Long rollouts: what a frame costs, and what is carried, after more and more frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import chronotope as ct
from chronotope.bench.results import Row, circumstances, times
from chronotope.bench.timing import Settings
from chronotope.nn import Attention, Block, ConvLSTM, ConvSpace, Mixer

DIM, HEADS, SIDE = 64, 4, 16
LAST = 9  # steps that are timed before each count of frames is reached

MIXERS: dict[str, Callable[[], Mixer]] = {
    "convolutional state space": lambda: Block([ConvSpace(DIM, 32)]),
    "ConvLSTM": lambda: Block([ConvLSTM(DIM)]),
    "attention: t so far, then h, w": lambda: Block(
        [
            Attention(DIM, HEADS, where=ct.along("t") & ct.causal("t")),
            Attention(DIM, HEADS, where=ct.along("h", "w")),
        ]
    ),
    "attention: all frames so far": lambda: Block([Attention(DIM, HEADS, where=ct.causal("t"))]),
}


def rollouts(settings: Settings) -> Iterator[list[Row] | str]:
    """Blocks that tell one frame after the other; a line for each with all counts of frames."""
    counts, side = ((4, 8), 2) if settings.quick else ((20, 40, 80, 160, 320), SIDE)
    for name, make in MIXERS.items():
        torch.manual_seed(0)
        layer = make().eval()
        with torch.inference_mode():
            found = _walked(layer, counts, side)
        rows = [_row(name, ct.Grid(t=count, h=side, w=side), *one, settings) for count, one in found.items()]
        yield rows
        took, sizes = ([getattr(row, column) or 0 for row in rows] for column in ("seconds_median", "peak_mb"))
        yield f"  {'':30}last / first: {took[-1] / took[0]:.2f} of time, {sizes[-1] / sizes[0]:.2f} of state"


def _walked(layer: Mixer, counts: tuple[int, ...], side: int) -> dict[int, tuple[list[float], int]]:
    """The times of the last steps before each count of frames, and the bytes of the state there."""
    state: Any = layer.init_state(1, ct.Grid(t=1, h=side, w=side))
    found, seconds = {}, list[float]()
    x = torch.randn(1, side * side, DIM)
    for t in range(1, counts[-1] + 1):
        start = time.perf_counter()
        _, state = layer.step(x, state)
        seconds.append(time.perf_counter() - start)
        if t in counts:
            found[t] = seconds[-LAST:], state.nbytes
    return found


def _row(name: str, grid: ct.Grid, seconds: list[float], size: int, settings: Settings) -> Row:
    return Row(
        table="rollouts",
        row=name,
        pattern="",
        grid=repr(grid),
        heads=HEADS,
        head_size=DIM // HEADS,
        dtype="float32",
        backend="step",
        phase="step",
        peak_mb=size / 2**20,
        **times(seconds),
        **circumstances(settings.threads, settings.device),
    )
