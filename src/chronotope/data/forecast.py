"""Many series on one clock, as a table: the files of multivariate forecasting."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from chronotope.data.files import unpacked
from chronotope.errors import ChronotopeError

SUFFIXES = (".csv", ".csv.gz", ".txt", ".txt.gz")
DATES = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d", "%Y/%m/%d %H:%M", "%Y/%m/%d")
DAY, MONTH = timedelta(days=1), timedelta(days=30)


@dataclass(frozen=True)
class Series:
    """values [N, V] in order of time, a name for each of the V columns, and the time between rows where it is told."""

    values: Float64[Tensor, "n v"]
    names: tuple[str, ...]
    step: timedelta | None

    def rows(self, span: timedelta) -> int | None:
        """How many rows a span of time has; None where that is not told, or no whole number."""
        return None if self.step is None or span % self.step else span // self.step

    def months(self) -> Parts:
        """The cut of the ETT tables: 12, 4 and 4 months of 30 days; later rows are not used."""
        month = self.rows(MONTH)
        if month is None or 20 * month > len(self.values):
            raise ChronotopeError(
                f"{len(self.values):,} rows {self.step} apart: expected at least 20 months of 30 days, with dates."
            )
        return Parts(12 * month, 16 * month, 20 * month)

    def shares(self) -> Parts:
        """The cut of the others: 70% to learn from, the last 20% to test, what is between to validate."""
        n = len(self.values)
        return Parts(int(n * 0.7), n - int(n * 0.2), n)


@dataclass(frozen=True)
class Parts:
    """Where a table is cut: rows [0, train) to learn from, [train, valid) to validate, [valid, test) to test."""

    train: int
    valid: int
    test: int


def read_series(path: str | Path) -> Series:
    """A table, a line for each time: `date,name,name,...`, then a date and numbers (.csv, .csv.gz); or numbers alone.

    The time between rows is that between the first two. Raises ChronotopeError: no such file, or another format.
    """
    path = Path(path)
    if not path.is_file() or not path.name.endswith(SUFFIXES):
        raise ChronotopeError(f"series {path}: no such file; expected a table ({', '.join(SUFFIXES)}).")
    try:
        text = unpacked(path).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ChronotopeError(f"{path}: {error}; expected a table as text, plain or gzipped.") from None
    rows = [line.split(",") for line in text.splitlines() if line.strip()]
    dated = bool(rows) and rows[0][0].strip().lower() == "date"
    names = (
        [name.strip() for name in rows.pop(0)[1:]] if dated else [str(i) for i in range(len(rows[0]) if rows else 0)]
    )
    values = _numbers(path, [row[dated:] for row in rows], len(names))
    return Series(values, tuple(names), _step(path, rows[0][0], rows[1][0]) if dated else None)


def _numbers(path: Path, rows: list[list[str]], width: int) -> Float64[Tensor, "n v"]:
    if width < 1 or len(rows) < 2:
        raise ChronotopeError(f"{path}: {len(rows)} rows of {width} numbers; expected 2 rows or more of 1 or more.")
    for at, row in enumerate(rows):
        if len(row) != width:
            raise ChronotopeError(f"{path}: row {at} has {len(row)} numbers; expected {width}, as above it.")
    try:
        values = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise ChronotopeError(f"{path}: {error}; expected numbers, in .csv after a date.") from None
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise ChronotopeError(f"{path}: row {bad[0, 0]} has {rows[bad[0, 0]][bad[0, 1]]}; expected finite numbers.")
    return torch.from_numpy(values)


def _step(path: Path, first: str, second: str) -> timedelta:
    """Raises ChronotopeError where the two are no dates, or not in order."""
    step = _date(path, second) - _date(path, first)
    if step <= timedelta(0):
        raise ChronotopeError(f"{path}: {second} comes after {first}; expected rows in order of time.")
    return step


def _date(path: Path, text: str) -> datetime:
    for form in DATES:
        try:
            return datetime.strptime(text.strip(), form)
        except ValueError:
            continue
    raise ChronotopeError(f"{path}: {text!r} is no date; expected one such as 2016-07-01 00:00:00.")
