"""What work costs a kernel: the numbers from which tiles are chosen, measured on the machine or built in."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from chronotope.machine import cache, processor

SCHEMA = 1
Shape = tuple[int, ...]
Keys = Callable[[Shape, Shape], float]
"""Mean number of keys in the key tiles that a query tile lists, for two tile shapes."""


@dataclass(frozen=True)
class Costs:
    """Thread-nanoseconds of a forward pass, for one head of size 64, of each kind of work.

    A kernel runs through query tiles in strips of `strip` rows (0: the whole tile) and through key tiles in panels of
    `panel` keys, and leaves out a panel of which a strip sees nothing.

    pair: a pair of tokens in a strip and panel that are computed. look: a strip and a listed panel, computed or not.
    tile_pair: a listed key tile of a query tile. tile: a query tile. token: a query.
    """

    kernel: str
    strip: int
    panel: int
    pair: float
    look: float
    tile_pair: float
    tile: float
    token: float
    measured: bool = False

    def of(self, tile: Shape, k_tile: Shape, keys: Keys) -> float:
        """Cost per query token of a plan with these tiles."""
        rows, columns = math.prod(tile), math.prod(k_tile)
        strips = -(-rows // self.strip) if self.strip else 1
        panels = -(-columns // self.panel)
        listed = keys(tile, k_tile) / columns  # key tiles
        seen = keys(_cell(tile, self.strip or rows), _cell(k_tile, self.panel)) if self.strip else listed * columns
        computed = seen * (panels * self.panel / columns) * (strips * self.strip / rows if self.strip else 1)
        tiles = self.look * strips * panels * listed + self.tile_pair * listed + self.tile
        return self.pair * computed + tiles / rows + self.token


def _cell(tile: Shape, count: int) -> Shape:
    """The box of `count` tokens that follow each other in a tile."""
    out = []
    for size in reversed(tile):
        out.append(min(size, count))
        count = -(-count // size)
    return tuple(reversed(out))


# Fitted to times on an AMD EPYC with AVX-512 (float32, 2 threads).
NATIVE = Costs("native", strip=8, panel=16, pair=3.1, look=4.4, tile_pair=62.0, tile=1260.0, token=260.0)
# The torch kernel computes whole tiles, and copies the keys of each: as much as 48 pairs.
TORCH = Costs("torch", strip=0, panel=1, pair=3.7, look=178.0, tile_pair=0.0, tile=0.0, token=0.0)


def costs() -> Costs:
    """What was measured on this machine for the kernel that runs here, else what is built in."""
    path = measured_path()
    return NATIVE if path is None else _read(path)


def measured_path() -> Path | None:
    """Where the measured costs of this machine and this torch are kept; None without a cache."""
    folder = cache()
    return None if folder is None else _path(folder)


@lru_cache(maxsize=8)
def _path(folder: Path) -> Path:
    key = hashlib.sha256(f"{SCHEMA} {processor()} {torch.__version__}".encode()).hexdigest()[:16]
    return folder / f"costs-{key}.json"


def save(found: dict[str, Costs]) -> None:
    """Keeps measured costs, by dtype; nothing where the cache cannot be written."""
    path = measured_path()
    if path is None:
        return
    text = json.dumps({name: asdict(one) for name, one in found.items()}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{id(found)}.part")
        part.write_text(text + "\n")
        part.replace(path)
    except OSError:
        return
    _read.cache_clear()


@lru_cache(maxsize=8)
def _read(path: Path) -> Costs:
    try:
        return Costs(**json.loads(path.read_text())["float32"])
    except (OSError, ValueError, KeyError, TypeError):
        return NATIVE
