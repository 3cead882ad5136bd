"""The backends of recurrences."""

from __future__ import annotations

from chronotope.listing import Listing
from chronotope.recurrences.call import Backend
from chronotope.recurrences.chunked import TORCH
from chronotope.recurrences.native import NATIVE
from chronotope.recurrences.reference import REFERENCE
from chronotope.recurrences.triton import TRITON

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (REFERENCE, TORCH, TRITON, NATIVE)}
COLUMNS = ("backend", "devices", "computes in", "chunk", "backward", "tested on", "what")


def row(backend: Backend) -> list[str]:
    """The cells of one backend, under `COLUMNS`."""
    b = backend
    dtypes = ",".join(str(dtype).removeprefix("torch.") for dtype in b.dtypes)
    return [b.name, ",".join(b.devices), dtypes, str(b.chunk), b.differentiable, b.tested_on, b.about]


def backends() -> Listing:
    """The capability table of recurrences."""
    return Listing(sorted(BACKENDS.values(), key=lambda backend: -backend.priority), COLUMNS, row)
