"""What mixes tokens: one contract for the whole clip at once and for one slice at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.position import Places

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

    A mixer with a position code takes, in `forward` and in `step`, the keyword `coords`: where the tokens after the
    prefix are, if not where the grid says (`ct.Rope`). It names the axes of its code in `placed`.
    """

    @property
    def placed(self) -> tuple[str, ...]:
        """The axes on which `coords` can say where tokens are; none: the mixer takes no coords."""
        return ()

    @abstractmethod
    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. `context`: other tokens to look at, [B, Nk, C] on the same grid, or with their grid."""

    @abstractmethod
    def init_state(self, batch: int, grid: Grid) -> State:
        """The state before the first slice. `grid`: of ONE slice of the first axis, such as Grid(t=1, h=8, w=8)."""

    @abstractmethod
    def step(self, x: Float[Tensor, "b s c"], state: Any) -> tuple[Float[Tensor, "b s c"], State]:
        """The next slice, and the state after it. The state given is left as it was."""


class Whole(Mixer):
    """A mixer of whole clips: it cannot be stepped, and says why."""

    why: ClassVar[str]
    """What a slice would lack."""

    def init_state(self, batch: int, grid: Grid) -> NoReturn:
        """Raises ChronotopeError."""
        raise ChronotopeError(f"{type(self).__name__} cannot be stepped: {self.why}. Call forward on the whole.")

    def step(self, x: Float[Tensor, "b s c"], state: Any) -> NoReturn:
        """Raises ChronotopeError, as `init_state`."""
        self.init_state(len(x), Grid(n=1))


def placed_by(mixers: Iterable[Mixer]) -> tuple[str, ...]:
    """The axes that some of them know."""
    return tuple(dict.fromkeys(axis for mixer in mixers for axis in mixer.placed))


def require_placed(known: tuple[str, ...], coords: Places | None, what: str) -> None:
    """Raises ChronotopeError where coords say something that nobody would hear."""
    unknown = [axis for axis in coords if axis not in known] if isinstance(coords, Mapping) else []
    if unknown or (coords is not None and not known):
        raise ChronotopeError(
            f"{what}: coords{f' for {unknown}' if unknown else ''}, but its position codes are over the axes "
            f"{list(known)}; give a layer a position code over them, such as position=ct.Rope(('n', 'time'))."
        )


def coords_for(mixer: Mixer, coords: Places | None) -> dict[str, Places]:
    """`{"coords": ...}` with those that the mixer knows, or nothing."""
    if isinstance(coords, Mapping):
        own = {axis: x for axis, x in coords.items() if axis in mixer.placed}
        return {"coords": own} if own else {}
    return {"coords": coords} if coords is not None and mixer.placed else {}


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
