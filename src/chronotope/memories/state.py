"""What a memory is, what it is told at every token, and what it carries along time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.memories.learners import Learner, Matrix
from chronotope.memories.losses import L2, Loss
from chronotope.memories.optimizers import Descent, Optimizer
from chronotope.memories.retentions import Decay, Retention


@dataclass(frozen=True)
class Memory:
    """Four choices, each free of the others: the network, what it makes small, how it holds on, how it learns."""

    learner: Learner = field(default_factory=Matrix)
    loss: Loss = field(default_factory=L2)
    retention: Retention = field(default_factory=Decay)
    optimizer: Optimizer = field(default_factory=Descent)


@dataclass(frozen=True)
class Gates:
    """What the tokens say of their own updates. Each but the threshold and `keep` also by channel, [B, H, N, Dv].

    rate: step of the inner descent, >= 0; of a `Normalized` one the share of the error that goes. decay: log of the
    share of the memory that is kept, <= 0; None: all. momentum: log of the share of past surprise that goes on, <= 0.
    threshold: of a Huber loss. keep: False where a token is padding, which changes nothing and reads 0.
    """

    rate: Float[Tensor, "b h n *dv"]
    decay: Float[Tensor, "b h n *dv2"] | None = None
    momentum: Float[Tensor, "b h n *dv3"] | None = None
    threshold: Float[Tensor, "b h n"] | None = None
    keep: Bool[Tensor, "b n"] | None = None


@dataclass(frozen=True)
class MemoryState(Carried):
    """A, accumulated so far, of every layer [B, H, in, out].

    start: A at the start of the chunk that is under way, where gradients are taken. surprise: S of an optimizer with
    momentum. place: how many tokens of that chunk have come.
    """

    memory: tuple[Float[Tensor, "b h _ _"], ...]
    start: tuple[Float[Tensor, "b h _ _"], ...]
    surprise: tuple[Float[Tensor, "b h _ _"], ...]
    place: int = 0


def begin(memory: Memory, weights: Sequence[Float[Tensor, "h _ _"]], batch: int) -> MemoryState:
    """The state before the first token: these weights (as A, of which the retention makes W) for all of the batch."""
    settled = tuple(memory.retention.settle(x).expand(batch, *x.shape) for x in weights)
    return MemoryState(settled, settled, _still(memory, settled))


def from_zeros(memory: Memory, like: Tensor, d: int, dv: int) -> MemoryState:
    """The state of a matrix that begins as zeros, of `like`'s batch and heads. Raises for networks that cannot."""
    if not isinstance(memory.learner, Matrix):
        raise ChronotopeError(
            f"state=None begins from zeros, where {memory.learner!r} has no gradient: "
            "give memories.begin(memory, memory.learner.weights(heads, D, Dv), batch)."
        )
    zeros = [like.new_zeros(like.shape[1], *size) for size in memory.learner.sizes(d, dv)]
    return begin(memory, zeros, like.shape[0])


def _still(memory: Memory, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(map(torch.zeros_like, weights)) if memory.optimizer.momentum else ()
