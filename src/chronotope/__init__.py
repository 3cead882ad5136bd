"""Chronotope: attention over space and time.

Say where tokens are (a grid), who may look at whom (a pattern), and it is computed exactly, sparsely:

    grid = ct.Grid(t=8, h=32, w=32)
    near = ct.window(t=5, h=9, w=9) & ct.causal("t")
    out = ct.attention(q, k, v, grid=grid, where=near)
"""

from __future__ import annotations

import importlib
from types import ModuleType

from chronotope import memories, nn
from chronotope.attention import attention
from chronotope.bias import Alibi, Bias, RelativeBias
from chronotope.capabilities import backends
from chronotope.draw import draw
from chronotope.errors import ChronotopeError, UnsupportedError
from chronotope.grid import Grid
from chronotope.merge import merge
from chronotope.patterns import (
    Pattern,
    along,
    blocks,
    causal,
    full,
    graph,
    nothing,
    per_head,
    predicate,
    segments,
    sinks,
    strided,
    window,
)
from chronotope.planning import Plan, load_plan, parse_pattern, plan
from chronotope.position import Rope
from chronotope.recurrences import RecurrentState, features, linear_attention, normalizers, recurrence, scan
from chronotope.routing import Fidelity, fidelity, route
from chronotope.spectral import spectral

__version__ = "0.1.0"

__all__ = [
    "Alibi",
    "Bias",
    "ChronotopeError",
    "Fidelity",
    "Grid",
    "Pattern",
    "Plan",
    "RecurrentState",
    "RelativeBias",
    "Rope",
    "UnsupportedError",
    "adapt",
    "along",
    "attention",
    "backends",
    "blocks",
    "causal",
    "draw",
    "features",
    "fidelity",
    "full",
    "graph",
    "linear_attention",
    "load_plan",
    "memories",
    "merge",
    "nn",
    "normalizers",
    "nothing",
    "parse_pattern",
    "per_head",
    "plan",
    "predicate",
    "recurrence",
    "route",
    "scan",
    "segments",
    "sinks",
    "spectral",
    "strided",
    "window",
]


def __getattr__(name: str) -> ModuleType:
    """`ct.adapt`, which most programs do not need, is imported when it is first named."""
    if name != "adapt":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("chronotope.adapt")
