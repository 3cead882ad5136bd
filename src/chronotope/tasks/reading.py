"""Language models with a long context, patched as they are: perplexity and needles found, against density."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.adapt import Assignment, apply, profile, search
from chronotope.adapt.attach import attention_names
from chronotope.adapt.candidates import SINKS, candidates
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.patterns import Pattern, sinks, window
from chronotope.routing.route import top_blocks
from chronotope.tasks import needle
from chronotope.tasks.language import learn, read_text, split
from chronotope.tasks.recall import IGNORED

BLOCK = 64
SHORT, EARLY = 1024, 0.6
"""Most that a byte model learns is near: windows of so many bytes, as many bytes a step, for so much of the steps."""
RATE = 2e-3
KEEPS = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Read:
    """What a patch at a density does: `value` is the perplexity of a byte, or the share of needles found."""

    measure: str
    patch: str
    density: float
    value: float


@dataclass(frozen=True)
class Reader:
    """A model, inputs to choose by, and what it is judged by: `score` of the patched model."""

    measure: str
    model: nn.Module
    inputs: list[Tensor]
    score: Any


def text_reader(path: str | Path | None, length: int, steps: int, windows: int, seed: int) -> Reader:
    """A byte model that learned short windows, then some of this length; judged by windows of the end of the text."""
    train, valid = split(read_text(path))
    if len(valid) <= length * windows:
        raise ChronotopeError(f"the end of the text has {len(valid):,} bytes, not {windows} windows of {length:,}.")
    early = round(EARLY * steps) if length > SHORT else 0
    model = learn(train, SHORT, early, batch=length // SHORT, seed=seed) if early else None
    model = learn(train, length, steps - early, batch=1, rate=RATE, seed=seed + 1, model=model)
    held = valid[: windows * length + 1].long()
    asked = [held[i * length : (i + 1) * length + 1][None] for i in range(windows)]
    some = [train[i * length : (i + 1) * length][None].long() for i in range(2)]

    def score(own: nn.Module) -> float:
        with torch.no_grad():
            losses = [F.cross_entropy(own(one[:, :-1]).flatten(0, 1), one[:, 1:].flatten()) for one in asked]
        return float(torch.stack(losses).mean().exp())

    return Reader("perplexity of a byte", model, some, score)


def needle_reader(length: int, steps: int, seed: int) -> Reader:
    """The model of `chronotope needle`, which learned on shorter sequences."""
    task = needle.Needles(length=length, steps=steps, seed=seed)
    model = needle.learn(task)
    rng = torch.Generator().manual_seed(seed + 1)
    tokens, targets, _ = needle.haystacks(task, length, task.needles, task.tested, rng)
    some = list(needle.haystacks(task, length, task.needles, 2, rng)[0].split(1))

    def score(own: nn.Module) -> float:
        with torch.no_grad():
            said = torch.cat([own(row).argmax(-1) for row in tokens.split(1)])
        asked = targets != IGNORED
        return float((said == targets)[asked].float().mean())

    return Reader("needles found", model, some, score)


def read(reader: Reader, densities: Sequence[float], *, queries: int = 256, console: Console) -> list[Read]:
    """Dense, and at each density: one window with sinks, one route, and a choice for each layer and head."""
    length = reader.inputs[0].shape[1]
    tried = candidates(Grid(n=length))
    tried += [top_blocks(keep=keep, n=BLOCK) for keep in KEEPS]
    seen = profile(reader.model, reader.inputs, tried, queries=queries)
    heads = {name: next(iter(levels.values())).heads for name, levels in seen.layers.items()}
    rows = [Read(reader.measure, "dense", 1.0, reader.score(reader.model))]
    for density in densities:
        # A causal window of a share s of the past holds 2 s - s^2 of its pairs.
        span = round(length * (1 - (1 - density) ** 0.5))
        patches = {
            "window and sinks": _alike(reader.model, _window(span), density, heads),
            "route": _alike(reader.model, top_blocks(keep=density, n=BLOCK), density, heads),
        }
        try:
            patches["searched"] = search(seen, max_density=density)
        except ChronotopeError as error:
            console.print(f"density {density}: {error}", markup=False)
        for name, patch in patches.items():
            with apply(reader.model, patch):
                rows.append(Read(reader.measure, name, patch.density, reader.score(reader.model)))
            console.print(f"{reader.measure}: {name} at {patch.density:.3f}: {rows[-1].value:.4f}")
    return rows


def _window(span: int) -> Pattern:
    return window(n=(max(1, span), 0)) | sinks(SINKS)


def _alike(model: nn.Module, where: Pattern, density: float, heads: dict[str, int]) -> Assignment:
    layers = {name: (where,) * heads[name] for name in attention_names(model) if name in heads}
    return Assignment(layers, density=density)


def table(rows: Sequence[Read]) -> Table:
    """One line for each patch and density."""
    out = Table("measure", "patch", "density", "value")
    for one in rows:
        out.add_row(one.measure, one.patch, f"{one.density:.3f}", f"{one.value:.4f}")
    return out
