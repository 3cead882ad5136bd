"""An LSTM over feature maps: its matrices are convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens


@dataclass(frozen=True)
class ConvLSTMState(Carried):
    """What the frames so far have left: h and c. grid: one frame."""

    hidden: Float[Tensor, "b d h w"]
    cell: Float[Tensor, "b d h w"]
    grid: Grid


class ConvLSTM(Mixer):
    """c_t = f c_{t-1} + i g, h_t = o tanh(c_t); i, f, o = sigmoid, g = tanh of (W * x_t + U * h_{t-1} + b).

    `*` is a convolution over a frame, with zeros around it. On a 1 x 1 frame it is `torch.nn.LSTMCell`, whose order of
    gates (i, f, g, o) it has. y = h, or a matrix times h where `hidden` is not `dim`. Without peepholes, as is usual
    today: those of the paper let the gates see c too. b starts at 0, and at 1 for f: a new layer forgets little.

    Args:
        dim: channels of x.
        hidden: channels of h and c; default dim.
        kernel: of both convolutions, odd.

    Source: Shi et al. 2015, "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting",
    arXiv 1506.04214.

    Example:
        >>> ConvLSTM(32)(torch.randn(2, 5 * 8 * 6, 32), Grid(t=5, h=8, w=6)).shape
        torch.Size([2, 240, 32])
    """

    def __init__(self, dim: int, hidden: int | None = None, kernel: int = 3):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ChronotopeError(f"ConvLSTM(kernel={kernel}): expected an odd size.")
        self.dim, self.hidden = dim, dim if hidden is None else hidden
        self.enter = nn.Conv2d(dim, 4 * self.hidden, kernel, padding="same")
        self.again = nn.Conv2d(self.hidden, 4 * self.hidden, kernel, padding="same", bias=False)
        assert self.enter.bias is not None
        nn.init.zeros_(self.enter.bias)
        nn.init.ones_(self.enter.bias[self.hidden : 2 * self.hidden])
        self.out = nn.Identity() if hidden in (None, dim) else nn.Linear(self.hidden, dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All frames, one after the other. Takes no context."""
        if context is not None:
            raise ChronotopeError("ConvLSTM takes no context: its state is written in the order of the frames.")
        return self.run(x, grid)[0]

    def run(
        self, x: Float[Tensor, "b n c"], grid: Grid, state: ConvLSTMState | None = None
    ) -> tuple[Float[Tensor, "b n c"], ConvLSTMState]:
        """All frames after a state, and the state after them."""
        require_tokens(x, grid, self.dim, "x")
        one = grid.replace(**{grid.axes[0]: 1})
        state = self.init_state(x.shape[0], one) if state is None else state
        gates = self.enter(x.reshape(-1, *grid.shape[1:], self.dim).movedim(-1, 1)).unflatten(0, (-1, grid.shape[0]))
        h, c, out = state.hidden, state.cell, []
        for added in gates.unbind(1):
            i, f, g, o = (added + self.again(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        y = torch.stack(out, 1).movedim(2, -1).flatten(1, 3)
        return self.out(y), ConvLSTMState(h, c, one)

    def init_state(self, batch: int, grid: Grid) -> ConvLSTMState:
        """Zeros."""
        require_slice(grid)
        require_maps(grid)
        zeros = self.enter.weight.new_zeros(batch, self.hidden, *grid.shape[1:])
        return ConvLSTMState(zeros, zeros, grid)

    def step(self, x: Float[Tensor, "b s c"], state: ConvLSTMState) -> tuple[Float[Tensor, "b s c"], ConvLSTMState]:
        """The next frame."""
        return self.run(x, state.grid, state)


def require_maps(grid: Grid) -> None:
    """Raises ChronotopeError unless the grid has an axis of time, two of space, and no prefix."""
    if len(grid.axes) != 3 or grid.prefix:
        raise ChronotopeError(f"{grid!r}: expected an axis of time, two of space, and no prefix.")
