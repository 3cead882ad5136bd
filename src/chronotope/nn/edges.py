"""Attention over lists of neighbours, each with a feature of its own edge."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.patterns import along


class EdgeAttention(nn.Module):
    r"""Attention of each token over the tokens of its list, whose keys and values depend on the edge between the two.

    $$
    y_i = W_o \sum_{j \in L_i} a_{ij} (v_j + W_v e_{ij}), \qquad
    a_{ij} = \mathrm{softmax}_j\Big(\tfrac{1}{\sqrt d}\, q_i \cdot (k_j + W_k e_{ij})\Big)
    $$

    Every edge is a key of its own: the queries lie on Grid(i=N), the keys on Grid(i=N, edge=n), and `along("edge")`
    lets a token see its own edges. O(N n) pairs. A token that sees nobody gets 0.

    Args:
        dim: channels of x and of the tokens it looks at.
        heads: heads, which divide dim.
        edge_dim: channels of an edge; None: edges have no features.

    Example:
        >>> grid = Grid(t=4, v=5)
        >>> layer = EdgeAttention(16, 2, edge_dim=3)
        >>> x, lists = torch.randn(2, grid.size, 16), neighbours(grid, "v")
        >>> layer(x, x, lists, torch.randn(2, grid.size, 5, 3), lists != torch.arange(grid.size)[:, None]).shape
        torch.Size([2, 20, 16])
    """

    def __init__(self, dim: int, heads: int, edge_dim: int | None = None):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ChronotopeError(f"EdgeAttention: dim={dim} is not a multiple of heads={heads}.")
        self.dim, self.heads, self.edge_dim = dim, heads, edge_dim
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.edge = None if edge_dim is None else nn.Linear(edge_dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        source: Float[Tensor, "b m c"],
        lists: Int64[Tensor, "n e"],
        edges: Float[Tensor, "#b n e k"] | None = None,
        seen: Bool[Tensor, "*b n e"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attention of x over `source`.

        lists: for each token of x the tokens of `source` at the other end of its edges. edges: their features.
        seen: which edges there are; None: all. What lies at the end of an edge that is not there must be finite.
        """
        if (edges is None) != (self.edge is None):
            raise ChronotopeError(
                f"EdgeAttention(edge_dim={self.edge_dim}): edges {'missing' if edges is None else 'not expected'}."
            )
        count, width = lists.shape
        kv = self.kv(source)[:, lists.flatten()].unflatten(1, (count, width))
        if edges is not None and self.edge is not None:
            kv = kv + self.edge(edges)
        k, v = kv.flatten(1, 2).unflatten(2, (2 * self.heads, -1)).transpose(1, 2).chunk(2, 1)
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        hidden = None
        if seen is not None:
            # A key has one query: what hides it needs no axis of queries. A pattern is the same for the whole batch.
            hidden = x.new_zeros(seen.shape).masked_fill(~seen, -torch.inf).flatten(-2)
            hidden = hidden.view(-1, 1, 1, count * width)
        grid, key_grid = Grid(i=count), Grid(i=count, edge=width)
        out = attention(q, k, v, grid=grid, key_grid=key_grid, where=along("edge"), bias=hidden)
        return self.out(out.transpose(1, 2).flatten(2))


def neighbours(grid: Grid, axis: str) -> Int64[Tensor, "n e"]:
    """For each token the tokens that share all axes but this one, in their order; itself among them."""
    grid.require((axis,), "neighbours")
    place = grid.axes.index(axis)
    tokens = torch.arange(grid.prefix, grid.size).view(grid.shape)
    lists = tokens.movedim(place, -1).unsqueeze(place)
    return lists.expand(*grid.shape, -1).flatten(0, -2)
