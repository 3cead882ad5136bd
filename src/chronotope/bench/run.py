"""Runs the tables, prints them as they come, and writes one CSV file for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from chronotope.bench import tables
from chronotope.bench.lines import heading, line
from chronotope.bench.memory import memory
from chronotope.bench.planning import planning
from chronotope.bench.recurrences import recurrences
from chronotope.bench.referee import machine
from chronotope.bench.results import Row, write
from chronotope.bench.rollouts import rollouts
from chronotope.bench.rounding import rounding
from chronotope.bench.routes import routes
from chronotope.bench.stepping import stepping
from chronotope.bench.timing import Settings
from chronotope.errors import ChronotopeError
from chronotope.planning.parse import named, unknown_name

Table = Callable[[Settings], Iterator[list[Row] | str]]
TABLES: dict[str, Table] = {
    "planning": planning,
    "attention": tables.attention,
    "windows": tables.windows,
    "sequences": tables.sequences,
    "temporal": tables.temporal,
    "memory": memory,
    "rounding": rounding,
    "recurrences": recurrences,
    "stepping": stepping,
    "rollouts": rollouts,
    "routes": routes,
}
COMPILED = ("none", "window", "all")
DEVICES = ("cpu", "cuda")
SHAPES = 128
FOLDER = Path("benchmarks/results")


def _say(text: str) -> None:
    print(text, flush=True)


def bench(
    settings: Settings, only: list[str] | None = None, folder: Path | None = None, say: Callable[[str], None] = _say
) -> list[Row]:
    """Measures the named tables, or all; CSV files go to the folder, one for each table, when the table is done.

    Raises ChronotopeError on a table, device or number that is not there.
    """
    names = named("table", only, TABLES)
    _require(settings)
    say(machine(settings.threads, settings.device))
    out: list[Row] = []
    with _configured(settings):
        for name in names:
            rows: list[Row] = []
            say("")
            for text in heading(name):
                say(text)
            for part in TABLES[name](settings):
                say(part if isinstance(part, str) else line(part))
                rows += [] if isinstance(part, str) else part
            if folder is not None and rows:
                say(f"  wrote {write(folder, rows)}")
            out += rows
    return out


@contextmanager
def _configured(settings: Settings) -> Iterator[None]:
    """The threads; and room for a compiled kernel for each shape, where torch would stop at eight."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        if settings.compiled == "none":
            yield
        else:
            from torch._dynamo import config  # takes a second

            with config.patch(recompile_limit=SHAPES):
                yield
    finally:
        torch.set_num_threads(threads)


def _require(settings: Settings) -> None:
    for name in ("threads", "rounds"):
        if getattr(settings, name) < 1:
            raise ChronotopeError(f"{name}={getattr(settings, name)}: expected 1 or more.")
    if settings.compiled not in COMPILED:
        raise unknown_name("choice for compile", settings.compiled, list(COMPILED))
    if settings.device not in DEVICES:
        raise unknown_name("device", settings.device, list(DEVICES))
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ChronotopeError("device cuda: torch finds no GPU here; leave device out.")
