"""Which pattern each head of each layer has: what `search` finds, in a small file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from chronotope.adapt.attach import Grids, Handle, Patterns, attention_names
from chronotope.errors import ChronotopeError
from chronotope.patterns import Pattern, full, per_head
from chronotope.planning import parse_pattern

SCHEMA, VERSION = "chronotope.assignment", 2

Choice = Mapping[str, tuple[Pattern, ...]]
"""Patterns by layer name, one for each head."""


@dataclass(frozen=True)
class Assignment:
    """A pattern for each head of each layer, and what is known of it.

    layers: patterns by layer name, one for each head. above: from which noise level on others hold in their place, and
    which; those of the highest border that is reached. error: relative error of the output of the model that is
    expected; density: mean over the heads of the pairs computed, as a share of those of the model as it is, and
    bound: no choice among the candidates of which no larger error is expected has less. measured: on what.
    """

    layers: Choice
    error: float = 0.0
    density: float = 1.0
    bound: float = 0.0
    measured: dict[str, Any] = field(default_factory=dict)
    above: Mapping[float, Choice] = field(default_factory=dict)

    @property
    def choices(self) -> list[Choice]:
        """By level: below the first border, from the first on, from the second on, ..."""
        return [self.layers, *(self.above[border] for border in sorted(self.above))]

    def where(self, layer: str, level: int = 0) -> Pattern | None:
        """The pattern of a layer where so many borders are reached; None: it stays as it is."""
        patterns = self.choices[level].get(layer)
        if patterns is None or all(one == full() for one in patterns):
            return None
        return patterns[0] if len(set(patterns)) == 1 else per_head(list(patterns))

    def save(self, path: str | Path) -> Path:
        """Writes it as JSON."""
        for one in {one for choice in self.choices for patterns in choice.values() for one in patterns}:
            _pattern(Path(path), "what is saved has to be read again", repr(one))
        numbers = {"error": self.error, "density": self.density, "bound": self.bound}
        told = {"schema": SCHEMA, "version": VERSION} | numbers | {"measured": dict(self.measured)}
        told["layers"] = _told(self.layers)
        told["above"] = [[border, _told(choice)] for border, choice in self.above.items()]
        path = Path(path)
        path.write_text(json.dumps(told, indent=1) + "\n")
        return path

    def __repr__(self) -> str:
        lines = [f"density {self.density:.3f} (no choice has less than {self.bound:.3f}), error {self.error:.4f}"]
        for border, choice in [(None, self.layers), *sorted(self.above.items())]:
            lines += [] if border is None else [f"from noise level {border:g} on:"]
            for name, patterns in choice.items():
                count = {one: patterns.count(one) for one in dict.fromkeys(patterns)}
                lines.append(f"{name}: " + ", ".join(f"{many} x {one!r}" for one, many in count.items()))
        return "\n".join(lines)


def _told(choice: Choice) -> dict[str, list[str]]:
    return {name: [repr(one) for one in patterns] for name, patterns in choice.items()}


def load(path: str | Path) -> Assignment:
    """Reads what `Assignment.save` wrote.

    Raises ChronotopeError for a file that is no assignment, is of another version, or names no pattern.
    """
    path = Path(path)
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ChronotopeError(f"{path}: cannot be read ({error}); `assignment.save(path)` writes one.") from None
    if not isinstance(told, dict) or told.get("schema") != SCHEMA:
        raise ChronotopeError(f"{path}: its schema is not {SCHEMA!r}; expected a file that `assignment.save` wrote.")
    if told.get("version") != VERSION:
        raise ChronotopeError(f"{path}: version {told.get('version')}; this library reads version {VERSION}.")
    above = told.get("above")
    if not isinstance(above, list) or not all(
        isinstance(one, list) and len(one) == 2 and _is_number(one[0]) for one in above
    ):
        raise ChronotopeError(f"{path}: `above` must hold pairs of a noise level and layers; none: [].")
    for name in ("error", "density", "bound"):
        if not isinstance(told.get(name), (int, float)):
            raise ChronotopeError(f"{path}: {name}={told.get(name)!r}; expected a number.")
    if not isinstance(told.get("measured", {}), dict):
        raise ChronotopeError(f"{path}: measured={told['measured']!r}; expected names and values.")
    numbers = {name: float(told[name]) for name in ("error", "density", "bound")}
    levels = {float(border): _choice(path, layers) for border, layers in above}
    return Assignment(_choice(path, told.get("layers")), **numbers, measured=told.get("measured", {}), above=levels)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _choice(path: Path, layers: Any) -> Choice:
    if not isinstance(layers, dict) or not all(isinstance(own, list) and own for own in layers.values()):
        raise ChronotopeError(f"{path}: `layers` must hold a list of patterns for each layer.")
    return {name: tuple(_pattern(path, name, text) for text in own) for name, own in layers.items()}


def _pattern(path: Path, layer: str, text: Any) -> Pattern:
    try:
        return parse_pattern(text)
    except (
        ChronotopeError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ChronotopeError(f"{path}: {layer}: {error}") from None


def apply(model: nn.Module, assignment: Assignment | str | Path, grid: Grids | None = None) -> Handle:
    """Attaches what was found, or the file of it, to a model. Dense heads of a layer that has others are computed by
    `full()`; a layer of dense heads stays as it is.

    Raises ChronotopeError where the model has no layer of such a name.
    """
    found = assignment if isinstance(assignment, Assignment) else load(assignment)
    there = dict(model.named_modules())
    missing = [name for name in dict.fromkeys(chain.from_iterable(found.choices)) if name not in there]
    if missing:
        names = ", ".join(attention_names(model)) or "none"
        raise ChronotopeError(f"the assignment names {', '.join(missing)}, which this model has not; it has {names}.")
    return Handle(model, Assigned(model, found, grid))


class Assigned(Patterns):
    """The patterns of an assignment, at the noise level of each call."""

    def __init__(self, model: nn.Module, found: Assignment, grid: Grids | None):
        super().__init__(model, found.where, grid, None, tuple(found.above))
        self.assignment = found

    def of(self, layer: str) -> Pattern | None:
        return self.assignment.where(layer, self.lies.level)
