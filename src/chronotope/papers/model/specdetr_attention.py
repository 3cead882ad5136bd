"""SpecDETR: attention at fixed places, and its pattern."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import SampledAttention, Whole
from chronotope.nn.mixer import Context, require_tokens
from chronotope.patterns import Pattern, per_head, window

STRAIGHT, SLANTED = ((0, 1), (1, 0), (0, -1), (-1, 0)), ((1, 1), (1, -1), (-1, -1), (-1, 1))


def fixed_offsets(heads: int = 8) -> Float[Tensor, "heads 4 2"]:
    """o_hp, down and across."""
    rows = [torch.tensor(SLANTED if h % 2 else STRAIGHT) * (h // 2 + 1) for h in range(heads)]
    return torch.stack(rows).float()


def same_distance(heads: int = 8) -> Pattern:
    """Head h sees the four places of `fixed_offsets` that are on the grid."""
    here, patterns = window(h=1, w=1), []
    for h in range(heads):
        far = h // 2 + 1
        if h % 2:
            patterns.append(window(h=3, w=3, dilation=far) & ~window(h=1) & ~window(w=1))
        else:
            patterns.append((window(h=3, w=1, dilation=far) | window(h=1, w=3, dilation=far)) & ~here)
    return per_head(patterns)


class FixedOffsetAttention(Whole):
    """Every head reads x at constant offsets, weighted by the query alone.

    offsets: [heads, P, 2], down and across, in tokens; None: `fixed_offsets(heads)`.
    """

    why = "it reads places on all sides of a token"

    offsets: Tensor

    def __init__(self, dim: int, heads: int = 8, offsets: Float[Tensor, "heads p 2"] | None = None):
        super().__init__()
        offsets = fixed_offsets(heads) if offsets is None else offsets
        if offsets.ndim != 3 or offsets.shape[0] != heads or offsets.shape[2] != 2:
            raise ChronotopeError(f"offsets of shape {list(offsets.shape)}; expected [{heads}, P, 2].")
        self.dim = dim
        self.register_buffer("offsets", offsets.clone(), persistent=False)
        self.read = SampledAttention(dim, heads, offsets.shape[1])

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        grid: Grid,
        context: Context | None = None,
        *,
        query: Float[Tensor, "b n c"] | None = None,
        hidden: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Tokens on h, w over those around. query: what the weights know, default x; hidden: values that are zeros."""
        if context is not None:
            raise ChronotopeError("FixedOffsetAttention takes no context: offsets are those of one grid; see `over`.")
        require_tokens(x, grid, self.dim, "x")
        plane = _plane(grid)
        places = plane.coords(x.device).to(x)[:, None, None] + self.offsets.to(x)
        return self.read(x if query is None else query, x, plane, places.expand(len(x), *places.shape), hidden)

    def over(
        self,
        q: Float[Tensor, "b q c"],
        x: Float[Tensor, "b n c"],
        grid: Grid,
        boxes: Float[Tensor, "b q box"],
        hidden: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b q c"]:
        """Queries over x: around points (across, down), or within boxes (and width, height); in shares of the grid."""
        plane = _plane(grid)
        size = boxes.new_tensor(plane.shape)
        at, offsets = boxes[..., [1, 0]], self.offsets.to(boxes)
        if boxes.shape[-1] == 4:
            extent = boxes[..., [3, 2]]
            reach = offsets / offsets.shape[1] * extent[:, :, None, None] * 0.5
            places = (at + 0.25 * extent)[:, :, None, None] + reach
        else:
            places = at[:, :, None, None] + offsets / size
        return self.read(q, x, plane, places * size - 0.5, hidden)


def _plane(grid: Grid) -> Grid:
    """The grid without axes of one token beside h and w."""
    grid.require(("h", "w"), "SpecDETR")
    plane = Grid(h=grid.sizes["h"], w=grid.sizes["w"])
    if plane.size != grid.size or [axis for axis in grid.axes if axis in "hw"] != ["h", "w"]:
        raise ChronotopeError(f"SpecDETR reads places on h and w; {grid!r} has others.")
    return plane
