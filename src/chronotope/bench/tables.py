"""The tables but for planning, memory and rounding: what is timed, and what bounds it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from chronotope.bench import cases
from chronotope.bench.cases import BACKWARD, BOTH, FORWARD, Case
from chronotope.bench.competitors import Attend, Competitor, absent, sdpa
from chronotope.bench.referee import paired
from chronotope.bench.results import Row, circumstances, times
from chronotope.bench.timing import Settings, table

NOTE = (
    "  native skips invisible cells (8 queries x 16 keys) inside partial tiles,"
    " so it can reach more than 1.0 of the bound of its tiles"
)
TENSORS = {FORWARD: 4, BACKWARD: 8, BOTH: 12}  # q k v out; with dout dq dk dv; both passes
COPIED = 1 << 22  # tokens of a copy, with 64 numbers each: 1 GB, beyond any cache
COPIED_QUICK = 1 << 18
REARRANGED = "rearrange, SDPA"


def attention(settings: Settings) -> Iterator[list[Row] | str]:
    """Patterns on a clip."""
    if settings.device == "cuda" and absent():
        yield f"  not installed, so without rows: {', '.join(absent())}"
    yield from table("attention", cases.attention(settings.quick), settings)
    yield NOTE


def windows(settings: Settings) -> Iterator[list[Row] | str]:
    """Sizes of windows, heads and clips."""
    yield from table("windows", cases.windows(settings.quick, settings.device), settings)


def sequences(settings: Settings) -> Iterator[list[Row] | str]:
    """Long plain sequences."""
    yield from table("sequences", cases.sequences(settings.quick, settings.device), settings)


def temporal(settings: Settings) -> Iterator[list[Row] | str]:
    """Attention along time, which is bound by memory: against rearranging, SDPA, and rearranging back."""
    copied = copy(settings)
    yield [copied]
    speed = copied.gb_per_s
    assert speed is not None

    def bound(row: Row, case: Case) -> Row:
        moved = TENSORS[row.phase] * case.grid.size * case.heads * case.head_size * settings.dtype.itemsize
        if row.seconds_median is None:
            return row
        reached = moved / row.seconds_median / 1e9
        fastest = None if row.dense_seconds_median is None else row.dense_seconds_median / (moved / speed / 1e9)
        return replace(row, gb_per_s=reached, bound=fastest, reached=reached / speed)

    for case in cases.temporal(settings.quick):
        yield from table("temporal", [case], settings, lambda case: Competitor(REARRANGED, rearranged(case)), bound)


def rearranged(case: Case) -> Attend:
    """Attention along the first axis as a user writes it: the other axes into the batch, SDPA, and back."""
    frames, places = case.grid.shape[0], case.grid.size // case.grid.shape[0]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, _, size = q.shape

        def apart(x: Tensor) -> Tensor:
            return x.view(batch, heads, frames, places, size).permute(0, 3, 1, 2, 4).reshape(-1, heads, frames, size)

        out = sdpa(apart(q), apart(k), apart(v)).view(batch, places, heads, frames, size)
        return out.permute(0, 2, 3, 1, 4).reshape(q.shape)

    return attend


def copy(settings: Settings) -> Row:
    """The speed of copying a tensor larger than the caches: bytes read and written in a second."""
    tokens, size = COPIED_QUICK if settings.quick else COPIED, 64
    source = torch.randn(tokens, size, device=settings.device)
    target = torch.empty_like(source)
    found = paired({"copy": lambda lap: target.copy_(source)}, max(3, settings.rounds), device=settings.device)
    seconds = [parts[0] for parts in found["copy"]]
    return Row(
        table="temporal",
        row="copy",
        pattern="",
        grid=f"Grid(n={tokens})",
        heads=1,
        head_size=size,
        dtype="float32",
        backend="copy",
        phase="copy",
        gb_per_s=2 * source.nbytes / statistics.median(seconds) / 1e9,
        **times(seconds),
        **circumstances(settings.threads, settings.device),
    )
