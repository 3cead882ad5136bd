"""From routes, q and k to the tiles that were chosen."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.grid import Grid
from chronotope.patterns import And, Or, Pattern, Route
from chronotope.planning.choice import ALL, NONE, Choice
from chronotope.planning.chosen import Chosen, assemble
from chronotope.planning.layout import Layout, Nest, around
from chronotope.planning.planner import plan
from chronotope.planning.sight import sight

TILE = 16
"""Smaller blocks are computed together, in tiles of at least so many tokens."""


@torch.no_grad()
def resolve(
    where: Pattern, q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], grid: Grid, key_grid: Grid
) -> Chosen:
    """Lets the routes of an expression choose, and finds what the expression shows then."""
    routes = [route for route in where.routes if isinstance(route, Route)]
    heads = q.shape[0] * q.shape[1], q.shape[1] // k.shape[1]
    if not routes:
        tiles = plan(where, grid, key_grid).parts[0].tiles
        return assemble(where, (tiles.q, tiles.k), {}, *heads, None)
    possible, grows = where.given(dict.fromkeys(routes, ALL)), _grows(where)
    if not grows:
        possible = possible | where.given(dict.fromkeys(routes, NONE))
    blocks = [route.blocks(grid, key_grid) for route in routes]
    coarse = (
        Layout(grid, around([own for own, _ in blocks], grid.shape, TILE)),
        Layout(key_grid, around([other for _, other in blocks], key_grid.shape, TILE)),
    )
    choices: dict[Pattern, Choice] = {}
    for route, (own, other) in zip(routes, blocks, strict=True):
        fine = Layout(grid, own), Layout(key_grid, other)
        own_sight = sight(possible, *fine)
        chosen = route.choose(q, k, own_sight)
        choices[route] = Choice.of(chosen, Nest(fine[0], coarse[0]), Nest(fine[1], coarse[1]), heads[0])
    return assemble(where, coarse, choices, *heads, own_sight.live if grows else None)


def _grows(where: Pattern) -> bool:
    """Whether more is seen the more the routes choose."""
    if isinstance(where, (And, Or)):
        return all(map(_grows, where.parts))
    return isinstance(where, Route) or not where.routes
