"""The capability table."""

from __future__ import annotations

from chronotope.kernels.call import Backend
from chronotope.kernels.flex import FLEX
from chronotope.kernels.native.kernel import NATIVE
from chronotope.kernels.reference import REFERENCE
from chronotope.kernels.tiled import TORCH
from chronotope.kernels.triton import TRITON
from chronotope.listing import Listing

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (REFERENCE, FLEX, TORCH, TRITON, NATIVE)}
COLUMNS = (
    "backend", "devices", "dtypes", "head sizes", "backward", "lse", "bias", "softcap", "grouped", "cross",
    "tested on", "what",
)  # fmt: skip


def row(backend: Backend) -> list[str]:
    """The cells of one backend, under `COLUMNS`."""
    b = backend
    flags = ["yes" if flag else "no" for flag in (b.lse, b.bias, b.softcap, b.grouped_heads, b.cross_grids)]
    dtypes = ",".join(str(dtype).removeprefix("torch.") for dtype in b.dtypes)
    return [b.name, ",".join(b.devices), dtypes, b.head_sizes, b.differentiable, *flags, b.tested_on, b.about]


def backends() -> Listing:
    """The capability table of attention: what each backend takes and gives."""
    return Listing(sorted(BACKENDS.values(), key=lambda backend: -backend.priority), COLUMNS, row)
