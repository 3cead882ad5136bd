"""What a compiler is shown in place of an object."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree


class Held:
    """An object as a constant of torch.compile, which guards on it by `==` of what is held.

    Dynamo hands the objects themselves to no function as constants (torch 2.11), or guards on their identity.
    """

    __slots__ = ("value",)
    value: Any

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash(self.value)


pytree.register_constant(Held)
