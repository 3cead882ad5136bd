"""A recurrence as the kernels know it: batch and heads are one, decays are sums, and autograd goes through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chronotope.errors import UnsupportedError
from chronotope.recurrences.call import Inputs, Outputs
from chronotope.recurrences.triton.passes import Kept, backward, forward, summed


class Chunks(torch.autograd.Function):
    """(out, last state) of `forward`, which says what the arguments are."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        erase: Tensor | None,
        v: Tensor,
        sums: Tensor | None,
        memory: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """Runs the kernels."""
        out, last, kept = forward(q, k, erase, v, sums, memory, chunk)
        ctx.save_for_backward(*kept)
        return out, last

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the kernels of the backward pass."""
        return *First.apply(*ctx.saved_tensors, dout, dlast), None


class First(torch.autograd.Function):
    """The gradients of `Chunks`, which have none themselves."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        """Runs the kernels."""
        *kept, dout, dlast = given
        return tuple(backward(Kept(*kept), dout, dlast))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        """Raises."""
        raise UnsupportedError(
            "the recurrence of backend 'triton' has first derivatives only; for second ones use backend='torch'."
        )


@torch.compiler.disable
def compute(inputs: Inputs, chunk: int) -> Outputs:
    """The recurrence, by chunks of 16, 32 or 64 tokens."""
    batch, heads, n, _ = inputs.q.shape
    if n == 0:
        total = None if inputs.normalizer is None else inputs.q.new_zeros(inputs.q.shape[:3])
        return Outputs(torch.zeros_like(inputs.v), total, inputs.memory, inputs.normalizer)
    q, k, v, memory = (x.flatten(0, 1).contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.memory))
    sums = None if inputs.decay is None else summed(inputs.decay.flatten(0, 1), chunk)
    # The decayed sum of keys is what is written when every value is 1.
    ones = v.new_ones(*v.shape[:2], 1)
    column = None if inputs.normalizer is None else inputs.normalizer.flatten(0, 1)[..., None].contiguous()
    total = None
    if inputs.beta is not None:
        # The delta rule writes beta k^T (v - k S'): a key is written beta times, and takes away what it reads.
        weighed = inputs.beta.flatten(0, 1)[..., None] * k
        out, memory = Chunks.apply(q, weighed, -k, v, sums, memory, chunk)
        if column is not None:
            total, column = Chunks.apply(q, k, None, ones, sums, column, chunk)
    elif column is not None:
        both = Chunks.apply(q, k, None, torch.cat([v, ones], -1), sums, torch.cat([memory, column], -1), chunk)
        (out, total), (memory, column) = (x.split([v.shape[-1], 1], -1) for x in both)
    else:
        out, memory = Chunks.apply(q, k, None, v, sums, memory, chunk)
    return Outputs(
        out.unflatten(0, (batch, heads)),
        None if total is None else total[..., 0].unflatten(0, (batch, heads)),
        memory.unflatten(0, (batch, heads)),
        None if column is None else column[..., 0].unflatten(0, (batch, heads)),
    )
