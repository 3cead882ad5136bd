"""The main job: for these clips and this grid, which attention gives which speed at which error?

One dense predictor is trained. Then, for each pattern of the menu: its attention is swapped in; the error is measured
at once and after the same few steps of tuning from the same weights, on the same batches (dense is tuned too); how
much of the dense attention mass the pattern keeps; and what one attention call costs against dense in the same run.

The model predicts frame t + 1 from frames 0..t, so every pattern is joined with `causal("t")`, and dense means
`causal("t")`: densities are shares of all pairs, and the bound of a row is tile density of dense / its tile density.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import chronotope
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.machine import processor
from chronotope.models import Predictor
from chronotope.patterns import Pattern
from chronotope.report import save_results, write_report
from chronotope.tasks import measure, show, training
from chronotope.tasks.clips import Clips, load
from chronotope.tasks.menu import Entry, choose
from chronotope.tasks.training import Recipe, Trained, train, tune

TUNING_STEPS, TUNED_IN_FULL = 24, 20
PICTURES = 3  # clips shown
MASS_CLIPS = 2  # clips on which the attention mass is measured
LARGEST_CONES = 4096  # tokens of the largest grid whose light cones go into the report: every pair is in it
LARGEST_SEED = 1 << 32
KEPT = "kept"  # the folder of checkpoints and finished rows, in the output folder


@dataclass(frozen=True)
class Settings:
    """What to compare, on what, and where to write it. See `chronotope compare --help`."""

    video: str | None = None
    grid: Grid = Grid(t=8, h=16, w=16)  # noqa: RUF009
    patch: int = 4
    channels: int = 1
    minutes: float = 1.0
    steps: int | None = None
    tune: int | None = None
    patterns: str | None = None
    out: Path = Path("out")
    budget: float = 0.01
    seed: int = 0

    def recipe(self) -> Recipe:
        """How the dense model is trained."""
        return Recipe(self.grid, self.patch, self.channels, minutes=self.minutes, steps=self.steps, seed=self.seed)

    def tuning_steps(self, count: int) -> int:
        """Steps of tuning for each of `count` patterns; by default fewer where many share the time."""
        if self.tune is not None:
            return self.tune
        return max(1, TUNING_STEPS * TUNED_IN_FULL // max(TUNED_IN_FULL, count))

    def check(self) -> None:
        """Raises ChronotopeError for numbers out of range."""
        training.check(self.recipe())
        if self.tune is not None and self.tune < 1:
            raise ChronotopeError(f"tune={self.tune}: expected 1 or more steps of tuning for each pattern.")
        if not (math.isfinite(self.budget) and self.budget >= 0):
            raise ChronotopeError(f"budget={self.budget}: expected the share of error that may be added, such as 0.01.")
        if not 0 <= self.seed < LARGEST_SEED:
            raise ChronotopeError(f"seed={self.seed}: expected 0 to {LARGEST_SEED - 1:,}.")


def compare(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Runs a comparison and writes `report.html`, `results.json` and the plan of the best pattern to `settings.out`.

    The plan is `plan.json`; where patterns take turns over the layers it is that of the first, and `plan.1.json`,
    `plan.2.json` are of the others. `ct.load_plan` reads them.

    In `kept/` lie the checkpoint and the finished rows: the same command after an interruption goes on there, and
    after the end it measures times again and nothing else.

    Returns the results with the names of `chronotope.report.results`, and in each row `layers`: pattern, density,
    tile_density and the mass of each head, layer by layer.

    Raises ChronotopeError for settings out of range, an unknown pattern and a video that cannot be used.
    """
    console = show.console() if console is None else console
    settings.check()
    recipe = settings.recipe()
    entries = choose(settings.patterns, settings.grid, recipe.heads)
    clips = load(settings.video, settings.grid, patch=settings.patch, channels=settings.channels, seed=settings.seed)
    kept = settings.out / KEPT
    kept.mkdir(parents=True, exist_ok=True)
    console.print(
        f"{clips.name} on {settings.grid!r}: {len(clips.train)} clips to train, {len(clips.valid)} to validate"
    )
    trained = train(recipe, clips, kept, console)
    again = ", kept from before" if trained.reused else ""
    console.print(f"the dense model has {trained.steps} steps of training{again}")
    rows, pictures = _rows(settings, recipe, entries, clips, trained, kept, console)
    results = _results(settings, recipe, clips, trained, rows, pictures)
    console.print(show.table(results))
    console.print(f"wrote {write_report(results, settings.out / 'report.html')}")
    console.print(f"wrote {save_results(results, settings.out / 'results.json')}")
    _save_plans(results, entries, recipe, settings.out, console)
    return results


def _rows(
    settings: Settings,
    recipe: Recipe,
    entries: list[Entry],
    clips: Clips,
    trained: Trained,
    kept: Path,
    console: Console,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows, and the pictures of the report."""
    shown = clips.valid[torch.linspace(0, len(clips.valid) - 1, min(PICTURES, len(clips.valid))).long()]
    layer = recipe.layers // 2
    cones = settings.grid.size <= LARGEST_CONES
    if not cones:
        console.print(f"the report has no light cones: {settings.grid.size:,} tokens are more than {LARGEST_CONES:,}")
    dense = measure.qkv(trained.model, clips.valid[:MASS_CLIPS, :-1])
    pictures: dict[str, Any] = {
        "true": _bytes(shown),
        "predicted": {},
        "heads": recipe.heads,
        "scale": 1 / math.sqrt(recipe.dim // recipe.heads),
        "layer": layer,
        "cones": {},
    }
    rows: list[dict[str, Any]] = []
    for number, entry in enumerate(entries, 1):
        start = time.perf_counter()
        learned = _learned(entry, recipe, settings.tuning_steps(len(entries)), clips, shown, layer, trained.model, kept)
        rows.append(_row(entry, recipe, learned, dense, layer))
        rows[-1]["bound"] = rows[0]["tile_density"] / rows[-1]["tile_density"]
        pictures["predicted"][entry.name] = learned["predicted"].numpy()
        if cones:
            pictures["cones"][entry.name] = _cone(entry.layers(recipe.layers)[layer], settings.grid, learned)
        console.print(show.line(number, len(entries), rows[-1], time.perf_counter() - start), markup=False)
    return rows, pictures


def _learned(
    entry: Entry,
    recipe: Recipe,
    steps: int,
    clips: Clips,
    shown: torch.Tensor,
    layer: int,
    model: Predictor,
    kept: Path,
) -> dict[str, Any]:
    """What training decides of a row: errors, predicted frames, q and k; computed once, then read."""
    facts = f"{recipe.key(clips)} {_digest(model)} {entry.expression} {steps} {layer}"
    path = kept / f"row-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    own = copy.deepcopy(model)
    own.swap(list(entry.patterns))
    before = measure.error(own, clips.valid)
    tune(own, clips, recipe, steps)
    found = measure.qkv(own, shown[:1, :-1])[layer]
    coming = torch.from_numpy(_bytes(measure.predictions(own, shown)))
    out = {
        "error": before,
        "tuned": measure.error(own, clips.valid),
        # The first frame is given, not predicted.
        "predicted": torch.cat([torch.from_numpy(_bytes(shown[:, :1])), coming], 1),
        "q": found.q[0].half(),
        "k": found.k[0].half(),
    }
    part = path.with_suffix(".part")
    torch.save(out, part)
    os.replace(part, path)
    return out


def _row(entry: Entry, recipe: Recipe, learned: dict[str, Any], dense: list[measure.QKV], layer: int) -> dict[str, Any]:
    """The numbers of a row: shares and times are means over the layers, memory is the most; q and k are dense."""
    grid, patterns = recipe.grid, entry.layers(recipe.layers)
    full = chronotope.full() & chronotope.causal("t")
    masses = [measure.mass(own.q, own.k, grid, where, full) for own, where in zip(dense, patterns, strict=True)]
    planned = measure.plans(patterns, grid, recipe.heads)
    baseline = chronotope.plan(full, grid, heads=recipe.heads)
    q, k = dense[layer].q[:1], dense[layer].k[:1]
    costs = {where: measure.timing(q, k, one, baseline) for where, (one, _) in planned.items()}
    memory = {where: measure.peak_mb(q, k, one) for where, (one, _) in planned.items()}

    def mean(of: Any) -> float:
        return sum(share * of(where, one) for where, (one, share) in planned.items())

    forward, train_ = (mean(lambda where, _, n=n: getattr(costs[where], n)) for n in ("forward_ms", "train_ms"))
    return {
        "name": entry.name,
        "pattern": entry.expression,
        "about": entry.about,
        "error": learned["error"],
        "tuned": learned["tuned"],
        "mass": float(torch.stack(masses).mean()),
        "density": mean(lambda _, one: one.density),
        "tile_density": mean(lambda _, one: one.tile_density),
        "forward_ms": forward,
        # Time over all layers is what adds up: speedups of layers join as times do.
        "forward_speedup": 1 / mean(lambda where, _: 1 / costs[where].forward_speedup),
        "train_ms": train_,
        "train_speedup": 1 / mean(lambda where, _: 1 / costs[where].train_speedup),
        "peak_mb": max(memory.values()),
        "layers": [
            {
                "pattern": repr(where),
                "density": planned[where][0].density,
                "tile_density": planned[where][0].tile_density,
                "mass": heads.tolist(),
            }
            for where, heads in zip(patterns, masses, strict=True)
        ],
    }


def _cone(where: Any, grid: Grid, learned: dict[str, Any]) -> dict[str, np.ndarray]:
    mask = chronotope.plan(where, grid).mask()
    return {
        "mask": (mask if mask.ndim == 3 else mask[None]).numpy(),
        "q": learned["q"].numpy(),
        "k": learned["k"].numpy(),
    }


def _results(
    settings: Settings,
    recipe: Recipe,
    clips: Clips,
    trained: Trained,
    rows: list[dict[str, Any]],
    pictures: dict[str, Any],
) -> dict[str, Any]:
    return {
        "schema": 1,
        "version": chronotope.__version__,
        "title": "Which attention, at which speed, at which error?",
        "input": clips.name,
        "seed": settings.seed,
        "machine": machine(),
        "grid": settings.grid.sizes,
        "patch": settings.patch,
        "channels": settings.channels,
        "minutes": settings.minutes,
        "budget": settings.budget,
        "model": {
            "dim": recipe.dim,
            "heads": recipe.heads,
            "layers": recipe.layers,
            "parameters": sum(p.numel() for p in trained.model.parameters()),
            "steps": trained.steps,
            "tuning_steps": settings.tuning_steps(len(rows)),
            "batch": recipe.batch,
        },
        "floor": {"repeat_last": clips.floor()},
        "rows": rows,
        "best": max(_within(rows, settings.budget), key=lambda row: row["forward_speedup"])["name"],
        "pictures": pictures,
    }


def _save_plans(results: dict[str, Any], entries: list[Entry], recipe: Recipe, out: Path, console: Console) -> None:
    """The plans of the best row; those of an earlier comparison go.

    Pages may have patterns that no expression names and so no file holds: then the next fastest is written, and told.
    """
    for old in out.glob("plan*.json"):
        old.unlink()
    speed = {row["name"]: row["forward_speedup"] for row in _within(results["rows"], results["budget"])}
    for entry in sorted((e for e in entries if e.name in speed), key=lambda e: -speed[e.name]):
        try:
            written = _write_plans(list(dict.fromkeys(entry.layers(recipe.layers))), recipe, out)
        except ChronotopeError as error:
            console.print(f"no plan file of {entry.name}: {error}", markup=False)
        else:
            console.print(f"wrote {', '.join(map(str, written))}: {entry.name}, {entry.expression}", markup=False)
            return


def _write_plans(patterns: list[Pattern], recipe: Recipe, out: Path) -> list[Path]:
    """One file for each pattern, or none where one cannot be written."""
    written: list[Path] = []
    for number, where in enumerate(patterns):
        path = out / (f"plan.{number}.json" if number else "plan.json")
        try:
            chronotope.plan(where, recipe.grid, heads=recipe.heads).save(str(path))
        except ChronotopeError:
            for one in written:
                one.unlink()
            raise
        written.append(path)
    return written


def _within(rows: list[dict[str, Any]], budget: float) -> list[dict[str, Any]]:
    """The rows whose error after tuning is at most that of dense and the budget; dense is one of them."""
    return [row for row in rows if row["tuned"] <= rows[0]["tuned"] * (1 + budget)]


def machine() -> dict[str, Any]:
    """What the times are of."""
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }


def _digest(model: Predictor) -> str:
    """A short hash of the weights: rows are of one training, also where minutes make another one differ."""
    out = hashlib.sha256()
    for value in model.state_dict().values():
        out.update(value.numpy().tobytes())
    return out.hexdigest()[:16]


def _bytes(clips: torch.Tensor) -> np.ndarray:
    """[n, frames, C, H, W] in [0, 1] as uint8 [n, frames, H, W, C]."""
    return (clips.clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).contiguous().numpy()
