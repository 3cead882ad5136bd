"""What a memory is made of: a small network of linear layers, whose weights are the state.

A layer l is x -> x W_l, W_l [in, out], without bias; so the gradient that one token gives it is a_l^T g_l, of the
layer's input and of the slope at its output, and never has to be written out.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chronotope.errors import ChronotopeError

Layer = Callable[[int, Tensor], Tensor]
"""(number of the layer, its input [B, H, N, in]) -> its output [B, H, N, out]."""
Slope = Callable[[Tensor], Tensor]
"""The network's output -> the derivative of the loss by it."""
Term = tuple[Tensor, Tensor]
"""(a [B, H, N, in], g [B, H, N, out]): token n gives the layer the gradient a_n^T g_n."""


class Learner(ABC):
    """A network f(x; W), x [B, H, N, D] -> [B, H, N, Dv]."""

    @abstractmethod
    def sizes(self, d: int, dv: int) -> tuple[tuple[int, int], ...]:
        """(in, out) of every layer. Raises ChronotopeError for sizes that it cannot have."""

    @abstractmethod
    def read(self, x: Float[Tensor, "b h n d"], layer: Layer) -> Float[Tensor, "b h n dv"]:
        """f(x), `layer` being whatever applies the weights."""

    @abstractmethod
    def terms(self, x: Float[Tensor, "b h n d"], weights: Sequence[Tensor], slope: Slope) -> list[Term]:
        """The gradients of the loss at f(x; weights), layer by layer, written out so that they are differentiable."""

    def sides(self, count: int) -> tuple[str, ...] | None:
        """The side of each of `count` layers that has the channels of x or of the output; None: some have neither."""
        return {1: ("out",), 2: ("in", "out")}.get(count)

    def weights(self, heads: int, d: int, dv: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Random weights [H, in, out], of variance 1 / in."""
        return tuple(torch.randn(heads, *size, generator=generator) / math.sqrt(size[0]) for size in self.sizes(d, dv))


@dataclass(frozen=True)
class Matrix(Learner):
    """f(x) = x W: the state of linear attention and of the delta rule. It may start from zeros."""

    def sizes(self, d: int, dv: int) -> tuple[tuple[int, int], ...]:
        """One layer."""
        return ((d, dv),)

    def read(self, x: Float[Tensor, "b h n d"], layer: Layer) -> Float[Tensor, "b h n dv"]:
        """x W."""
        return layer(0, x)

    def terms(self, x: Float[Tensor, "b h n d"], weights: Sequence[Tensor], slope: Slope) -> list[Term]:
        """x and the slope."""
        return [(x, slope(x @ weights[0]))]


@dataclass(frozen=True)
class Mlp(Learner):
    """f(x) = gelu(... gelu(x W_1) ...) W_depth, `expansion` times as wide inside as x."""

    depth: int = 2
    expansion: int = 4

    def __post_init__(self) -> None:
        if self.depth < 1 or self.expansion < 1:
            raise ChronotopeError(f"{self!r}: expected at least one layer, and at least the width of x.")

    def sizes(self, d: int, dv: int) -> tuple[tuple[int, int], ...]:
        """`depth` layers."""
        widths = [d, *[self.expansion * d] * (self.depth - 1), dv]
        return tuple(itertools.pairwise(widths))

    def read(self, x: Float[Tensor, "b h n d"], layer: Layer) -> Float[Tensor, "b h n dv"]:
        """The layers, with GELU between them."""
        x = layer(0, x)
        for number in range(1, self.depth):
            x = layer(number, F.gelu(x))
        return x

    def terms(self, x: Float[Tensor, "b h n d"], weights: Sequence[Tensor], slope: Slope) -> list[Term]:
        """Back-propagation."""
        inputs, before = [x], []
        for weight in weights[:-1]:
            before.append(inputs[-1] @ weight)
            inputs.append(F.gelu(before[-1]))
        grad = slope(inputs[-1] @ weights[-1])
        found = [(inputs[-1], grad)]
        for number in range(self.depth - 2, -1, -1):
            grad = (grad @ weights[number + 1].transpose(-1, -2)) * _gelu_slope(before[number])
            found.append((inputs[number], grad))
        return found[::-1]


@dataclass(frozen=True)
class Residual(Learner):
    """f(x) = x + LN(inner(x)), LN without weights; x and the output have the same size."""

    inner: Learner
    eps: float = 1e-5

    def sizes(self, d: int, dv: int) -> tuple[tuple[int, int], ...]:
        """Those inside."""
        if d != dv:
            raise ChronotopeError(f"{self!r}: keys of size {d} and values of size {dv}; a residual needs them equal.")
        return self.inner.sizes(d, dv)

    def read(self, x: Float[Tensor, "b h n d"], layer: Layer) -> Float[Tensor, "b h n dv"]:
        """x + LN(inner(x))."""
        return x + F.layer_norm(self.inner.read(x, layer), x.shape[-1:], eps=self.eps)

    def terms(self, x: Float[Tensor, "b h n d"], weights: Sequence[Tensor], slope: Slope) -> list[Term]:
        """Those inside, for the slope before the norm."""

        def before(inner: Tensor) -> Tensor:
            centred = inner - inner.mean(-1, keepdim=True)
            scale = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
            normed = centred * scale
            grad = slope(x + normed)
            return scale * (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True))

        return self.inner.terms(x, weights, before)


def applied(weights: Sequence[Tensor]) -> Layer:
    """Layers of these weights, [B, H, in, out]."""
    return lambda number, x: x @ weights[number]


def _gelu_slope(x: Tensor) -> Tensor:
    """d gelu / dx = Phi(x) + x phi(x)."""
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
