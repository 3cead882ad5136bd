"""Attention where content decides: routes choose first, then the kernels run as ever."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.kernels import Call, run
from chronotope.patterns import Pattern
from chronotope.planning import Chosen, heads_alike, plan, resolve

Heads = tuple[int, ...]


def chosen(
    where: Pattern, q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], grid: Grid, key_grid: Grid
) -> list[tuple[Heads, Chosen]]:
    """What the routes of an expression choose, for each set of heads that are alike."""
    if where.heads is not None and where.heads != q.shape[1]:
        raise ChronotopeError(f"{where!r} is for {where.heads} heads, q has {q.shape[1]}.")
    where.check(grid, key_grid)
    return [
        (heads, resolve(own, *of_heads(q, k, k, heads)[:2], grid, key_grid))
        for own, heads in heads_alike(where, q.shape[1]).items()
    ]


def of_heads(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of some query heads; keys are repeated where these heads do not share them evenly."""
    if len(heads) == q.shape[1]:
        return q, k, v
    group = q.shape[1] // k.shape[1]
    own = [head // group for head in heads]
    return q[:, list(heads)], k[:, own], v[:, own]


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) over what was chosen; all heads of the batch lie in one sequence."""
    long = [x.reshape(1, 1, -1, x.shape[3]) for x in (q, k, v)]
    out, lse = run(long[0], long[1], long[2], call.scores.tensors, call)
    return out.view(*q.shape[:3], v.shape[3]), lse.view(q.shape[:3])


def select(
    where: Pattern,
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    grid: Grid,
    key_grid: Grid | None = None,
) -> Bool[Tensor, "b h nq nk"]:
    """What every query sees, for each batch element and head. For small grids."""
    key_grid = grid if key_grid is None else key_grid
    if not where.routes:
        mask = plan(where, grid, key_grid, heads=q.shape[1]).mask()
        return mask.expand(*q.shape[:2], *mask.shape[-2:]).clone()
    out = torch.empty(*q.shape[:3], k.shape[2], dtype=torch.bool)
    for heads, tiles in chosen(where, q, k, grid, key_grid):
        out[:, list(heads)] = tiles.masks().view(q.shape[0], len(heads), *out.shape[2:])
    return out
