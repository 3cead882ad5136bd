"""What a recurrence carries along time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class RecurrentState:
    """S_t, and z_t where the output is normalised; float32, or float64 where the inputs are.

    memory [B, H, D, Dv]: what has been written under each key channel. normalizer [B, H, D]: the decayed sum of keys.
    """

    memory: Float[Tensor, "b h d dv"]
    normalizer: Float[Tensor, "b h d"] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(x.nbytes for x in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors held."""
        return (self.memory,) if self.normalizer is None else (self.memory, self.normalizer)

    def to(self, device: torch.device | str) -> RecurrentState:
        """The same state on another device."""
        return self._each(lambda x: x.to(device))

    def select(self, index: Tensor) -> RecurrentState:
        """The state of some members of the batch, int [n], in this order."""
        return self._each(lambda x: x.index_select(0, index))

    def repeat(self, n: int) -> RecurrentState:
        """The state with every member of the batch n times in a row."""
        return self._each(lambda x: x.repeat_interleave(n, 0))

    def detach(self) -> RecurrentState:
        """The same state, through which no gradient passes to what came before."""
        return self._each(lambda x: x.detach())

    def _each(self, change: Callable[[Tensor], Tensor]) -> RecurrentState:
        normalizer = None if self.normalizer is None else change(self.normalizer)
        return replace(self, memory=change(self.memory), normalizer=normalizer)
