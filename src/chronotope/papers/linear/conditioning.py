"""Fixed codes of places, as the denoisers of several pages add them to their tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid


def sincos(grid: Grid, dim: int, device: torch.device | None = None) -> Float[Tensor, "n c"]:
    """Fixed sine and cosine codes of the places of a grid, an equal share of `dim` for each axis."""
    share = dim // len(grid.axes)
    if dim % len(grid.axes) or share % 2:
        raise ChronotopeError(f"sincos: dim={dim} has no even share for each of the axes {', '.join(grid.axes)}.")
    speed = 10000.0 ** (-torch.arange(share // 2, device=device, dtype=torch.float64) / (share // 2))
    angle = grid.coords(device)[grid.prefix :, :, None] * speed
    return torch.cat((angle.sin(), angle.cos()), -1).flatten(1).float()
