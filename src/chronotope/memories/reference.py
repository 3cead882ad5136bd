"""The meaning of a memory: one token after the other, gradients by autograd, in float64.

g_t = dl(f(k_t; W), v_t) / dW,  W = weights(A at the start of the chunk)
S_t = exp(momentum_t) S_{t-1} - rate_t g_t              (without momentum: S_t = -rate_t g_t)
A_t = exp(decay_t) A_{t-1} + S_t
out_t = f(q_t; weights(A_t))
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.memories.learners import applied
from chronotope.memories.optimizers import normalized
from chronotope.memories.state import Gates, Memory, MemoryState


def compute(
    memory: Memory, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: MemoryState
) -> tuple[Float[Tensor, "b h c dv"], MemoryState]:
    """Tokens of one chunk; the state after them, the chunk being left open."""
    dtype = q.dtype
    q, k, v = (x.double() for x in (q, k, v))
    start, found, surprise = ([x.double() for x in parts] for parts in (state.start, state.memory, state.surprise))
    sides = memory.learner.sides(len(start)) or ("out",) * len(start)
    outs = []
    for t in range(q.shape[2]):
        now = slice(t, t + 1)
        threshold = None if gates.threshold is None else gates.threshold[:, :, now].double()
        slope, *gradients = _gradients(memory, k[:, :, now], v[:, :, now], threshold, start)
        rates = gates.rate[:, :, now].double()
        if memory.optimizer.normalizes:
            gradient = torch.stack([x.square().sum((-2, -1)) for x in gradients]).sum(0)
            rates = normalized(rates, slope.square().sum(-1), gradient[..., None])
        before = list(found), list(surprise)
        for number, (side, gradient) in enumerate(zip(sides, gradients, strict=True)):
            decay, momentum = (_gate(x, t, side) for x in (gates.decay, gates.momentum))
            update = -_gate(rates, 0, side) * gradient
            if memory.optimizer.momentum:
                update = surprise[number] = momentum.exp() * surprise[number] + update
            found[number] = decay.exp() * found[number] + update
        if gates.keep is not None:
            write = gates.keep[:, t, None, None, None]
            found, surprise = (
                [torch.where(write, new, old) for new, old in zip(news, olds, strict=True)]
                for news, olds in ((found, before[0]), (surprise, before[1]))
            )
        weights = [memory.retention.weights(x) for x in found]
        outs.append(memory.learner.read(q[:, :, now], applied(weights)))
    memories, surprises = (tuple(x.to(dtype) for x in parts) for parts in (found, surprise))
    after = replace(state, memory=memories, surprise=surprises, place=state.place + q.shape[2])
    return torch.cat(outs, 2).to(dtype), after


def _gradients(
    memory: Memory, k: Tensor, v: Tensor, threshold: Tensor | None, start: list[Tensor]
) -> tuple[Tensor, ...]:
    """dl / dy, y being what the last layer gives, then dl / dW of every layer: by autograd, with a graph if wanted."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        weights = [memory.retention.weights(x) for x in start]
        weights = [x if x.requires_grad else x.detach().requires_grad_() for x in weights]
        outputs: list[Tensor] = []

        def layer(number: int, x: Tensor) -> Tensor:
            outputs.append(applied(weights)(number, x))
            return outputs[-1]

        loss = memory.loss.value(memory.learner.read(k, layer), v, threshold).sum()
        return torch.autograd.grad(loss, [outputs[-1], *weights], create_graph=graph, materialize_grads=True)


def _gate(x: Tensor | None, t: int, side: str) -> Tensor:
    """The gate of token t as [B, H, 1, 1], or along the side of a matrix that has its channels."""
    if x is None:
        return torch.zeros((), dtype=torch.float64)
    x = x[:, :, t].double()
    if x.ndim == 2:
        return x[..., None, None]
    return x[..., None, :] if side == "out" else x[..., None]
