"""A pattern on a grid, cut in tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from chronotope.checks import check_grids
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.patterns import Pattern, full
from chronotope.planning.cost import Choice, choose, key_tile
from chronotope.planning.costs import Costs, costs
from chronotope.planning.layout import Layout
from chronotope.planning.tiles import Tiles

MASK_LIMIT = 1 << 26


@dataclass(frozen=True)
class Part:
    """Heads that share one pattern, its tiles, and the candidates among which `costs` decided."""

    heads: tuple[int, ...]
    tiles: Tiles
    choices: tuple[Choice, ...] = field(compare=False)
    costs: Costs | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Plan:
    """A pattern on a grid, cut in tiles: which pairs of tiles are empty, full or partial. Made by `ct.plan`."""

    where: Pattern
    grid: Grid
    key_grid: Grid
    heads: int
    parts: tuple[Part, ...]

    @property
    def tile(self) -> dict[str, int]:
        """Tokens of a query tile on each axis (of the first head, where heads differ)."""
        return dict(zip(self.grid.axes, self.parts[0].tiles.q.tile, strict=True))

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs of one head."""
        return self.grid.size * self.key_grid.size

    @cached_property
    def density(self) -> float:
        """Exact share of visible pairs."""
        return sum(_visible(part.tiles) * len(part.heads) for part in self.parts) / (self.pairs * self.heads)

    @cached_property
    def tile_density(self) -> float:
        """Share of pairs that a kernel computes: those in tiles with something to see."""
        return sum(part.tiles.computed * len(part.heads) for part in self.parts) / (self.pairs * self.heads)

    @property
    def bound(self) -> float:
        """1 / tile_density: a kernel that computes these tiles cannot beat dense by more."""
        return 1 / self.tile_density if self.tile_density else math.inf

    def flops(self, head_dim: int, batch: int = 1, heads: int | None = None) -> int:
        """Floating-point operations of a forward pass over these tiles: 4 * head_dim for each computed pair."""
        computed = sum(part.tiles.computed * len(part.heads) for part in self.parts)
        return round(4 * head_dim * batch * computed * ((heads or self.heads) / self.heads))

    def mask(self) -> Bool[Tensor, "..."]:
        """The dense mask in token order, [Nq, Nk], or [H, Nq, Nk] where heads differ. For small grids."""
        count = self.pairs * (self.heads if self.where.heads else 1)
        if count > MASK_LIMIT:
            raise ChronotopeError(
                f"Plan.mask() would hold {count:,} pairs of {self.grid!r}; it is for small grids, up to {MASK_LIMIT:,}."
                " Ask .density, .tile_density or explain(), or ct.draw for one query."
            )
        if self.where.heads is None:
            return self.parts[0].tiles.mask()
        out = torch.empty(self.heads, self.grid.size, self.key_grid.size, dtype=torch.bool)
        for part in self.parts:
            out[list(part.heads)] = part.tiles.mask()
        return out

    def explain(self) -> str:
        """What was planned and why: tiles, density, bound, and the candidates of the cost model."""
        from chronotope.planning.text import explain

        return explain(self)

    def save(self, path: str | Path) -> None:
        """Writes the plan as a small JSON file, which `ct.load_plan` reads."""
        from chronotope.planning.store import save_plan

        save_plan(self, path)

    def __repr__(self) -> str:
        from chronotope.planning.text import summary

        return summary(self)


def plan(
    where: Pattern | None,
    grid: Grid,
    key_grid: Grid | None = None,
    *,
    heads: int = 1,
    tile: Mapping[str, int] | None = None,
) -> Plan:
    """Cuts a pattern on a grid in tiles, and finds which pairs of tiles have anything to see.

    Args:
        where: who may look at whom; None means everybody.
        grid: where the queries are.
        key_grid: where the keys are; default: the same grid.
        heads: number of query heads. A `per_head` pattern must have as many (1 stands for as many as it has).
        tile: tokens of a tile on each axis, such as `{"t": 2, "h": 4, "w": 8}`; an axis not named is not cut.
            Any size that fits the axis. Default: chosen by the cost model, see `Plan.explain`.

    Plans are cached by value. Raises ChronotopeError where the pattern does not fit the grids.
    """
    where = full() if where is None else where
    key_grid = grid if key_grid is None else key_grid
    if not isinstance(where, Pattern):
        raise ChronotopeError(f"where={where!r}: expected a pattern, such as ct.window(t=5) & ct.causal('t').")
    check_grids(grid, key_grid)
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ChronotopeError(f"heads={heads!r}: expected a number of heads of at least 1.")
    if where.heads is not None and heads not in (1, where.heads):
        raise ChronotopeError(
            f"{where!r} is for {where.heads} heads, but there are {heads}: give one pattern for each query head."
        )
    if where.routes:
        raise ChronotopeError(
            f"{where!r} is decided by q and k, and a plan is made without them: give it to ct.attention."
        )
    where.check(grid, key_grid)
    return _plan(where, grid, key_grid, where.heads or heads, _shape(tile, grid), costs())


def _shape(tile: Mapping[str, int] | None, grid: Grid) -> tuple[int, ...] | None:
    if tile is None:
        return None
    if not isinstance(tile, Mapping):
        raise ChronotopeError(f"tile={tile!r}: expected tokens by axis, such as {{'t': 2, 'h': 4, 'w': 8}}.")
    grid.require(tile, f"tile={dict(tile)!r}")
    for axis, size in tile.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= grid.sizes[axis]:
            raise ChronotopeError(
                f"tile={dict(tile)!r}: {axis}={size!r} does not fit the axis; expected 1 to {grid.sizes[axis]}."
            )
    return tuple(tile.get(axis, n) for axis, n in grid.sizes.items())


@lru_cache(maxsize=64)
def _plan(where: Pattern, grid: Grid, key_grid: Grid, heads: int, tile: tuple[int, ...] | None, costs: Costs) -> Plan:
    alike = heads_alike(where, heads).items()
    return Plan(
        where, grid, key_grid, heads, tuple(_part(pattern, own, grid, key_grid, tile, costs) for pattern, own in alike)
    )


def heads_alike(where: Pattern, heads: int) -> dict[Pattern, tuple[int, ...]]:
    """The heads of each distinct pattern of one head."""
    found: dict[Pattern, list[int]] = {}
    for head in range(heads):
        found.setdefault(where.head(head), []).append(head)
    return {pattern: tuple(own) for pattern, own in found.items()}


def _part(
    pattern: Pattern, heads: tuple[int, ...], grid: Grid, key_grid: Grid, tile: tuple[int, ...] | None, costs: Costs
) -> Part:
    if tile is None:
        choices = tuple(choose(pattern, grid, key_grid, costs))
        q_tile, k_tile = choices[0].q_tile, choices[0].k_tile
    else:
        choices, q_tile, k_tile = (), tile, key_tile(grid, key_grid, tile)
    tiles = Tiles(pattern, Layout(grid, q_tile), Layout(key_grid, k_tile))
    _ = tiles.found
    return Part(heads, tiles, choices, costs)


def _visible(tiles: Tiles) -> int:
    """Number of visible pairs: a product over axes where the pattern is separable, else tile by tile."""
    grid, key_grid = tiles.q.grid, tiles.k.grid
    reaches = tiles.pattern.reaches(grid, key_grid)
    count = 1
    for found in (reaches or {}).values():
        joint = found[0]
        for reach in found[1:]:
            meeting = joint.meet(reach)
            if meeting is None:
                return tiles.visible
            joint = meeting
        count *= int(joint.counts().sum())
    if reaches is None:
        return tiles.visible
    count *= math.prod(n for axis, n in grid.sizes.items() if axis not in reaches)
    count *= math.prod(n for axis, n in key_grid.sizes.items() if axis not in reaches)
    of_prefix, by_prefix = tiles.pattern.prefix_sees()
    return count + of_prefix * grid.size * key_grid.prefix + by_prefix * grid.prefix * key_grid.places
