"""How gradients become updates: what each token's gradient weighs in the memory at every later token of a chunk.

All is in sums of logs, no difference of which is positive, and in products of triangular matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Flow:
    """A chunk of c tokens, from A and S before it, u_i = -rate_i gradient_i: leading sizes [B, H], or [B, H, D].

    A_t = kept_t A + carried_t S + sum_i pairs_ti u_i;  at the end S' = surprise_kept S + sum_i surprise_pairs_i u_i.
    The last three are None where there is no S.
    """

    kept: Float[Tensor, "*s c"]
    pairs: Float[Tensor, "*s c c"]
    carried: Float[Tensor, "*s c"] | None = None
    surprise_kept: Float[Tensor, "*s"] | None = None
    surprise_pairs: Float[Tensor, "*s c"] | None = None


class Optimizer(ABC):
    """The rule of updates."""

    momentum: ClassVar[bool] = False
    """Whether there is an S."""

    @abstractmethod
    def flow(
        self,
        decay: Float[Tensor, "*s c"],
        momentum: Float[Tensor, "*s c"] | None,
        write: Bool[Tensor, "*#s c"] | None,
    ) -> Flow:
        """What weighs how much; decay and momentum are logs. Where `write` is False the token changes nothing."""


@dataclass(frozen=True)
class Descent(Optimizer):
    """A_t = exp(decay_t) A_{t-1} - rate_t gradient_t."""

    def flow(
        self,
        decay: Float[Tensor, "*s c"],
        momentum: Float[Tensor, "*s c"] | None,
        write: Bool[Tensor, "*#s c"] | None,
    ) -> Flow:
        """Products of decays."""
        kept, pairs = _products(decay)
        return Flow(kept, pairs)


@dataclass(frozen=True)
class Momentum(Optimizer):
    """S_t = exp(momentum_t) S_{t-1} - rate_t gradient_t, A_t = exp(decay_t) A_{t-1} + S_t: past surprise goes on."""

    momentum: ClassVar[bool] = True

    def flow(
        self,
        decay: Float[Tensor, "*s c"],
        momentum: Float[Tensor, "*s c"] | None,
        write: Bool[Tensor, "*#s c"] | None,
    ) -> Flow:
        """Products of decays, of what products of momenta have carried so far."""
        assert momentum is not None
        kept, pairs = _products(decay)
        past, carried = _products(momentum)
        if write is not None:
            pairs = pairs * write[..., None, :]
        return Flow(
            kept=kept,
            pairs=pairs @ carried,
            carried=(pairs @ past[..., None])[..., 0],
            surprise_kept=past[..., -1],
            surprise_pairs=carried[..., -1, :],
        )


def _products(logs: Float[Tensor, "*s c"]) -> tuple[Float[Tensor, "*s c"], Float[Tensor, "*s c c"]]:
    """exp of the sums of logs over 1..t, and over j+1..t for j <= t, else 0."""
    # In float64 a difference of sums keeps what a small log beside a large one needs.
    sums = logs.double().cumsum(-1)
    gaps = (sums[..., :, None] - sums[..., None, :]).to(logs.dtype)
    hidden = torch.ones(gaps.shape[-2:], dtype=torch.bool, device=logs.device).triu(1)
    return sums.to(logs.dtype).exp(), gaps.masked_fill(hidden, -torch.inf).exp()
