"""Needles found under each route, at each depth of the haystack."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chronotope.report.plot import plotly, write_figures
from chronotope.tasks.needle import Found, Needles


def write_needle(found: list[Found], task: Needles, folder: Path) -> Path:
    """needle.json, and the picture needle.html: share of questions answered, by route and depth of the needle."""
    facts = {"task": asdict(task), "rows": [asdict(one) for one in found]}
    return write_figures("needle", facts, _figures(found, task), folder)


def _figures(found: list[Found], task: Needles) -> Iterator[Any]:
    go = plotly().graph_objects
    depths = len(found[0].depths) if found else 0
    figure = go.Figure(
        go.Heatmap(
            x=[f"{100 * at // depths} to {100 * (at + 1) // depths} %" for at in range(depths)],
            y=[f"{one.name} ({one.found:.0%})" for one in found],
            z=[one.depths for one in found],
            zmin=0,
            zmax=1,
            colorscale="Teal",
            texttemplate="%{z:.2f}",
            colorbar={"title": "found"},
        )
    )
    figure.update_layout(
        title=f"Needles in {task.length} tokens, {task.keep:.0%} of the keys kept: share of questions answered",
        xaxis={"title": "depth of the needle, from the start"},
        yaxis={"autorange": "reversed", "automargin": True},
        height=120 + 36 * len(found),
        template="plotly_white",
    )
    yield figure
