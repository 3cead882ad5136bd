"""The rows of a report as an HTML table that reads without JavaScript; page.js sorts it."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from chronotope.report.plot import excess


@dataclass(frozen=True)
class Column:
    """key: name in a row. label: head of the column. show: a number as text. says: what the number is."""

    key: str
    label: str
    show: Callable[[float], str]
    says: str


def three(value: float) -> str:
    """Three significant digits, whole numbers in full up to a million."""
    whole = len(str(int(abs(value))))
    if 1 <= abs(value) < 1e6:
        return f"{value:.{max(0, 3 - whole)}f}"
    return f"{value:#.3g}" if value else "0"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{three(100 * value)} %"


def signed(value: float) -> str:
    """A percentage with its sign."""
    if value == 0:
        return "0 %"
    return f"{value:+.2f} %" if abs(value) < 10 else f"{value:+.0f} %"


def times(value: float) -> str:
    """A factor."""
    return f"{three(value)}×"


COLUMNS = [
    Column("error", "error at once", three, "mean squared error right after the swap, without training"),
    Column("tuned", "error tuned", three, "mean squared error after fine-tuning"),
    Column("excess", "above dense", signed, "error tuned, above that of the dense row"),
    Column("mass", "mass", percent, "share of the dense attention mass on the pairs kept"),
    Column("density", "density", percent, "share of visible pairs"),
    Column("tile_density", "tile density", percent, "share of pairs computed"),
    Column("bound", "bound", times, "tile density of dense / tile density: these tiles allow no larger speed"),
    Column("forward_ms", "forward ms", three, "milliseconds of one attention call, forward"),
    Column("forward_speedup", "forward speed", times, "dense forward time / this"),
    Column("train_ms", "train ms", three, "milliseconds of one attention call, forward and backward"),
    Column("train_speedup", "train speed", times, "dense training time / this"),
    Column("peak_mb", "peak MB", three, "peak memory in megabytes"),
]


def table(results: dict[str, Any]) -> str:
    """The <table>: a head of buttons, a body of one row per pattern; cells carry their number in data-value."""
    heads = [_head("name", "pattern", "name, and the expression that makes it")]
    heads += [_head(column.key, column.label, column.says) for column in COLUMNS]
    rows = [_row(results, row) for row in results["rows"]]
    return f'<table id="rows"><thead><tr>{"".join(heads)}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _head(key: str, label: str, says: str) -> str:
    button = f'<button type="button" title="{escape(says)}">{escape(label)}</button>'
    return f'<th scope="col" data-key="{key}" aria-sort="none">{button}</th>'


def _row(results: dict[str, Any], row: dict[str, Any]) -> str:
    best = row["name"] == results["best"]
    badge = ' <span class="badge">best</span>' if best else ""
    name, pattern = escape(row["name"]), escape(row["pattern"])
    cells = [f'<th scope="row" data-value="{name}">{name}{badge}<code>{pattern}</code></th>']
    values = row | {"excess": excess(results, row)}
    cells += [_cell(column, values[column.key]) for column in COLUMNS]
    return f'<tr data-name="{name}"{" class=best" if best else ""}>{"".join(cells)}</tr>'


def _cell(column: Column, value: float | int | None) -> str:
    number, text = ("", "–") if value is None else (repr(float(value)), column.show(float(value)))
    return f'<td data-key="{column.key}" data-label="{escape(column.label)}" data-value="{number}">{text}</td>'
