"""The capability table."""

from __future__ import annotations

from chronotope.kernels.call import Backend
from chronotope.kernels.flex import FLEX
from chronotope.kernels.native.kernel import NATIVE
from chronotope.kernels.reference import REFERENCE
from chronotope.kernels.tiled import TORCH
from chronotope.kernels.triton import TRITON

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (REFERENCE, FLEX, TORCH, TRITON, NATIVE)}
COLUMNS = (
    "backend", "devices", "dtypes", "head sizes", "backward", "lse", "bias", "softcap", "grouped", "cross",
    "tested on", "what",
)  # fmt: skip


class Backends(list[Backend]):
    """A list of backends that prints as a table."""

    def __repr__(self) -> str:
        rows = [list(COLUMNS), *(row(backend) for backend in self)]
        widths = [max(len(cells[i]) for cells in rows) for i in range(len(COLUMNS))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in rows)
        return "\n".join(line.rstrip() for line in lines)


def row(backend: Backend) -> list[str]:
    """The cells of one backend, under `COLUMNS`."""
    b = backend
    flags = ["yes" if flag else "no" for flag in (b.lse, b.bias, b.softcap, b.grouped_heads, b.cross_grids)]
    dtypes = ",".join(str(dtype).removeprefix("torch.") for dtype in b.dtypes)
    return [b.name, ",".join(b.devices), dtypes, b.head_sizes, b.differentiable, *flags, b.tested_on, b.about]


def backends() -> Backends:
    """The capability table: what each backend takes and gives. Prints as a table; a list of `Backend` otherwise."""
    return Backends(sorted(BACKENDS.values(), key=lambda backend: -backend.priority))
