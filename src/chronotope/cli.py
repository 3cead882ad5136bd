"""The command line. Commands of learning problems are in `cli_learning`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from typer.core import TyperGroup
except ImportError:
    sys.exit("chronotope: the command line needs typer and rich: pip install 'chronotope[cli]'")

from chronotope.cli_adapting import adapt, reading, sampling
from chronotope.cli_learning import evaluate, tasks, train
from chronotope.errors import ChronotopeError


class Commands(TyperGroup):
    """The commands; bad input ends in one red line and exit code 2, never in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except ChronotopeError as error:
            Console(stderr=True, highlight=False).print(Text(str(error), style="red"), soft_wrap=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Attention over space and time: see a pattern, and find out which one your video can do with.",
)


@app.command()
def compare(
    video: Annotated[
        str | None, typer.Argument(help="An mp4, gif, avi … Default: handwritten digits that move.", show_default=False)
    ] = None,
    grid: Annotated[str, typer.Option(help="Tokens in time, height and width.", metavar="T,H,W")] = "8,16,16",
    patch: Annotated[int, typer.Option(help="Pixels of a token, each side: frames are H x patch by W x patch.")] = 4,
    channels: Annotated[int, typer.Option(help="1 for gray, 3 for colour.")] = 1,
    minutes: Annotated[float, typer.Option(help="Minutes to train the dense model.")] = 1.0,
    steps: Annotated[
        int | None,
        typer.Option(help="Train so many steps, not minutes: the same errors at every run.", show_default=False),
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            help="Steps of tuning for each pattern, dense too. Default: 24, fewer for more than 20 patterns.",
            show_default=False,
        ),
    ] = None,
    patterns: Annotated[
        str | None,
        typer.Option(
            help="Names of the menu or expressions, between commas or semicolons; [a, b] takes turns over the layers. "
            "Default: the whole menu.",
            metavar="LIST",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("out"),
    budget: Annotated[float, typer.Option(help="Share of error that the best pattern may add to dense.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the clips, the weights and the batches.")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. Default: torch's choice.", show_default=False)
    ] = None,
) -> None:
    """Which attention gives **which speed at which error**, for your video and your grid?

    Trains a small predictor of coming frames with dense attention, swaps in each pattern of the menu, and measures:
    error at once and after tuning, attention mass kept, density, time and memory against dense in the same run.

    Writes `report.html` (open it in a browser), `results.json`, and the plan of the fastest pattern within the budget:
    `plan.json`, and `plan.1.json` … where patterns take turns. Interrupted? The same command goes on.

    Examples:

    ```
    chronotope compare
    chronotope compare film.mp4 --grid 8,12,16 --channels 3 --minutes 3
    chronotope compare --patterns 'divided, window; window(t=3, h=5, w=5) | along("t")'
    ```
    """
    import torch

    from chronotope.grid import Grid
    from chronotope.tasks.compare import Settings
    from chronotope.tasks.compare import compare as run

    if threads is not None:
        if threads < 1:
            raise ChronotopeError(f"threads={threads}: expected 1 or more.")
        torch.set_num_threads(threads)
    where = Grid.parse(grid)
    run(Settings(video, where, patch, channels, minutes, steps, tune, patterns, out, budget, seed))


@app.command()
def draw(
    pattern: Annotated[str, typer.Argument(help="An expression, such as 'window(t=3, h=5, w=5) & causal(\"t\")'.")],
    grid: Annotated[
        str, typer.Option(help="8,16,16 (t, h, w), 16,16 (h, w), 64 (n), or t=8,v=25,prefix=1.", metavar="SIZES")
    ] = "8,16,16",
    query: Annotated[
        str | None,
        typer.Option(help="Coordinates of the query. Default: the middle.", metavar="4,8,8", show_default=False),
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="Of a per_head pattern, the head to show; default: all.", show_default=False)
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write a PNG as well.", metavar="FILE.png", show_default=False)
    ] = None,
) -> None:
    """The **light cone** of one query: which tokens it sees, slice by slice.

    Examples:

    ```
    chronotope draw 'window(t=5, h=5, w=5) & causal("t")' --grid 6,9,16
    chronotope draw 'strided(n=4) | window(n=3)' --grid 64 --query 20
    chronotope draw 'along("t") | along("h", "w")' --save cone.png
    ```
    """
    from chronotope.draw import draw as picture
    from chronotope.grid import Grid
    from chronotope.planning import parse_pattern

    drawn = picture(parse_pattern(pattern), Grid.parse(grid), _numbers(query), head=head)
    console = Console(highlight=False)
    console.print(Text(str(drawn)), soft_wrap=True)
    if save is not None:
        console.print(Text(f"wrote {drawn.save(save)}"), soft_wrap=True)


@app.command()
def papers(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON: one object for each mechanism.")] = False,
    family: Annotated[str | None, typer.Option(help="Those of one family.", show_default=False)] = None,
) -> None:
    """The **published mechanisms** that have a page here, each with the tests that show it.

    Examples:

    ```
    chronotope papers --family pattern
    chronotope papers --json
    ```
    """
    from chronotope.papers import papers as registered
    from chronotope.papers.registry import FAMILIES
    from chronotope.planning.parse import unknown_name
    from chronotope.tasks.show import console

    if family is not None and family not in FAMILIES:
        raise unknown_name("family", family, list(FAMILIES))
    pages = registered(family)
    if as_json:
        print(json.dumps([page.to_dict() for page in pages], indent=1, ensure_ascii=False))
        return
    table = Table(title=f"{len(pages)} mechanisms", title_justify="left", box=None, pad_edge=False)
    for column, wraps in (
        ("system", False),
        ("name", False),
        ("status", True),
        ("what it does, and the evidence", True),
    ):
        table.add_column(column, no_wrap=not wraps, overflow="fold")
    for page in pages:
        status = page.status + (f": {page.missing}" if page.missing else "")
        cells = (str(page.system), page.name, status, "\n".join([page.claim, *page.evidence]))
        table.add_row(*(Text(cell) for cell in cells))
    console().print(table)


@app.command()
def backends() -> None:
    """The **kernels** that run attention and recurrences, and what each of them can do."""
    import chronotope

    print(chronotope.backends())
    print(f"\nrecurrences\n{chronotope.backends('recurrence')}")


@app.command()
def bench(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="A table: planning, attention, windows, sequences, temporal, memory, rounding, recurrences, stepping, "
            "rollouts, routes. "
            "May be given again. Default: all.",
            metavar="TABLE",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Paired runs of each kernel; where they are long fewer, at least 3.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes: whether everything runs, not how fast.")
    ] = False,
    compiled: Annotated[
        str | None,
        typer.Option(
            "--compile",
            help="Where torch's compiled FlexAttention takes part, some 10 s for each shape: window (the first row), "
            "all, none. Default: window, none with --quick.",
            metavar="WHERE",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Folder for a CSV file of each table. Default: benchmarks/results, none with --quick.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    no_csv: Annotated[bool, typer.Option("--no-csv", help="Write no files.")] = False,
) -> None:
    """**Times as ratios**: our kernels beside dense attention, FlexAttention and copying, in one run.

    Every kernel is checked against float64 first; one that is wrong is printed as WRONG and not timed.

    Examples:

    ```
    chronotope bench
    chronotope bench --only temporal --only memory --rounds 9
    chronotope bench --quick
    ```
    """
    from chronotope.bench.run import FOLDER, Settings
    from chronotope.bench.run import bench as run

    folder = None if no_csv or (quick and csv is None) else csv or FOLDER
    run(Settings(threads, rounds, quick, device, compiled or ("none" if quick else "window")), only, folder)


@app.command()
def recall(
    only: Annotated[
        list[str] | None,
        typer.Option(help="A mixer of the menu. May be given again. Default: all.", metavar="NAME", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of each model.")] = 800,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of weights and sequences.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for recall.html and recall.json.", metavar="DIR")] = Path("out"),
) -> None:
    """**Which mixers remember**: multi-query associative recall, learned by small models, against the state's size.

    Example:

    ```
    chronotope recall --only softmax --only "delta rule, 32"
    ```
    """
    import torch

    from chronotope.report.recall import write_recall
    from chronotope.tasks.recall import Recall, compare

    torch.set_num_threads(threads)
    task = Recall(steps=steps, seed=seed)
    print(f"wrote {write_recall(compare(task, only), task, out)}")


@app.command()
def fidelity(
    video: Annotated[
        Path | None,
        typer.Option(help="A video for the predictor. Default: digits that move.", metavar="FILE", show_default=False),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text for the language model, plain or .gz. Default: the source of Python's standard library.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Training of the predictor.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Training steps of the language model.")] = 400,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for fidelity.html and fidelity.json.", metavar="DIR")] = Path("out"),
) -> None:
    """**What routes keep** of the attention of two trained models, beside static patterns and the best choice there is.

    Example:

    ```
    chronotope fidelity --video clip.mp4 --text book.txt
    ```
    """
    import torch

    from chronotope.report.fidelity import fidelity_tables, write_fidelity
    from chronotope.tasks import fidelity as task

    torch.set_num_threads(threads)
    console = Console(highlight=False)
    samples = [task.video(video, minutes, out / "kept", console), task.text(text, steps, console)]
    rows = [row for sample in samples for row in task.compare(sample, console)]
    for table in fidelity_tables(rows):
        console.print(table)
    console.print(f"wrote {write_fidelity(rows, out)}")


@app.command()
def needle(
    only: Annotated[
        list[str] | None,
        typer.Option(help="A route of the menu. May be given again. Default: all.", metavar="NAME", show_default=False),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of the sequences that are asked.")] = 8192,
    keep: Annotated[float, typer.Option(help="Share of the blocks of keys that a query may look at.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 450,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of weights and sequences.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for needle.html and needle.json.", metavar="DIR")] = Path("out"),
) -> None:
    """**Which routes find a needle**: a small model, trained with dense attention, reads a haystack under each route.

    Example:

    ```
    chronotope needle --only dense --only "mean key" --only "oracle: most attention"
    ```
    """
    import torch

    from chronotope.report.needle import write_needle
    from chronotope.tasks.needle import Needles, compare

    torch.set_num_threads(threads)
    task = Needles(length=length, keep=keep, steps=steps, seed=seed)
    print(f"wrote {write_needle(compare(task, only), task, out)}")


app.command()(tasks)
app.command()(train)
app.command("eval")(evaluate)
app.command()(adapt)
app.command()(sampling)
app.command()(reading)


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.lstrip("-").isdigit() for part in parts):
        raise ChronotopeError(f"query {text!r}: expected whole numbers between commas, such as 4,8,8.")
    return tuple(int(part) for part in parts)


def main() -> None:
    """Runs the command line."""
    app()
