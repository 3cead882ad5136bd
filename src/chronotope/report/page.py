"""Writes a report: one HTML file that needs no network, and the numbers as JSON.

Arrays travel as base64 of zlib; page.js unpacks an array when it is first looked at.
"""

import base64
import json
import os
import re
import zlib
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from chronotope.errors import ChronotopeError
from chronotope.report.plot import plotly, speed_error
from chronotope.report.results import check, plain
from chronotope.report.table import table, three, times


def write_report(results: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes the page of `results` (the names in `report.results`, "pictures" among them) and returns its path.

    Raises ChronotopeError: a name is missing, a picture does not fit the grid, a number is not finite, the folder is
    not there, or plotly is missing.
    """
    check(results)
    numbers = plain(_numbers(results))
    figure = speed_error(numbers).to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id="speed-error",
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
    )
    parts = {
        "title": escape(numbers["title"]),
        "css": _asset("page.css"),
        "js": _asset("page.js"),
        "plotly": plotly().offline.get_plotlyjs(),
        "summary": summary(numbers),
        "table": table(numbers),
        "figure": figure,
        "payload": _script_safe(json.dumps(_payload(numbers, results["pictures"]), allow_nan=False)),
    }
    # One pass over the template alone: what is put in is never searched for marks.
    page = re.sub(r"<!-- (\w+) -->", lambda mark: parts[mark[1]], _asset("page.html"))
    return _write(path, page)


def save_results(results: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes `results` without "pictures" as JSON (RFC 8259: no NaN, no infinity) and returns its path.

    Raises ChronotopeError: a number is not finite, a value has no form in JSON, or the folder is not there.
    """
    return _write(path, json.dumps(plain(_numbers(results)), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def summary(results: dict[str, Any]) -> str:
    """The paragraph under the title, as HTML: what was measured, on what, on which machine, and what came out."""
    model, machine, grid = results["model"], results["machine"], results["grid"]
    colour = "gray" if results["channels"] == 1 else f"{results['channels']} channels"
    return (
        f"A model of {model['layers']} layers with {model['heads']} heads and {model['parameters']:,} parameters "
        f"learned to predict frames of <b>{escape(results['input'])}</b> with full attention ({model['steps']:,} "
        f"steps, seed {results['seed']}, {three(float(results['minutes']))} min). Its tokens are patches of "
        f"{results['patch']} × {results['patch']} pixels ({colour}) on a grid of {grid['t']} × {grid['h']} × "
        f"{grid['w']} (time, height, width). Then its attention was swapped for each pattern below: the error is the "
        f"mean squared error of its predictions, at once and after fine-tuning; repeating the last frame has "
        f"{three(float(results['floor']['repeat_last']))}. Times are of {escape(machine['cpu'])} ({machine['threads']} "
        f"threads, torch {escape(machine['torch'])}, Python {escape(machine['python'])}, "
        f"{escape(machine['platform'])}). {_verdict(results)}"
    )


def _verdict(results: dict[str, Any]) -> str:
    budget = f"{100 * results['budget']:g} %"
    row = next((row for row in results["rows"] if row["name"] == results["best"]), None)
    if row is None:
        return f"<b>No pattern is within {budget} of the dense error.</b>"
    speeds = [(row["forward_speedup"], "forward"), (row["train_speedup"], "in training")]
    told = " and ".join(f"{times(float(speed))} {what}" for speed, what in speeds if speed is not None)
    return f"<b>Best within {budget} of the dense error: {escape(row['name'])}</b>, speed {told}."


def _numbers(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "pictures"}


def _payload(numbers: dict[str, Any], pictures: dict[str, Any]) -> dict[str, Any]:
    """What page.js reads: shapes as they are, arrays packed, masks 8 pairs to the byte (rows padded to whole bytes)."""
    cones = {
        name: {
            "masks": len(cone["mask"]),
            "size": cone["q"].shape[-1],
            "mask": _packed(np.packbits(cone["mask"], axis=-1)),
            "q": _packed(cone["q"].astype("<f2")),
            "k": _packed(cone["k"].astype("<f2")),
        }
        for name, cone in pictures["cones"].items()
    }
    return {
        "grid": {axis: int(numbers["grid"][axis]) for axis in ("t", "h", "w")},
        "best": numbers["best"],
        "shape": list(pictures["true"].shape),
        "true": _packed(pictures["true"]),
        "predicted": {name: _packed(value) for name, value in pictures["predicted"].items()},
        "heads": int(pictures["heads"]),
        "scale": float(pictures["scale"]),
        "layer": int(pictures["layer"]),
        "cones": cones,
    }


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 6)).decode()


def _script_safe(text: str) -> str:
    """JSON that cannot end the <script> around it."""
    return text.replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (files("chronotope.report") / name).read_text(encoding="utf-8")


def _write(path: str | os.PathLike[str], text: str) -> Path:
    target = Path(path)
    if not target.parent.is_dir():
        raise ChronotopeError(f"{target.parent} is not a folder, expected one to write {target.name} in: create it")
    target.write_text(text, encoding="utf-8")
    return target
