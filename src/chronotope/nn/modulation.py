"""Layers steered by a condition (adaLN), and conditions made of times and labels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError


class Modulation(nn.Module):
    """A layer steered by a condition c: its input shifted and scaled, its output gated (adaLN-Zero).

        y = x + gate * layer((1 + scale) * LN(x) + shift),   (shift, scale, gate) = W silu(c) + b

    LN has no weights; W and b are 0 at first, so that y = x.

    Args:
        dim: channels of x.
        condition_dim: channels of c; default: as many.
        gate: without, y = layer((1 + scale) * LN(x) + shift): what the last layer of a denoiser takes.

    c is [B, C], or [B, M, C] with a vector for each of M equal pieces of the tokens, such as frames.

    Example:
        >>> modulation, mlp = Modulation(64, condition_dim=32), FeedForward(64)
        >>> modulation(torch.randn(2, 4 * 9, 64), torch.randn(2, 4, 32), mlp).shape
        torch.Size([2, 36, 64])

    Raises ChronotopeError: tokens that M does not divide.

    Source: Peebles and Xie 2022 (arXiv 2212.09748).
    """

    def __init__(self, dim: int, condition_dim: int | None = None, gate: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.parts = 3 if gate else 2
        self.modulation = nn.Linear(dim if condition_dim is None else condition_dim, self.parts * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        condition: Float[Tensor, "b k"] | Float[Tensor, "b m k"],
        layer: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "b n out"]:
        """The layer, steered."""
        condition = condition if condition.ndim == 3 else condition[:, None]
        pieces = condition.shape[1]
        if x.shape[1] % pieces:
            raise ChronotopeError(f"Modulation: {x.shape[1]} tokens are not a multiple of {pieces} conditions.")
        shift, scale, *gate = self.modulation(F.silu(condition))[:, :, None].chunk(self.parts, -1)
        y = layer((self.norm(x.unflatten(1, (pieces, -1))) * (1 + scale) + shift).flatten(1, 2))
        return x + (gate[0] * y.unflatten(1, (pieces, -1))).flatten(1, 2) if gate else y


class TimeEmbedding(nn.Module):
    """A network of two layers on cosines and sines of a time: [...] -> [..., dim].

    Args:
        dim: channels.
        waves: cosines and sines, of wavelengths from 2 pi to 2 pi * 10000.
        scale: times are multiplied by it first, such as 1000 for times between 0 and 1.
    """

    def __init__(self, dim: int, waves: int = 256, scale: float | int = 1.0):
        super().__init__()
        if waves < 2 or waves % 2:
            raise ChronotopeError(f"TimeEmbedding(waves={waves}): expected an even number of 2 or more.")
        self.waves, self.scale = waves, scale
        self.net = nn.Sequential(nn.Linear(waves, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b c"]:
        """The times as vectors."""
        half = self.waves // 2
        speed = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half).to(t.dtype)
        angle = self.scale * t[..., None] * speed
        return self.net(torch.cat((angle.cos(), angle.sin()), -1))


class LabelEmbedding(nn.Module):
    """A vector for each class, and one for none, which takes the place of a label with probability `dropout`.

    A model trained so answers with and without a label, as classifier-free guidance asks (Ho and Salimans 2022,
    arXiv 2207.12598).
    """

    def __init__(self, dim: int, classes: int, dropout: float | int = 0.1):
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
