"""Speed against error: one point per pattern, the bound of its tiles beside it, the error budget as a line."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chronotope.errors import ChronotopeError

ACCENT, INK, FAINT = "#0b6e6e", "#1d2730", "#a9b4bd"


def plotly() -> Any:
    """The plotly package with `graph_objects` and `offline` loaded.

    Raises ChronotopeError: it is not installed.
    """
    try:
        import plotly
        import plotly.graph_objects
        import plotly.offline
    except ImportError as error:
        raise ChronotopeError(
            "write_report draws with plotly, which is not installed: pip install chronotope[report]"
        ) from error
    return plotly


def write_figures(name: str, facts: Any, figures: Iterable[Any], folder: Path) -> Path:
    """name.json with the facts, and then, as drawing them may fail, name.html with the figures; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=2))
    parts = (
        plotly().offline.plot(figure, output_type="div", include_plotlyjs=not number, auto_open=False)
        for number, figure in enumerate(figures)
    )
    path = folder / f"{name}.html"
    path.write_text("\n".join(parts))
    return path


def excess(results: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Error after tuning above that of the dense row, in percent of it; None where either was not measured."""
    dense = results["rows"][0]["tuned"]
    return 100.0 * (row["tuned"] / dense - 1) if dense and row["tuned"] is not None else None


def speed_error(results: dict[str, Any]) -> Any:
    """A plotly figure: x = dense time / time of the forward pass (log), y = `excess` (percent).

    Rows without both numbers have no point.
    """
    go = plotly().graph_objects
    points = []
    for row in results["rows"]:
        above = excess(results, row)
        if above is not None and row["forward_speedup"] is not None:
            points.append((row, above))
    points.sort(key=lambda point: point[0]["forward_speedup"])
    figure = go.Figure(layout=_layout(results, points))
    figure.add_traces([_bounds(go, points), _measured(go, points, results["best"])])
    return figure


def _measured(go: Any, points: list[tuple[dict[str, Any], float]], best: str | None) -> Any:
    # Names alternate above and below, so that neighbours in speed do not cover each other.
    sides = ["top center" if number % 2 else "bottom center" for number in range(len(points))]
    return go.Scatter(
        name="measured",
        mode="markers+text",
        x=[row["forward_speedup"] for row, _ in points],
        y=[y for _, y in points],
        text=[row["name"] for row, _ in points],
        textposition=sides,
        marker={"size": 12, "color": [ACCENT if row["name"] == best else INK for row, _ in points]},
        hovertemplate="%{text}<br>%{x:.3g} times dense speed<br>error %{y:+.3g} %<extra></extra>",
    )


def _bounds(go: Any, points: list[tuple[dict[str, Any], float]]) -> Any:
    """Open circles at the bound, each joined to its measured point: the line is the speed not yet reached."""
    x, y, text = [], [], []
    for row, above in points:
        x += [row["forward_speedup"], row["bound"], None]
        y += [above, above, None]
        text += [None, row["name"], None]
    sizes = [9 if index % 3 == 1 else 0 for index in range(len(x))]
    return go.Scatter(
        name="bound of its tiles",
        mode="lines+markers",
        x=x,
        y=y,
        text=text,
        line={"color": FAINT, "width": 1, "dash": "dot"},
        marker={"size": sizes, "symbol": "circle-open", "color": FAINT, "line": {"width": 1.5}, "opacity": 1},
        hovertemplate="%{text}<br>bound %{x:.3g} times dense speed<extra></extra>",
    )


def _layout(results: dict[str, Any], points: list[tuple[dict[str, Any], float]]) -> dict[str, Any]:
    budget = 100.0 * results["budget"]
    axis: dict[str, Any] = {
        "gridcolor": "#e6eaed",
        "zeroline": False,
        "linecolor": FAINT,
        "ticks": "outside",
        "tickcolor": FAINT,
    }
    speeds = [speed for row, _ in points for speed in (row["forward_speedup"], row["bound"])] or [1.0]
    errors = [y for _, y in points] + [0.0, budget]
    x = axis | _title("forward speed (dense = 1)") | _ticks() | {"type": "log"}
    # The margins hold the names of the outermost points, which plotly would cut.
    x["range"] = [math.log10(min(speeds)) - 0.15, math.log10(max(speeds)) + 0.15]
    y = axis | _title("error after tuning, above dense (%)") | {"automargin": True, "range": _wider(errors)}
    near = _wider([max(min(errors), -4 * budget), min(max(errors), 4 * budget)])
    return {
        "template": "none",
        "height": 440,
        "margin": {"l": 64, "r": 24, "t": 48, "b": 56},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "xaxis": x,
        "yaxis": y,
        "shapes": [_line(budget)],
        "annotations": [_words(f"error budget {budget:g} %", budget)],
        "updatemenus": [_zoom({"every pattern": y["range"], "near the budget": near})],
    }


def _wider(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    margin = 0.15 * (high - low or 1)
    return [low - margin, high + margin]


def _title(text: str) -> dict[str, Any]:
    return {"title": {"text": text, "font": {"size": 13}}}


def _ticks() -> dict[str, Any]:
    values = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]
    return {"tickvals": values, "ticktext": [f"{value:g}×" for value in values]}


def _zoom(ranges: dict[str, list[float]]) -> dict[str, Any]:
    """Buttons: one pattern that loses by much would press the others onto one line."""
    return {
        "type": "buttons",
        "direction": "right",
        "x": 1,
        "xanchor": "right",
        "y": 1.02,
        "yanchor": "bottom",
        "pad": {"r": 0, "t": 0},
        "bgcolor": "#ffffff",
        "bordercolor": FAINT,
        "font": {"size": 12},
        "buttons": [
            {"label": label, "method": "relayout", "args": [{"yaxis.range": bounds}]}
            for label, bounds in ranges.items()
        ],
    }


def _line(budget: float) -> dict[str, Any]:
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": budget,
        "y1": budget,
        "line": {"color": ACCENT, "width": 1.5, "dash": "dash"},
    }


def _words(text: str, y: float) -> dict[str, Any]:
    place = {"xref": "paper", "x": 1, "xanchor": "right", "y": y, "yanchor": "bottom"}
    return place | {"text": text, "showarrow": False, "font": {"color": ACCENT, "size": 12}}
