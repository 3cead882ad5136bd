"""What routes keep of attention, as a table and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from chronotope.report.plot import plotly
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fidelity.json").write_text(json.dumps([asdict(row) for row in rows], indent=2))
    drawn = plotly()
    parts: list[str] = []
    for model in dict.fromkeys(row.model for row in rows):
        for column, title in (("mass", "share of dense attention kept"), ("error", "relative error of the output")):
            figure = drawn.graph_objects.Figure()
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
            first = not parts
            parts.append(drawn.offline.plot(figure, output_type="div", include_plotlyjs=first, auto_open=False))
    path = folder / "fidelity.html"
    path.write_text("\n".join(parts))
    return path
