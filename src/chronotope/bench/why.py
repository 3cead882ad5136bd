"""Why a row loses: the reasons that docs/benchmarks.md prints, kept here so that new figures do not drop them."""

from __future__ import annotations

from chronotope.bench.cases import BACKWARD, BOTH, FORWARD
from chronotope.bench.results import Row

SLOWER, FAR = 0.95, 0.5  # of what it is compared with, of the bound
UNKNOWN = "not known"

WHY = {
    ("native", "temporal"): "8 keys for each query: memory is the limit and not arithmetic, see Along time",
    ("native", "axial"): "three passes over memory, with 8, 32 and 32 keys for each query: memory is the limit",
    ("native", "radial"): "the published block of 128 hides little of 8 frames: the bound itself is near 1",
    ("native", "full"): "the same work as dense, by another kernel",
    ("native", "8x64x64"): "rows of 64 numbers a frame apart, and the arithmetic of 8 keys, which a copy has not",
    ("native", "32x32x32"): "the arithmetic of 32 keys, beside reading and writing once: neither is the limit alone",
    ("torch", "temporal"): "copies keys and values into tiles first, and memory is the limit",
    ("torch", "axial"): "copies keys and values into tiles first, three times, and memory is the limit",
    ("torch", "8x64x64"): "copies q, k and v into tiles, as rearranging does, and writes out the scores of short rows",
    ("torch", "32x32x32"): "copies q, k and v into tiles, as rearranging does, and writes out the scores of short rows",
    (
        "torch",
        "",
    ): "torch's operators under the plan of another kernel: all pairs of a tile are computed, and its "
    "keys are copied for it",
    ("FlexAttention", ""): "blocks of 128 x 128 tokens in grid order: a window touches more of them than of tiles that "
    "are boxes, and its rule is evaluated for each pair in them",
    ("sdpa is_causal", ""): "torch's own kernel; the bound is that of our tiles",
}


def loses(rows: list[Row]) -> bool:
    """Whether some pass is clearly slower than what it is compared with, or reaches less than half of its bound."""
    if rows[0].row == rows[0].backend:  # what the others are compared with
        return False
    timed = [row for row in rows if row.phase in (FORWARD, BACKWARD, BOTH) and row.ratio_to_dense is not None]
    return any((row.ratio_to_dense or 0) < SLOWER or (row.reached or 0) < FAR for row in timed)


def why(rows: list[Row]) -> str:
    """The reason for a row: its own, else that of the kernel."""
    first = rows[0]
    return WHY.get((first.backend, first.row)) or WHY.get((first.backend, "")) or UNKNOWN
