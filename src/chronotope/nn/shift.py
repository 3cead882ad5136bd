"""Channels that come a moment late."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens


@dataclass(frozen=True)
class ShiftState(Carried):
    """The channels of the last slice that are shifted, zeros before the first."""

    late: Float[Tensor, "b s shifted"]
    grid: Grid


class TemporalShift(Mixer):
    """y_t = (x_{t-1}[: c], x_{t+1}[c : 2c], x_t[2c :]); causal: y_t = (x_{t-1}[: c], x_t[c :]). 0 outside of the grid.

    c = share * dim. Without weights and without products: what follows mixes moments, place by place, such as a
    convolution over h and w: `Chain([TemporalShift(64), GridConv(64, {"h": 3, "w": 3}, depthwise=False)])`. Prefix
    tokens pass unchanged.

    Args:
        dim: channels of x.
        share: part of the channels that is shifted each way.
        causal: whether nothing comes from after; then it can be stepped, with c channels of one slice as its state.
        axis: along which is shifted.

    Example:
        >>> TemporalShift(16)(torch.randn(2, 4 * 5 * 6, 16), Grid(t=4, h=5, w=6)).shape
        torch.Size([2, 120, 16])

    Source: Lin et al. 2018, TSM (arXiv 1811.08383): bidirectional with 1/8 each way, causal with 1/8 for video online.
    """

    def __init__(self, dim: int, share: float = 1 / 8, causal: bool = False, axis: str = "t"):
        super().__init__()
        self.dim, self.count, self.causal, self.axis = dim, int(dim * share + 1e-6), causal, axis
        if not 1 <= self.count * (1 if causal else 2) <= dim:
            raise ChronotopeError(
                f"TemporalShift({dim}, share={share:g}, causal={causal}): {self.count} of {dim} channels each way; "
                "expected 1 or more, and no more than there are."
            )

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("TemporalShift takes no context.")
        require_tokens(x, grid, self.dim, "x")
        grid.require((self.axis,), "TemporalShift")
        axis = 1 + grid.axes.index(self.axis)
        body = x[:, grid.prefix :].unflatten(1, grid.shape)
        late, early, rest = body.split(self._parts(), -1)
        late = _moved(late, axis, 1)
        shifted = torch.cat((late, _moved(early, axis, -1), rest), -1).flatten(1, -2)
        return torch.cat((x[:, : grid.prefix], shifted), 1) if grid.prefix else shifted

    def init_state(self, batch: int, grid: Grid) -> ShiftState:
        """Zeros. Raises ChronotopeError where a slice needs the one after it."""
        require_slice(grid)
        grid.require((self.axis,), "TemporalShift")
        if self.axis == grid.axes[0] and not self.causal:
            raise ChronotopeError(
                f"TemporalShift cannot be stepped along {self.axis!r}: channels come from the next slice. "
                "Use causal=True."
            )
        return ShiftState(torch.zeros(batch, grid.size, self.count), grid)

    def step(self, x: Float[Tensor, "b s c"], state: ShiftState) -> tuple[Float[Tensor, "b s c"], ShiftState]:
        """The next slice."""
        if self.axis != state.grid.axes[0]:
            return self(x, state.grid), state
        require_tokens(x, state.grid, self.dim, "x")
        y = torch.cat((state.late.to(x), x[..., self.count :]), -1)
        return y, replace(state, late=x[..., : self.count].clone())

    def _parts(self) -> list[int]:
        early = 0 if self.causal else self.count
        return [self.count, early, self.dim - self.count - early]

    def extra_repr(self) -> str:
        return f"{self.dim}, share={self.count}/{self.dim}, causal={self.causal}, axis={self.axis!r}"


def _moved(x: Tensor, axis: int, by: int) -> Tensor:
    """x[i - by] at i along an axis, 0 where there is none; by is 1 or -1."""
    gap = torch.zeros_like(x.narrow(axis, 0, 1))
    length = x.shape[axis] - 1
    return torch.cat((gap, x.narrow(axis, 0, length)) if by > 0 else (x.narrow(axis, 1, length), gap), axis)
