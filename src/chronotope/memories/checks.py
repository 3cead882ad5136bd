"""What a memory must be given; every refusal says what came and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.memories.state import Gates, Memory, MemoryState

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(
    memory: Memory, q: Tensor, k: Tensor, v: Tensor, gates: Gates, chunk: int, truncate: int | None
) -> None:
    """Raises unless shapes, dtypes, devices, gates and numbers fit each other and the memory."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.dtype not in DTYPES:
            raise ChronotopeError(
                f"{name} is {list(x.shape)} of {x.dtype}; expected [B, heads, tokens, head size] of floats."
            )
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ChronotopeError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected q and k [B, H, N, D], v [B, H, N, Dv]."
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ChronotopeError(
            f"q, k, v are {q.dtype} on {q.device}, {k.dtype} on {k.device}, {v.dtype} on {v.device}; "
            "convert them to one."
        )
    if 0 in (q.shape[0], q.shape[1], q.shape[3], v.shape[3]):
        raise ChronotopeError(f"an empty dimension: q {list(q.shape)}, v {list(v.shape)}.")
    for name, size in (("chunk", chunk), ("truncate", truncate)):
        if size is not None and size < 1:
            raise ChronotopeError(f"{name}={size}: expected at least 1.")
    _check_gates(memory, gates, q, v)


def _check_gates(memory: Memory, gates: Gates, q: Tensor, v: Tensor) -> None:
    plain, wide = list(q.shape[:3]), list(v.shape)
    count = len(memory.learner.sizes(q.shape[3], v.shape[3]))
    for name in ("rate", "decay", "momentum", "threshold"):
        x = getattr(gates, name)
        forms = [plain] if name == "threshold" else [plain, wide]
        if x is not None and (list(x.shape) not in forms or x.device != q.device):
            raise ChronotopeError(
                f"gates.{name} is {list(x.shape)} on {x.device}; expected {' or '.join(map(str, forms))} on {q.device}."
            )
        if (
            x is not None
            and x.ndim == 4
            and (memory.learner.sides(count) is None or (count > 1 and q.shape[3] != v.shape[3]))
        ):
            raise ChronotopeError(
                f"gates.{name} is by channel, {list(x.shape)}, and {memory.learner!r} has layers without these "
                f"channels: give one number for each token, {plain}."
            )
        # On a GPU the answer would have to be waited for.
        if x is None or x.device.type != "cpu" or torch.compiler.is_compiling():
            continue
        if name in ("decay", "momentum") and bool((x > 0).any()):
            raise ChronotopeError(
                f"gates.{name} has {float(x.detach().max()):.4g} in it; it is the log of what is kept, at most 0. "
                "From a share use share.log(), from any number F.logsigmoid."
            )
    if gates.keep is not None and list(gates.keep.shape) != [q.shape[0], q.shape[2]]:
        raise ChronotopeError(f"gates.keep is {list(gates.keep.shape)}; expected [B, N] = {[q.shape[0], q.shape[2]]}.")
    if gates.decay is not None and not memory.retention.decays:
        raise ChronotopeError(f"gates.decay is given, and {memory.retention!r} does not decay: use memories.Decay().")
    if (gates.momentum is not None) != memory.optimizer.momentum:
        said = "is given" if gates.momentum is not None else "is missing"
        raise ChronotopeError(f"gates.momentum {said}, and the optimizer is {memory.optimizer!r}.")


def check_state(memory: Memory, state: MemoryState, q: Tensor, v: Tensor, chunk: int) -> None:
    """Raises unless the state is of this memory, with these sizes."""
    sizes = [[*q.shape[:2], *size] for size in memory.learner.sizes(q.shape[3], v.shape[3])]
    found = [list(x.shape) for x in state.memory]
    if found != sizes or len(state.start) != len(sizes):
        raise ChronotopeError(f"the state's layers are {found}; {memory.learner!r} has [B, H, in, out] = {sizes}.")
    if len(state.surprise) != (len(sizes) if memory.optimizer.momentum else 0):
        raise ChronotopeError(f"the state has surprise of {len(state.surprise)} layers, with {memory.optimizer!r}.")
    if state.place >= chunk:
        raise ChronotopeError(
            f"the state is {state.place} tokens into a chunk, and chunk={chunk}: go on with the same."
        )
    if state.memory[0].device != q.device:
        raise ChronotopeError(f"devices differ: q {q.device}, state {state.memory[0].device}; use state.to(device).")
