"""The command that adapts a model: `chronotope adapt`."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from chronotope.errors import ChronotopeError


def adapt(
    model: Annotated[
        str,
        typer.Argument(
            help="package.module:factory, which makes a model (or a Subject, with its inputs); or a folder or name "
            "that from_pretrained of transformers or diffusers reads.",
            metavar="MODULE:FACTORY|PATH",
        ),
    ],
    inputs: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="package.module:function, or a file of torch.save: a list of batches; the later half is held out.",
            metavar="MODULE:FUNCTION|FILE",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[float, typer.Option(help="Relative error of the output that may be added.")] = 0.01,
    candidates: Annotated[
        str | None,
        typer.Option(help="Patterns and routes, separated by `;`. Default: windows of the grid.", show_default=False),
    ] = None,
    levels: Annotated[
        str,
        typer.Option(
            help="Noise levels, separated by commas, between which patterns may differ, of a model that is told one.",
            metavar="NUMBERS",
        ),
    ] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Of the factory. May be given again.", metavar="KEY=VALUE")
    ] = None,
    queries: Annotated[int, typer.Option(help="Of each call that are profiled.")] = 256,
    rounds: Annotated[int, typer.Option(help="Pairs of timings.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the queries that are profiled.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for assignment.json, adapt.json and adapt.html.", metavar="DIR")
    ] = Path("out"),
) -> None:
    """**Adapts** a model: profiles its attention, chooses a pattern for each layer and head under an error budget.

    Then what that does to inputs that were held out: error, attention time and whole time against the model as it is,
    beside the best single pattern of the same density. `ct.adapt.apply(model, "out/assignment.json")` patches it.

    Example:

    ```
    chronotope adapt chronotope.tasks.subjects:predictor --set video=clip.mp4 --set grid=8,32,32 --budget 0.01
    ```
    """
    import torch

    from chronotope.report.adapted import adapted_table, write_adapted
    from chronotope.tasks import adapting

    torch.set_num_threads(threads)
    console = Console(highlight=False)
    subject = adapting.subject_of(model, inputs, dict(_setting(text) for text in settings or []))
    tried = adapting.read_candidates(candidates)
    found = adapting.adapt(
        subject, budget=budget, tried=tried, levels=_numbers("levels", levels), queries=queries, rounds=rounds,
        seed=seed, console=console,
    )  # fmt: skip
    console.print(adapted_table(found))
    console.print(f"wrote {write_adapted(found, out)}")


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ChronotopeError(f"--{name} {text}: expected numbers, such as 0.5,0.25.") from None


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ChronotopeError(f"--set {text}: expected KEY=VALUE.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def sampling(
    run: Annotated[Path, typer.Argument(help="A folder that `chronotope train video-diffusion` wrote.", metavar="DIR")],
    samples: Annotated[int, typer.Option(help="Noises that clips are made of.")] = 8,
    steps: Annotated[int, typer.Option(help="Of the sampler.")] = 16,
    tuning: Annotated[int, typer.Option(help="Steps of fine-tuning of each patch; 0: none.")] = 100,
    clips: Annotated[int, typer.Option(help="To choose by, and to tune on.")] = 16,
    rounds: Annotated[int, typer.Option(help="Pairs of timings.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for sampling.json.", metavar="DIR")] = Path("out"),
) -> None:
    """**Samples** a trained video diffusion transformer under patterns: time, and distance to the dense samples.

    Radial attention, mixtures of blocks and searched choices of the density of radial attention and of half of it,
    without and with a light fine-tuning.
    """
    import torch

    from chronotope.models.video_dit import VideoDiT
    from chronotope.tasks import registry
    from chronotope.tasks import sampling as work
    from chronotope.tasks.learning import recall, settle
    from chronotope.tasks.show import save_rows
    from chronotope.tasks.video_diffusion import VideoDiffusion

    torch.set_num_threads(threads)
    console = Console(highlight=False)
    task, model, settings, data = recall(run)
    settled = settle(registry.task(task), data, model, settings)
    if not isinstance(settled.task, VideoDiffusion):
        raise ChronotopeError(f"{run} is a run of {task}; give one of video-diffusion.")
    real = settled.task.whole("train", clips, torch.Generator().manual_seed(seed))
    own = VideoDiT.from_pretrained(run / "model")
    rows = work.compare(
        own, real, samples=samples, steps=steps, tuning=tuning, rounds=rounds, seed=seed, console=console
    )
    console.print(work.table(rows))
    console.print(
        f"wrote {save_rows(rows, out / 'sampling.json', {'run': str(run), 'steps': steps, 'tuning': tuning})}"
    )


def reading(
    text: Annotated[
        Path | None,
        typer.Option(help="Plain or .gz. Default: the source of Python's standard library.", show_default=False),
    ] = None,
    length: Annotated[int, typer.Option(help="Bytes, and tokens, of the context.")] = 8192,
    steps: Annotated[int, typer.Option(help="Training of the byte model, 3/5 of it on windows of 1,024 bytes.")] = 200,
    needles: Annotated[
        int, typer.Option(help="Training steps of the model that finds needles; 0: leave it out.")
    ] = 450,
    densities: Annotated[
        str, typer.Option(help="Shares of the dense pairs, separated by commas.")
    ] = "0.5,0.25,0.1,0.05",
    windows: Annotated[int, typer.Option(help="Windows of the held-out text that are read.")] = 4,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of weights and sequences.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for reading.json.", metavar="DIR")] = Path("out"),
) -> None:
    """**Reads** long contexts under patches: perplexity and needles found against density, without training."""
    import torch

    from chronotope.tasks import reading as work
    from chronotope.tasks.show import save_rows

    torch.set_num_threads(threads)
    console = Console(highlight=False)
    shares = _numbers("densities", densities)
    readers = [work.text_reader(text, length, steps, windows, seed)]
    if needles:
        readers.append(work.needle_reader(length, needles, seed))
    rows = [row for reader in readers for row in work.read(reader, shares, console=console)]
    console.print(work.table(rows))
    console.print(
        f"wrote {save_rows(rows, out / 'reading.json', {'length': length, 'steps': steps, 'needles': needles})}"
    )
