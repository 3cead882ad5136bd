"""What is measured, as rows of CSV files whose names say machine, torch and threads."""

from __future__ import annotations

import csv
import platform
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from chronotope.bench.referee import ratio
from chronotope.errors import ChronotopeError
from chronotope.machine import processor

RENAMED = {"phase": "pass"}  # a keyword of Python


@dataclass(frozen=True)
class Row:
    """One figure. A time that is None beside an error: the result was wrong, and was not timed.

    row: its name in the table. phase: forward, backward, forward+backward, or what else was timed.
    dense_seconds_median: of what the table compares with, in the same rounds; ratio_to_dense: median over the rounds of
    that / this. density, tile_density: share of pairs that are visible, that lie in tiles. bound: largest ratio that
    is to be expected. reached: ratio / bound. error: against float64, see the table. gb_per_s: where memory is the
    bound. peak_mb, peak_share: memory, and as a multiple of q + k + v + out.
    """

    table: str
    row: str
    pattern: str
    grid: str
    heads: int | None = None
    head_size: int | None = None
    dtype: str = ""
    backend: str = ""
    phase: str = ""
    seconds_median: float | None = None
    seconds_min: float | None = None
    dense_seconds_median: float | None = None
    ratio_to_dense: float | None = None
    density: float | None = None
    tile_density: float | None = None
    bound: float | None = None
    reached: float | None = None
    error: float | None = None
    gb_per_s: float | None = None
    peak_mb: float | None = None
    peak_share: float | None = None
    rounds: int | None = None
    threads: int = 1
    machine: str = ""
    torch: str = ""
    python: str = ""
    date: str = ""

    @property
    def wrong(self) -> bool:
        """Checked, found wrong, and not timed."""
        return self.error is not None and self.seconds_median is None and self.table != "rounding"


COLUMNS = [RENAMED.get(field.name, field.name) for field in fields(Row)]
_NUMBERS = {"int": int, "int | None": int, "float | None": float}
_KINDS = {RENAMED.get(field.name, field.name): _NUMBERS.get(str(field.type), str) for field in fields(Row)}


def times(seconds: Sequence[float] | None, dense: Sequence[float] | None = None) -> dict[str, Any]:
    """The columns of a time taken in every round, and of what it is compared with; None: not timed."""
    if seconds is None:
        return {}
    out = {"seconds_median": statistics.median(seconds), "seconds_min": min(seconds), "rounds": len(seconds)}
    if dense is not None:
        out |= {"dense_seconds_median": statistics.median(dense), "ratio_to_dense": ratio(dense, seconds)}
    return out


def circumstances(threads: int, device: str) -> dict[str, Any]:
    """The columns that say on what, and when."""
    return {
        "threads": threads,
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def suffix(row: Row) -> str:
    """Machine, torch and threads of a row, as the end of a file name."""
    name = f"{row.machine}-torch{row.torch}-{row.threads}threads"
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def write(folder: Path, rows: list[Row]) -> Path:
    """The rows of one table as a file in the folder; one of the same table, machine and torch is replaced."""
    path = folder / f"{rows[0].table}-{suffix(rows[0])}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_text(value) for value in asdict(row).values()] for row in rows)
    return path


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises ChronotopeError where the columns are not those of this version."""
    with path.open(newline="") as file:
        found = csv.DictReader(file)
        if found.fieldnames != COLUMNS:
            raise ChronotopeError(f"{path}: the columns are {found.fieldnames}, expected {COLUMNS}; measure again.")
        return [_row(line) for line in found]


def read_all(paths: Iterable[Path]) -> list[Row]:
    """The rows of some files."""
    return [row for path in paths for row in read(path)]


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def _row(line: dict[str, str]) -> Row:
    back = {column: name for name, column in RENAMED.items()}
    values = {}
    for column, text in line.items():
        kind = _KINDS[column]
        values[back.get(column, column)] = None if not text and kind is not str else kind(text)
    return Row(**values)  # type: ignore[arg-type]
