"""What a kernel is given and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from chronotope.bias import Bias
from chronotope.grid import Coords, joint_shape
from chronotope.planning import Tiles


@dataclass(frozen=True)
class Scores:
    """How logits come from q and k: softcap(scale * q . k) + bias.

    softcap(s) = c * tanh(s / c). `heads`: which of the caller's query heads a kernel has before it (a bias may
    differ by head). A bias is a tensor that broadcasts to [B, H, Nq, Nk], or a `Bias`.
    """

    scale: float
    softcap: float | None
    bias: Tensor | Bias | None
    heads: tuple[int, ...]

    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors behind the bias, which may need gradients."""
        if self.bias is None:
            return ()
        return (self.bias,) if isinstance(self.bias, Tensor) else (*self.bias.parameters(), *self.bias.buffers())

    def values(
        self,
        parameters: tuple[Tensor, ...],
        tiles: Tiles,
        queries: Int64[Tensor, "g q_tokens"],
        keys: Int64[Tensor, "g k_tokens"],
    ) -> Float[Tensor, "b h g q_tokens k_tokens"] | None:
        """The bias of G blocks of token pairs, computed from the parameters that are given; B or H may be 1."""
        if self.bias is None:
            return None
        q, k = queries[:, :, None], keys[:, None, :]
        if isinstance(self.bias, Tensor):
            table = parameters[0]
            table = table.reshape((1,) * (4 - table.ndim) + tuple(table.shape))
            if table.shape[1] > 1:
                table = table[:, list(self.heads)]
            return table[
                :, :, q if table.shape[2] > 1 else torch.zeros_like(q), k if table.shape[3] > 1 else torch.zeros_like(k)
            ]
        names = [name for name, _ in (*self.bias.named_parameters(), *self.bias.named_buffers())]
        state = dict(zip(names, parameters, strict=True))
        score = torch.func.functional_call(self.bias, state, (Coords.of(tiles.q.grid, q), Coords.of(tiles.k.grid, k)))
        shape = joint_shape(q, k)
        return score[list(self.heads)].expand(len(self.heads), *shape)[None]


Run = Callable[[Tensor, Tensor, Tensor, Tiles, Scores], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Backend:
    """One way to compute attention, and what it can do. `run(q, k, v, tiles, scores) -> (out, lse)`."""

    name: str
    about: str
    run: Run
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_sizes: str = "any"
    backward: bool = True
    double_backward: bool = True
    lse: bool = True
    bias: bool = True
    softcap: bool = True
    grouped_heads: bool = True
    cross_grids: bool = True
    value_size: bool = True
    tested_on: str = "cpu"
    priority: int = 0
    largest_pairs: int | None = None

    def reasons(self, q: Tensor, v: Tensor, tiles: Tiles, scores: Scores) -> list[str]:
        """Why this backend cannot run the call; empty where it can."""
        out = []
        if q.device.type not in self.devices:
            out.append(f"runs on {', '.join(self.devices)}, the tensors are on {q.device.type}")
        if q.dtype not in self.dtypes:
            out.append(f"takes {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, got {q.dtype}")
        if scores.bias is not None and not self.bias:
            out.append("has no bias")
        if scores.softcap is not None and not self.softcap:
            out.append("has no softcap")
        if tiles.q.grid != tiles.k.grid and not self.cross_grids:
            out.append("takes one grid for queries and keys")
        if q.shape[-1] != v.shape[-1] and not self.value_size:
            out.append(f"takes values of the size of the keys, got {v.shape[-1]} and {q.shape[-1]}")
        pairs = tiles.q.grid.size * tiles.k.grid.size
        if self.largest_pairs is not None and pairs > self.largest_pairs:
            out.append(f"holds every pair in memory: at most {self.largest_pairs:,}, got {pairs:,}")
        return out
