"""Who computes a case: our backends, dense attention, FlexAttention by hand, and other libraries where installed.

A competitor is a function of q, k, v [B, H, N, D] in grid order; what it must rearrange counts as its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import chronotope as ct
from chronotope.bench.cases import Case
from chronotope.errors import UnsupportedError
from chronotope.patterns.separable import Window

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
sdpa = torch.nn.functional.scaled_dot_product_attention

DEFINITION = "reference"  # the meaning of all others; it holds every pair
COMPILED = "flex"
BY_HAND = "FlexAttention"
LIBRARIES = ("natten", "fla")


@dataclass(frozen=True)
class Competitor:
    """once: seconds of what is done once for a shape. heads_last: takes and gives [B, N, H, D].

    trains: whether there is a backward pass on this device. foreign: code that is not ours, and may fail in any way.
    """

    name: str
    attend: Attend
    trains: bool = True
    heads_last: bool = False
    foreign: bool = False
    once: dict[str, float] = field(default_factory=dict)


def competitors(case: Case, device: str, compiled: str) -> Iterator[Competitor]:
    """All that can be asked to compute a case. `compiled`: "none", "window" (cases with a rule) or "all"."""
    return (one for one in _all(case, device, compiled) if case.backends is None or one.name in case.backends)


def _all(case: Case, device: str, compiled: str) -> Iterator[Competitor]:
    for backend in ct.backends():
        costly = backend.name == COMPILED and not compiles(case, compiled)
        if device in backend.devices and backend.name != DEFINITION and not costly:
            yield Competitor(backend.name, ours(case, backend.name))
    if case.patterns == (ct.causal(),):
        yield Competitor("sdpa is_causal", lambda q, k, v: sdpa(q, k, v, is_causal=True))
    if case.rule is not None and compiles(case, compiled):
        yield by_hand(case, device)
    if device == "cuda":
        yield from _libraries(case)


def compiles(case: Case, compiled: str) -> bool:
    """Whether kernels that torch compiles for each shape take part."""
    return compiled == "all" or (compiled == "window" and case.rule is not None)


def ours(case: Case, backend: str) -> Attend:
    """`ct.attention` under the plan of each pattern; the results are added."""
    plans = [ct.plan(pattern, case.grid) for pattern in case.patterns]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = [ct.attention(q, k, v, grid=case.grid, where=plan, backend=backend) for plan in plans]
        return sum(outs[1:], start=outs[0])

    return attend


def by_hand(case: Case, device: str) -> Competitor:
    """torch's FlexAttention as its user writes it: `create_block_mask` of a rule, and the compiled kernel."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert case.rule is not None
    start = time.perf_counter()
    mask = create_block_mask(case.rule, None, None, case.grid.size, case.grid.size, device=device)
    seconds = time.perf_counter() - start
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return Competitor(
        BY_HAND,
        lambda q, k, v: compiled(q, k, v, block_mask=mask),
        trains=device == "cuda",  # torch has no backward pass of it on CPUs
        foreign=True,
        once={"mask": seconds},
    )


def absent() -> list[str]:
    """Libraries that would take part on a GPU and are not installed."""
    return [name for name in LIBRARIES if find_spec(name) is None]


def _libraries(case: Case) -> Iterator[Competitor]:
    if len(case.patterns) > 1:
        return
    (pattern,) = case.patterns
    missing = absent()
    if "natten" not in missing and isinstance(pattern, Window) and _shifted(pattern):
        yield _natten(case, pattern)
    if "fla" not in missing and pattern == ct.causal():
        kernel = import_module("fla.ops").parallel_attn
        yield Competitor("fla", lambda q, k, v: kernel(q, k, v), heads_last=True, foreign=True)


def _shifted(pattern: Window) -> bool:
    return pattern.edge == "shift" and all(step == 1 for _, step in pattern.dilation)


def _natten(case: Case, pattern: Window) -> Competitor:
    """NATTEN's fused neighborhood attention, which has the shifted windows at borders."""
    functional = import_module("natten.functional")
    kernel = getattr(functional, f"na{len(case.grid.axes)}d")
    spans = {axis: before + after + 1 for axis, (before, after) in pattern.spans}
    size = tuple(spans.get(axis, n) for axis, n in case.grid.sizes.items())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        on_grid = (x.unflatten(1, case.grid.shape) for x in (q, k, v))
        out: Tensor = kernel(*on_grid, kernel_size=size)
        return out.flatten(1, len(size))

    return Competitor("natten", attend, heads_last=True, foreign=True)


def refusal(competitor: Competitor, error: Exception) -> str | None:
    """Why it did not run, where that is no fault of ours: it says so, memory is short, or it is not our code."""
    known = (UnsupportedError, NotImplementedError, torch.OutOfMemoryError)
    if isinstance(error, known) or competitor.foreign:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
    return None
