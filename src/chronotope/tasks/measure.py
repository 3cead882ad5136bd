"""What is measured of a pattern: error, attention mass kept, time against dense in the same run, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.adapt.outcome import peak_bytes
from chronotope.attention import attention
from chronotope.grid import Grid
from chronotope.models import Predictor
from chronotope.nn import Attention
from chronotope.patterns import Pattern
from chronotope.planning import Plan, plan

AT_ONCE = 4  # clips of one forward pass
ROUNDS = (3, 15)  # pairs of timings, least and most
SECONDS = 1.0  # of timing, after the least number of rounds


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one attention call, medians; speedups are medians of dense time / time, pair by pair."""

    forward_ms: float
    forward_speedup: float
    train_ms: float
    train_speedup: float


@torch.no_grad()
def predictions(
    model: Predictor, clips: Float[Tensor, "n frames c height width"]
) -> Float[Tensor, "n coming c height width"]:
    """What the model says of every frame but the first, from those before it."""
    return torch.cat([model(part[:, :-1]) for part in clips.split(AT_ONCE)])


def error(model: Predictor, clips: Float[Tensor, "n frames c height width"]) -> float:
    """Mean squared error of `predictions`."""
    return float((predictions(model, clips) - clips[:, 1:]).square().mean())


@dataclass(frozen=True)
class QKV:
    """What an attention layer attends with, as `ct.nn.Attention.project` gives it."""

    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b hk nk d"]
    v: Float[Tensor, "b hk nk d"]


@torch.no_grad()
def qkv(model: nn.Module, x: Tensor) -> list[QKV]:
    """q, k and v of every attention layer, in the order in which a forward pass of x comes to them."""
    found: list[QKV] = []
    with ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, Attention):
                hook = layer.register_forward_pre_hook(lambda own, given: found.append(QKV(*own.project(*given))))
                hooks.enter_context(hook)
        model(x)
    return found


@torch.no_grad()
def mass(
    q: Float[Tensor, "n h tokens d"], k: Float[Tensor, "n hk tokens d"], grid: Grid, where: Pattern, dense: Pattern
) -> Float[Tensor, "h"]:
    """Per head the share of the dense attention that falls on the pairs kept: mean over queries of

    sum_{k seen} softmax_dense(q, k) = exp(lse_where - lse_dense)

    No pair of tokens is held: both lse come from `ct.attention`. `where` must be part of `dense`.
    """
    lses = []
    for pattern in (where, dense):
        _, lse = attention(q, k, k, grid=grid, where=pattern, return_lse=True)
        lses.append(lse)
    return torch.exp(lses[0] - lses[1]).mean((0, 2))


def timing(q: Float[Tensor, "1 h n d"], k: Float[Tensor, "1 hk n d"], one: Plan, dense: Plan) -> Timing:
    """One attention call under a plan against one under the dense plan, forward alone and forward with backward.

    Layout, gathering and joining are in it; planning is not, for a plan is made once. k stands in for v: time does
    not depend on its values. The two calls take turns, so that a change of the machine's speed meets both.
    """
    inputs = tuple(x.detach().clone().requires_grad_() for x in (q, k, k))
    runs = [(lambda p=p, train=train: _call(inputs, p, train)) for train in (False, True) for p in (one, dense)]
    for run in runs:
        run()
    seconds: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + SECONDS
    while len(seconds[0]) < ROUNDS[0] or (len(seconds[0]) < ROUNDS[1] and time.perf_counter() < end):
        for run, kept in zip(runs, seconds, strict=True):
            kept.append(_seconds(run))
    forward, dense_forward, train, dense_train = seconds
    return Timing(
        1000 * statistics.median(forward),
        statistics.median(d / s for d, s in zip(dense_forward, forward, strict=True)),
        1000 * statistics.median(train),
        statistics.median(d / s for d, s in zip(dense_train, train, strict=True)),
    )


def peak_mb(q: Float[Tensor, "1 h n d"], k: Float[Tensor, "1 hk n d"], planned: Plan) -> float:
    """Megabytes (10^6 bytes) that one attention call holds at most, forward and backward, beyond q, k and v.

    The highest sum of live allocations of torch's CPU allocator as the profiler records them, and the tensors of the
    plan, which stay. Not counted: what the allocator keeps after it was freed, and buffers that MKL has of its own.
    """
    inputs = tuple(x.detach().clone().requires_grad_() for x in (q, k, k))
    _call(inputs, planned, train=True)
    most = peak_bytes(lambda: _call(inputs, planned, train=True))
    return (most + plan_bytes(planned)) / 1e6


def plan_bytes(planned: Plan) -> int:
    """Bytes of all tensors that a plan has made so far and keeps: tile lists, token indices, element masks."""
    storages: dict[int, int] = {}
    waiting: list[Any] = [planned.parts]
    met: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in met:
            continue
        met.add(id(value))
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        elif type(value).__module__.startswith("chronotope."):
            waiting += getattr(value, "__dict__", {}).values()
    return sum(storages.values())


def plans(patterns: list[Pattern], grid: Grid, heads: int) -> dict[Pattern, tuple[Plan, float]]:
    """Each distinct pattern with its plan and the share of the layers that use it."""
    return {
        pattern: (plan(pattern, grid, heads=heads), patterns.count(pattern) / len(patterns))
        for pattern in dict.fromkeys(patterns)
    }


def _call(inputs: tuple[Tensor, ...], planned: Plan, train: bool) -> None:
    if train:
        out = attention(*inputs, grid=planned.grid, where=planned)
        torch.autograd.grad(out, inputs, out.detach())  # type: ignore[union-attr, arg-type]
    else:
        with torch.no_grad():
            attention(*inputs, grid=planned.grid, where=planned)


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
