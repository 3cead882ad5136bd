"""The tile pairs of a pattern as kernels of other languages read them: compressed rows, and masks by kind."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int32
from torch import Tensor

if TYPE_CHECKING:
    from chronotope.planning.tiling import Tiling

FULL = -1


@dataclass(frozen=True)
class Rows:
    """For each tile of one side the tiles of the other that it meets: those from start[i] to start[i + 1].

    `kind`: equal numbers mean equal element masks (`Tiling.kinds` has one pair of tiles of each kind); -1: all visible.
    """

    start: Int32[Tensor, "tiles_and_one"]
    tile: Int32[Tensor, "pairs"]
    kind: Int32[Tensor, "pairs"]

    def to(self, device: torch.device | str) -> Rows:
        """The same lists on another device."""
        return Rows(*(getattr(self, f.name).to(device) for f in fields(self)))


def by_query(tiles: Tiling) -> Rows:
    """Key tiles of each query tile, in order."""
    found = tiles.found
    return _rows(found.rows, found.cols, _kinds(tiles), len(tiles.q.sizes))


def by_key(tiles: Tiling) -> Rows:
    """Query tiles of each key tile, in order: the transpose."""
    found = tiles.found
    order = torch.argsort(found.cols, stable=True)
    return _rows(found.cols[order], found.rows[order], _kinds(tiles)[order], len(tiles.k.sizes))


def _kinds(tiles: Tiling) -> Tensor:
    out = torch.full(tiles.found.rows.shape, FULL)
    out[~tiles.found.full] = tiles.partial_kinds[2]
    return out


def _rows(own: Tensor, other: Tensor, kind: Tensor, count: int) -> Rows:
    start = torch.zeros(count + 1, dtype=torch.int64)
    start[1:] = torch.bincount(own, minlength=count).cumsum(0)
    return Rows(start.int(), other.int(), kind.int())
