"""From scores of blocks to the blocks that are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.errors import ChronotopeError

Scores = Float[Tensor, "b h rows nk"]
Kept = Bool[Tensor, "b h rows nk"]


class Selection(ABC):
    """Which of the key blocks each query block keeps; -inf marks those that cannot be kept."""

    together: bool = False
    """Whether all query blocks of a head compete with each other: none may then be in the future of another."""

    @abstractmethod
    def __call__(self, scores: Scores, own: Bool[Tensor, "rows nk"]) -> Kept:
        """`own`: the blocks in which the queries lie, which are kept before all others."""


class Keeping(Selection, ABC):
    """What keeps a share of the blocks, or a number of them. `counted`: a number, so that 1 is not taken for 1.0."""

    keep: float | int
    counted: bool

    def __post_init__(self) -> None:
        require_keep(self.keep)
        object.__setattr__(self, "counted", isinstance(self.keep, int))


@dataclass(frozen=True)
class TopK(Keeping):
    """The `keep` best of each query block, its own counted: a share of those it could keep, or a number."""

    keep: float | int
    counted: bool = field(init=False, repr=False)

    def __call__(self, scores: Scores, own: Bool[Tensor, "rows nk"]) -> Kept:
        first = own.to(scores.device) & (scores > -torch.inf)
        most = _most(self.keep, scores)
        limit = int(most.max()) if most.numel() else 0
        best = scores.masked_fill(first, torch.inf).topk(limit, dim=-1)
        kept = (best.values > -torch.inf) & (torch.arange(limit, device=scores.device) < most)
        return torch.zeros_like(first).scatter_(-1, best.indices, kept) | first


@dataclass(frozen=True)
class Mass(Keeping):
    """The fewest blocks of each query block that hold a share of the softmax over the scores, its own counted.

    `keep`: no more than these, a share or a number.
    """

    mass: float | int
    keep: float | int = 1.0
    counted: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("mass", self.mass)

    def __call__(self, scores: Scores, own: Bool[Tensor, "rows nk"]) -> Kept:
        possible = scores > -torch.inf
        first = own.to(scores.device) & possible
        share = torch.nan_to_num(scores.softmax(-1))  # of a row without any: NaN
        order = scores.masked_fill(first, torch.inf).argsort(dim=-1, descending=True, stable=True)
        found = share.gather(-1, order)
        before = found.cumsum(-1) - found
        most = _most(self.keep, scores)
        kept = (before < self.mass) & (torch.arange(order.shape[-1], device=scores.device) < most)
        if self.mass == 1:  # whatever a sum of rounded shares is
            kept = torch.arange(order.shape[-1], device=scores.device) < most
        return (torch.zeros_like(possible).scatter_(-1, order, kept) | first) & possible


@dataclass(frozen=True)
class Sampled(Keeping):
    """As many as `TopK`, drawn without replacement with probabilities softmax(scores / temperature); own ones first.

    The same seed draws the same. With a large temperature: uniform.
    """

    keep: float | int
    seed: int = 0
    temperature: float = 1.0
    counted: bool = field(init=False, repr=False)

    def __call__(self, scores: Scores, own: Bool[Tensor, "rows nk"]) -> Kept:
        drawn = torch.rand(scores.shape, generator=torch.Generator().manual_seed(self.seed)).to(scores)
        gumbel = -torch.log(-torch.log(drawn.clamp(1e-12, 1 - 1e-7)))
        return TopK(self.keep)(scores / self.temperature + gumbel, own)


def kept_of(keep: float | int, possible: Tensor) -> Tensor:
    """How many that is."""
    if isinstance(keep, int):
        return possible.clamp(max=keep)
    return torch.ceil(keep * possible.double() - 1e-6).long()


def _most(keep: float | int, scores: Scores) -> Tensor:
    """How many each query block keeps at most."""
    if isinstance(keep, int):
        return torch.full((1,), min(keep, scores.shape[-1]), device=scores.device)
    return kept_of(keep, (scores > -torch.inf).float().sum(-1, keepdim=True))  # a sum of floats is far faster


def require_keep(keep: object) -> None:
    """Raises ChronotopeError unless `keep` is a share or a number of blocks."""
    if isinstance(keep, bool) or not (
        (isinstance(keep, int) and keep >= 1) or (isinstance(keep, float) and 0 < keep <= 1)
    ):
        raise ChronotopeError(
            f"keep={keep!r}: expected a share, 0.0 < keep <= 1.0, or a number of blocks, an int from 1 on."
        )


def require_share(name: str, share: object) -> None:
    """Raises ChronotopeError unless this is a share."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ChronotopeError(f"{name}={share!r}: expected a share, 0 < {name} <= 1.")
