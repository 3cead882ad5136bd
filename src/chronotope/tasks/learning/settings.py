"""`key=value` from the command line, sorted to what they set: the task, the schedule, the model."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from chronotope.errors import ChronotopeError
from chronotope.planning.parse import named
from chronotope.tasks.learning.task import Schedule, Task

ASKED = "run.json"


@dataclass(frozen=True)
class Settled:
    """A task, one of its models, and how it is trained."""

    task: Task
    model: str
    schedule: Schedule
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """All that makes a training what it is, but the seed: equal keys, equal training."""
        task = {**dataclasses.asdict(self.task), "data": self.task.data.name}
        return repr((self.task.name, task, self.model, dict(self.options), dataclasses.asdict(self.schedule)))

    def make(self) -> nn.Module:
        """An untrained model."""
        return self.task.maker(self.model)(**self.options)


def settle(kind: type[Task], data: Path, model: str | None, texts: Sequence[str] = ()) -> Settled:
    """Reads settings such as `steps=500` and `dim=64`. Raises ChronotopeError: an unknown name, or no such value."""
    (model,) = named("model", None if model is None else [model], kind.models)[:1]
    given = dict(_pair(text) for text in texts)
    own = {field.name: field.type for field in dataclasses.fields(kind) if field.name != "data"}
    types_of = typing.get_type_hints(kind)
    told = {key: _read(key, given.pop(key), types_of[key]) for key in list(given) if key in own}
    task = kind(data=data, **{**kind.presets.get(model, {}), **told})
    schedule, fields = task.schedule(model), typing.get_type_hints(Schedule)
    schedule = replace(
        schedule, **{key: _read(key, given.pop(key), fields[key]) for key in list(given) if key in fields}
    )
    maker = task.maker(model)
    known = inspect.signature(maker).parameters
    hints = _hints(maker)
    options = {key: _read(key, given.pop(key), hints[key]) for key in list(given) if key in known}
    if given:
        there = ", ".join([*own, *fields, *known])
        raise ChronotopeError(
            f"--set {next(iter(given))}: {kind.name} with {model!r} has no such setting; there are: {there}."
        )
    return Settled(task, model, schedule, options)


def _hints(maker: Any) -> dict[str, Any]:
    """The types of the arguments of a function or class."""
    function = maker.func if isinstance(maker, partial) else maker
    return typing.get_type_hints(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]


def remember(out: Path, task: str, model: str, texts: Sequence[str], data: Path) -> None:
    """Writes what a run was asked for to its folder, the first time."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / ASKED).exists():
        asked = {"task": task, "model": model, "set": list(texts), "data": str(data)}
        (out / ASKED).write_text(json.dumps(asked, indent=1) + "\n")


def recall(out: Path) -> tuple[str, str, list[str], Path]:
    """Task, model, settings and data of a run. Raises ChronotopeError where there is none."""
    if not (out / ASKED).is_file():
        raise ChronotopeError(f"{out} has no {ASKED}; give the folder that `chronotope train` wrote.")
    asked = json.loads((out / ASKED).read_text())
    return asked["task"], asked["model"], asked["set"], Path(asked["data"])


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ChronotopeError(f"--set {text}: expected key=value, such as steps=500.")
    return key.strip(), value.strip()


def _read(key: str, text: str, kind: Any) -> Any:
    """A value of this type. Raises ChronotopeError where the text is none."""
    if isinstance(kind, types.UnionType):
        kinds = [one for one in typing.get_args(kind) if one is not type(None)]
        return None if text == "none" and len(kinds) < len(typing.get_args(kind)) else _read(key, text, kinds[0])
    if typing.get_origin(kind) is typing.Literal:
        if text in typing.get_args(kind):
            return text
        raise ChronotopeError(f"--set {key}={text}: expected one of {', '.join(typing.get_args(kind))}.")
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError, TypeError):
        raise ChronotopeError(f"--set {key}={text}: expected {getattr(kind, '__name__', kind)}.") from None
