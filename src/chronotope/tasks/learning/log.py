"""The course of a training as a CSV file."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Log:
    """Rows of numbers by step; those of a killed run beyond its last checkpoint are dropped."""

    path: Path

    def rows(self) -> list[dict[str, str]]:
        """What is there."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def keep(self, step: int) -> None:
        """Drops what comes after a step."""
        rows = self.rows()
        self._write([row for row in rows if int(row["step"]) <= step])

    def add(self, row: dict[str, float | int]) -> None:
        """One more row."""
        self._write([*self.rows(), {key: f"{value:.6g}" for key, value in row.items()}])

    def _write(self, rows: list[dict[str, str]]) -> None:
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
