"""A short convolution over the tokens before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens


@dataclass(frozen=True)
class ConvState(Carried):
    """The last width - 1 tokens, zeros where there were none."""

    tail: Float[Tensor, "b n c"]
    grid: Grid


class ShortConv(Mixer):
    """y_t = sum_{i < width} w_i * x_{t-i} + b, channel by channel, in the order of the grid.

    Args:
        dim: channels of x.
        width: tokens seen, the own one included.
    """

    def __init__(self, dim: int, width: int = 4):
        super().__init__()
        if width < 1:
            raise ChronotopeError(f"ShortConv(width={width}): expected at least 1 token.")
        self.dim, self.width = dim, width
        self.conv = nn.Conv1d(dim, dim, width, groups=dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("ShortConv takes no context.")
        require_tokens(x, grid, self.dim, "x")
        return self._over(F.pad(x, (0, 0, self.width - 1, 0)))

    def init_state(self, batch: int, grid: Grid) -> ConvState:
        """Zeros."""
        require_slice(grid)
        return ConvState(self.conv.weight.new_zeros(batch, self.width - 1, self.dim), grid)

    def step(self, x: Float[Tensor, "b s c"], state: ConvState) -> tuple[Float[Tensor, "b s c"], ConvState]:
        """The next slice."""
        require_tokens(x, state.grid, self.dim, "x")
        given = torch.cat((state.tail, x), 1)
        tail = given[:, given.shape[1] - self.width + 1 :].clone()
        return self._over(given), ConvState(tail, state.grid)

    def _over(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]
