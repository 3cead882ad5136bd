"""Boxes of coordinates: what planning looks at instead of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.grid import Coords, Grid


@dataclass(frozen=True)
class Boxes:
    """P boxes on a grid: per axis the first and the last coordinate, both inclusive, int64 [P].

    `prefix` [P] marks boxes that hold prefix tokens (their coordinates mean nothing); None: no such box.
    """

    grid: Grid
    lo: dict[str, Int64[Tensor, "p"]]
    hi: dict[str, Int64[Tensor, "p"]]
    prefix: Bool[Tensor, "p"] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.lo.values())))

    def __getitem__(self, index: Tensor | slice) -> Boxes:
        prefix = None if self.prefix is None else self.prefix[index]
        lo = {name: value[index] for name, value in self.lo.items()}
        return Boxes(self.grid, lo, {name: value[index] for name, value in self.hi.items()}, prefix)

    @classmethod
    def whole(cls, grid: Grid) -> Boxes:
        """One box that holds every token with a place."""
        lo = {name: torch.zeros(1, dtype=torch.int64) for name in grid.axes}
        return cls(grid, lo, {name: torch.tensor([size - 1]) for name, size in grid.sizes.items()})

    @classmethod
    def slices(cls, grid: Grid, axis: str, first: Int64[Tensor, "p"], last: Int64[Tensor, "p"]) -> Boxes:
        """Whole slices of an axis, from `first` to `last`, both inclusive."""
        lo = {name: torch.zeros_like(first) for name in grid.axes}
        hi = {name: torch.full_like(first, size - 1) for name, size in grid.sizes.items()}
        return cls(grid, {**lo, axis: first}, {**hi, axis: last})

    def sizes(self) -> dict[str, Int64[Tensor, "p"]]:
        """Extent of each box on each axis."""
        return {name: self.hi[name] - self.lo[name] + 1 for name in self.lo}

    def volume(self) -> Int64[Tensor, "p"]:
        """Number of tokens in each box."""
        sizes = list(self.sizes().values())
        return torch.stack(sizes).prod(0)

    def place(self, corner: dict[str, Tensor]) -> Tensor:
        """Row-major index (without prefix) of a corner, `lo` or `hi`."""
        out = torch.zeros_like(next(iter(corner.values())))
        for name, size in self.grid.sizes.items():
            out = out * size + corner[name]
        return out

    def tokens(self) -> tuple[Coords, Bool[Tensor, "p v"]]:
        """Coordinates [P, V] of the tokens in each box, row-major, V the largest volume; and which are real."""
        sizes = self.sizes()
        volume = self.volume()
        rest = torch.arange(int(volume.max()))[None, :]
        real = rest < volume[:, None]
        axes: dict[str, Tensor] = {}
        for name in reversed(self.grid.axes):
            axes[name] = self.lo[name][:, None] + rest % sizes[name][:, None]
            rest = rest // sizes[name][:, None]
        axes = {name: torch.where(real, value, self.lo[name][:, None]) for name, value in axes.items()}
        place = self.place(axes)
        return Coords(self.grid, axes, place, torch.zeros_like(real)), real


def chunks(count: int, each: int, budget: int) -> list[slice]:
    """Slices over `count` items of `each` elements, so that one slice holds about `budget` elements."""
    step = max(1, budget // max(1, each))
    return [slice(start, min(count, start + step)) for start in range(0, count, step)]


def identify(*keys: Int64[Tensor, "p"]) -> Int64[Tensor, "p"]:
    """One number per row, equal exactly where all the keys are equal."""
    out = torch.unique(keys[0], return_inverse=True)[1]
    for key in keys[1:]:
        values, index = torch.unique(key, return_inverse=True)
        out = torch.unique(out * len(values) + index, return_inverse=True)[1]
    return out
