"""A chunk of tokens at once: their gradients at the weights of its start, and what each token then reads.

With Flow's numbers, and a_i^T g_i the gradient of token i for a layer, the weights that token t reads are
A_t = kept_t A + carried_t S - sum_i pairs_ti rate_i a_i^T g_i. Where W is A they are never written out:

    x_t A_t = kept_t x_t A + carried_t x_t S - sum_i pairs_ti (x_t . a_i) rate_i g_i

which is how test-time training is made of matrix products (Sun et al. 2024, arXiv 2407.04620). Where W is not
linear in A, and where gates differ by channel, A_t is written out for each token of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.memories.learners import Layer
from chronotope.memories.optimizers import Flow, normalized
from chronotope.memories.state import Gates, Memory, MemoryState


@dataclass(frozen=True)
class _Part:
    """One layer in one chunk. a [B, H, C, in], g [B, H, C, out], rate included; side: that of gates by channel."""

    flow: Flow
    side: str | None
    memory: Float[Tensor, "b h i o"]
    surprise: Float[Tensor, "b h i o"] | None
    a: Float[Tensor, "b h c i"]
    g: Float[Tensor, "b h c o"]

    def product(self, x: Float[Tensor, "b h c i"]) -> Float[Tensor, "b h c o"]:
        """x_t A_t, without A_t."""
        flow = self.flow
        out = flow.kept[..., None] * (x @ self.memory)
        if flow.carried is not None and self.surprise is not None:
            out = out + flow.carried[..., None] * (x @ self.surprise)
        return out - ((x @ self.a.transpose(-1, -2)) * flow.pairs) @ self.g

    def each(self) -> Float[Tensor, "b h c i o"]:
        """A_t of every token."""
        flow = self.flow
        out = self._weighed(flow.kept, self.memory)
        if flow.carried is not None and self.surprise is not None:
            out = out + self._weighed(flow.carried, self.surprise)
        if self.side is None:
            return out - (flow.pairs @ (self.a[..., :, None] * self.g[..., None, :]).flatten(-2)).view_as(out)
        sums = "bhoct,bhti,bhto->bhcio" if self.side == "out" else "bhict,bhti,bhto->bhcio"
        return out - torch.einsum(sums, flow.pairs, self.a, self.g)

    def last(self) -> Float[Tensor, "b h i o"]:
        """A after the last token."""
        flow = self.flow
        out = self._scaled(flow.kept[..., -1], self.memory) - self._sum(flow.pairs[..., -1, :])
        return out if flow.carried is None else out + self._scaled(flow.carried[..., -1], self.surprise)

    def surprised(self) -> Float[Tensor, "b h i o"]:
        """S after the last token."""
        flow = self.flow
        assert flow.surprise_kept is not None and flow.surprise_pairs is not None
        return self._scaled(flow.surprise_kept, self.surprise) - self._sum(flow.surprise_pairs)

    def _weighed(self, weights: Tensor, x: Tensor) -> Tensor:
        """The matrix x for every token: weights [B, H, C], or [B, H, D, C] for the channels of a side."""
        x = x[:, :, None]
        if self.side is None:
            return weights[..., None, None] * x
        weights = weights.transpose(-1, -2)
        return weights[..., None, :] * x if self.side == "out" else weights[..., None] * x

    def _scaled(self, weights: Tensor, x: Tensor | None) -> Tensor:
        assert x is not None
        if self.side is None:
            return weights[..., None, None] * x
        return (weights[..., None, :] if self.side == "out" else weights[..., None]) * x

    def _sum(self, weights: Tensor) -> Tensor:
        """sum_i weights_i a_i^T g_i."""
        weights = weights[..., None] if self.side is None else weights.transpose(-1, -2)
        a, g = (weights * self.a, self.g) if self.side == "in" else (self.a, weights * self.g)
        return a.transpose(-1, -2) @ g


def compute(
    memory: Memory, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: MemoryState
) -> tuple[Float[Tensor, "b h c dv"], MemoryState]:
    """Tokens of one chunk; the state after them, the chunk being left open."""
    retention = memory.retention
    weights = tuple(map(retention.weights, state.start))
    terms = memory.learner.terms(k, weights, lambda y: memory.loss.slope(y, v, gates.threshold))
    if memory.optimizer.normalizes:
        slopes = [g.square().sum(-1) for _, g in terms]
        gradient = torch.stack([a.square().sum(-1) * slope for (a, _), slope in zip(terms, slopes, strict=True)]).sum(0)
        gates = replace(gates, rate=normalized(gates.rate, slopes[-1], gradient))
    parts = _parts(memory, terms, gates, state)
    if retention.linear and all(part.side is None for part in parts):
        out = memory.learner.read(q, lambda number, x: parts[number].product(x))
        after = tuple(part.last() for part in parts)
    else:
        every = [part.each() for part in parts]
        out = memory.learner.read(q, per_token([retention.weights(x) for x in every]))
        after = tuple(x[:, :, -1] for x in every)
    surprise = tuple(part.surprised() for part in parts) if memory.optimizer.momentum else ()
    return out, replace(state, memory=after, surprise=surprise, place=state.place + k.shape[2])


def per_token(weights: list[Tensor]) -> Layer:
    """Layers whose weights [B, H, C, in, out] differ from token to token."""
    return lambda number, x: torch.einsum("bhci,bhcio->bhco", x, weights[number])


def _parts(memory: Memory, terms: list[tuple[Tensor, Tensor]], gates: Gates, state: MemoryState) -> list[_Part]:
    write = None if gates.keep is None else gates.keep[:, None]
    decay, momentum = gates.decay, gates.momentum
    decay = torch.zeros_like(gates.rate[..., 0] if gates.rate.ndim == 4 else gates.rate) if decay is None else decay
    if momentum is not None and decay.ndim != momentum.ndim:
        wide = max(decay, momentum, key=lambda x: x.ndim)
        decay, momentum = (x if x.ndim == 4 else x[..., None].expand_as(wide) for x in (decay, momentum))
    channels = decay.ndim == 4
    if channels:
        decay = decay.transpose(-1, -2)
        momentum = None if momentum is None else momentum.transpose(-1, -2)
        write = None if write is None else write[:, :, None]
    flow = memory.optimizer.flow(decay, momentum, write)
    sides = memory.learner.sides(len(terms)) or ("none",) * len(terms)
    parts = []
    for number, ((a, g), side) in enumerate(zip(terms, sides, strict=True)):
        if gates.rate.ndim == 3:
            g = gates.rate[..., None] * g
        elif side == "in":
            a = gates.rate * a
        else:
            g = gates.rate * g
        surprise = state.surprise[number] if memory.optimizer.momentum else None
        parts.append(_Part(flow, side if channels else None, state.memory[number], surprise, a, g))
    return parts
