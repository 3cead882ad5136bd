"""The picture of one query's light cone: which tokens it sees, slice by slice."""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.patterns import Pattern

SEEN, UNSEEN, QUERY, BLIND_QUERY = "█", "·", "◆", "◇"
COLUMNS = 100  # characters of one line of maps
WRAP = 64  # tokens in a row where the grid has one axis
WIDE = 8  # maps up to so many cells get two characters per cell, which makes cells square
COLOURS = {"paper": (255, 255, 255), "unseen": (225, 230, 233), "seen": (11, 110, 110), "query": (255, 157, 46)}
GAP = 4  # pixels between the maps of a PNG


@dataclass(frozen=True, eq=False, repr=False)
class Picture:
    """What one query sees. `str` and `repr` are maps for the terminal; `save` writes a PNG.

    Attributes:
        pattern: who may look at whom.
        grid: where the tokens are.
        query: the query's coordinates.
        heads: the heads shown; (None,) where all heads are alike.
        seen: bool [len(heads), grid.size] in token order.
    """

    pattern: Pattern
    grid: Grid
    query: tuple[int, ...]
    heads: tuple[int | None, ...]
    seen: Bool[Tensor, "shown tokens"]

    @property
    def token(self) -> int:
        """Index of the query in token order."""
        return self.grid.index(**dict(zip(self.grid.axes, self.query, strict=True)))

    def __repr__(self) -> str:
        at = ", ".join(f"{axis}={place}" for axis, place in zip(self.grid.axes, self.query, strict=True))
        lines = [f"{self.pattern!r} on {self.grid!r}, query {at}"]
        for head, seen in zip(self.heads, self.seen, strict=True):
            count = int(seen.sum())
            name = "" if head is None else f"head {head}: {self.pattern.head(head)!r}: "
            lines.append(f"{name}sees {count:,} of {self.grid.size:,} tokens ({100 * count / self.grid.size:.3g} %)")
            lines += self._prefix(seen) + self._maps(seen)
        lines.append(f"{SEEN} seen   {UNSEEN} not seen   {QUERY} the query ({BLIND_QUERY}: does not see itself)")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a PNG: slices from left to right, heads from top to bottom; the query orange, what it sees green.

        Prefix tokens are a row of cells in front of the maps. Raises ChronotopeError where the folder is not there.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise ChronotopeError(
                f"{target.parent} is not a folder, expected one to write {target.name} in: create it."
            )
        rows = [_side_by_side([_pixels(cells) for cells in self._cells(seen)]) for seen in self.seen]
        image = _stacked(rows)
        target.write_bytes(png(image))
        return target

    def _slices(self, seen: Bool[Tensor, "tokens"]) -> list[tuple[str, list[list[int]]]]:
        """Maps of cells (0 unseen, 1 seen, 2 query, 3 query that does not see itself, -1 nothing), with titles."""
        cells = seen.long()
        cells[self.token] = 2 if seen[self.token] else 3
        cells = cells[self.grid.prefix :]
        shape = self.grid.shape
        if len(shape) == 1:
            cells = torch.nn.functional.pad(cells, (0, -len(cells) % min(WRAP, len(cells))), value=-1)
            return [("", cells.view(-1, min(WRAP, shape[0])).tolist())]
        outer = self.grid.axes[:-2]
        maps = cells.view(-1, *shape[-2:])
        titles = []
        for index in range(len(maps)):
            rest, places = index, []
            for axis in reversed(outer):
                places.append(f"{axis}={rest % self.grid.sizes[axis]}")
                rest //= self.grid.sizes[axis]
            titles.append(" ".join(reversed(places)))
        return [(title, rows.tolist()) for title, rows in zip(titles, maps, strict=True)]

    def _cells(self, seen: Bool[Tensor, "tokens"]) -> list[list[list[int]]]:
        """The maps alone; prefix tokens as a map in front."""
        before = [[[int(cell) for cell in seen[: self.grid.prefix]]]] if self.grid.prefix else []
        return before + [rows for _, rows in self._slices(seen)]

    def _prefix(self, seen: Bool[Tensor, "tokens"]) -> list[str]:
        if not self.grid.prefix:
            return []
        return ["prefix " + "".join(SEEN if cell else UNSEEN for cell in seen[: self.grid.prefix].tolist())]

    def _maps(self, seen: Bool[Tensor, "tokens"]) -> list[str]:
        slices = self._slices(seen)
        width = len(slices[0][1][0])
        wide = 2 if width <= WIDE else 1
        at_once = max(1, COLUMNS // (width * wide + 2))
        out = []
        for start in range(0, len(slices), at_once):
            group = slices[start : start + at_once]
            if group[0][0]:
                out.append("  ".join(title.ljust(width * wide) for title, _ in group).rstrip())
            for row in range(len(group[0][1])):
                out.append("  ".join(_text(rows[row], wide) for _, rows in group).rstrip())
        return out


def draw(
    pattern: Pattern,
    grid: Grid,
    query: Sequence[int] | Mapping[str, int] | None = None,
    *,
    head: int | None = None,
) -> Picture:
    """The light cone of one query: which tokens of the grid it sees.

    Args:
        pattern: who may look at whom.
        grid: where the tokens are. One map for each slice of all axes but the last two.
        query: its coordinates, `(t, h, w)` or `{"t": 3, "h": 0, "w": 2}`; default: the middle token.
        head: of a `per_head` pattern, the head to show; default: all of them.

    Only the pairs of this query are looked at, so the grid may be large.
    Raises ChronotopeError where the pattern does not fit the grid, or the query or the head is outside.

        print(ct.draw(ct.window(t=3, h=5, w=5), ct.Grid(t=4, h=8, w=8), query=(1, 0, 4)))
    """
    pattern.check(grid, grid)
    place = _place(query, grid)
    token = grid.index(**dict(zip(grid.axes, place, strict=True)))
    heads = _heads(pattern, head)
    q = Coords.of(grid, torch.tensor([token]))
    k = Coords.of(grid, torch.arange(grid.size))
    alone = [pattern if index is None else pattern.head(index) for index in heads]
    seen = torch.stack([one.sees(q, k).expand(grid.size) for one in alone])
    return Picture(pattern, grid, place, heads, seen)


def _place(query: Sequence[int] | Mapping[str, int] | None, grid: Grid) -> tuple[int, ...]:
    if query is None:
        return tuple(size // 2 for size in grid.shape)
    values = [query.get(axis) for axis in grid.axes] if isinstance(query, Mapping) else list(query)
    unknown = set(query) - set(grid.axes) if isinstance(query, Mapping) else set()
    if len(values) != len(grid.axes) or unknown or any(type(value) is not int for value in values):
        raise ChronotopeError(
            f"query={query!r}: expected one whole number for each of the axes {', '.join(grid.axes)} of {grid!r}."
        )
    return tuple(int(value) for value in values if value is not None)


def _heads(pattern: Pattern, head: int | None) -> tuple[int | None, ...]:
    if pattern.heads is None:
        if head is not None:
            raise ChronotopeError(f"head={head}: all heads of {pattern!r} are alike; leave head out.")
        return (None,)
    if head is not None and not 0 <= head < pattern.heads:
        raise ChronotopeError(f"head={head}: {pattern!r} has the heads 0 to {pattern.heads - 1}.")
    return tuple(range(pattern.heads)) if head is None else (head,)


def _text(cells: list[int], wide: int) -> str:
    marks = {-1: " " * wide, 0: UNSEEN.ljust(wide), 1: SEEN * wide, 2: QUERY.ljust(wide), 3: BLIND_QUERY.ljust(wide)}
    return "".join(marks[cell] for cell in cells)


def _pixels(cells: list[list[int]]) -> Tensor:
    """Cells as squares with a thin line between them, uint8 [H, W, 3]."""
    size = max(3, min(12, 240 // len(cells[0])))
    names = {-1: "paper", 0: "unseen", 1: "seen", 2: "query", 3: "query"}
    colours = torch.tensor([[COLOURS[names[cell]] for cell in row] for row in cells], dtype=torch.uint8)
    image = colours.repeat_interleave(size, 0).repeat_interleave(size, 1)
    image[::size] = image[:, ::size] = torch.tensor(COLOURS["paper"], dtype=torch.uint8)
    return image


def _side_by_side(images: list[Tensor]) -> Tensor:
    """At most 8 maps in a row."""
    per_row = min(8, max(1, math.ceil(math.sqrt(2 * len(images)))))
    rows = []
    for start in range(0, len(images), per_row):
        group = images[start : start + per_row]
        height = max(len(image) for image in group)
        rows.append(torch.cat([_padded(image, height, image.shape[1] + GAP) for image in group], 1))
    return _stacked(rows)


def _stacked(images: list[Tensor]) -> Tensor:
    width = max(image.shape[1] for image in images)
    return torch.cat([_padded(image, len(image) + GAP, width) for image in images])


def _padded(image: Tensor, height: int, width: int) -> Tensor:
    out = torch.tensor(COLOURS["paper"], dtype=torch.uint8).repeat(height, width, 1)
    out[: image.shape[0], : image.shape[1]] = image
    return out


def png(image: Tensor) -> bytes:
    """A PNG of uint8 [H, W, 3]: signature, header, zlib of rows that each begin with filter 0, end (RFC 2083)."""
    height, width = image.shape[:2]
    rows = torch.nn.functional.pad(image.reshape(height, -1), (1, 0)).contiguous().numpy().tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
