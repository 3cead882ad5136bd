"""How a memory holds on to what it has: the weights W that the accumulated updates A stand for.

Updates add up in A, and decay there; W = weights(A) is what is read and what gradients are taken at: mirror descent.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError


class Retention(ABC):
    """W = weights(A), layer by layer."""

    linear: ClassVar[bool] = False
    """Whether W is A."""
    decays: ClassVar[bool] = True
    """Whether A may decay."""

    @abstractmethod
    def weights(self, a: Float[Tensor, "*b i o"]) -> Float[Tensor, "*b i o"]:
        """The weights of a layer."""

    def settle(self, a: Float[Tensor, "*b i o"]) -> Float[Tensor, "*b i o"]:
        """The same weights by another A, if there is one to be preferred; where a chunk ends."""
        return a


@dataclass(frozen=True)
class Keep(Retention):
    """W = A, and nothing decays."""

    linear: ClassVar[bool] = True
    decays: ClassVar[bool] = False

    def weights(self, a: Float[Tensor, "*b i o"]) -> Float[Tensor, "*b i o"]:
        """A."""
        return a


@dataclass(frozen=True)
class Decay(Retention):
    """W = A, which decays: an L2 penalty on the weights."""

    linear: ClassVar[bool] = True

    def weights(self, a: Float[Tensor, "*b i o"]) -> Float[Tensor, "*b i o"]:
        """A."""
        return a


@dataclass(frozen=True)
class Lq(Retention):
    """W = A / ||A||_q^(q-2), the norm being that of the whole matrix of a layer."""

    q: float | int = 4
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.q < 2 or self.eps <= 0:
            raise ChronotopeError(f"{self!r}: expected q >= 2, and eps > 0, by which A = 0 is W = 0.")

    def weights(self, a: Float[Tensor, "*b i o"]) -> Float[Tensor, "*b i o"]:
        """A / ||A||_q^(q-2)."""
        powers = a.abs().pow(self.q).sum((-2, -1), keepdim=True) + self.eps
        return a / powers.pow((self.q - 2) / self.q)


@dataclass(frozen=True)
class Softmax(Retention):
    """W = total * softmax(A) over the inputs of each output: positive, of a constant sum, held by KL divergence."""

    total: float | int = 1.0

    def __post_init__(self) -> None:
        if self.total <= 0:
            raise ChronotopeError(f"{self!r}: expected a positive sum.")

    def weights(self, a: Float[Tensor, "*b i o"]) -> Float[Tensor, "*b i o"]:
        """total * softmax(A)."""
        return self.total * a.softmax(-2)

    def settle(self, a: Float[Tensor, "*b i o"]) -> Float[Tensor, "*b i o"]:
        """log W: what decays, and what does not grow without bound."""
        return a.log_softmax(-2) + math.log(self.total)
