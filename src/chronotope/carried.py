"""What is carried from one piece of a sequence to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from chronotope.errors import ChronotopeError

Kind = TypeVar("Kind", bound="Carried")


@dataclass(frozen=True)
class Carried:
    """A base for states: frozen dataclasses whose tensors all have the batch in front.

    Fields may be tensors, states, tuples of these, None, or anything else (a count, a grid), which is left as it is.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(x.nbytes for x in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors held."""
        return tuple(x for _, x in _walk(self, "") if isinstance(x, Tensor))

    def to(self: Kind, device: torch.device | str) -> Kind:
        """The same state on another device."""
        return self.each(lambda x: x.to(device))

    def select(self: Kind, index: Tensor) -> Kind:
        """The state of some members of the batch, int [n], in this order."""
        return self.each(lambda x: x.index_select(0, index))

    def repeat(self: Kind, n: int) -> Kind:
        """The state with every member of the batch n times in a row."""
        return self.each(lambda x: x.repeat_interleave(n, 0))

    def detach(self: Kind) -> Kind:
        """The same state, through which no gradient passes to what came before."""
        return self.each(lambda x: x.detach())

    def each(self: Kind, change: Callable[[Tensor], Tensor]) -> Kind:
        """The same state with every tensor changed."""
        return _mapped(self, change)  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Tensor]:
        """Tensors and counts by name, for torch.save or safetensors."""
        return {name: x if isinstance(x, Tensor) else torch.tensor(x) for name, x in _walk(self, "")}

    def from_dict(self: Kind, given: Mapping[str, Tensor]) -> Kind:
        """This state with what `to_dict` of another one said; this one is of the same mixer, such as a new one."""
        names = [name for name, _ in _walk(self, "")]
        if sorted(names) != sorted(given):
            raise ChronotopeError(
                f"a state with {sorted(given)} is not one with {sorted(names)}: it is of another mixer."
            )
        return _read(self, "", given)  # type: ignore[no-any-return]


def _parts(x: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(x, Carried):
        yield from ((field.name, getattr(x, field.name)) for field in fields(x))
    elif isinstance(x, tuple):
        yield from ((str(i), part) for i, part in enumerate(x))


def _walk(x: Any, name: str) -> Iterator[tuple[str, Tensor | int]]:
    """Every tensor and count, with the names that lead to it."""
    if isinstance(x, Tensor) or type(x) is int:
        yield name, x
    for part, value in _parts(x):
        yield from _walk(value, f"{name}.{part}".lstrip("."))


def _rebuilt(x: Any, change: Callable[[str, Any], Any]) -> Any:
    if isinstance(x, Carried):
        return replace(x, **{name: change(name, value) for name, value in _parts(x)})
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return tuple(change(name, value) for name, value in _parts(x))
    return x


def _mapped(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(x) if isinstance(x, Tensor) else _rebuilt(x, lambda _, value: _mapped(value, change))


def _read(x: Any, name: str, given: Mapping[str, Tensor]) -> Any:
    if isinstance(x, Tensor):
        return given[name].to(x.device)
    if type(x) is int:
        return int(given[name])
    return _rebuilt(x, lambda part, value: _read(value, f"{name}.{part}".lstrip("."), given))
