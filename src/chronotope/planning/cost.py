"""Which tile shape to take: the candidate whose estimated work is least. `costs` has the estimate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from chronotope.grid import Grid
from chronotope.patterns import Pattern
from chronotope.patterns.base import Reaches
from chronotope.patterns.reach import Reach
from chronotope.planning.costs import TORCH, Costs, Shape
from chronotope.planning.layout import Layout
from chronotope.planning.search import Blocks, search

ALIKE = 1.1  # estimates err by about so much: among equals a kernel that computes whole tiles decides
SAMPLES = 16  # query tiles that stand for all, where looking at all would be slow
VOLUMES = (32, 2048)  # tokens in a query tile, where the axes leave a choice
KEY_VOLUME = 16  # least tokens in a key tile
STEPS = 6  # rounds of descent
REFINED = 6  # candidates that are tried with finer key tiles, where looking at all would be slow
COSTLY = 128  # tokens in the tile of a pattern that would be slow to look into
RUN = 512  # tokens in the run from which a descent starts


@dataclass(frozen=True)
class Choice:
    """A candidate, and its estimated cost per query token: here, and for a kernel that computes whole tiles."""

    q_tile: Shape
    k_tile: Shape
    cost: float
    whole: float


def key_tile(grid: Grid, key_grid: Grid, tile: Shape) -> Shape:
    """The tile on the key grid that covers the same share of each shared axis; whole axes elsewhere."""
    shares = {axis: size / n for axis, n, size in zip(grid.axes, grid.shape, tile, strict=True)}
    return tuple(max(1, min(n, round(n * shares.get(axis, 1)))) for axis, n in key_grid.sizes.items())


def choose(pattern: Pattern, grid: Grid, key_grid: Grid, costs: Costs) -> list[Choice]:
    """The candidates that were looked at: the one to take, then the others in order of cost."""
    reaches = pattern.reaches(grid, key_grid)
    if pattern.costly:
        tile = _square(grid)
        return [Choice(tile, key_tile(grid, key_grid, tile), math.nan, math.nan)]
    sizes = [_sizes(reaches, grid, key_grid, axis) for axis in grid.axes]
    independent = reaches is not None and len(grid.axes) > 1
    keys_per_tile = _per_axis(reaches or {}, grid, key_grid) if independent else _sampled(pattern, grid, key_grid)
    known: dict[tuple[Shape, int], Choice] = {}

    def consider(tile: Shape, finer: int = 1) -> float:
        small = tuple(max(1, s // finer) if len(choices) > 1 else s for s, choices in zip(tile, sizes, strict=True))
        worth = finer == 1 or (small != tile and math.prod(small) >= KEY_VOLUME)
        if worth and (tile, finer) not in known:
            k_tile = key_tile(grid, key_grid, small)
            cost, whole = (kernel.of(tile, k_tile, keys_per_tile) for kernel in (costs, TORCH))
            known[tile, finer] = Choice(tile, k_tile, cost, whole)
        return known[tile, finer].cost if (tile, finer) in known else math.inf

    if reaches is None:
        for start in _starts(sizes):
            _descend(consider, sizes, start)
    else:
        for tile in itertools.product(*sizes):
            if _sensible(tile, sizes):
                consider(tile)
    for tile, finer in itertools.product(_best(known, REFINED if reaches is None else None), (2, 4)):
        consider(tile, finer)
    in_order = sorted(known.values(), key=lambda choice: choice.cost)
    alike = [choice for choice in in_order if choice.cost <= ALIKE * in_order[0].cost]
    best = min(alike, key=lambda choice: choice.whole)
    return [best, *(choice for choice in in_order if choice is not best)]


def _square(grid: Grid) -> Shape:
    """A tile of about the same size on every axis, of at most `COSTLY` tokens: what suits a pattern not looked into."""
    tile = [1] * len(grid.axes)
    while True:
        axis = min((i for i, n in enumerate(grid.shape) if tile[i] < n), key=lambda i: tile[i], default=None)
        if axis is None or math.prod(tile) // tile[axis] * min(2 * tile[axis], grid.shape[axis]) > COSTLY:
            return tuple(tile)
        tile[axis] = min(2 * tile[axis], grid.shape[axis])


def _best(known: dict[tuple[Shape, int], Choice], count: int | None) -> list[Shape]:
    return [choice.q_tile for choice in sorted(known.values(), key=lambda choice: choice.cost)[:count]]


def _starts(sizes: list[list[int]]) -> list[list[int]]:
    """Where to begin a descent: tiles of middle size on every axis, and runs of tokens that follow each other."""
    run, volume = [0] * len(sizes), math.prod(choices[0] for choices in sizes)
    for axis in reversed(range(len(sizes))):
        for i, size in enumerate(sizes[axis]):
            if volume // sizes[axis][run[axis]] * size <= RUN:
                volume = volume // sizes[axis][run[axis]] * size
                run[axis] = i
    return [[len(choices) // 2 for choices in sizes], run]


def _sensible(tile: Shape, sizes: list[list[int]]) -> bool:
    """Neither tiny nor huge, unless the axes leave no choice."""
    least, most = (math.prod(f(choices) for choices in sizes) for f in (min, max))
    return max(least, min(most, VOLUMES[0])) <= math.prod(tile) <= max(least, VOLUMES[1])


def _descend(consider: Callable[[Shape], float], sizes: list[list[int]], place: list[int]) -> None:
    """Looks at the neighbours of the best tile so far, twice or half as large on one axis, until none is better."""
    best = consider(tuple(choices[i] for choices, i in zip(sizes, place, strict=True)))
    for _ in range(STEPS):
        around = []
        for axis, step in itertools.product(range(len(sizes)), (-1, 1)):
            moved = [i + step if a == axis else i for a, i in enumerate(place)]
            if 0 <= moved[axis] < len(sizes[axis]):
                tile = tuple(choices[i] for choices, i in zip(sizes, moved, strict=True))
                if _sensible(tile, sizes):
                    around.append((consider(tile), moved))
        if not around or min(around)[0] >= best:
            return
        best, place = min(around)


def _sizes(reaches: Reaches | None, grid: Grid, key_grid: Grid, axis: str) -> list[int]:
    """Tile sizes worth a try on one axis: all of it where it is free, a block where it is cut apart."""
    n = grid.sizes[axis]
    if reaches is not None:
        found = reaches.get(axis, [])
        if all(bool((reach.counts() == key_grid.sizes[axis]).all()) for reach in found):
            return [n]
        blocks = [_block(reach, n) for reach in found if n == key_grid.sizes[axis]]
        if any(blocks):
            return [max(blocks)]
    least, most = (32, 1024) if len(grid.axes) == 1 else (1, 64)
    powers = [2**i for i in range(11) if least <= 2**i <= min(n, most)]
    return sorted({*powers, n}) if n <= most else powers


def _block(reach: Reach, n: int) -> int:
    """The size of the blocks into which a relation cuts its axis, all equal but the last; 0 where it does not."""
    size = int(reach.last[0] - reach.first[0]) + 1
    if size < 1:
        return 0
    start = torch.arange(n) // size * size
    same = torch.equal(reach.first, start) and torch.equal(reach.last, (start + size).clamp(max=n) - 1)
    return size if same and reach.step == 1 else 0


def _per_axis(reaches: Reaches, grid: Grid, key_grid: Grid) -> Callable[[Shape, Shape], float]:
    """Mean number of keys listed by a query tile: the axes are independent, so it is a product over axes."""
    known: dict[tuple[str, int, int], float] = {}

    def mean(axis: str, size: int, key_size: int) -> float:
        n, n_key = grid.sizes[axis], key_grid.sizes[axis]
        count, key_count = -(-n // size), -(-n_key // key_size)
        tiles = torch.linspace(0, count - 1, min(count, 4 * SAMPLES)).round().long().unique()
        q_lo, k_lo = (tiles * size)[:, None], (torch.arange(key_count) * key_size)[None, :]
        q_hi, k_hi = (q_lo + size).clamp(max=n) - 1, (k_lo + key_size).clamp(max=n_key) - 1
        bounds = [bound.expand(len(tiles), key_count).flatten() for bound in (q_lo, q_hi, k_lo, k_hi)]
        some = torch.ones(len(tiles) * key_count, dtype=torch.bool)
        for reach in reaches[axis]:
            some &= reach.over(*bounds)[0]
        listed = (some.view(len(tiles), key_count) * (k_hi - k_lo + 1)).sum(1)
        weight = (q_hi - q_lo + 1)[:, 0]
        return float((listed * weight).sum() / weight.sum())

    def keys(tile: Shape, k_tile: Shape) -> float:
        sizes, key_sizes = dict(zip(grid.axes, tile, strict=True)), dict(zip(key_grid.axes, k_tile, strict=True))
        out = 1.0
        for axis, n_key in key_grid.sizes.items():
            if axis not in reaches:
                out *= n_key
                continue
            entry = (axis, sizes[axis], key_sizes[axis])
            if entry not in known:
                known[entry] = mean(*entry)
            out *= known[entry]
        return out

    return keys


def _sampled(pattern: Pattern, grid: Grid, key_grid: Grid) -> Callable[[Shape, Shape], float]:
    """Mean number of keys listed by a query tile: from a few query tiles spread over the grid."""

    @cache
    def keys(tile: Shape, k_tile: Shape) -> float:
        q, k = Layout(grid, tile), Layout(key_grid, k_tile)
        count = math.prod(q.counts)
        rest = torch.linspace(0, count - 1, min(SAMPLES, count)).round().long().unique()
        tiles, corner = rest + q.prefix_tiles, []
        for along in reversed(q.counts):
            corner.append(rest % along)
            rest = rest // along
        lo = torch.stack(corner[::-1])
        found = search(pattern, q, k, Blocks(q, lo, lo + 1))
        pairs = q.sizes[found.rows] * k.sizes[found.cols]
        return float(pairs.sum() / q.sizes[tiles].sum())

    return keys
