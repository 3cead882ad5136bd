"""The commands of learning problems: `chronotope tasks`, `train`, `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from chronotope.errors import ChronotopeError


def tasks() -> None:
    """The learning problems there are, and their models."""
    from chronotope.tasks.registry import TASKS, task

    table = Table("task", "model", "what it is")
    for name in TASKS:
        kind = task(name)
        table.add_row(name, "", kind.about)
        for model, about in kind.models.items():
            table.add_row("", model, about)
    Console(highlight=False).print(table)


def train(
    task: Annotated[str, typer.Argument(help="A learning problem: see `chronotope tasks`.")],
    data: Annotated[Path, typer.Option(help="The file or folder of the data.", metavar="PATH")],
    model: Annotated[str | None, typer.Option(help="Default: the first of the task.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Of task, schedule or model. May be given again.", metavar="KEY=VALUE"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder. Default: runs/TASK-MODEL-SEED.", metavar="DIR", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and what is drawn.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads of a process.")] = 2,
    devices: Annotated[int, typer.Option(help="Processes that share each batch.")] = 1,
) -> None:
    """**Trains** a model on real data and measures it, beside floors and published numbers.

    Validated as it goes, kept, and resumed: after a kill the same command goes on, with the same weights in the end.

    Examples:

    ```
    chronotope train recommend --data Beauty.txt.gz --set length=50
    chronotope train recommend --data ml1m_gsasrec_split.npz --model gsasrec --set dim=64 --set steps=5000
    ```
    """
    import torch

    from chronotope.report.learned import result_table
    from chronotope.tasks import registry
    from chronotope.tasks.learning import learn, remember, settle

    torch.set_num_threads(threads)
    settled = settle(registry.task(task), data, model, settings or [])
    out = Path("runs") / f"{task}-{settled.model}-{seed}" if out is None else out
    console = Console(highlight=False)
    remember(out, task, settled.model, settings or [], data)
    result = learn(settled, out, console, seed=seed, devices=devices)
    console.print(result_table(result))
    console.print(f"{result.parameters:,} parameters, {result.steps:,} steps, {result.minutes} minutes; wrote {out}")


def evaluate(
    run: Annotated[Path, typer.Argument(help="A folder that `chronotope train` wrote.", metavar="DIR")],
    data: Annotated[
        Path | None, typer.Option(help="Default: where they were.", metavar="PATH", show_default=False)
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """The metrics of a trained model, once more."""
    import torch

    from chronotope.tasks import registry
    from chronotope.tasks.learning import measure_again, recall, settle

    torch.set_num_threads(threads)
    task, model, settings, there = recall(run)
    data = there if data is None else data
    if not data.exists():
        raise ChronotopeError(f"{data}: no such data; say where they are, --data PATH.")
    found = measure_again(settle(registry.task(task), data, model, settings), run)
    table = Table("metric", *found)
    for metric in dict.fromkeys(name for numbers in found.values() for name in numbers):
        table.add_row(metric, *(f"{numbers[metric]:.4f}" if metric in numbers else "" for numbers in found.values()))
    Console(highlight=False).print(table)
