"""A bias for heads that lie one after the other in one sequence, where routes have each head see its own."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from chronotope.bias import Bias
from chronotope.grid import Coords, Grid


class Copied(Bias):
    """What `bias` adds, for sequences laid out as `planning.Copies`: heads of the first batch element, of the second...

    `bias`: an object, or a tensor that broadcasts to [B, H, Nq, Nk]. `own`: which of its heads each sequence of a batch
    element is. Its parameters and buffers are those of `bias`.
    """

    heads = 1

    def __init__(self, bias: Bias | Tensor, grid: Grid, key_grid: Grid, own: tuple[int, ...]):
        super().__init__()
        self.grid, self.key_grid, self.own = grid, key_grid, own
        self.bias = bias if isinstance(bias, Bias) else None
        self.register_buffer("table", None if isinstance(bias, Bias) else bias)

    def _get_name(self) -> str:
        return f"{'a bias tensor' if self.bias is None else type(self.bias).__name__} beside a route"

    def check(self, axes: tuple[str, ...]) -> None:
        return None

    def score(self, q: Coords, k: Coords) -> Float[Tensor, "1 ..."]:
        copy, query, key = q.place // self.grid.size, q.place % self.grid.size, k.place % self.key_grid.size
        head = torch.tensor(self.own, device=copy.device)[copy % len(self.own)]
        if self.bias is None:
            return _entry(self.get_buffer("table"), copy // len(self.own), head, query, key)[None]
        places = Coords.of(self.grid, query), Coords.of(self.key_grid, key)
        state = dict((*self.bias.named_parameters(), *self.bias.named_buffers()))
        tables = self.bias.relative(state, self.grid, self.key_grid)
        if tables is None:  # scores of all heads, of which one is taken
            found = self.bias(*places)
            return found.gather(0, head.expand(found.shape[1:])[None])
        aligned = places[0].aligned(self.key_grid)
        out = sum(one.of(head, aligned, places[1]) for one in tables)
        return torch.where(places[0].prefix | places[1].prefix, 0.0, out)[None]


def _entry(
    table: Tensor, batch: Int64[Tensor, "..."], head: Tensor, query: Tensor, key: Tensor
) -> Float[Tensor, "..."]:
    """The entry of a tensor that broadcasts to [B, H, Nq, Nk]."""
    table = table[(None,) * (4 - table.ndim)]
    places = zip((batch, head, query, key), table.shape, strict=True)
    return table[tuple(at if size > 1 else torch.zeros_like(at) for at, size in places)]
