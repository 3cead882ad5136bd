"""A comparison in the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chronotope.report.table import percent, signed, three, times

WIDTH = 132


def table(results: dict[str, Any]) -> Table:
    """The rows of results, the best one marked."""
    budget = f"{100 * results['budget']:g} %"
    best = results["best"]
    ending = f"* fastest within {budget} of the dense error"
    out = Table(
        title=f"{results['input']}: mean squared error of the next frame "
        f"(repeating the last frame: {three(results['floor']['repeat_last'])})",
        caption=f"{ending}; times and memory are of one attention call; bound: dense tile density / tile density",
        title_justify="left",
        caption_justify="left",
    )
    heads = ["pattern", "at once", "tuned", "± dense", "mass", "density", "bound"]
    heads += ["fwd ms", "speed", "+bwd ms", "speed", "peak MB"]
    for head in heads:
        out.add_column(head, justify="left" if head == "pattern" else "right", overflow="fold")
    dense = results["rows"][0]["tuned"]
    for row in results["rows"]:
        mark = "* " if row["name"] == best else ""
        out.add_row(
            mark + row["name"],
            three(row["error"]),
            three(row["tuned"]),
            signed(100 * (row["tuned"] / dense - 1)),
            percent(row["mass"]),
            percent(row["density"]),
            times(row["bound"]),
            three(row["forward_ms"]),
            times(row["forward_speedup"]),
            three(row["train_ms"]),
            times(row["train_speedup"]),
            three(row["peak_mb"]),
            style="bold green" if mark else None,
        )
    return out


def line(number: int, count: int, row: dict[str, Any], seconds: float) -> str:
    """What is said of a row when it is done."""
    return (
        f"[{number}/{count}] {row['name']:<18} error {three(row['error'])}, tuned {three(row['tuned'])}, "
        f"mass {percent(row['mass'])}, forward {times(row['forward_speedup'])}, "
        f"with backward {times(row['train_speedup'])}  ({seconds:.1f} s)"
    )


def console(**options: Any) -> Console:
    """A console that is wide enough for the table where the width is not a terminal's."""
    out = Console(highlight=False, **options)
    if not out.is_terminal:
        out.width = max(out.width, WIDTH)
    return out


def save_rows(rows: Sequence[Any], path: Path, facts: dict[str, Any]) -> Path:
    """Writes dataclasses, and the facts that go with them, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | {"rows": [asdict(one) for one in rows]}, indent=1) + "\n")
    return path
