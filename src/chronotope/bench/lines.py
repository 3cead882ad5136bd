"""The tables as lines of text."""

from __future__ import annotations

import re

from chronotope.bench.cases import BACKWARD, BOTH, FORWARD
from chronotope.bench.results import Row

PASSES = (FORWARD, BACKWARD, BOTH)
SHORT = {FORWARD: "fwd", BACKWARD: "bwd", BOTH: "fwd+bwd"}
NAMES = 44
TITLES = {
    "planning": "planning, nothing kept from before; x: times faster than create_block_mask",
    "attention": "attention of patterns, batch 1, grid order in and out; layout and masks included, plans warm",
    "windows": "windows of three sizes; as above",
    "sequences": "plain sequences; as above",
    "temporal": "along('t'), grid order in and out, against rearrange + SDPA + rearrange; reached: share of copy speed",
    "memory": "peak memory above what there was before q, k, v: these, out, plan, gradients and all; q+k+v+out are 1.0",
    "rounding": "root mean square error against float64, and its ratio to that of SDPA under the dense mask",
    "recurrences": "recurrences, heads of 64, float32; x: causal SDPA time / time; reached: share of the peak of a "
    "matrix product, by counted operations",
    "routes": "routes, heads of 64, float32, choosing included; x: SDPA time / time; bound: 1 / pairs computed",
    "stepping": "one token after the other: bytes of the state and time of a step, after contexts of growing length",
    "rollouts": "blocks on frames of 16 x 16 places, one frame after the other: time of a frame and bytes of the state",
}
LEGEND = (
    "  x: dense time / time, median of paired rounds; bound: 1 / share of pairs in tiles; reached: share of the bound;",
    "  error: largest difference from float64 over the largest number, of all passes, checked before timing",
)


def heading(table: str) -> list[str]:
    """Title and columns."""
    out = [TITLES[table]]
    if table in ("attention", "windows", "sequences"):
        out += LEGEND
        out.append(f"{'':{NAMES}}{'density':>8}{'in tiles':>9}{'bound':>8}{_passes('x', 'reached')}{'error':>9}")
    if table == "temporal":
        out.append(f"{'':{NAMES}}{_passes('x', 'GB/s', 'reached')}{'error':>9}")
    return out


def _passes(*columns: str) -> str:
    return "".join(f"{SHORT[phase] + ' ms':>11}" + "".join(f"{column:>8}" for column in columns) for phase in PASSES)


def _names(row: Row) -> str:
    return f"  {row.row:26}{row.backend:16}"


def line(rows: list[Row]) -> str:
    """One line for what belongs together: the passes of one kernel in one case."""
    first = rows[0]
    if any(row.wrong for row in rows):
        errors = ", ".join(f"{row.phase} {row.error:.1e}" for row in rows)
        return f"{_names(first)}WRONG, not timed; errors: {errors}"
    if first.table == "planning":
        return "\n".join(_planned(row) for row in rows)
    if first.table == "memory":
        found = ", ".join(f"{row.phase} {row.peak_mb:7.0f} MB ({row.peak_share:.2f})" for row in rows)
        return f"{_names(first)}{found}"
    if first.table == "rounding":
        found = "   ".join(f"{row.phase} {row.error:.1e} {row.ratio_to_dense:.2f}x" for row in rows)
        return f"  {first.dtype:10}{first.backend:14}{found}"
    if first.table == "recurrences":
        return _carried(rows)
    if first.table in ("stepping", "rollouts"):
        cells = (f"{slices(row):>7}: {1e6 * (row.seconds_median or 0):7.0f} us {row.peak_mb:9.3f} MB" for row in rows)
        return f"  {first.row:30}{'  '.join(cells)}"
    if first.table == "routes":
        return _routed(rows)
    return _timed(rows)


def slices(row: Row) -> int:
    """Of the first axis of the grid."""
    return int(re.findall(r"\d+", row.grid)[0])


def _routed(rows: list[Row]) -> str:
    first = rows[0]
    out = f"  {_tokens(first):>6,} {first.row:32}{_ms(first)} ms {first.ratio_to_dense or 0:6.1f}x"
    if first.bound is not None:
        out += f" of {first.bound:6.1f}x: {first.reached or 0:5.2f}"
    for row in rows[1:]:
        out += f"   {row.phase}{_ms(row)} ms" + (f" {row.reached:5.2f} of bound" if row.reached else "")
    return out + ("" if first.error is None else f"{first.error:10.1e}")


def _tokens(row: Row) -> int:
    return int(row.grid.removeprefix("Grid(n=").removesuffix(")"))


def _carried(rows: list[Row]) -> str:
    first = rows[0]
    tokens = _tokens(first)
    out = f"  {tokens:>6,} {first.row:24}{first.backend:16}"
    for row in rows:
        out += f"{_ms(row)} ms"
        if row.seconds_median is not None and first.backend != "matrix product":
            out += f"{1e6 * row.seconds_median / tokens:8.2f} us/token"
        if row.ratio_to_dense is not None:
            out += f"{row.ratio_to_dense:8.1f}x"
        if row.reached is not None:
            out += f"{row.reached:7.2f} of peak"
    return out + ("" if first.error is None else f"{first.error:10.1e}")


def _planned(row: Row) -> str:
    found = f"  {row.row:24}{row.backend:24}{_ms(row)} ms"
    if row.ratio_to_dense is not None:
        found += f"{row.ratio_to_dense:8.1f}x"
    if row.peak_mb is not None:
        found += f"   {row.pattern} on {row.grid}: density {row.density:.6f}, in tiles {row.tile_density:.6f}"
        found += f", peak memory {row.peak_mb:.0f} MB above import"
    return found


def _timed(rows: list[Row]) -> str:
    first, by_phase = rows[0], {row.phase: row for row in rows}
    out = _names(first)
    if first.table == "temporal":
        if first.backend == "copy":
            return f"{out}{_ms(first)}{first.gb_per_s:16.1f} of {first.grid}, {first.head_size} numbers each"
    else:
        out += f"{first.density or 0:8.4f}{first.tile_density or 0:9.4f}{first.bound or 0:7.1f}x"
    for phase in PASSES:
        row = by_phase.get(phase)
        out += _ms(row) + (f"{'-':>8}" if row is None or row.ratio_to_dense is None else f"{row.ratio_to_dense:7.1f}x")
        if first.table == "temporal":
            out += f"{'-':>8}" if row is None or row.gb_per_s is None else f"{row.gb_per_s:8.1f}"
        out += f"{'-':>8}" if row is None or row.reached is None else f"{row.reached:8.2f}"
    errors = [row.error for row in rows if row.error is not None]
    out += f"{max(errors):9.1e}" if errors else ""
    extra = [f"{phase} {row.seconds_median:.1f} s" for phase, row in by_phase.items() if phase not in PASSES]
    return out + (f"   once: {', '.join(extra)}" if extra else "")


def _ms(row: Row | None) -> str:
    return f"{'-':>11}" if row is None or row.seconds_median is None else f"{1e3 * row.seconds_median:11.1f}"
