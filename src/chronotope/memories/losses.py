"""What a memory tries to make small: the loss of f(k) against v, token by token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError


class Loss(ABC):
    """l(y, v), of the memory's answer y and the value v."""

    has_threshold: ClassVar[bool] = False
    """Whether it depends on a threshold: that of the gates, token by token, or else its own."""

    @abstractmethod
    def value(
        self, y: Float[Tensor, "*s dv"], v: Float[Tensor, "*s dv"], threshold: Float[Tensor, "*s"] | None = None
    ) -> Float[Tensor, "*s"]:
        """l(y, v): the meaning."""

    @abstractmethod
    def slope(
        self, y: Float[Tensor, "*s dv"], v: Float[Tensor, "*s dv"], threshold: Float[Tensor, "*s"] | None = None
    ) -> Float[Tensor, "*s dv"]:
        """dl / dy, written out so that it is differentiable."""


@dataclass(frozen=True)
class L2(Loss):
    """||y - v||^2."""

    def value(self, y: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The sum of squares."""
        return (y - v).square().sum(-1)

    def slope(self, y: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        """2 (y - v)."""
        return 2 * (y - v)


@dataclass(frozen=True)
class Dot(Loss):
    """-y . v: what is written does not depend on what is there, as in linear attention."""

    def value(self, y: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        """-y . v."""
        return -(y * v).sum(-1)

    def slope(self, y: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        """-v."""
        return -v


@dataclass(frozen=True)
class Lp(Loss):
    """sum (e^2 + eps)^(p/2), e = y - v: ||e||_p^p, with a corner that is round below sqrt(eps)."""

    p: float | int = 3
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.p < 1 or self.eps <= 0:
            raise ChronotopeError(f"{self!r}: expected p >= 1, and eps > 0 where the slope is not smooth.")

    def value(self, y: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The rounded sum of powers."""
        return ((y - v).square() + self.eps).pow(self.p / 2).sum(-1)

    def slope(self, y: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        """p e (e^2 + eps)^(p/2 - 1), which is p sign(e) |e|^(p-1) above sqrt(eps)."""
        e = y - v
        return self.p * e * (e.square() + self.eps).pow(self.p / 2 - 1)


@dataclass(frozen=True)
class Huber(Loss):
    """||e||^2 where ||e|| <= threshold, else 2 threshold ||e|| - threshold^2, e = y - v: the pull has a bound."""

    has_threshold: ClassVar[bool] = True
    threshold: float | int = 1.0

    def value(self, y: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The square, or the line that continues it."""
        square, far, bound, length = self._parts(y - v, threshold)
        return torch.where(far, 2 * bound * length - bound.square(), square)

    def slope(self, y: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        """2 e, no longer than 2 threshold."""
        e = y - v
        _, far, bound, length = self._parts(e, threshold)
        return e * torch.where(far, 2 * bound / length, 2.0)[..., None]

    def _parts(self, e: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """||e||^2; whether that is beyond the threshold; there the threshold and ||e||, elsewhere 1."""
        square, far, bound = _apart(e, self.threshold if threshold is None else threshold)
        # An infinite threshold and the root at 0 are kept out of the branch that is not taken, and of its derivatives.
        return square, far, torch.where(far, bound, 1.0), torch.where(far, square, 1.0).sqrt()


@dataclass(frozen=True)
class Switch(Loss):
    """||e||^2 where ||e|| <= threshold, else threshold ||e||_1, e = y - v: it jumps there, and its slope as well."""

    has_threshold: ClassVar[bool] = True
    threshold: float | int = 1.0

    def value(self, y: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The square, or the sum of sizes."""
        square, far, bound = _apart(y - v, self.threshold if threshold is None else threshold)
        return torch.where(far, torch.where(far, bound, 1.0) * (y - v).abs().sum(-1), square)

    def slope(self, y: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        """2 e, or threshold * sign(e)."""
        e = y - v
        _, far, bound = _apart(e, self.threshold if threshold is None else threshold)
        return torch.where(far[..., None], torch.where(far, bound, 1.0)[..., None] * e.sign(), 2 * e)


def _apart(e: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """||e||^2, whether that is beyond the threshold, and the threshold, token by token."""
    square = e.square().sum(-1)
    bound = threshold if isinstance(threshold, Tensor) else torch.full_like(square, threshold)
    return square, square > bound.square(), bound
