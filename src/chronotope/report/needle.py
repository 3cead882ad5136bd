"""Needles found under each route, at each depth of the haystack."""

import json
from dataclasses import asdict
from pathlib import Path

from chronotope.report.plot import plotly
from chronotope.tasks.needle import Found, Needles


def write_needle(found: list[Found], task: Needles, folder: Path) -> Path:
    """needle.json, and the picture needle.html: share of questions answered, by route and depth of the needle."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(one) for one in found]
    (folder / "needle.json").write_text(json.dumps({"task": asdict(task), "rows": rows}, indent=2))
    drawn = plotly()
    depths = len(found[0].depths) if found else 0
    figure = drawn.graph_objects.Figure(
        drawn.graph_objects.Heatmap(
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
    path = folder / "needle.html"
    path.write_text(drawn.offline.plot(figure, output_type="div", include_plotlyjs=True, auto_open=False))
    return path
