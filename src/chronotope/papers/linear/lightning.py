"""Lightning Attention-2: linear attention with a decay for each head, in blocks, at a cost per token that is constant.

    o_t = sum_{s <= t} lambda^(t - s) (q_t . k_s) v_s,    lambda = exp(decay), no softmax and no denominator

In blocks of B tokens, D_ij = lambda^(i - j) for i >= j else 0, and S the state before the block:

    O = ((Q K^T) * D) V + diag(lambda^i) Q S,    S <- lambda^B S + (diag(lambda^(B - i)) K)^T V,    i = 1..B

which is `ct.recurrence` with one decay for each head. The gradient is the same recurrence three more times, forwards
for dq and from the end for dk and dv, so that of a call only q, k, v and the first state are kept:

    dq_t = sum_{s <= t} lambda^(t - s) (do_t . v_s) k_s
    dk_s = sum_{t >= s} lambda^(t - s) (v_s . do_t) q_t,    dv_s = sum_{t >= s} lambda^(t - s) (k_s . q_t) do_t

Sizes: q, k [B, H, N, D], v [B, H, N, E], decay [H]; O(N (chunk + D) E) work, a state [B, H, D, E]. chunk=N is the
masked product in one piece, chunk=1 token by token; sums are float32 at least.

    >>> q, k, v = torch.randn(3, 1, 4, 1000, 32)
    >>> out, state = lightning_attention(q, k, v, decay=-torch.tensor([0.25, 0.0625, 0.0156, 0.0039]))
    >>> out.shape, state.memory.shape
    (torch.Size([1, 4, 1000, 32]), torch.Size([1, 4, 32, 32]))

Left out: kernels of our own for GPUs, and so what the paper measures of speed there; decays that are learned, which
`ct.recurrence` differentiates. The released kernels compute D on the fly and count i from 0, to the same effect.

Paper: Qin et al. 2024, "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language
Models", arXiv 2401.04658.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.papers.registry import paper
from chronotope.recurrences import RecurrentState, recurrence

CHUNK = 64


@paper(
    system=21,
    name="Lightning Attention-2",
    family="linear",
    claim="decayed linear attention in blocks: constant cost per token, and a backward pass that keeps no states",
    evidence=["tests/papers/linear/test_lightning.py"],
)
def lightning_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    *,
    decay: Float[Tensor, "h"] | None = None,
    state: RecurrentState | None = None,
    keep: Bool[Tensor, "b n"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "b h n e"], RecurrentState]:
    """out_t = q_t S_t, S_t = lambda S_{t-1} + k_t^T v_t.

    Args:
        q, k, v: queries, keys, values.
        decay: log lambda <= 0 for each head; a constant, without a gradient. None: nothing is forgotten.
        state: what a former call returned; None: nothing came before. Its memory has a gradient.
        keep: False for padding, which writes nothing; the decay goes on over it.
        chunk: tokens in a block.

    Returns out, and the state after the last token. Raises ChronotopeError for a decay that wants a gradient.
    """
    if decay is not None and decay.requires_grad:
        raise ChronotopeError(
            "lightning_attention: decay requires a gradient, and has none here; use ct.recurrence(decay=...)."
        )
    if keep is not None:
        # Not multiplied: padding may hold NaN.
        k, v = (torch.where(keep[:, None, :, None], x, 0.0) for x in (k, v))
    if state is None:
        exact = torch.promote_types(q.dtype, torch.float32)
        state = RecurrentState(q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=exact))
    out, memory = _Lightning.apply(q, k, v, decay, state.memory, chunk)  # type: ignore[no-untyped-call]
    return out, RecurrentState(memory)


def both_ways(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    *,
    decay: Float[Tensor, "h"] | None = None,
    chunk: int = CHUNK,
) -> Float[Tensor, "b h n e"]:
    """out_t = sum_s lambda^|t - s| (q_t . k_s) v_s, over all tokens: a pass from each end, the own token once."""
    before, _ = lightning_attention(q, k, v, decay=decay, chunk=chunk)
    after, _ = lightning_attention(*(x.flip(2) for x in (q, k, v)), decay=decay, chunk=chunk)
    return before + after.flip(2) - (q * k).sum(-1, keepdim=True) * v


class _Lightning(torch.autograd.Function):
    """The recurrence, and its gradient by the recurrence."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, memory: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        out, state = recurrence(q, k, v, decay=decay, state=RecurrentState(memory), chunk=chunk)
        # A result must not be an input, which without tokens it would be.
        return out, state.memory if q.shape[2] else state.memory.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, decay, memory, ctx.chunk = inputs
        ctx.save_for_backward(q, k, v, decay, memory)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, memory = ctx.saved_tensors
        dout, dmemory = gradients
        if not q.shape[2]:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None, dmemory, None
        dq, _ = recurrence(dout, v, k, decay=decay, state=RecurrentState(memory.mT), chunk=ctx.chunk)
        back = None
        if decay is not None:
            back = decay[None, :, None].expand(q.shape[:3]).clone()
            back[:, :, 0] = 0  # what comes from behind the last token has not been forgotten by it
        q, k, v, dout = (x.flip(2) for x in (q, k, v, dout))
        dk, _ = recurrence(v, dout, q, decay=back, state=RecurrentState(dmemory.mT), chunk=ctx.chunk)
        dv, first = recurrence(k, q, dout, decay=back, state=RecurrentState(dmemory), chunk=ctx.chunk)
        before = first.memory if decay is None else decay.to(memory.dtype).exp()[:, None, None] * first.memory
        return dq, dk.flip(2), dv.flip(2), None, before.to(memory.dtype), None
