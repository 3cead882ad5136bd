"""The results of learning problems as a page: mean and spread over seeds, beside floors and published numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence

from chronotope.tasks.learning import Result

HEAD = """# Results

Made by `python docs/results.py` from the files that `chronotope train` wrote. Ours, in bold: mean over seeds, and where
there are several their standard deviation. Every row that was run is here, losing ones too.
"""


def results_page(results: Sequence[Result]) -> str:
    """All results in Markdown, a table for each task and its settings."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        key = json.dumps([result.task, result.data, result.protocol, result.settings], sort_keys=True)
        groups.setdefault(key, []).append(result)
    return "\n".join([HEAD, *(_section(group) for group in groups.values())])


def _section(group: Sequence[Result]) -> str:
    first = group[0]
    columns = list(first.test)
    rows = [["", *columns, "parameters", "minutes", "seeds"], ["---", *["---:"] * (len(columns) + 3)]]
    models: dict[str, list[Result]] = {}
    for result in group:
        options = ", ".join(f"{key}={value}" for key, value in result.options.items())
        models.setdefault(f"{result.model} ({options})" if options else result.model, []).append(result)
    for name, runs in models.items():
        cells = [_spread([run.test[column] for run in runs]) for column in columns]
        minutes = f"{statistics.mean(run.minutes for run in runs):.0f}"
        rows.append([f"**{name}**", *cells, f"{runs[0].parameters:,}", minutes, str(len(runs))])
    rows += [[f"floor: {name}", *_cells(numbers, columns), "", "", ""] for name, numbers in first.floors.items()]
    sources: dict[str, list[str]] = {}
    for one in first.published:
        rows.append([f"published: {one['name']}", *_cells(one["numbers"], columns), "", "", ""])
        sources.setdefault(one["source"], []).append(one["name"])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    settings = ", ".join(f"{key}={value}" for key, value in first.settings.items())
    told = f"{first.protocol}. Settings: {settings}. {first.machine}, {first.threads} threads, torch {first.torch}."
    notes = "".join(f"\n{', '.join(names)}: {source}.\n" for source, names in sources.items())
    return f"## {first.task}: {first.data}\n\n{told}\n\n{table}\n{notes}"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def _cells(numbers: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    return [f"{numbers[column]:.4f}" if column in numbers else "" for column in columns]
