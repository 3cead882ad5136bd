"""Combiner's axial mixture: on a grid of rows and columns, rows and columns directly, the rest by running summaries.

A query at row r, column c attends in one softmax to

    (r', c), r' < r, and (r, c'), c' <= c      directly
    every other column above it                 summary of rows 0 to r - 1 of that column
    every row above it, left and right of c     summaries of columns before c, and after c, of that row

A summary up to a token is the maximum of the keys up to there, and their values weighted by the maximum of the
queries up to there. A token above is thus reached by two ways, and both count: at most 3 h + 2 w logits for each query.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.merge import merge
from chronotope.patterns import Pattern, along, causal, window


def axial_mixture(
    q: Float[Tensor, "b heads n d"], k: Float[Tensor, "b heads n d"], v: Float[Tensor, "b heads n dv"], grid: Grid
) -> Float[Tensor, "b heads n dv"]:
    """Causal in token order on a grid with the axes h and w, without prefix."""
    if grid.axes != ("h", "w") or grid.prefix:
        raise ChronotopeError(f"axial_mixture: expected a grid such as Grid(h=32, w=32) without prefix, got {grid!r}.")
    above = causal("h", strict=True)
    parts = [_attend(q, k, v, grid, (along("h") & above) | (along("w") & causal("w")))]
    for axis, back, keys_of_summary, where in (
        ("h", False, along("h") & causal("h"), window(h=(1, 0)) & above & ~window(w=1)),
        ("w", False, along("w") & causal("w"), window(w=(1, 0)) & causal("w", strict=True) & above),
        ("w", True, along("w") & ~causal("w", strict=True), window(w=(0, 1)) & ~causal("w") & above),
    ):
        values = _attend(_running(q, grid, axis, back), k, v, grid, keys_of_summary)[0]
        parts.append(_attend(q, _running(k, grid, axis, back), values, grid, where))
    return merge(parts)[0]  # type: ignore[arg-type]


def _attend(q: Tensor, k: Tensor, v: Tensor, grid: Grid, where: Pattern) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, grid=grid, where=where, return_lse=True)  # type: ignore[return-value]


def _running(x: Tensor, grid: Grid, axis: str, back: bool) -> Tensor:
    """Maximum along the axis up to each token, or from each token to the end."""
    x, dim = x.unflatten(2, grid.shape), 2 + grid.axes.index(axis)
    x = x.flip(dim).cummax(dim).values.flip(dim) if back else x.cummax(dim).values
    return x.flatten(2, 3)
