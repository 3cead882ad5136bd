"""Recall against the number of pairs, one line for each mixer."""

import json
from dataclasses import asdict
from pathlib import Path

from chronotope.report.plot import plotly
from chronotope.tasks.recall import Found, Recall


def write_recall(found: list[Found], task: Recall, folder: Path) -> Path:
    """recall.json, and the picture recall.html: accuracy against the number of pairs, a line for each mixer."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(one) for one in found]
    (folder / "recall.json").write_text(json.dumps({"task": asdict(task), "rows": rows}, indent=2))
    drawn = plotly()
    lines = [
        drawn.graph_objects.Scatter(
            x=list(one.accuracy),
            y=list(one.accuracy.values()),
            mode="lines+markers",
            name=f"{one.name} ({one.state_bytes / 1024:.1f} kB)",
        )
        for one in found
    ]
    figure = drawn.graph_objects.Figure(lines)
    figure.update_layout(
        title=f"Multi-query recall: {task.length} tokens, {task.layers} layers of {task.dim} channels (state)",
        xaxis={"title": "pairs of key and value", "type": "log", "tickvals": list(task.pairs)},
        yaxis={"title": "share of queries answered", "range": [0, 1.02]},
        template="plotly_white",
    )
    path = folder / "recall.html"
    path.write_text(drawn.offline.plot(figure, output_type="div", include_plotlyjs=True, auto_open=False))
    return path
