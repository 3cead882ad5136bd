"""Routes that score blocks of keys for blocks of queries, and keep some: summary, score and selection are parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from chronotope.boxes import chunks
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.patterns import Route
from chronotope.planning import Sight
from chronotope.routing.scores import Dot, Score
from chronotope.routing.selections import Mass, Selection, TopK
from chronotope.routing.summaries import Mean, Summary

AT_ONCE = 1 << 24  # scores held at once
Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Cut:
    """Blocks of a route: tokens by axis; an axis that is not named is not cut. `queries`: other blocks for queries."""

    block: Sizes
    queries: Sizes | None = None

    @classmethod
    def of(cls, name: str, block: Mapping[str, int], queries: Mapping[str, int] | None = None) -> Cut:
        """From what the caller names."""
        if not block:
            raise ChronotopeError(f"{name}: name the blocks, such as t=2, h=4, w=4, or n=64 on a sequence.")
        for sizes in (block, queries or {}):
            for axis, size in sizes.items():
                if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                    raise ChronotopeError(f"{name}: {axis}={size!r}; expected tokens of a block, an int from 1 on.")
        return cls(tuple(block.items()), None if queries is None else tuple(queries.items()))

    def check(self, grid: Grid, key_grid: Grid) -> None:
        """Raises ChronotopeError where an axis is named that a grid lacks."""
        grid.require(dict(self.queries or self.block), f"blocks {dict(self.queries or self.block)!r}")
        key_grid.require(dict(self.block), f"blocks {dict(self.block)!r}")

    def tiles(self, grid: Grid, key_grid: Grid) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens of a block on each axis; one that is longer than the axis is as long."""
        return tuple(  # type: ignore[return-value]
            tuple(min(dict(sizes).get(axis, n), n) for axis, n in own.sizes.items())
            for sizes, own in ((self.block if self.queries is None else self.queries, grid), (self.block, key_grid))
        )

    def __str__(self) -> str:
        own = [f"{axis}={size}" for axis, size in self.block]
        return ", ".join(own if self.queries is None else [*own, f"queries={dict(self.queries)!r}"])


class Cutting(Route):
    """A route whose blocks are those of its `cut`."""

    cut: Cut

    def blocks(self, grid: Grid, key_grid: Grid) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.cut.tiles(grid, key_grid)

    def check(self, grid: Grid, key_grid: Grid) -> None:
        self.cut.check(grid, key_grid)


@dataclass(frozen=True, repr=False)
class Blockwise(Cutting):
    """Each query block keeps the key blocks that `selection` finds best by `score` of their summaries.

    q [B, H, Nq, D] and k [B, Hk, Nk, D] are summarised by block; heads that share keys choose each for itself.
    """

    cut: Cut
    selection: Selection
    summary: Summary = field(default_factory=Mean)
    score: Score = field(default_factory=Dot)

    def choose(
        self, q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], sight: Sight
    ) -> Int64[Tensor, "pairs"]:
        if self.selection.together and sight.arrow is not None:
            raise ChronotopeError(
                f"{self!r}: its blocks of queries compete with each other, so that later ones would influence earlier "
                f"ones under {sight.arrow!r}; use a selection for each query block, such as TopK or Mass."
            )
        left = self.summary(q, sight.queries)
        right = self.summary(k, sight.keys).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        each = q.shape[0] * q.shape[1] * right.shape[2]
        rows = chunks(left.shape[2], 0 if self.selection.together else each, AT_ONCE)
        found = []
        for some in rows:
            scores = sight.spread(self.score(left[:, :, some], right, sight.keys.count), some)
            found.append(sight.pairs(self.selection(scores, sight.own[some]), some.start))
        return torch.cat(found) if len(found) == 1 else torch.cat(found).sort().values

    def __repr__(self) -> str:
        return f"route.Blockwise({self.cut}, {self.selection!r}, {self.summary!r}, {self.score!r})"


@dataclass(frozen=True, repr=False)
class TopBlocks(Blockwise):
    """What `top_blocks` returns."""

    def __repr__(self) -> str:
        given = self.selection
        kept = f"keep={given.keep}" if isinstance(given, TopK) else f"mass={given.mass}, keep={given.keep}"  # type: ignore[attr-defined]
        return f"route.top_blocks({kept}, {self.cut})"


def top_blocks(
    keep: float | int | None = None,
    mass: float | int | None = None,
    *,
    queries: Mapping[str, int] | None = None,
    **block: int,
) -> Route:
    """The key blocks whose mean key answers the mean query of a query block best; always the block of the query itself.

    score(I, J) = mean_I(q) . mean_J(k) / sqrt(D) + log |J|

    Args:
        keep: how many key blocks each query block keeps, its own counted: a share (float) of those that it may see, or
            a number (int). Default: 0.25, or with `mass` all that it takes.
        mass: the fewest blocks that hold this share of softmax(score).
        queries: tokens of a query block by axis; default: as the key blocks. `queries={"n": 1}`: each query chooses.
        block: tokens of a key block by axis, such as t=2, h=4, w=4; an axis that is not named is not cut.

    Beside a causal pattern (`top_blocks(...) & causal("t")`, or a one-sided window) only what no query of the block has
    in its future enters both means, so that nothing from the future, key or query, influences a choice.

    Example:
        >>> grid = Grid(t=4, h=8, w=8)
        >>> q = k = v = torch.randn(1, 2, grid.size, 16)
        >>> where = top_blocks(keep=0.25, t=2, h=4, w=4) & causal("t")
        >>> attention(q, k, v, grid=grid, where=where).shape
        torch.Size([1, 2, 256, 16])
    """
    cut = Cut.of("top_blocks", block, queries)
    if mass is None:
        return TopBlocks(cut, TopK(0.25 if keep is None else keep))
    return TopBlocks(cut, Mass(mass, 1.0 if keep is None else keep))
