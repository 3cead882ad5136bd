"""Values read between the tokens of a grid, and attention over a few such places for each query."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import require_tokens


def sample(
    x: Float[Tensor, "b n c"],
    grid: Grid,
    places: Float[Tensor, "b *points axes"],
    outside: Literal["border", "zeros"] = "border",
) -> Float[Tensor, "b *points c"]:
    """x at places between tokens, mixed linearly on every axis between the tokens around.

    Args:
        x: tokens on `grid`, which has two or three axes and no prefix.
        places: in tokens, in the order of the axes of the grid; token i of an axis is at i.
        outside: what lies beyond the grid: its border, or zeros, which start to be mixed in less than a token away.

    Gradients reach x and places. Raises ChronotopeError: another grid, or places of other axes.

    Example:
        >>> x, grid = torch.randn(2, 4 * 6, 8), Grid(h=4, w=6)
        >>> sample(x, grid, torch.tensor([1.5, 2.25]).expand(2, 5, 2)).shape
        torch.Size([2, 5, 8])
    """
    require_tokens(x, grid, x.shape[-1], "x")
    axes = len(grid.axes)
    if axes not in (2, 3) or grid.prefix or places.shape[-1] != axes or places.ndim < 2 or len(places) != len(x):
        raise ChronotopeError(
            f"sample: places of shape {list(places.shape)} on {grid!r}; expected two or three axes, no prefix, and "
            f"[{len(x)}, ..., {axes}]."
        )
    if outside not in ("border", "zeros"):
        raise ChronotopeError(f"sample(outside={outside!r}): expected 'border' or 'zeros'.")
    exact = torch.promote_types(x.dtype, places.dtype)
    # grid_sample counts the outer edges of tokens from -1 to 1, the last axis first.
    sizes = places.new_tensor(grid.shape[::-1])
    at = ((2 * places.flip(-1) + 1) / sizes - 1).reshape(len(x), -1, *[1] * (axes - 1), axes)
    volume = x.transpose(1, 2).unflatten(2, grid.shape)
    out = F.grid_sample(volume.to(exact), at.to(exact), padding_mode=outside, align_corners=False)
    return out.flatten(2).transpose(1, 2).reshape(*places.shape[:-1], x.shape[2]).to(x.dtype)


class SampledAttention(nn.Module):
    """y = W_o [sum_p softmax(W_a q)_hp v_h(s_hp)]_h, v = W_v x: each head reads x at P places of the query.

    The weights depend on the query alone. Zeros lie beyond the grid, and keep their weights.

    Args:
        dim: channels of queries and tokens.
        heads, points: heads, and P, places of each.

    Example:
        >>> layer, grid = SampledAttention(16, heads=2, points=4), Grid(h=5, w=6)
        >>> q, x, places = torch.randn(1, 3, 16), torch.randn(1, 30, 16), 4 * torch.rand(1, 3, 2, 4, 2)
        >>> layer(q, x, grid, places).shape
        torch.Size([1, 3, 16])

    Q H P places are read, whatever the size of the grid, beside the projection of x.

    Source: Zhu et al. 2020, Deformable DETR (arXiv 2010.04159), one scale; where the places are is left to the caller.
    """

    def __init__(self, dim: int, heads: int, points: int):
        super().__init__()
        if heads < 1 or points < 1 or dim % heads:
            raise ChronotopeError(f"SampledAttention({dim}, {heads}, {points}): expected heads that divide channels.")
        self.dim, self.heads, self.points = dim, heads, points
        self.weights = nn.Linear(dim, heads * points)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)

    def forward(
        self,
        q: Float[Tensor, "b q c"],
        x: Float[Tensor, "b n c"],
        grid: Grid,
        places: Float[Tensor, "b q heads points axes"],
        hidden: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b q c"]:
        """Queries after one look at x. `hidden`: tokens whose values count as zeros."""
        require_tokens(x, grid, self.dim, "x")
        if places.shape[1:4] != (q.shape[1], self.heads, self.points):
            raise ChronotopeError(
                f"SampledAttention: places of shape {list(places.shape)}; expected "
                f"[B, {q.shape[1]}, {self.heads}, {self.points}, axes]."
            )
        v = self.value(x)
        v = v if hidden is None else v.masked_fill(hidden[..., None], 0.0)
        # Heads read places of their own: they count as members of the batch.
        apart = v.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(0, 1)
        read = sample(apart, grid, places.transpose(1, 2).flatten(0, 1), outside="zeros")
        read = read.unflatten(0, (-1, self.heads)).transpose(1, 2)  # [B, Q, H, P, C / H]
        weight = self.weights(q).unflatten(2, (self.heads, self.points)).softmax(-1)
        return self.out(torch.einsum("bqhp,bqhpc->bqhc", weight, read).flatten(2))  # type: ignore[no-any-return]
