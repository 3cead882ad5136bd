"""What mixes tokens: one contract for the whole clip at once and for one slice at a time."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid

Context = Tensor | tuple[Tensor, Grid]


@runtime_checkable
class State(Protocol):
    """What a mixer carries from slice to slice."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        ...

    def to(self, device: torch.device | str) -> Any:
        """The same state on another device."""
        ...

    def select(self, index: Tensor) -> Any:
        """The state of some members of the batch, int [n], in this order."""
        ...

    def repeat(self, n: int) -> Any:
        """The state with every member of the batch n times in a row."""
        ...


@dataclass(frozen=True)
class States(Carried):
    """The states of several mixers, in order."""

    parts: tuple[Any, ...]


class Mixer(nn.Module):
    """Mixes tokens: x [B, N, C] in grid order -> [B, N, C].

    Law: stepping over the slices of the first axis gives what `forward` gives on all of them, wherever the mixer is
    causal on that axis; where it is not, `init_state` says why.
    """

    @abstractmethod
    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. `context`: other tokens to look at, [B, Nk, C] on the same grid, or with their grid."""

    @abstractmethod
    def init_state(self, batch: int, grid: Grid) -> State:
        """The state before the first slice. `grid`: of ONE slice of the first axis, such as Grid(t=1, h=8, w=8)."""

    @abstractmethod
    def step(self, x: Float[Tensor, "b s c"], state: Any) -> tuple[Float[Tensor, "b s c"], State]:
        """The next slice, and the state after it. The state given is left as it was."""


def require_slice(grid: Grid) -> None:
    """Raises ChronotopeError unless the grid is one slice of its first axis, without a prefix."""
    if grid.shape[0] != 1:
        raise ChronotopeError(
            f"init_state: {grid!r} has {grid.shape[0]} slices of its first axis {grid.axes[0]!r}; give that of one, "
            f"{grid.replace(**{grid.axes[0]: 1})!r}."
        )
    if grid.prefix:
        raise ChronotopeError(
            f"init_state: {grid!r} has a prefix; its tokens look at slices that have not come yet. "
            "Use a grid without a prefix."
        )


def require_tokens(x: Tensor, grid: Grid, dim: int, what: str) -> None:
    """Raises ChronotopeError unless x is [B, grid.size, dim]."""
    if x.ndim != 3 or x.shape[1] != grid.size or x.shape[2] != dim:
        raise ChronotopeError(f"{what} has shape {list(x.shape)}; expected [B, {grid.size}, {dim}] for {grid!r}.")
