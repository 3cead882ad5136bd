"""What routes keep of attention, as a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from chronotope.report.plot import plotly, write_figures
from chronotope.tasks.fidelity import LIMIT, STATIC, Kept

DASH = {STATIC: "dash", LIMIT: "dot"}


def fidelity_tables(rows: list[Kept]) -> list[Table]:
    """One for each model; `above static`: mass, less that of the best static pattern at the same density."""
    out = []
    for model in dict.fromkeys(row.model for row in rows):
        table = Table(title=f"attention kept of the {model}, means over layers and heads")
        for column in ("pattern", "density", "mass", "error", "recall", "above static"):
            table.add_column(column, justify="left" if column == "pattern" else "right")
        for row in (row for row in rows if row.model == model):
            numbers = [f"{number:.3f}" for number in (row.density, row.mass, row.error, row.recall)]
            table.add_row(row.name, *numbers, "" if row.above is None else f"{row.above:+.3f}")
        out.append(table)
    return out


def write_fidelity(rows: list[Kept], folder: Path) -> Path:
    """fidelity.json, and fidelity.html: mass and error against density, a line for each route."""
    return write_figures("fidelity", [asdict(row) for row in rows], _figures(rows), folder)


def _figures(rows: list[Kept]) -> Iterator[Any]:
    go = plotly().graph_objects
    for model in dict.fromkeys(row.model for row in rows):
        for column, title in (("mass", "share of dense attention kept"), ("error", "relative error of the output")):
            figure = go.Figure()
            for name in dict.fromkeys(row.name for row in rows if row.model == model):
                own = [row for row in rows if (row.model, row.name) == (model, name)]
                own.sort(key=lambda row: row.density)
                figure.add_scatter(
                    x=[row.density for row in own],
                    y=[getattr(row, column) for row in own],
                    name=name,
                    mode="lines+markers",
                    line={"dash": DASH.get(own[0].kind, "solid")},
                )
            figure.update_layout(
                title=f"{model}: {title}", xaxis={"title": "share of the pairs of dense", "type": "log"},
                yaxis={"title": title}, template="plotly_white",
            )  # fmt: skip
            yield figure
