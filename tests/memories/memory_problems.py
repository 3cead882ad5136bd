"""Random memories, gates and tokens, and what the two ways to compute them give."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from chronotope.memories import Gates, Learner, Memory, MemoryState, begin, memorize
from chronotope.memories.table import LEARNERS, LOSSES, OPTIMIZERS, RETENTIONS

ALL = [Memory(*parts) for parts in itertools.product(LEARNERS, LOSSES, RETENTIONS, OPTIMIZERS)]


def by_channel(learner: Learner) -> bool:
    """Whether gates may differ by channel."""
    return learner.sides(len(learner.sizes(4, 4))) is not None


@dataclass
class Problem:
    """Tokens q, k, v, gates by name, and the weights at the start, all of them leaves."""

    memory: Memory
    tokens: list[Tensor]
    gates: dict[str, Tensor]
    weights: list[Tensor]
    keep: Tensor | None = None

    @classmethod
    def random(
        cls, memory: Memory, n: int = 11, size: int = 4, channels: bool = False, padding: bool = False, seed: int = 0
    ) -> Problem:
        """Two sequences, two heads, float64."""
        rng = torch.Generator().manual_seed(seed)

        def draw(*shape: int, make=torch.rand) -> Tensor:
            return make(2, 2, n, *shape, dtype=torch.float64, generator=rng)

        tokens = [draw(size, make=torch.randn) for _ in range(3)]
        tokens[1] = F.normalize(tokens[1], dim=-1)
        shape = (size,) if channels else ()
        gates = {"rate": 0.1 * draw(*shape)}
        if memory.retention.decays:
            gates["decay"] = -draw(*shape)
        if memory.optimizer.momentum:
            gates["momentum"] = -draw(*shape)
        if memory.loss.has_threshold:
            gates["threshold"] = 4 * draw()
        weights = [x.double() for x in memory.learner.weights(2, size, size, rng)]
        keep = torch.rand(2, n, generator=rng) > 0.2 if padding else None
        for x in (*tokens, *gates.values(), *weights):
            x.requires_grad_()
        return cls(memory, tokens, gates, weights, keep)

    @property
    def leaves(self) -> list[Tensor]:
        """All that a gradient is asked for."""
        return [*self.tokens, *self.gates.values(), *self.weights]

    def begin(self) -> MemoryState:
        """The state before the first token."""
        return begin(self.memory, self.weights, 2)

    def run(
        self, now: slice = slice(None), state: MemoryState | None = None, **options: object
    ) -> tuple[Tensor, MemoryState]:
        """Some of the tokens, from a state or from the beginning."""
        gates = {name: x[:, :, now] for name, x in self.gates.items()}
        keep = None if self.keep is None else self.keep[:, now]
        tokens = [x[:, :, now] for x in self.tokens]
        return memorize(*tokens, self.memory, Gates(**gates, keep=keep), state=state or self.begin(), **options)

    def results(self, out: Tensor, state: MemoryState) -> list[Tensor]:
        """The output, the state, and the gradients of a number made of all of them by every leaf."""
        parts = [out, *state.tensors()]
        rng = torch.Generator().manual_seed(1)
        loss = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=rng)).sum() for x in parts)
        return [*parts, *torch.autograd.grad(loss, self.leaves, materialize_grads=True)]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, over the largest number of the tensor or 1."""
    assert len(found) == len(expected)
    return max(
        float((x.detach() - y.detach()).abs().max() / y.detach().abs().max().clamp(min=1))
        for x, y in zip(found, expected, strict=True)
    )
