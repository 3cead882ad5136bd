"""In which order a recurrence visits the tokens of a grid: permutations with their inverses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid


@dataclass(frozen=True, eq=False)
class Order:
    """A permutation of the tokens of a grid. visited[i]: the token at step i; steps[j]: the step of token j."""

    visited: Int64[Tensor, "n"]
    steps: Int64[Tensor, "n"]

    def __call__(self, x: Tensor, dim: int = 1) -> Tensor:
        """Tokens in grid order along `dim`, put in the order of visits."""
        return x.index_select(dim, self.visited)

    def undo(self, x: Tensor, dim: int = 1) -> Tensor:
        """Tokens in the order of visits along `dim`, put back in grid order."""
        return x.index_select(dim, self.steps)


def scan_order(
    grid: Grid,
    axes: tuple[str, ...] | None = None,
    *,
    snake: bool = False,
    flip: Iterable[str] = (),
    reverse: bool = False,
    device: torch.device | str = "cpu",
) -> Order:
    """The order that runs along the last of `axes` first.

    Args:
        axes: all axes of the grid, from the slowest to the fastest; default: those of the grid (raster order).
        snake: every other run along an axis goes backwards (boustrophedon), so that successive tokens are always
            neighbours on the grid.
        flip: axes along which the first run goes from the far end.
        reverse: the same path from its end to its start.
        device: where the permutation is kept.

    Prefix tokens have no place: they stay in front. Raises ChronotopeError where the axes are not those of the grid.

    Example:
        >>> scan_order(Grid(h=2, w=3), snake=True).visited
        tensor([0, 1, 2, 5, 4, 3])
        >>> scan_order(Grid(h=2, w=3), ("w", "h")).visited
        tensor([0, 3, 1, 4, 2, 5])
    """
    axes, flipped = grid.axes if axes is None else tuple(axes), tuple(flip)
    if sorted(axes) != sorted(grid.axes) or not set(flipped) <= set(axes):
        raise ChronotopeError(
            f"scan_order(axes={axes!r}, flip={flipped!r}) of {grid!r}: name each of {', '.join(grid.axes)} once, and "
            "flip some of them."
        )
    # A compiler cannot look into a cache.
    made = _order if torch.compiler.is_compiling() else _kept_order
    return made(grid, axes, snake, frozenset(flipped), reverse, torch.device(device))


def _order(
    grid: Grid, axes: tuple[str, ...], snake: bool, flip: frozenset[str], reverse: bool, device: torch.device
) -> Order:
    step = torch.arange(grid.places, device=device)
    if reverse:
        step = step.flip(0)
    strides, stride = {}, 1
    for axis in reversed(grid.axes):
        strides[axis] = stride
        stride *= grid.sizes[axis]
    place = torch.zeros_like(step)
    for axis in reversed(axes):
        size = grid.sizes[axis]
        along, step = step % size, step // size
        # What is left of the step counts the runs along this axis.
        backwards = (step % 2 == 1) & snake
        backwards = backwards ^ (axis in flip)
        place = place + torch.where(backwards, size - 1 - along, along) * strides[axis]
    prefix = torch.arange(grid.prefix, device=device)
    visited = torch.cat((prefix, place + grid.prefix))
    return Order(visited, torch.empty_like(visited).scatter_(0, visited, torch.arange(grid.size, device=device)))


@lru_cache(maxsize=256)
def _kept_order(
    grid: Grid, axes: tuple[str, ...], snake: bool, flip: frozenset[str], reverse: bool, device: torch.device
) -> Order:
    # An index made in inference mode could not be used by a later training step.
    with torch.inference_mode(False):
        return _order(grid, axes, snake, flip, reverse, device)
