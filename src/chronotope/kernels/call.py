"""What a kernel is given and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from chronotope.bias import Bias
from chronotope.grid import Coords, joint_shape
from chronotope.planning import Tiling


@dataclass(frozen=True)
class Scores:
    """How logits come from q and k: softcap(scale * q . k) + bias.

    softcap(s) = c * tanh(s / c). `biased`: whether there is a bias: the object `bias`, whose parameters and buffers are
    `tensors`, or else one tensor that broadcasts to [B, H, Nq, Nk]. `heads`: which of the caller's query heads a
    kernel has before it (a bias may differ by head).
    """

    scale: float
    softcap: float | None
    bias: Bias | None
    biased: bool
    tensors: tuple[Tensor, ...]
    heads: tuple[int, ...]

    def given(self, tensors: tuple[Tensor, ...]) -> Scores:
        """The same scores from other tensors."""
        return replace(self, tensors=tensors)

    def exact(self, dtype: torch.dtype) -> Scores:
        """The same scores with tensors of this dtype, so that gradients of the bias add up in it."""
        return self.given(tuple(x.to(dtype) if x.is_floating_point() else x for x in self.tensors))

    def values(
        self,
        tiles: Tiling,
        queries: Int64[Tensor, "g q_tokens"],
        keys: Int64[Tensor, "g k_tokens"],
    ) -> Float[Tensor, "b h g q_tokens k_tokens"] | None:
        """The bias of G blocks of token pairs; B or H may be 1."""
        if not self.biased:
            return None
        q, k = queries[:, :, None], keys[:, None, :]
        if self.bias is None:
            table = self.tensor
            return table[
                :, :, q if table.shape[2] > 1 else torch.zeros_like(q), k if table.shape[3] > 1 else torch.zeros_like(k)
            ]
        score = torch.func.functional_call(
            self.bias, self.state, (Coords.of(tiles.q.grid, q), Coords.of(tiles.k.grid, k))
        )
        shape = joint_shape(q, k)
        return score[list(self.heads)].expand(len(self.heads), *shape)[None]

    @property
    def tensor(self) -> Float[Tensor, "b h n_query n_key"]:
        """The bias tensor for these heads, with all four dimensions; any of them may be 1."""
        (table,) = self.tensors
        table = table.reshape((1,) * (4 - table.ndim) + tuple(table.shape))
        return table[:, list(self.heads)] if table.shape[1] > 1 else table

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the bias object by name."""
        assert self.bias is not None
        names = [name for name, _ in (*self.bias.named_parameters(), *self.bias.named_buffers())]
        return dict(zip(names, self.tensors, strict=True))


@dataclass(frozen=True)
class Facts:
    """What can be known of q and v before there are numbers in them."""

    device: str
    dtype: torch.dtype
    head_size: int
    value_size: int


def bias_tensors(bias: Tensor | Bias | None) -> tuple[Tensor, ...]:
    """The tensors behind a bias as `ct.attention` takes it, which may need gradients."""
    if isinstance(bias, Bias):
        return (*bias.parameters(), *bias.buffers())
    return () if bias is None else (bias,)


def blank(x: Float[Tensor, "b h n d"], size: int, dtype: torch.dtype) -> Float[Tensor, "b h n size"]:
    """Memory for a tensor like x with another last dimension: heads outside of tokens or inside, as in x."""
    batch, heads, tokens, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, tokens, heads, size, dtype=dtype).transpose(1, 2)
    return x.new_empty(batch, heads, tokens, size, dtype=dtype)


Results = tuple[Tensor, Tensor]
"""out [B, H, Nq, Dv] and lse [B, H, Nq]."""
Gradients = tuple[Tensor, Tensor, Tensor, list[Tensor | None]]
"""Of q, k, v, and of each of the tensors behind the bias, None where it is not wanted."""
Forward = Callable[[Tensor, Tensor, Tensor, Tiling, Scores], Results]
"""(q, k, v, tiles, scores) -> (out, lse)."""
Reasons = Callable[[Facts, Tiling, Scores], list[str]]


@dataclass(frozen=True)
class Known:
    """What the backward pass of one call starts from: its inputs and results, and the gradients of the results.

    `wanted`: which of the tensors behind the bias need a gradient. A gradient that is None is zero.
    """

    q: Float[Tensor, "b h nq d"]
    k: Float[Tensor, "b hk nk d"]
    v: Float[Tensor, "b hk nk dv"]
    out: Float[Tensor, "b h nq dv"]
    lse: Float[Tensor, "b h nq"]
    dout: Float[Tensor, "b h nq dv"] | None
    dlse: Float[Tensor, "b h nq"] | None
    wanted: tuple[bool, ...]


Backward = Callable[[Known, Tiling, Scores], Gradients]


@dataclass(frozen=True)
class Backend:
    """One way to compute attention, and what it can do.

    `forward(q, k, v, tiles, scores) -> (out, lse)` and `backward(known, tiles, scores)` are functions of numbers:
    `operator` makes them differentiable. Without `backward`, autograd differentiates `forward` itself.
    """

    name: str
    about: str
    forward: Forward
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    backward: Backward | None = None
    head_sizes: str = "any"
    differentiable: str = "twice"
    lse: bool = True
    bias: bool = True
    softcap: bool = True
    grouped_heads: bool = True
    cross_grids: bool = True
    value_size: bool = True
    tested_on: str = "cpu"
    priority: int = 0
    largest_pairs: int | None = None
    also: Reasons | None = None

    def reasons(self, facts: Facts, tiles: Tiling, scores: Scores) -> list[str]:
        """Why this backend cannot run the call; empty where it can."""
        out = []
        if facts.device not in self.devices:
            out.append(f"runs on {', '.join(self.devices)}, the tensors are on {facts.device}")
        if facts.dtype not in self.dtypes:
            out.append(f"takes {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, got {facts.dtype}")
        if scores.biased and not self.bias:
            out.append("has no bias")
        if scores.softcap is not None and not self.softcap:
            out.append("has no softcap")
        if tiles.q.grid != tiles.k.grid and not self.cross_grids:
            out.append("takes one grid for queries and keys")
        if facts.head_size != facts.value_size and not self.value_size:
            out.append(f"takes values of the size of the keys, got {facts.value_size} and {facts.head_size}")
        pairs = tiles.q.grid.size * tiles.k.grid.size
        if self.largest_pairs is not None and pairs > self.largest_pairs:
            out.append(f"holds every pair in memory: at most {self.largest_pairs:,}, got {pairs:,}")
        # What is beyond the table may cost something to find out, such as building the kernel.
        return out if out or self.also is None else self.also(facts, tiles, scores)
