"""Lists that print as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any


class Listing(list[Any]):
    """A list that prints as a table: `row(item)` gives the cells under `columns`."""

    def __init__(self, items: Iterable[Any], columns: Sequence[str], row: Callable[[Any], Sequence[str]]):
        super().__init__(items)
        self.columns, self.row = columns, row

    def __repr__(self) -> str:
        rows = [list(self.columns), *map(self.row, self)]
        widths = [max(len(cells[i]) for cells in rows) for i in range(len(self.columns))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in rows)
        return "\n".join(line.rstrip() for line in lines)
