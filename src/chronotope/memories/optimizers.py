"""How gradients become updates: what each token's gradient weighs in the memory at every later token of a chunk.

All is in sums of logs, no difference of which is positive, and in products of triangular matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EPS = 1e-12
"""Where a gradient is 0, no step."""


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

    @property
    def momentum(self) -> bool:
        """Whether there is an S."""
        return False

    @property
    def normalizes(self) -> bool:
        """Whether rates are shares of the error, and not steps."""
        return False

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

    @property
    def momentum(self) -> bool:
        """There is."""
        return True

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


@dataclass(frozen=True)
class Normalized(Optimizer):
    """The rule inside, with steps rate_t |dl/dy|^2 / (2 |dl/dW|^2), y being what the last layer gives at k_t.

    An L2 loss falls, to first order, as if the share rate_t of the error y - v_t went, however large weights and keys
    are. For a matrix that is what happens: rate_t is the beta of the delta rule, for keys of any length (normalised
    least mean squares). Gradients of a deeper network have the scale of its weights, which change, so that a fixed
    step which is small enough at the start may diverge later.
    """

    inner: Optimizer = field(default_factory=Descent)

    @property
    def momentum(self) -> bool:
        """That of the rule inside."""
        return self.inner.momentum

    @property
    def normalizes(self) -> bool:
        """They are."""
        return True

    def flow(
        self,
        decay: Float[Tensor, "*s c"],
        momentum: Float[Tensor, "*s c"] | None,
        write: Bool[Tensor, "*#s c"] | None,
    ) -> Flow:
        """That of the rule inside."""
        return self.inner.flow(decay, momentum, write)


def normalized(
    rate: Float[Tensor, "b h n *d"], slope: Float[Tensor, "b h n"], gradient: Float[Tensor, "b h n"]
) -> Float[Tensor, "b h n *d"]:
    """Steps from shares: rate slope / (2 gradient), the squared lengths of dl/dy and dl/dW."""
    share = slope / (2 * gradient + EPS)
    return rate * (share if rate.ndim == 3 else share[..., None])


def _products(logs: Float[Tensor, "*s c"]) -> tuple[Float[Tensor, "*s c"], Float[Tensor, "*s c c"]]:
    """exp of the sums of logs over 1..t, and over j+1..t for j <= t, else 0."""
    # In float64 a difference of sums keeps what a small log beside a large one needs.
    sums = logs.double().cumsum(-1)
    gaps = (sums[..., :, None] - sums[..., None, :]).to(logs.dtype)
    hidden = torch.ones(gaps.shape[-2:], dtype=torch.bool, device=logs.device).triu(1)
    return sums.to(logs.dtype).exp(), gaps.masked_fill(hidden, -torch.inf).exp()
