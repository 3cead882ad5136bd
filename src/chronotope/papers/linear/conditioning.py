"""What the denoisers of several pages share: conditions, and how they steer a layer (adaLN-Zero)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid


class AdaLN(nn.Module):
    """x + gate * layer((1 + scale) * norm(x) + shift), where (shift, scale, gate) = W silu(condition) + b.

    W and b are 0 at first, so that it begins as the identity (Peebles and Xie 2022, arXiv 2212.09748).

    `condition` [B, M, C] steers M equal pieces of the tokens, one after the other; M = 1: all alike.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 3 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x: Float[Tensor, "b n c"], condition: Float[Tensor, "b m c"], layer: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "b n c"]:
        """The layer, steered."""
        pieces = condition.shape[1]
        if x.shape[1] % pieces:
            raise ChronotopeError(f"AdaLN: {x.shape[1]} tokens are not a multiple of {pieces} conditions.")
        shift, scale, gate = self.modulation(F.silu(condition))[:, :, None].chunk(3, -1)
        parts = x.unflatten(1, (pieces, -1))
        steered = self.norm(parts) * (1 + scale) + shift
        return (parts + gate * layer(steered.flatten(1, 2)).view_as(parts)).flatten(1, 2)


class TimeEmbedding(nn.Module):
    """A network of two layers on cosines and sines of a time: [...] -> [..., dim]."""

    def __init__(self, dim: int, waves: int = 256):
        super().__init__()
        self.waves = waves
        self.net = nn.Sequential(nn.Linear(waves, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b c"]:
        """The times as vectors."""
        half = self.waves // 2
        angle = t[..., None] * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half).to(t.dtype)
        return self.net(torch.cat((angle.cos(), angle.sin()), -1))


class LabelEmbedding(nn.Module):
    """A vector for each class, and one for none, which takes the place of a label with probability `dropout`."""

    def __init__(self, dim: int, classes: int, dropout: float = 0.1):
        super().__init__()
        self.none, self.dropout = classes, dropout
        self.table = nn.Embedding(classes + 1, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, label: Int[Tensor, "b"]) -> Float[Tensor, "b c"]:
        """The labels as vectors; `self.none` asks for no class."""
        if self.training and self.dropout:
            left = torch.rand(label.shape, device=label.device) < self.dropout
            label = torch.where(left, self.none, label)
        return self.table(label)


def sincos(grid: Grid, dim: int, device: torch.device | None = None) -> Float[Tensor, "n c"]:
    """Fixed sine and cosine codes of the places of a grid, an equal share of `dim` for each axis."""
    share = dim // len(grid.axes)
    if dim % len(grid.axes) or share % 2:
        raise ChronotopeError(f"sincos: dim={dim} has no even share for each of the axes {', '.join(grid.axes)}.")
    speed = 10000.0 ** (-torch.arange(share // 2, device=device, dtype=torch.float64) / (share // 2))
    angle = grid.coords(device)[grid.prefix :, :, None] * speed
    return torch.cat((angle.sin(), angle.cos()), -1).flatten(1).float()
