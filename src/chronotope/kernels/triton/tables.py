"""What kernels read of a plan, on the device: tokens by position, element masks, coordinates.

All tables are int32 and made once for each plan and device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import triton.language as tl
from jaxtyping import Int64
from torch import Tensor

from chronotope.grid import Coords
from chronotope.kernels.triton.device import PACKED
from chronotope.kernels.triton.limits import mask_words
from chronotope.planning import Order, Tiling


class Masks(NamedTuple):
    """Tokens by position, and which keys a query of a partial pair of tiles sees.

    An order holds the token at a position, or -1 - token where it sees nothing or nobody sees it: what such a token
    holds must not matter. With R = `relations` a key is visible where low <= place <= high holds R times, (low, high)
    being `q_bounds` [nq, R, 2] and the place `k_places` [nk, R].

    With R = PACKED it is a matter of `bits` [kinds + 1, rows, words]: bit j % 32 of word j // 32 of row i of its kind's
    mask, i and j counting from the start of a tile; the last kind is all ones. Of each position, its tile and where in
    it are given. (One level of fields: Triton 3.6 loses whole numbers that are 1 in a tuple in a tuple.)
    """

    relations: tl.constexpr
    q_order: Tensor
    k_order: Tensor
    q_bounds: Tensor | None = None
    k_places: Tensor | None = None
    bits: Tensor | None = None
    rows: int = 0
    words: int = 0
    q_tile: Tensor | None = None
    k_tile: Tensor | None = None
    q_within: Tensor | None = None
    k_within: Tensor | None = None


Make = Callable[..., Any]
_kept: weakref.WeakKeyDictionary[Tiling, dict[Any, Any]] = weakref.WeakKeyDictionary()


def kept(make: Make) -> Make:
    """Keeps the results of `make(tiles, *hashable)` as long as the tiles live."""

    @wraps(make)
    def found(tiles: Tiling, *rest: Any) -> Any:
        known = _kept.setdefault(tiles, {})
        key = (make.__name__, *rest)
        if key not in known:
            known[key] = make(tiles, *rest)
        return known[key]

    return found


def spread(count: Int64[Tensor, "n"]) -> tuple[Int64[Tensor, "total"], Int64[Tensor, "total"]]:
    """`count[i]` times i, and how many of the same come before."""
    member = torch.arange(len(count)).repeat_interleave(count)
    before = count.cumsum(0) - count
    return member, torch.arange(len(member)) - before[member]


@kept
def masks(tiles: Tiling, device: torch.device) -> Masks:
    """Tokens and element masks of a plan."""
    q_order, k_order = (
        _order(layout, sighted).int().to(device)
        for layout, sighted in zip((tiles.q, tiles.k), tiles.sighted, strict=True)
    )
    if not bool((tiles.by_query.kind >= 0).any()):
        return Masks(tl.constexpr(0), q_order, k_order)
    found = _relations(tiles)
    if found is None:
        return _packed(tiles, q_order, k_order)
    bounds, places = (x.int().contiguous().to(device) for x in found)
    return Masks(tl.constexpr(places.shape[1]), q_order, k_order, bounds, places)


def _order(layout: Order, sighted: Tensor) -> Tensor:
    return torch.where(sighted[layout.order], layout.order, -1 - layout.order)


def _relations(tiles: Tiling) -> tuple[Int64[Tensor, "nq r 2"], Int64[Tensor, "nk r"]] | None:
    """(bounds, places) of a separable pattern: intervals of places, and of residues where a relation has a step."""
    grid, key_grid = tiles.q.grid, tiles.k.grid
    reaches = None if tiles.pattern is None else tiles.pattern.reaches(grid, key_grid)
    if reaches is None:
        return None
    q, k = Coords.of(grid, tiles.q.order), Coords.of(key_grid, tiles.k.order)
    bounds, places = [], []
    for axis, found in reaches.items():
        x, y = q.axes[axis], k.axes[axis]
        low = torch.stack([reach.first for reach in found]).amax(0)
        high = torch.stack([reach.last for reach in found]).amin(0)
        bounds.append(torch.stack([low[x], high[x]], 1))
        places.append(y)
        for reach in found:
            if reach.step > 1:
                residue = (reach.first % reach.step)[x]
                bounds.append(torch.stack([residue, residue], 1))
                places.append(y % reach.step)
    return torch.stack(bounds, 1), torch.stack(places, 1)


def _packed(tiles: Tiling, q_order: Tensor, k_order: Tensor) -> Masks:
    kinds, rows, words = mask_words(tiles)
    out = torch.full((kinds + 1, rows, 4 * words), 255, dtype=torch.uint8)
    for part, seen in tiles.kind_masks():
        padded = torch.zeros(len(seen), seen.shape[1], 32 * words, dtype=torch.uint8)
        padded[:, :, : seen.shape[2]] = seen
        weights = 1 << torch.arange(8, dtype=torch.uint8)
        out[part, : seen.shape[1]] = (padded.unflatten(2, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    places = [[x.int().to(q_order.device) for x in spread(layout.sizes)] for layout in (tiles.q, tiles.k)]
    (q_tile, q_within), (k_tile, k_within) = places
    bits = out.view(torch.int32).to(q_order.device)
    return Masks(PACKED, q_order, k_order, None, None, bits, rows, words, q_tile, k_tile, q_within, k_within)


@kept
def coordinates(tiles: Tiling, axes: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Coordinates [positions, axes] on the key grid: of the queries, aligned, and of the keys."""
    q = Coords.of(tiles.q.grid, tiles.q.order).aligned(tiles.k.grid)
    k = Coords.of(tiles.k.grid, tiles.k.order)
    of_q, of_k = (torch.stack([x.axes[axis] for axis in axes], 1).int().to(device) for x in (q, k))
    return of_q, of_k
