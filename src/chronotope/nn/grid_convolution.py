"""Convolution over the axes of a grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens

LAYERS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class GridConvState(Carried):
    """The last slices that a coming slice still reaches, zeros where there were none."""

    tail: Float[Tensor, "b n c"]
    grid: Grid


class GridConv(Mixer):
    r"""y[p] = b + \sum_o W_o x[p + o], o over a box of offsets; 0 outside of the grid. With `residual`, + x[p].

    Prefix tokens pass unchanged, and no other token sees them. It can be stepped where the first axis is causal, or not
    among those of the box: as many slices are kept as the box reaches back.

    Args:
        dim: channels of x.
        size: extent of the box on one to three axes, such as {"t": 3, "h": 3, "w": 3}; on others it is 1. Odd, unless
            the axis is causal.
        causal: axes of which the past and the own place are seen only: offsets -(size - 1) .. 0.
        dilation: step between offsets, by axis; 1 where it does not say.
        depthwise: whether each channel is convolved by itself, or W_o is a matrix.
        residual: whether x is added: then, in a `Stack` between blocks, it is a conditional position code, which knows
            places from the zeros at the borders.

    Example:
        >>> layer = GridConv(16, {"t": 3, "h": 3, "w": 3}, causal=("t",))
        >>> layer(torch.randn(2, 4 * 5 * 6, 16), Grid(t=4, h=5, w=6)).shape
        torch.Size([2, 120, 16])

    Raises ChronotopeError: sizes that are even and not causal, axes that the grid lacks, a context.

    Source: Chu et al. 2021, conditional positional encodings (arXiv 2102.10882), for `residual`.
    """

    def __init__(
        self,
        dim: int,
        size: Mapping[str, int],
        *,
        causal: tuple[str, ...] | str = (),
        dilation: Mapping[str, int] | None = None,
        depthwise: bool = True,
        residual: bool = False,
    ):
        super().__init__()
        causal = (causal,) if isinstance(causal, str) else tuple(causal)
        dilation = dict(dilation or {})
        even = [axis for axis, n in size.items() if n % 2 == 0 and axis not in causal]
        if not 1 <= len(size) <= 3 or min([*size.values(), *dilation.values()]) < 1 or even:
            raise ChronotopeError(
                f"GridConv({dim}, {dict(size)}, dilation={dilation}): expected sizes of one to three axes, 1 or more, "
                "and odd unless causal."
            )
        unknown = [axis for axis in (*causal, *dilation) if axis not in size]
        if unknown:
            raise ChronotopeError(f"GridConv({dim}, {dict(size)}): {unknown} are not among the axes of size.")
        self.dim, self.size, self.causal, self.residual = dim, dict(size), causal, residual
        steps = tuple(dilation.get(axis, 1) for axis in size)
        self.reach = {axis: (n - 1) * step for (axis, n), step in zip(size.items(), steps, strict=True)}
        layer = LAYERS[len(size) - 1]
        self.conv = layer(dim, dim, tuple(size.values()), dilation=steps, groups=dim if depthwise else 1)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("GridConv takes no context: its offsets are those of one grid.")
        require_tokens(x, grid, self.dim, "x")
        body = x[:, grid.prefix :]
        y = self._over(body, grid, known=0)
        y = body + y if self.residual else y
        return torch.cat((x[:, : grid.prefix], y), 1) if grid.prefix else y

    def init_state(self, batch: int, grid: Grid) -> GridConvState:
        """Zeros. Raises ChronotopeError where the box reaches into slices to come."""
        require_slice(grid)
        grid.require(self.size, "GridConv")
        axis = grid.axes[0]
        if self.reach.get(axis, 0) and axis not in self.causal:
            raise ChronotopeError(f"GridConv cannot be stepped along {axis!r}: it looks ahead. Use causal=({axis!r},).")
        return GridConvState(self.conv.weight.new_zeros(batch, self.reach.get(axis, 0) * grid.size, self.dim), grid)

    def step(self, x: Float[Tensor, "b s c"], state: GridConvState) -> tuple[Float[Tensor, "b s c"], GridConvState]:
        """The next slice."""
        grid = state.grid
        require_tokens(x, grid, self.dim, "x")
        seen = torch.cat((state.tail.to(x.dtype), x), 1)
        y = self._over(seen, grid.replace(**{grid.axes[0]: seen.shape[1] // grid.size}), known=state.tail.shape[1])
        tail = seen[:, seen.shape[1] - state.tail.shape[1] :].clone()
        return x + y if self.residual else y, replace(state, tail=tail)

    def _over(self, x: Float[Tensor, "b n c"], grid: Grid, known: int) -> Float[Tensor, "b m c"]:
        """The convolution; where some tokens of the past are known, they stand for the zeros before the first axis."""
        grid.require(self.size, "GridConv")
        others = [axis for axis in grid.axes if axis not in self.size]
        place = {axis: i for i, axis in enumerate(("batch", *grid.axes, "channel"))}
        order = [place[axis] for axis in ("batch", *others, "channel", *self.size)]
        apart = x.unflatten(1, grid.shape).permute(order)
        pads = []
        for axis, reach in reversed(self.reach.items()):
            before = reach if axis in self.causal else reach // 2
            pads += [0 if known and axis == grid.axes[0] else before, reach - before]
        y = self.conv(F.pad(apart.flatten(0, len(others)), pads)).unflatten(0, apart.shape[: len(others) + 1])
        return y.permute(*(order.index(i) for i in range(len(order)))).flatten(1, -2)  # type: ignore[no-any-return]
