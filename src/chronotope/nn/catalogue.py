"""Cross-entropy over many classes, whose scores are never held at once."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

HELD = 2**21
"""Scores that are held at once: 8 MiB."""

LEAST = 80.0
"""The largest loss of one step that is told, as exp(-80) is near the smallest number; gradients do not depend on it."""


def cross_entropy(
    h: Float[Tensor, "m c"],
    table: Float[Tensor, "classes c"],
    taken: Int64[Tensor, "m"],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, ""]:
    """The mean of -log softmax(h @ table.T)[taken], differentiable once.

    `F.cross_entropy(h @ table.T, taken)`, with the gradient made where the scores are: memory is linear in m + classes.
    `dtype`: of scores and their gradient, such as bfloat16; sums are as precise as h.
    """
    return _CrossEntropy.apply(h, table, taken, dtype or h.dtype)  # type: ignore[no-any-return]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, table: Tensor, taken: Tensor, dtype: torch.dtype) -> Tensor:
        total, d_h, d_table = h.new_zeros(()), torch.empty_like(h), table.new_zeros(table.shape[::-1])
        rows, factor = max(1, HELD // len(table)), table.to(dtype)
        for some, own, out in zip(h.to(dtype).split(rows), taken.split(rows), d_h.split(rows), strict=True):
            slope, at = (some @ factor.T).softmax(-1), (torch.arange(len(own), device=own.device), own)
            chance = slope[at]
            total -= chance.to(h.dtype).log().clamp(min=-LEAST).sum()
            if any(ctx.needs_input_grad):
                slope[at] = chance - 1
                out.copy_(slope @ factor)
                d_table += some.T @ slope  # the large factor as it lies
        ctx.save_for_backward(d_h, d_table)
        return total / len(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> Any:  # type: ignore[override]
        d_h, d_table = ctx.saved_tensors
        share = d_loss / len(d_h)
        return d_h * share, d_table.T * share, None, None
