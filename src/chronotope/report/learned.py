"""The results of learning problems as a page: mean and spread over seeds, beside floors and published numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from rich.table import Table

from chronotope.tasks.learning import Result

HEAD = """# Results

Made by `python docs/results.py` from the files that `chronotope train` wrote. Ours, in bold: mean over seeds, and where
there are several their standard deviation. Every row that was run is here, losing ones too.
"""
SUMMARY = """## In one table

Of ours the model that validated best, beside the best floor and the best published number.
"""
LARGER = ("accuracy",)
"""Metrics of which more is better, where models are not chosen by them."""
One = TypeVar("One")


def results_page(results: Sequence[Result]) -> str:
    """All results in Markdown: the best of each problem, then each with all its rows."""
    groups = _grouped(results, lambda result: (result.task, result.data, result.protocol))
    problems = [Problem(group) for group in groups]
    return "\n".join([HEAD, SUMMARY, _summary(problems), *(problem.section() for problem in problems)])


def result_table(result: Result) -> Table:
    """The test metrics of one run beside floors and published numbers, for a terminal."""
    columns = list(result.test)
    table = Table(result.task, *columns)
    rows: list[tuple[str, Mapping[str, float]]] = [(f"{result.model}, seed {result.seed}", result.test)]
    rows += [(f"floor: {name}", numbers) for name, numbers in result.floors.items()]
    rows += [(f"published: {one['name']}", one["numbers"]) for one in result.published]
    for name, numbers in rows:
        table.add_row(name, *_cells(numbers, columns))
    return table


@dataclass(frozen=True)
class Trained:
    """A model as it was set, and its runs with different seeds."""

    name: str
    runs: Sequence[Result]

    def values(self, metric: str) -> list[float | int]:
        """One for each seed."""
        return [run.test[metric] for run in self.runs]

    @property
    def valid(self) -> float | int:
        """By which models are chosen, mean over seeds."""
        return statistics.mean(run.valid[run.best] for run in self.runs)

    @property
    def cells(self) -> list[str]:
        """Parameters, minutes, seeds."""
        minutes = statistics.mean(run.minutes for run in self.runs)
        return [f"{self.runs[0].parameters:,}", f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.1f}", _count(self)]


@dataclass(frozen=True)
class Problem:
    """All runs on the same data by the same protocol."""

    results: Sequence[Result]

    @property
    def first(self) -> Result:
        """Floors and published numbers are the same in all."""
        return self.results[0]

    @cached_property
    def trained(self) -> list[Trained]:
        """Runs that differ in nothing but their seed stand together; a name says what else they differ in."""
        alike = _grouped(self.results, lambda r: (r.model, _text(r.settings), _text(r.options), _text(r.schedule)))
        firsts = [runs[0] for runs in alike]
        out = []
        for runs in alike:
            rivals = [first for first in firsts if first.model == runs[0].model]
            told = {
                **_own(runs[0].settings, [first.settings for first in firsts]),
                **runs[0].options,
                **_own(runs[0].schedule, [first.schedule for first in rivals]),
            }
            options = ", ".join(f"{key}={value}" for key, value in told.items())
            out.append(Trained(f"{runs[0].model} ({options})" if options else runs[0].model, runs))
        return out

    @property
    def columns(self) -> list[str]:
        """The metrics of models, then those that floors alone are told by."""
        told = [self.first.test, *self.first.floors.values()]
        return list(dict.fromkeys(metric for numbers in told for metric in numbers))

    @property
    def metric(self) -> str:
        """That by which models are chosen; where neither floors nor others tell it, the first one."""
        told = [*self.first.floors.values(), *(one["numbers"] for one in self.first.published)]
        return self.first.best if any(self.first.best in numbers for numbers in told) else next(iter(self.first.test))

    def better(self, rows: Iterable[tuple[str, float | int]]) -> tuple[str, float | int] | None:
        """The row of the best number."""
        larger = self.first.larger if self.metric == self.first.best else self.metric in LARGER
        return (max if larger else min)(rows, key=lambda row: row[1], default=None)

    def section(self) -> str:
        """Heading, protocol, a row for each model, floor and published number, sources."""
        first, columns = self.first, self.columns
        rows = [["", *columns, "parameters", "minutes", "seeds"], ["---", *["---:"] * (len(columns) + 3)]]
        rows += [
            [f"**{one.name}**", *(_spread(one.values(c)) if c in first.test else "" for c in columns), *one.cells]
            for one in self.trained
        ]
        rows += [[f"floor: {name}", *_cells(numbers, columns), "", "", ""] for name, numbers in first.floors.items()]
        sources: dict[str, list[str]] = {}
        for one in first.published:
            rows.append([f"published: {one['name']}", *_cells(one["numbers"], columns), "", "", ""])
            sources.setdefault(one["source"], []).append(one["name"])
        shared = {k: v for k, v in first.settings.items() if all(run.settings[k] == v for run in self.results)}
        settings = ", ".join(f"{key}={value}" for key, value in shared.items())
        machines = "; ".join(sorted({f"{r.machine}, threads: {r.threads}, torch {r.torch}" for r in self.results}))
        notes = "".join(f"\n{', '.join(names)}: {source}.\n" for source, names in sources.items())
        told = f"{first.protocol}. Settings: {settings}. {machines}."
        return f"## {first.task}: {first.data}\n\n{told}\n\n{_markdown(rows)}\n{notes}"


def _summary(problems: Sequence[Problem]) -> str:
    rows = [["task", "data", "metric", "ours", "model", "seeds", "floor", "published"], ["---"] * 8]
    for problem in problems:
        first, metric = problem.first, problem.metric
        ours = (max if first.larger else min)(problem.trained, key=lambda one: one.valid)
        floors = first.floors.items()
        rivals = [
            problem.better((name, numbers[metric]) for name, numbers in some if metric in numbers)
            for some in (floors, [(one["name"], one["numbers"]) for one in first.published])
        ]
        cells = [f"{row[1]:.4f} ({row[0]})" if row else "" for row in rivals]
        where = ", ".join([first.data, *first.protocol.split(", ")[:2]])
        rows.append([first.task, where, metric, _spread(ours.values(metric)), ours.name, _count(ours), *cells])
    return _markdown(rows) + "\n"


def _grouped(items: Iterable[One], key: Callable[[One], Hashable]) -> list[list[One]]:
    groups: dict[Hashable, list[One]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _own(mine: Mapping[str, Any], all_: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is not the same everywhere."""
    return {key: value for key, value in mine.items() if any(other.get(key) != value for other in all_)}


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True)


def _count(one: Trained) -> str:
    return str(len(one.runs))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _spread(values: Sequence[float | int]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def _cells(numbers: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    return [f"{numbers[column]:.4f}" if column in numbers else "" for column in columns]
