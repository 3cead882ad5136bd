"""The order in which a plan lays out tokens: tile by tile, prefix first."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import Boxes
from chronotope.grid import Grid

PREFIX_TILE = 128


class Order(ABC):
    """Tokens in the order in which they are laid out, cut in tiles."""

    grid: Grid
    """Where the tokens are: `grid.size` is their number."""

    @property
    @abstractmethod
    def prefix_tiles(self) -> int:
        """Number of tiles that hold the prefix; they come first."""

    @property
    @abstractmethod
    def start(self) -> Int64[Tensor, "tiles_and_one"]:
        """Where each tile starts in `order`, and the end."""

    @property
    @abstractmethod
    def order(self) -> Int64[Tensor, "tokens"]:
        """The token at each position of the layout."""

    @cached_property
    def sizes(self) -> Int64[Tensor, "tiles"]:
        """Number of tokens in each tile."""
        return self.start.diff()

    @cached_property
    def tile_of(self) -> Int64[Tensor, "tokens"]:
        """The tile of each token."""
        out = torch.empty_like(self.order)
        out[self.order] = torch.arange(len(self.sizes)).repeat_interleave(self.sizes)
        return out

    def tokens(self, tiles: Int64[Tensor, "*some"]) -> Int64[Tensor, "*some size"]:
        """The tokens of tiles of one size."""
        size = int(self.sizes[tiles.flatten()[0]])
        return self.order[self.start[tiles][..., None] + torch.arange(size)]

    def spread(self, tiles: Int64[Tensor, "some"]) -> Bool[Tensor, "tokens"]:
        """Which tokens, in token order, lie in one of the tiles."""
        chosen = torch.zeros(len(self.sizes), dtype=torch.bool)
        chosen[tiles] = torch.ones((), dtype=torch.bool)
        out = torch.empty(self.grid.size, dtype=torch.bool)
        out[self.order] = chosen.repeat_interleave(self.sizes)
        return out


@dataclass(frozen=True)
class Layout(Order):
    """A grid cut in tiles of one shape, smaller at the end of an axis. Prefix tokens have tiles of their own."""

    grid: Grid
    tile: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of tiles on each axis."""
        return tuple(-(-n // size) for n, size in zip(self.grid.shape, self.tile, strict=True))

    @property
    def prefix_tiles(self) -> int:
        return -(-self.grid.prefix // PREFIX_TILE)

    @cached_property
    def start(self) -> Int64[Tensor, "tiles_and_one"]:
        prefix = torch.full((self.prefix_tiles,), PREFIX_TILE)
        if self.prefix_tiles:
            prefix[-1] = self.grid.prefix - PREFIX_TILE * (self.prefix_tiles - 1)
        volume = torch.ones(1, dtype=torch.int64)
        for n, size, count in zip(self.grid.shape, self.tile, self.counts, strict=True):
            extent = torch.full((count,), size)
            extent[-1] = n - size * (count - 1)
            volume = (volume[:, None] * extent[None, :]).flatten()
        return torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat([prefix, volume]).cumsum(0)])

    @cached_property
    def order(self) -> Int64[Tensor, "tokens"]:
        tile = torch.zeros(1, dtype=torch.int64)
        for n, size, count in zip(self.grid.shape, self.tile, self.counts, strict=True):
            tile = (tile[:, None] * count + torch.arange(n)[None, :] // size).flatten()
        return torch.cat([torch.arange(self.grid.prefix), self.grid.prefix + torch.argsort(tile, stable=True)])

    def boxes(self, tiles: Int64[Tensor, "p"]) -> Boxes:
        """The coordinates that tiles cover."""
        index = (tiles - self.prefix_tiles).clamp(min=0)
        lo, hi = {}, {}
        for axis, n, size, count in reversed(
            list(zip(self.grid.axes, self.grid.shape, self.tile, self.counts, strict=True))
        ):
            lo[axis] = index % count * size
            hi[axis] = (lo[axis] + size).clamp(max=n) - 1
            index = index // count
        return Boxes(self.grid, lo, hi, tiles < self.prefix_tiles if self.prefix_tiles else None)


@dataclass(frozen=True)
class Copies(Order):
    """A layout for each of `count` sequences that lie one after the other, such as the heads of a batch."""

    layout: Layout
    count: int

    @cached_property
    def grid(self) -> Grid:  # type: ignore[override]
        return Grid(token=self.count * self.layout.grid.size)

    @property
    def prefix_tiles(self) -> int:
        return 0

    @cached_property
    def start(self) -> Int64[Tensor, "tiles_and_one"]:
        first = torch.arange(self.count)[:, None] * self.layout.grid.size + self.layout.start[:-1]
        return torch.cat([first.flatten(), torch.tensor([self.grid.size])])

    @cached_property
    def order(self) -> Int64[Tensor, "tokens"]:
        return (torch.arange(self.count)[:, None] * self.layout.grid.size + self.layout.order).flatten()


@dataclass(frozen=True)
class Nest:
    """A fine layout inside of a coarse one, whose tiles are, on each axis, whole tiles of the fine one, or the axis."""

    fine: Layout
    coarse: Layout

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Of each fine tile with a place: the coarse tile, and its number within."""
        parent = child = torch.zeros(1, dtype=torch.int64)
        sizes = zip(self.fine.tile, self.coarse.tile, self.fine.counts, self.coarse.counts, strict=True)
        for fine, coarse, count, coarse_count in sizes:
            ratio = count if coarse_count == 1 else coarse // fine
            at = torch.arange(count)
            parent = (parent[:, None] * coarse_count + at // ratio).flatten()
            child = (child[:, None] * ratio + at % ratio).flatten()
        return parent, child

    @cached_property
    def parent(self) -> Int64[Tensor, "fine_tiles"]:
        """The coarse tile of each fine one."""
        prefix = torch.arange(self.fine.prefix_tiles)
        return torch.cat([prefix, self._places[0] + self.coarse.prefix_tiles])

    @cached_property
    def child(self) -> Int64[Tensor, "fine_tiles"]:
        """The place of each fine tile within its coarse one."""
        return torch.cat([torch.zeros(self.fine.prefix_tiles, dtype=torch.int64), self._places[1]])

    @cached_property
    def most(self) -> int:
        """Places of fine tiles within a coarse one."""
        return int(self.child.max()) + 1

    @cached_property
    def count(self) -> Int64[Tensor, "coarse_tiles"]:
        """Fine tiles in each coarse one."""
        return torch.bincount(self.parent, minlength=len(self.coarse.sizes))


def around(tiles: Sequence[tuple[int, ...]], shape: tuple[int, ...], least: int) -> tuple[int, ...]:
    """The smallest tile that holds whole tiles of all these shapes, and at least so many tokens, or the axis."""
    out = [min(math.lcm(*sizes), n) for *sizes, n in zip(*tiles, shape, strict=True)]
    for axis in reversed(range(len(shape))):
        times = -(-least // math.prod(out))
        out[axis] = min(out[axis] * times, shape[axis])
    return tuple(out)
