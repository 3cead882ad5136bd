"""`ct.recurrence`: a state carried along time instead of a set of keys."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from chronotope.errors import UnsupportedError
from chronotope.recurrences.call import FLOOR, Backend, Inputs
from chronotope.recurrences.checks import check_inputs, check_state
from chronotope.recurrences.native import NATIVE
from chronotope.recurrences.state import RecurrentState
from chronotope.recurrences.table import BACKENDS


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalize: bool = False,
    scale: float | int = 1.0,
    state: RecurrentState | None = None,
    segments: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, RecurrentState]:
    """Reads and writes a state along the tokens, causally.

        S_t = exp(decay_t) S_{t-1} + k_t^T v_t,    out_t = scale * q_t S_t

    With `beta`, the delta rule: S' = exp(decay_t) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S'). With `normalize`,
    out_t is divided by q_t . z_t, z_t = exp(decay_t) z_{t-1} + k_t; where that is 0, nothing was seen and out_t is 0.

    Args:
        q, k: [B, H, N, D]; v: [B, H, N, Dv]; float32, bfloat16, float16, float64.
        decay: log of what is kept, <= 0 (-inf forgets all): for each head [H], for each token [B, H, N], or for each
            token and key channel [B, H, N, D]. None: nothing is forgotten.
        beta: [B, H, N], how much of the difference is written; in 0..1 where keys have length 1.
        scale: a factor of the output.
        state: what came before these tokens: the state that a former call returned. None: nothing.
        segments: packed sequences: the state is forgotten wherever the id differs from that of the token before, in
            each sequence for itself [B, N] or alike [N]. The first token goes on from `state`.
        chunk: tokens computed together; it changes speed and not meaning. None: what the backend likes.
        backend: "auto", or a name in `ct.backends("recurrence")`, which runs or raises.

    Returns out [B, H, N, Dv] in q's dtype, and the state after the last token, float32 (float64 for float64 inputs).
    Everything is differentiable, states included. Running in pieces with `state` equals running at once.

    Raises ChronotopeError for what does not fit, UnsupportedError where the backend named cannot run the call.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 1000, 64)
        >>> out, state = recurrence(q, k, v, decay=torch.tensor([-0.1, -0.05, -0.02, -0.01]))
        >>> out.shape, state.memory.shape
        (torch.Size([2, 4, 1000, 64]), torch.Size([2, 4, 64, 64]))
    """
    check_inputs(q, k, v, decay, beta, scale, segments, chunk)
    if state is not None:
        check_state(state, q, v, normalize)
    inputs = _inputs(q, k, v, decay, beta, normalize, state, segments)
    chosen = choose(inputs, chunk, backend)
    size = max(1, min(chunk or chosen.chunk, q.shape[2]))
    # The native kernel bounds decays as it reads them: a copy of those by channel takes as long as a part of its work.
    found = chosen.compute(inputs if chosen is NATIVE else _bounded(inputs), size)
    out = found.out
    if found.total is not None:
        total = found.total[..., None]
        empty = total == 0
        out = torch.where(empty, 0.0, out / torch.where(empty, 1.0, total))
    out = out if scale == 1 else scale * out
    return _as(out, q.dtype), RecurrentState(found.memory, found.normalizer)


def choose(inputs: Inputs, chunk: int | None, backend: str) -> Backend:
    """The backend of this name, or the best that can run the call. Raises UnsupportedError with every reason."""
    if backend != "auto":
        if backend not in BACKENDS:
            raise UnsupportedError(f"backend={backend!r}: there are {', '.join(BACKENDS)}, and 'auto'.")
        found = BACKENDS[backend]
        reasons = found.reasons(inputs, chunk or found.chunk)
        if reasons:
            raise UnsupportedError(f"backend {backend!r} cannot run this recurrence: {'; '.join(reasons)}.")
        return found
    for found in sorted(BACKENDS.values(), key=lambda backend: -backend.priority):
        if not found.reasons(inputs, chunk or found.chunk):
            return found
    raise UnsupportedError(f"no backend runs on {inputs.q.device.type}.")


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    normalize: bool,
    state: RecurrentState | None,
    segments: Tensor | None,
) -> Inputs:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, n, d = q.shape
    if decay is not None:
        decay = decay[None, :, None].expand(batch, heads, n) if decay.ndim == 1 else decay
        decay = _as(decay, dtype)
    if segments is not None and n:
        decay = _forgetting(decay, segments.expand(batch, n), heads, dtype)
    if state is not None:
        memory = _as(state.memory, dtype)
    else:  # one zero stands for all where no kernel writes; without tokens this is the state that is returned
        size = (batch, heads, d, v.shape[3])
        memory = q.new_zeros((), dtype=dtype).expand(size) if n else q.new_zeros(size, dtype=dtype)
    normalizer = None
    if normalize:
        given = None if state is None else state.normalizer
        normalizer = q.new_zeros(batch, heads, d, dtype=dtype) if given is None else _as(given, dtype)
    return Inputs(
        _as(q, dtype),
        _as(k, dtype),
        _as(v, dtype),
        decay,
        None if beta is None else _as(beta, dtype),
        memory,
        normalizer,
    )


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype; to ask is quicker than to convert what needs no converting."""
    return x if x.dtype == dtype else x.to(dtype)


def _bounded(inputs: Inputs) -> Inputs:
    """With every decay at least `FLOOR`."""
    return inputs if inputs.decay is None else replace(inputs, decay=inputs.decay.clamp(min=FLOOR))


def _forgetting(decay: Tensor | None, segments: Int[Tensor, "b n"], heads: int, dtype: torch.dtype) -> Tensor:
    """The decay with -inf wherever another segment begins."""
    begins = torch.zeros_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    begins = begins[:, None, :]
    if decay is None:
        return (
            begins.new_zeros((), dtype=dtype)
            .expand(segments.shape[0], heads, segments.shape[1])
            .masked_fill(begins, -torch.inf)
        )
    return decay.masked_fill(begins if decay.ndim == 3 else begins[..., None], -torch.inf)
