"""Recall against the number of pairs, one line for each mixer."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chronotope.report.plot import plotly, write_figures
from chronotope.tasks.recall import Found, Recall


def write_recall(found: list[Found], task: Recall, folder: Path) -> Path:
    """recall.json, and the picture recall.html: accuracy against the number of pairs, a line for each mixer."""
    facts = {"task": asdict(task), "rows": [asdict(one) for one in found]}
    return write_figures("recall", facts, _figures(found, task), folder)


def _figures(found: list[Found], task: Recall) -> Iterator[Any]:
    go = plotly().graph_objects
    lines = [
        go.Scatter(
            x=list(one.accuracy),
            y=list(one.accuracy.values()),
            mode="lines+markers",
            name=f"{one.name} ({one.state_bytes / 1024:.1f} kB)",
        )
        for one in found
    ]
    figure = go.Figure(lines)
    figure.update_layout(
        title=f"Multi-query recall: {task.length} tokens, {task.layers} layers of {task.dim} channels (state)",
        xaxis={"title": "pairs of key and value", "type": "log", "tickvals": list(task.pairs)},
        yaxis={"title": "share of queries answered", "range": [0, 1.02]},
        template="plotly_white",
    )
    yield figure
