"""What the C++ kernels read of a plan: padded layouts, tile lists, masks in bits. Made once for each plan."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from jaxtyping import Int32
from torch import Tensor

from chronotope.grid import Coords, Grid
from chronotope.planning import Order, Tiling

MOST_AXES = MOST_TERMS = 8
WORDS_KEPT = 1 << 27  # words of masks that a plan may need whatever the grid; beyond that, so many for each token
WORDS_PER_TOKEN = 1 << 12

Int = ctypes.c_int64
Pointer = ctypes.c_void_p


def pointer(x: Tensor | None) -> int | None:
    """Where the numbers are; the caller keeps the tensor alive."""
    return None if x is None else x.data_ptr()


class Strided(ctypes.Structure):
    """`Tensor` of problem.h."""

    _fields_ = (("data", Pointer), ("batch", Int), ("head", Int), ("token", Int))

    @classmethod
    def of(cls, x: Tensor) -> Strided:
        """A tensor [B, H, N, size] whose last stride is 1."""
        return cls(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


class Side(ctypes.Structure):
    """`Side` of problem.h."""

    _fields_ = (
        ("tiles", Int), ("slots", Int), ("prefix_tiles", Int),
        ("first", Pointer), ("size", Pointer), ("token", Pointer), ("source", Pointer), ("place", Pointer),
    )  # fmt: skip


class Term(ctypes.Structure):
    """`Term` of problem.h."""

    _fields_ = (
        ("axes", Int), ("entries", Int), ("axis", Int * MOST_AXES), ("reach", Int * MOST_AXES),
        ("table", Pointer), ("gradient", Pointer),
    )  # fmt: skip


class Problem(ctypes.Structure):
    """`Problem` of problem.h."""

    _fields_ = (
        ("batch", Int), ("heads", Int), ("key_heads", Int), ("depth", Int), ("value_depth", Int), ("type", Int),
        ("tokens", Int), ("key_tokens", Int),
        ("scale", ctypes.c_double), ("softcap", ctypes.c_double),
        ("q", Strided), ("k", Strided), ("v", Strided), ("out", Strided), ("lse", Pointer),
        ("queries", Side), ("keys", Side),
        ("start", Pointer), ("tile", Pointer), ("kind", Pointer), ("bits", Pointer), ("mask", Pointer),
        ("exclusive", Int),
        ("terms", Int), ("term", Term * MOST_TERMS),
        ("bias", Pointer), ("bias_stride", Int * 4),
        ("dout", Strided), ("dq", Strided), ("dk", Strided), ("dv", Strided), ("dlse", Pointer),
        ("lanes", Int), ("bias_size", Int), ("dbias", Pointer),
    )  # fmt: skip


@dataclass(frozen=True)
class Padded:
    """A layout with every tile padded to whole strips or panels; a slot is a position in it."""

    prefix_tiles: int
    first: Int32[Tensor, "tiles_and_one"]
    size: Int32[Tensor, "tiles"]
    token: Int32[Tensor, "slots"]
    source: Int32[Tensor, "slots"]
    place: Int32[Tensor, "axes slots"]

    @classmethod
    def of(cls, layout: Order, live: Tensor, unit: int, onto: Grid) -> Padded:
        """`live`: by token, whether it sees or is seen. Places are on the axes of `onto`, 0 where it lacks an axis."""
        padded = (layout.sizes + unit - 1) // unit * unit
        first = torch.cat([torch.zeros(1, dtype=torch.int64), padded.cumsum(0)])
        tile = torch.arange(len(padded)).repeat_interleave(padded)
        within = torch.arange(int(first[-1])) - first[tile]
        real = within < layout.sizes[tile]
        token = layout.order[(layout.start[tile] + within).clamp(max=layout.grid.size - 1)]
        places = Coords.of(layout.grid, token).aligned(onto)
        columns = [places.axes.get(axis, torch.zeros_like(token)) for axis in onto.axes]
        return cls(
            layout.prefix_tiles,
            first.int(),
            layout.sizes.int(),
            torch.where(real, token, -1).int(),
            torch.where(real & live[token], token, -1).int(),
            torch.stack(columns).int().contiguous(),
        )

    def side(self) -> Side:
        """The structure that points here."""
        arrays = (self.first, self.size, self.token, self.source, self.place)
        return Side(len(self.size), len(self.token), self.prefix_tiles, *map(pointer, arrays))


@dataclass(frozen=True)
class Tables:
    """All of a plan that a kernel needs."""

    queries: Padded
    keys: Padded
    start: Int32[Tensor, "tiles_and_one"]
    tile: Int32[Tensor, "pairs"]
    kind: Int32[Tensor, "pairs"]
    bits: Tensor
    mask: Tensor
    exclusive: bool
    covers_keys: bool  # every key tile is listed

    @classmethod
    def of(cls, tiles: Tiling, library: ctypes.CDLL) -> Tables:
        """Reads a plan for the vectors of this machine."""
        lanes, strip = library.chronotope_lanes(), library.chronotope_strip()
        sees, seen = tiles.sighted
        rows = tiles.by_query
        listed = torch.bincount(rows.tile, minlength=len(tiles.k.sizes))
        bits, mask = _masks(tiles, library, lanes, strip)
        return cls(
            Padded.of(tiles.q, sees, strip, tiles.k.grid),
            Padded.of(tiles.k, seen, lanes, tiles.k.grid),
            rows.start,
            rows.tile,
            rows.kind,
            bits,
            mask,
            bool((listed <= 1).all()),
            bool((listed > 0).all()),
        )


def words(tiles: Tiling, lanes: int = 16, strip: int = 8) -> Tensor:
    """How many words the mask of each kind takes: for each strip and panel one word for each row of the strip."""
    rows, cols = tiles.kinds
    strips = (tiles.q.sizes[rows] + strip - 1) // strip
    return strips * strip * ((tiles.k.sizes[cols] + lanes - 1) // lanes)


def too_large(tiles: Tiling) -> bool:
    """Whether masks would take more memory than a kernel should."""
    most = max(WORDS_KEPT, WORDS_PER_TOKEN * max(tiles.q.grid.size, tiles.k.grid.size))
    return int(words(tiles).sum()) > most


def _masks(tiles: Tiling, library: ctypes.CDLL, lanes: int, strip: int) -> tuple[Tensor, Tensor]:
    each = words(tiles, lanes, strip)
    first = each.cumsum(0) - each
    bits = torch.empty(int(each.sum()), dtype=torch.int16)
    rows, cols = tiles.kinds
    heights, widths = tiles.q.sizes[rows].int(), tiles.k.sizes[cols].int()
    for part, seen in tiles.kind_masks():
        seen = seen.contiguous()
        library.chronotope_masks(
            *(Int(n) for n in seen.shape),
            *(Pointer(x.data_ptr()) for x in (seen, heights[part], widths[part], first[part])),
            Pointer(bits.data_ptr()),
        )
    return bits, first
