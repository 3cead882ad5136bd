"""What `ct.recurrence` must be given; every refusal says what came and what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.recurrences.state import RecurrentState

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    segments: Tensor | None,
    chunk: int | None,
) -> None:
    """Raises unless shapes, dtypes, devices and numbers fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 4:
            given = f"of shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ChronotopeError(f"{name} is {given}; expected a tensor [B, heads, tokens, head size].")
        if x.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ChronotopeError(f"{name} is {x.dtype}; expected one of {names}.")
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ChronotopeError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected q and k [B, H, N, D], v [B, H, N, Dv]."
        )
    if 0 in (q.shape[0], q.shape[1], q.shape[3], v.shape[3]):
        raise ChronotopeError(f"an empty dimension: q {list(q.shape)}, v {list(v.shape)}.")
    if not q.dtype == k.dtype == v.dtype:
        raise ChronotopeError(f"dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}; convert them to one.")
    for name, other in (("k", k), ("v", v), ("decay", decay), ("beta", beta), ("segments", segments)):
        if isinstance(other, Tensor) and other.device != q.device:
            raise ChronotopeError(f"devices differ: q {q.device}, {name} {other.device}; move them to one.")
    _check_decay(decay, q)
    if beta is not None and (not isinstance(beta, Tensor) or beta.shape != q.shape[:3]):
        raise ChronotopeError(f"beta is {_shape(beta)}; expected a tensor [B, H, N] = {list(q.shape[:3])}.")
    if not math.isfinite(scale):
        raise ChronotopeError(f"scale={scale}: expected a finite number.")
    if segments is not None and list(segments.shape) not in ([q.shape[2]], [q.shape[0], q.shape[2]]):
        raise ChronotopeError(f"segments is {_shape(segments)}; expected ids [N] or [B, N], N = {q.shape[2]}.")
    if chunk is not None and chunk < 1:
        raise ChronotopeError(f"chunk={chunk}: expected at least 1 token.")


def _check_decay(decay: Tensor | None, q: Tensor) -> None:
    if decay is None:
        return
    forms = ([q.shape[1]], list(q.shape[:3]), list(q.shape))
    if not isinstance(decay, Tensor) or list(decay.shape) not in forms:
        raise ChronotopeError(
            f"decay is {_shape(decay)}; expected [H], [B, H, N] or [B, H, N, D]: one of {', '.join(map(str, forms))}."
        )
    if decay.device.type != "cpu" or torch.compiler.is_compiling() or not decay.numel():
        return  # on a GPU the answer would have to be waited for
    if float(decay.detach().amax()) > 0:  # found ten times as fast as whether any is
        raise ChronotopeError(
            f"decay has {float(decay.detach().max()):.4g} in it; it is the log of what is kept, at most 0. "
            "From a share use share.log(), from any number F.logsigmoid."
        )


def check_state(state: RecurrentState, q: Tensor, v: Tensor, normalize: bool) -> None:
    """Raises unless the state is of a recurrence with these sizes."""
    if not isinstance(state, RecurrentState):
        raise ChronotopeError(f"state is a {type(state).__name__}; expected what a former call of recurrence returned.")
    expected = [*q.shape[:2], q.shape[3], v.shape[3]]
    if list(state.memory.shape) != expected:
        raise ChronotopeError(f"state.memory is {list(state.memory.shape)}; expected [B, H, D, Dv] = {expected}.")
    if (state.normalizer is not None) != normalize:
        said = "has a" if state.normalizer is not None else "has no"
        raise ChronotopeError(f"the state {said} normalizer, and normalize={normalize}: go on as the state was made.")
    if state.normalizer is not None and list(state.normalizer.shape) != expected[:3]:
        raise ChronotopeError(f"state.normalizer is {list(state.normalizer.shape)}; expected {expected[:3]}.")
    if state.memory.device != q.device:
        raise ChronotopeError(f"devices differ: q {q.device}, state {state.memory.device}; use state.to(device).")


def _shape(x: object) -> str:
    return f"of shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
