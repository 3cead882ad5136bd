"""Tokens on a grid, and a mixer that sees them slice by slice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chronotope import Grid


def tokens(grid: Grid, dim: int = 12, batch: int = 2, seed: int = 0) -> Tensor:
    """Random ones [batch, grid.size, dim], float64."""
    return torch.randn(batch, grid.size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(layer: Any, x: Tensor, grid: Grid, batch: int | None = None) -> tuple[Tensor, Any]:
    """What a mixer gives for the slices of the first axis, one after the other, and the state in the end."""
    one = grid.replace(**{grid.axes[0]: 1})
    state, out = layer.init_state(batch or len(x), one), []
    for part in x.split(one.size, 1):
        y, state = layer.step(part, state)
        out.append(y)
    return torch.cat(out, 1), state
