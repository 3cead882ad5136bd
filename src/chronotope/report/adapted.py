"""What adapting a model brought: a table, a picture of the choice for each layer and head, and the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from chronotope.adapt.search import cost, density
from chronotope.machine import processor
from chronotope.report.plot import plotly, write_figures
from chronotope.tasks.adapting import Adapted, alike


def adapted_table(found: Adapted) -> Table:
    """One line for each patch."""
    table = Table("patch", "density", "bound", "error on held-out inputs", "attention", "end to end", "peak MB")
    for one in found.outcomes:
        share = density_of(found, one.name)
        spread = "" if math.isnan(one.spread) else f" ± {one.spread:.2%}"
        table.add_row(
            one.name,
            f"{share:.3f}",
            f"{1 / share:.1f}x",
            f"{one.error:.2%}{spread}",
            f"{one.attention_speedup:.2f}x",
            f"{one.speedup:.2f}x",
            f"{one.memory / 1e6:.0f}",
        )
    return table


def density_of(found: Adapted, name: str) -> float:
    """Pairs in tiles, as a share of those that the model computes as it is."""
    if name == "dense":
        return 1.0
    if name == "searched":
        return found.assignment.density
    assert found.uniform is not None
    return density(found.profile, alike(found.profile, found.uniform))


def write_adapted(found: Adapted, folder: Path) -> Path:
    """assignment.json, adapt.json, and the picture adapt.html."""
    folder.mkdir(parents=True, exist_ok=True)
    found.assignment.save(folder / "assignment.json")
    facts = {
        "machine": {"cpu": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "rounding": found.rounding,
        "uniform": repr(found.uniform),
        "expected error": found.assignment.error,
        "no choice has less than": found.assignment.bound,
        "rows": [
            {
                "name": one.name, "density": density_of(found, one.name), "errors": list(one.errors),
                "error": one.error, "interval": one.spread, "seconds": one.seconds, "attention seconds": one.attention,
                "speedup": one.speedup, "attention speedup": one.attention_speedup, "peak bytes": one.memory,
            }
            for one in found.outcomes
        ],
    }  # fmt: skip
    return write_figures("adapt", facts, _figures(found), folder)


def _figures(found: Adapted) -> Iterator[Any]:
    go = plotly().graph_objects
    rows, shares, texts = [], [], []
    for level, choice in enumerate(found.assignment.choices):
        for name, patterns in choice.items():
            seen = found.profile.layers[name][level]
            rows.append(f"{name} from {found.profile.levels[level - 1]:g} on" if level else name)
            shares.append([cost(seen, one)[head] for head, one in enumerate(patterns)])
            texts.append([repr(one) for one in patterns])
    figure = go.Figure(
        go.Heatmap(
            z=shares, x=[f"head {head}" for head in range(max(map(len, shares)))], y=rows, text=texts,
            texttemplate="%{text}", zmin=0, zmax=1, colorscale="Teal", colorbar={"title": "share of dense"},
        )
    )  # fmt: skip
    figure.update_layout(
        title="What each head keeps", yaxis={"autorange": "reversed", "automargin": True},
        height=160 + 40 * len(rows), template="plotly_white",
    )  # fmt: skip
    yield figure
    yield _distances(found, list(found.profile.layers))


def _distances(found: Adapted, layers: list[str]) -> Any:
    """How far heads look, which is why they keep what they keep."""
    go = plotly().graph_objects
    figure = go.Figure()
    profiles = [next(iter(found.profile.layers[name].values())) for name in layers]
    for axis in profiles[0].grid.axes:
        far = [float(value) for one in profiles for value in one.mean(axis)]
        names = [f"{name} {head}" for name, one in zip(layers, profiles, strict=True) for head in range(one.heads)]
        figure.add_bar(x=names, y=far, name=axis)
    figure.update_layout(
        title="Mean distance of what is looked at, in tokens", barmode="group", template="plotly_white"
    )
    return figure
