"""A model that exists, its attention profiled, searched and patched under an error budget, and what that does to it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from chronotope.adapt import Assignment, Profile, attach, profile, search
from chronotope.adapt.attach import Grids
from chronotope.adapt.candidates import candidates
from chronotope.adapt.inputs import Batch, call, output_of, relative
from chronotope.adapt.outcome import Outcome, report
from chronotope.adapt.search import density
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.patterns import Pattern, full, window
from chronotope.planning import parse_pattern

ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Relative error of the output under `full()`, by its dtype: more is no rounding."""
UNIFORM, NEAR = 12, 0.8
"""Uniform windows that are tried: so many, of at least this share of the density of the choice, or the next below."""


@dataclass
class Subject:
    """A model, inputs to choose by, inputs to judge by, and where its tokens are (None: read from the inputs)."""

    model: nn.Module
    inputs: list[Batch]
    held_out: list[Batch]
    grid: Grids | None = None


@dataclass(frozen=True)
class Adapted:
    """What came out: the choice, the best uniform pattern at its density, and what each does to held-out inputs."""

    profile: Profile
    assignment: Assignment
    uniform: Pattern | None
    outcomes: list[Outcome]
    rounding: float


def adapt(
    subject: Subject,
    *,
    budget: float,
    tried: Sequence[Pattern] = (),
    levels: Sequence[float] = (),
    queries: int = 256,
    rounds: int = 5,
    seed: int = 0,
    console: Console | None = None,
) -> Adapted:
    """Profiles, searches under the budget (relative error of the output), patches and measures.

    tried: candidates; default: those of the grid. levels: as for `profile`.

    Raises ChronotopeError where the model under `full()` is not itself.
    """
    console = Console(quiet=True) if console is None else console
    model = subject.model.eval()
    rounding = check(subject)
    console.print(f"under full() the output is its own within {rounding:.1e}")
    seen = profile(model, subject.inputs, grid=subject.grid, queries=queries, levels=levels, seed=seed)
    grid = next(iter(next(iter(seen.layers.values())).values())).grid
    found = search(seen, list(tried) or candidates(grid), max_error=budget)
    console.print(f"{len(seen.candidates)} candidates: {found!r}", markup=False)
    uniform = best_uniform(seen, grid, found.density)
    patches: dict[str, Assignment | Pattern] = {"dense": full(), "searched": found}
    if uniform is not None:
        patches["best uniform"] = uniform
    rows = report(model, patches, subject.held_out, grid=subject.grid, rounds=rounds)
    return Adapted(seen, found, uniform, rows, rounding)


def check(subject: Subject) -> float:
    """The relative difference of the output of the model under `full()`, on its first input."""
    with torch.no_grad():
        plain = output_of(call(subject.model, subject.inputs[0]))
        with attach(subject.model, full(), grid=subject.grid):
            patched = output_of(call(subject.model, subject.inputs[0]))
    off = relative([plain], [patched])
    if off > ROUNDING.get(plain.dtype, 0.05):
        raise ChronotopeError(
            f"under full() the output of {type(subject.model).__name__} is not its own: off by {off:.2e}."
        )
    return off


def best_uniform(seen: Profile, grid: Grid, most: float) -> Pattern | None:
    """The window for all heads and layers with the least expected error, of nearly the density of the choice."""
    first, *others = grid.axes
    costs = {}
    spans = range(1, 2 * grid.sizes[first], 2)
    shared = range(1, 2 * max((grid.sizes[axis] for axis in others), default=1), 2)
    for own, side in product(spans, shared):
        sizes: dict[str, Any] = {first: own} | dict.fromkeys(others, side)
        where = window(**sizes)
        costs[where] = density(seen, alike(seen, where))
    near = sorted((where for where in costs if costs[where] <= most), key=lambda where: -costs[where])
    if not near:
        return None
    least = min(NEAR * most, costs[near[0]])
    near = [where for where in near if costs[where] >= least]
    seen.measure(near[:UNIFORM])
    return min(near[:UNIFORM], key=lambda where: expected(seen, where))


def alike(seen: Profile, where: Pattern) -> dict[str, tuple[Pattern, ...]]:
    """One pattern for every head of every layer."""
    return {name: (where,) * next(iter(levels.values())).heads for name, levels in seen.layers.items()}


def expected(seen: Profile, where: Pattern) -> float:
    """Squared relative error of the output where every head has this pattern."""
    sites = [(name, level) for name, levels in seen.layers.items() for level in levels]
    return sum(seen.share(level) * seen.influence(name, where, level) ** 2 for name, level in sites)


def subject_of(model: str, inputs: str | None, settings: dict[str, Any]) -> Subject:
    """What a command line names.

    model: `package.module:factory`, which makes a `Subject`, or a model; or a folder or hub name, as `from_pretrained`
    of transformers or diffusers reads it. inputs: `package.module:function` that makes a list of batches, or a file of
    such a list as torch.save writes it; of these, the later half is held out.
    """
    made = factory(model)(**settings) if ":" in model else pretrained(model)
    if isinstance(made, Subject):
        return made
    if not isinstance(made, nn.Module):
        raise ChronotopeError(f"{model} made {type(made).__name__}; expected a model, or a Subject.")
    if inputs is None:
        raise ChronotopeError(f"{model} is a model without inputs; give some, --input MODULE:FUNCTION or FILE.pt.")
    batches = factory(inputs)() if ":" in inputs else torch.load(inputs, weights_only=True)
    if not isinstance(batches, (list, tuple)) or len(batches) < 2:
        raise ChronotopeError(f"{inputs}: expected a list of two inputs or more: to choose by, and to judge by.")
    half = len(batches) // 2
    return Subject(made, list(batches[:half]), list(batches[half:]))


def factory(name: str) -> Callable[..., Any]:
    """The function `package.module:function`, or `package.module:Class.function`."""
    module, _, function = name.partition(":")
    try:
        return attrgetter(function)(importlib.import_module(module))  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise ChronotopeError(f"{name}: {error}; write it as package.module:function.") from None


def pretrained(name: str) -> nn.Module:
    """A model of transformers or diffusers, from a folder or by its name on the hub."""
    path = Path(name)
    config = path / "config.json"
    told = json.loads(config.read_text()) if config.exists() else {}
    if path.exists() and not told:
        raise ChronotopeError(f"{name}: no config.json there; give the folder that save_pretrained wrote.")
    library, kind = ("diffusers", told["_class_name"]) if "_class_name" in told else ("transformers", None)
    try:
        module = importlib.import_module(library)
    except ImportError:
        raise ChronotopeError(f"{name} needs {library}: pip install 'chronotope[adapt]'.") from None
    if kind is None:
        (kind,) = told.get("architectures") or ["AutoModel"]
    try:
        return getattr(module, kind).from_pretrained(name)
    except (OSError, AttributeError, ValueError) as error:
        raise ChronotopeError(f"{name}: cannot be loaded by {library} ({error}).") from None


def read_candidates(text: str | None) -> list[Pattern]:
    """Pattern expressions, separated by semicolons."""
    return [parse_pattern(part) for part in (text or "").split(";") if part.strip()]
