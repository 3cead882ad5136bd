"""Scores that depend on where query and key are: added to the logits, never expanded to N x N."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.held import Held


@dataclass(frozen=True)
class Relative:
    """A score that depends on key - query alone: table[h, i], i counting offsets row-major over the axes of `extent`.

    i = sum over axes of (clamp(key - query, -reach, reach) + reach) * stride, the last axis having stride 1; queries
    are aligned onto the key grid. A kernel can look this up by itself, whatever the bias object is.
    """

    extent: Mapping[str, int]
    table: Float[Tensor, "heads entries"]

    def index(self, q: Coords, k: Coords) -> Int64[Tensor, "..."]:
        """i of pairs of places; q is aligned."""
        out = torch.zeros((), dtype=torch.int64, device=q.place.device)
        for axis, reach in self.extent.items():
            out = out * (2 * reach + 1) + (k.axes[axis] - q.axes[axis]).clamp(-reach, reach) + reach
        return out

    def of(self, head: Int64[Tensor, "..."], q: Coords, k: Coords) -> Float[Tensor, "..."]:
        """The scores of pairs of places, each for a head of its own."""
        return self.table.flatten()[head * self.table.shape[1] + self.index(q, k)]


class Bias(nn.Module):
    """A score for every head and pair of places. `forward(q, k) -> [heads, ...]`, the coordinates broadcasting.

    Subclasses hold their parameters like any module; gradients reach them through `ct.attention`. Pairs with a
    prefix token have no distance: their score is 0.
    """

    heads: int

    def __init__(self) -> None:
        super().__init__()
        self.held = Held(self)
        """This module as a constant for torch.compile."""

    @abstractmethod
    def score(self, q: Coords, k: Coords) -> Float[Tensor, "heads ..."]:
        """The score of places; prefix tokens are seen to elsewhere."""

    @abstractmethod
    def check(self, axes: tuple[str, ...]) -> None:
        """Raises ChronotopeError where the grid lacks an axis that the score depends on."""

    def relative(self, state: Mapping[str, Tensor], grid: Grid, key_grid: Grid) -> list[Relative] | None:
        """This bias as a sum of relative tables made from the named parameters and buffers; None: it is none."""
        return None

    def forward(self, q: Coords, k: Coords) -> Float[Tensor, "heads ..."]:
        """Scores [heads, ...] of pairs of coordinates, 0 where one of them is a prefix token."""
        score = self.score(q.aligned(k.grid), k)
        return torch.where(q.prefix | k.prefix, torch.zeros((), dtype=score.dtype, device=score.device), score)


class RelativeBias(Bias):
    """A learned table of relative places, one entry for each head and offset (Swin, T5 without buckets).

    score[h] = table[h, key - query], the offsets of all named axes taken together and clamped to +-extent.

    Args:
        heads: number of query heads.
        extent: largest |key - query| on each axis that has an entry of its own; `RelativeBias(4, h=3, w=3)` has
            7 x 7 entries for each of 4 heads.

    Source: Shaw et al. 2018 (arXiv 1803.02155); Liu et al. 2021 (arXiv 2103.14030).
    """

    def __init__(self, heads: int, **extent: int):
        super().__init__()
        if not extent or any(isinstance(e, bool) or not isinstance(e, int) or e < 0 for e in extent.values()):
            raise ChronotopeError(
                f"RelativeBias({heads}, {extent}): give an extent of 0 or more for at least one axis."
            )
        self.heads = heads
        self.extent = dict(extent)
        entries = 1
        for reach in extent.values():
            entries *= 2 * reach + 1
        self.table = nn.Parameter(torch.zeros(heads, entries))

    def check(self, axes: tuple[str, ...]) -> None:
        missing = [axis for axis in self.extent if axis not in axes]
        if missing:
            raise ChronotopeError(f"RelativeBias has a table over {missing}, but the grid has the axes {list(axes)}.")

    def score(self, q: Coords, k: Coords) -> Float[Tensor, "heads ..."]:
        index = Relative(self.extent, self.table).index(q, k)
        return self.table.index_select(1, index.flatten()).view(self.heads, *index.shape)

    def relative(self, state: Mapping[str, Tensor], grid: Grid, key_grid: Grid) -> list[Relative]:
        return [Relative(self.extent, state["table"])]

    def extra_repr(self) -> str:
        return f"{self.heads}, {', '.join(f'{axis}={reach}' for axis, reach in self.extent.items())}"


class Alibi(Bias):
    """A slope per head times the distance: score[h] = -slope[h] * sum over the axes of |key - query|.

    Args:
        heads: number of query heads.
        axes: the axes whose distances add up; default: all of the grid.
        slopes: one for each head; default 2^(-8 (h + 1) / heads).
        learned: whether the slopes are parameters; else they are a buffer.

    Source: Press et al. 2022 (arXiv 2108.12409).
    """

    slopes: Tensor

    def __init__(
        self, heads: int, axes: str | tuple[str, ...] | None = None, slopes: Tensor | None = None, learned: bool = False
    ):
        super().__init__()
        if slopes is None:
            slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        slopes = torch.as_tensor(slopes)
        if slopes.shape != (heads,):
            raise ChronotopeError(f"Alibi: expected slopes of shape [{heads}], got {list(slopes.shape)}.")
        self.heads = heads
        self.axes = (axes,) if isinstance(axes, str) else axes
        if learned:
            self.slopes = nn.Parameter(slopes.clone())
        else:
            self.register_buffer("slopes", slopes.clone())

    def check(self, axes: tuple[str, ...]) -> None:
        missing = [axis for axis in self.axes or () if axis not in axes]
        if missing:
            raise ChronotopeError(f"Alibi measures distance on {missing}, but the grid has the axes {list(axes)}.")

    def score(self, q: Coords, k: Coords) -> Float[Tensor, "heads ..."]:
        shared = self._shared(q.grid, k.grid)
        distance = torch.zeros_like(q.place + k.place)
        for axis in shared:
            distance = distance + (k.axes[axis] - q.axes[axis]).abs()
        return -self.slopes.view(-1, *[1] * distance.ndim) * distance

    def relative(self, state: Mapping[str, Tensor], grid: Grid, key_grid: Grid) -> list[Relative]:
        slopes, out = state["slopes"], []
        for axis in self._shared(grid, key_grid):
            reach = key_grid.sizes[axis] - 1
            distance = torch.arange(-reach, reach + 1, device=slopes.device).abs()
            out.append(Relative({axis: reach}, -slopes[:, None] * distance))
        return out

    def _shared(self, grid: Grid, key_grid: Grid) -> list[str]:
        return [axis for axis in self.axes or grid.axes if axis in grid.axes and axis in key_grid.axes]

    def extra_repr(self) -> str:
        return f"{self.heads}, axes={self.axes}"
