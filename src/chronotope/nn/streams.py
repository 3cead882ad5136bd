"""Two streams of tokens, each on a grid of its own, that exchange what they know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.attention import Attention
from chronotope.nn.block import DropBranch
from chronotope.nn.feedforward import FeedForward
from chronotope.nn.mixer import Mixer
from chronotope.position import Rope


class Exchange(nn.Module):
    """x' = first(x, grid, (y, other)), y' = second(y, other, (x, grid)): each sees the other as it came in.

    Args:
        first, second: mixers of the two streams, of which those in `Cross` look at the other one:
            `Block([Attention(64, 4), Cross(Attention(64, 4))])`. None: that stream stays as it is, so that `Streams` of
            `Exchange(a, None)`, `Exchange(None, b)` lets them ask in turns.
    """

    def __init__(self, first: Mixer | None, second: Mixer | None):
        super().__init__()
        self.first, self.second = first, second

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, y: Float[Tensor, "b m d"], other: Grid
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b m d"]]:
        """Both streams, one layer on."""
        new_x = x if self.first is None else self.first(x, grid, (y, other))
        new_y = y if self.second is None else self.second(y, other, (x, grid))
        return new_x, new_y


class JointBlock(nn.Module):
    """One attention over the tokens of both streams, each with projections, norms and a feed-forward of its own.

    The tokens of y are prefix tokens of the grid of x: the pattern of `first` holds among the tokens of x, and all see
    those of y, as far as order allows. Where both streams have a position code, places on the axes that both grids have
    are those on the grid of x, centre on centre: sound of 50 steps beside 10 frames.

    Args:
        first, second: attention of x and of y, of equal heads and head size; `where`, `bias`, `softcap` and `backend`
            are those of the first.
        mlp, mlp_ratio, dropout, drop_path: as for `Block`.

    Raises ChronotopeError: heads that differ.

    Source: Esser et al. 2024, MM-DiT (arXiv 2403.03206), without its modulation.
    """

    def __init__(
        self,
        first: Attention,
        second: Attention,
        mlp: str = "swiglu",
        mlp_ratio: float | int = 4.0,
        *,
        dropout: float | int = 0.0,
        drop_path: float | int = 0.0,
    ):
        super().__init__()
        shapes = [(layer.heads, layer.kv_heads, layer.head_dim) for layer in (first, second)]
        if shapes[0] != shapes[1]:
            raise ChronotopeError(
                f"JointBlock: (heads, kv_heads, head_dim) are {shapes[0]} and {shapes[1]}; they meet in one attention "
                "and have to be equal."
            )
        self.layers = nn.ModuleList((first, second))
        self.norms = nn.ModuleList(nn.LayerNorm(layer.dim) for layer in (first, second))
        self.mlps = nn.ModuleList(FeedForward(layer.dim, mlp, mlp_ratio) for layer in (first, second))
        self.mlp_norms = nn.ModuleList(nn.LayerNorm(layer.dim) for layer in (first, second))
        self.drop = DropBranch(dropout, drop_path)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, y: Float[Tensor, "b m d"], other: Grid
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b m d"]]:
        """Both streams, one layer on."""
        seen_x, seen_y = self._joint(self.norms[0](x), grid, self.norms[1](y), other)
        out = []
        for stream, seen, norm, mlp in zip((x, y), (seen_x, seen_y), self.mlp_norms, self.mlps, strict=True):
            stream = stream + self.drop(seen)
            out.append(stream + self.drop(mlp(norm(stream))))
        return out[0], out[1]

    def _joint(self, x: Tensor, grid: Grid, y: Tensor, other: Grid) -> tuple[Tensor, Tensor]:
        first, second = self.layers
        assert isinstance(first, Attention) and isinstance(second, Attention)
        own = first.project(x, grid)
        theirs = second.project(y, other, coords=_shared(second, other, grid))
        q, k, v = (torch.cat((b, a), 2) for a, b in zip(own, theirs, strict=True))
        out = attention(
            q, k, v, grid=grid.replace(prefix=other.size + grid.prefix), where=first.where, bias=first.bias,
            softcap=first.softcap, backend=first.backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        seen_y, seen_x = out.transpose(1, 2).flatten(2).split((other.size, grid.size), 1)
        return first.out(seen_x), second.out(seen_y)


class Streams(nn.Module):
    """Layers that take two streams, one after the other: `Exchange`, `JointBlock`, or modules called like them.

    Example:
        >>> layers = [JointBlock(Attention(32, 4), Attention(24, 4, head_dim=8)) for _ in range(2)]
        >>> video, text = torch.randn(2, 2 * 3 * 3, 32), torch.randn(2, 5, 24)
        >>> x, y = Streams(layers)(video, Grid(t=2, h=3, w=3), text, Grid(n=5))
        >>> x.shape, y.shape
        (torch.Size([2, 18, 32]), torch.Size([2, 5, 24]))
    """

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, y: Float[Tensor, "b m d"], other: Grid
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b m d"]]:
        """Both streams after all layers."""
        for layer in self.layers:
            x, y = layer(x, grid, y, other)
        return x, y


def _shared(layer: Attention, grid: Grid, onto: Grid) -> dict[str, Tensor] | None:
    """Places on the axes that another grid has too, on that grid."""
    if layer.position is None:
        return None
    known = zip(layer.position.axes, layer.position.places, strict=True)
    axes = tuple(axis for axis, table in known if table is None and axis in grid.axes and axis in onto.axes)
    return dict(zip(axes, Rope(axes).coords(grid, onto=onto).unbind(1), strict=True)) if axes else None
