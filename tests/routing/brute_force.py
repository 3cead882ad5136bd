"""What a route should choose, worked out token by token and one block at a time."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

import chronotope as ct
from chronotope.grid import Coords


def blocks(grid: ct.Grid, sizes: dict[str, int]) -> list[list[int]]:
    """The tokens of each block, row-major, the prefix left out."""
    steps = [range(0, n, min(sizes.get(axis, n), n)) for axis, n in grid.sizes.items()]
    out = []
    for corner in itertools.product(*steps):
        pairs = zip(corner, grid.sizes.items(), strict=True)
        spans = [range(x, min(x + min(sizes.get(axis, n), n), n)) for x, (axis, n) in pairs]
        out.append([grid.index(**dict(zip(grid.axes, place, strict=True))) for place in itertools.product(*spans)])
    return out


def mask_of(pattern: ct.Pattern, grid: ct.Grid, key_grid: ct.Grid) -> Tensor:
    """The dense mask of a plain pattern."""
    q = Coords.of(grid, torch.arange(grid.size)).view(-1, 1)
    k = Coords.of(key_grid, torch.arange(key_grid.size)).view(1, -1)
    return pattern.sees(q, k).expand(grid.size, key_grid.size)


def top_blocks(
    q: Tensor,
    k: Tensor,
    grid: ct.Grid,
    key_grid: ct.Grid,
    beside: ct.Pattern,
    order: ct.Pattern | None,
    keep: float | int,
    block: dict[str, int],
    queries: dict[str, int],
) -> Tensor:
    """What `top_blocks(keep, queries=queries, **block) & beside` should choose of one head: bool [Nq, Nk].

    q [Nq, D], k [Nk, D]. `order`: a causal pattern that `beside` implies: only what no query of a block has in its
    future may enter a mean.
    """
    visible = mask_of(beside, grid, key_grid)
    before = None if order is None else mask_of(order, grid, key_grid)
    among = None if order is None else mask_of(order, grid, grid)
    shared = [axis for axis in grid.axes if axis in key_grid.axes]
    same = mask_of(ct.window(**dict.fromkeys(shared, 1)) if shared else ct.nothing(), grid, key_grid)
    chosen = torch.zeros(grid.size, key_grid.size, dtype=torch.bool)
    chosen[: grid.prefix], chosen[:, : key_grid.prefix] = torch.tensor(True), torch.tensor(True)
    places, key_places = slice(grid.prefix, None), slice(key_grid.prefix, None)
    for own in blocks(grid, queries):
        stand = [x for x in own if visible[x, key_places].any() and (among is None or among[own, x].all())]
        mean = q[stand].mean(0) if stand else torch.zeros(q.shape[1])
        scores: list[tuple[bool, float, list[int]]] = []
        for other in blocks(key_grid, block):
            if not visible[own][:, other].any():
                continue
            first = bool(same[own][:, other].any())
            known = [x for x in other if visible[places, x].any() and (before is None or before[own, x].all())]
            score = -math.inf
            if known:
                score = float(mean @ k[known].mean(0)) / math.sqrt(q.shape[1]) + math.log(len(known))
            scores.append((first, score, other))
        count = min(keep, len(scores)) if isinstance(keep, int) else math.ceil(keep * len(scores) - 1e-6)
        count = max(count, sum(first for first, _, _ in scores))
        ranked = sorted(scores, key=lambda entry: (not entry[0], -entry[1]))
        for _, _, other in ranked[:count]:
            chosen[torch.tensor(own)[:, None], torch.tensor(other)] = torch.tensor(True)
    return chosen
