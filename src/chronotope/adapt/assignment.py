"""Which pattern each head of each layer has: what `search` finds, in a small file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from chronotope.adapt.attach import Grids, Handle, attach, attention_names
from chronotope.errors import ChronotopeError
from chronotope.patterns import Pattern, full, per_head
from chronotope.planning import parse_pattern

SCHEMA, VERSION = "chronotope.assignment", 1


@dataclass(frozen=True)
class Assignment:
    """A pattern for each head of each layer, and what is known of it.

    layers: patterns by layer name, one for each head. error: relative error of the output of the model that is
    expected; density: mean over the heads of the pairs computed, as a share of those of the model as it is, and
    bound: no choice among the candidates within the same budget has less. measured: on what.
    """

    layers: Mapping[str, tuple[Pattern, ...]]
    error: float = 0.0
    density: float = 1.0
    bound: float = 0.0
    measured: dict[str, Any] = field(default_factory=dict)

    def where(self, layer: str) -> Pattern | None:
        """The pattern of a layer; None: it stays as it is."""
        patterns = self.layers.get(layer)
        if patterns is None or all(one == full() for one in patterns):
            return None
        return patterns[0] if len(set(patterns)) == 1 else per_head(list(patterns))

    def save(self, path: str | Path) -> Path:
        """Writes it as JSON."""
        for one in {one for patterns in self.layers.values() for one in patterns}:
            _pattern(Path(path), "what is saved has to be read again", repr(one))
        layers = {name: [repr(one) for one in patterns] for name, patterns in self.layers.items()}
        numbers = {"error": self.error, "density": self.density, "bound": self.bound}
        told = {"schema": SCHEMA, "version": VERSION} | numbers | {"measured": dict(self.measured), "layers": layers}
        path = Path(path)
        path.write_text(json.dumps(told, indent=1) + "\n")
        return path

    def __repr__(self) -> str:
        lines = [f"density {self.density:.3f} (no choice has less than {self.bound:.3f}), error {self.error:.4f}"]
        for name, patterns in self.layers.items():
            count = {one: patterns.count(one) for one in dict.fromkeys(patterns)}
            lines.append(f"{name}: " + ", ".join(f"{many} x {one!r}" for one, many in count.items()))
        return "\n".join(lines)


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
    layers = told.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(own, list) and own for own in layers.values()):
        raise ChronotopeError(f"{path}: `layers` must hold a list of patterns for each layer.")
    for name in ("error", "density", "bound"):
        if not isinstance(told.get(name), (int, float)):
            raise ChronotopeError(f"{path}: {name}={told.get(name)!r}; expected a number.")
    if not isinstance(told.get("measured", {}), dict):
        raise ChronotopeError(f"{path}: measured={told['measured']!r}; expected names and values.")
    read = {name: tuple(_pattern(path, name, text) for text in own) for name, own in layers.items()}
    numbers = {name: float(told[name]) for name in ("error", "density", "bound")}
    return Assignment(read, **numbers, measured=told.get("measured", {}))


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
    missing = [name for name in found.layers if name not in there]
    if missing:
        names = ", ".join(attention_names(model)) or "none"
        raise ChronotopeError(f"the assignment names {', '.join(missing)}, which this model has not; it has {names}.")
    return attach(model, found.where, grid=grid)
