"""`memorize`: a state that is the weights of a small network, written by descent on what comes."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import UnsupportedError
from chronotope.memories import chunked, reference
from chronotope.memories.checks import check_inputs, check_state
from chronotope.memories.learners import applied
from chronotope.memories.state import Gates, Memory, MemoryState, from_zeros
from chronotope.recurrences.call import FLOOR

BACKENDS = {"chunked": chunked.compute, "reference": reference.compute}
"""Ways to compute one chunk: by matrix products; or token by token in float64, which is the meaning."""


def memorize(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    memory: Memory,
    gates: Gates,
    *,
    state: MemoryState | None = None,
    chunk: int = 64,
    truncate: int | None = None,
    backend: str = "chunked",
) -> tuple[Float[Tensor, "b h n dv"], MemoryState]:
    """Teaches a network v_t at k_t, and reads it at q_t, causally.

        g_t = dl(f(k_t; W), v_t) / dW,      W = weights(A at the start of the chunk)
        S_t = exp(momentum_t) S_{t-1} - rate_t g_t
        A_t = exp(decay_t) A_{t-1} + S_t,   out_t = f(q_t; weights(A_t))

    f and its sizes are `memory.learner`, l is `memory.loss`, A -> weights(A) is `memory.retention`, and S is that of
    `memory.optimizer`, which may also normalize the rate. Where a chunk ends A is settled, which does not change W.

    Args:
        q, k, v: queries, keys, values; float32, bfloat16, float16, float64.
        memory: the four choices.
        gates: rate, decay, momentum, threshold, and which tokens are padding.
        state: what came before these tokens: what a former call returned, or `begin(memory, weights, batch)`. None:
            zeros, for a `Matrix`.
        chunk: tokens whose gradients are taken at the same weights; part of the meaning. With 1, every token sees
            what the one before it wrote; more are faster.
        truncate: chunks through which gradients pass back in time; after so many the state is cut from its past.
            None: through all. The gradients of the inner steps are part of the graph in either case.
        backend: "chunked", or "reference", which defines the meaning.

    Returns out [B, H, N, Dv] in q's dtype, and the state after the last token, float32 (float64 for float64 inputs).
    Everything is differentiable, states included. Running in pieces with `state`, cut anywhere, equals running at
    once. With gates by channel, or a retention that is not linear, memory grows by chunk * D * Dv for each head.

    Raises ChronotopeError for what does not fit, UnsupportedError for another backend.

    Source: Behrouz et al. 2024 (Titans, arXiv 2501.00663) and 2025 (Miras, arXiv 2504.13173).

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 100, 16)
        >>> memory = Memory(Mlp(2), L2(), Decay(), Momentum())
        >>> gates = Gates(rate=torch.full((2, 4, 100), 0.01), momentum=torch.full((2, 4, 100), -0.5))
        >>> out, state = memorize(q, k, v, memory, gates, state=begin(memory, memory.learner.weights(4, 16, 16), 2))
        >>> out.shape, [x.shape for x in state.memory]
        (torch.Size([2, 4, 100, 16]), [torch.Size([2, 4, 16, 64]), torch.Size([2, 4, 64, 16])])
    """
    check_inputs(memory, q, k, v, gates, chunk, truncate)
    if backend not in BACKENDS:
        raise UnsupportedError(f"backend={backend!r}: there are {', '.join(BACKENDS)}.")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state is None:
        state = from_zeros(memory, q.new_zeros((), dtype=dtype).expand(q.shape[:2]), q.shape[3], v.shape[3])
    check_state(memory, state, q, v, chunk)
    state = state.each(lambda x: x.to(dtype))
    given, exact = q.dtype, _exact(gates, dtype)
    q, k, v = (_only(x.to(dtype), gates) for x in (q, k, v))
    outs, at, ended = [q.new_zeros((*v.shape[:2], 0, v.shape[3]), dtype=dtype)], 0, 0
    while at < q.shape[2]:
        now = slice(at, min(at + chunk - state.place, q.shape[2]))
        out, state = BACKENDS[backend](memory, q[:, :, now], k[:, :, now], v[:, :, now], _piece(exact, now), state)
        outs.append(out)
        at = now.stop
        if state.place == chunk:
            settled, ended = tuple(map(memory.retention.settle, state.memory)), ended + 1
            state = replace(state, memory=settled, start=settled, place=0)
            state = state.detach() if truncate and ended % truncate == 0 else state
    return _only(torch.cat(outs, 2), gates).to(given), state


def recall(q: Float[Tensor, "b h n d"], memory: Memory, state: MemoryState) -> Float[Tensor, "b h n dv"]:
    """f(q_t; W) for every token, of the state as it is: nothing is written."""
    weights = [memory.retention.weights(x) for x in state.memory]
    return memory.learner.read(q.to(weights[0].dtype), applied(weights)).to(q.dtype)


def _exact(gates: Gates, dtype: torch.dtype) -> Gates:
    """The gates as numbers to compute with: no decay below what is 0, and nothing done where there is padding."""

    def made(x: Tensor | None, floor: float | None = None, padding: float = 0.0) -> Tensor | None:
        if x is None:
            return None
        x = x.to(dtype) if floor is None else x.to(dtype).clamp(min=floor)
        return x if gates.keep is None else torch.where(_spread(gates.keep, x), x, padding)

    rate = made(gates.rate)
    assert rate is not None
    return Gates(
        rate, made(gates.decay, FLOOR), made(gates.momentum, FLOOR), made(gates.threshold, padding=1.0), gates.keep
    )


def _spread(keep: Tensor, like: Tensor) -> Tensor:
    """[B, N] as [B, 1, N] or [B, 1, N, 1]."""
    return keep[:, None] if like.ndim == 3 else keep[:, None, :, None]


def _only(x: Tensor, gates: Gates) -> Tensor:
    """0 where there is padding. Not multiplied: it may be NaN."""
    return x if gates.keep is None else torch.where(_spread(gates.keep, x), x, 0.0)


def _piece(gates: Gates, now: slice) -> Gates:
    keep = None if gates.keep is None else gates.keep[:, now]
    rate, decay, momentum, threshold = (
        None if x is None else x[:, :, now] for x in (gates.rate, gates.decay, gates.momentum, gates.threshold)
    )
    assert rate is not None
    return Gates(rate, decay, momentum, threshold, keep)
