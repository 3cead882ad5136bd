"""Attention as one operator of torch, whichever kernel computes it.

`torch.ops.chronotope.attend` is what autograd, torch.compile, checkpointing and export see. A call's plan and scores
are no tensors: they reach the operator by name, and the name leads to a `Call`.
"""

from __future__ import annotations

import itertools
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from chronotope.errors import ChronotopeError, UnsupportedError
from chronotope.kernels.call import Backend, Gradients, Known, Scores, blank
from chronotope.kernels.tiled import gradients
from chronotope.planning import Tiling


@dataclass(frozen=True, eq=False)
class Call:
    """Which kernel runs which tiles; the tensors of the scores come with the operator's arguments."""

    backend: Backend
    tiles: Tiling
    scores: Scores


_calls: weakref.WeakValueDictionary[str, Call] = weakref.WeakValueDictionary()
_pinned: list[Call] = []  # calls whose names are constants of a compiled graph
_count = itertools.count()
_process = uuid.uuid4().hex


def named(call: Call, forever: bool = False, exported: bool = False) -> str:
    """A name for the call, which holds as long as the call lives; with `forever`, as long as the process.

    A name for an exported program is not given in any other process. Compiled graphs keep theirs short and the same,
    since torch finds what it compiled before by the text of a graph.
    """
    if forever:
        _pinned.append(call)
    out = f"call {next(_count)}{f' of {_process}' if exported else ''}"
    _calls[out] = call
    return out


def _call(name: str) -> Call:
    found = _calls.get(name)
    if found is None:
        raise ChronotopeError(f"{name!r} is of another process: run an exported program where it was exported.")
    return found


def run(q: Tensor, k: Tensor, v: Tensor, tensors: tuple[Tensor, ...], call: Call | str) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call or of one with this name, differentiable."""
    if isinstance(call, str):
        return torch.ops.chronotope.attend(q, k, v, tensors, call)  # type: ignore[no-any-return]
    if call.backend.backward is None:
        return call.backend.forward(q, k, v, call.tiles, call.scores.given(tensors))
    if any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v, *tensors)):
        # torch would drop the tangent without a word.
        raise UnsupportedError(
            f"backend {call.backend.name!r} has no forward-mode derivative; use backend='reference'."
        )
    return torch.ops.chronotope.attend(q, k, v, tensors, named(call))  # type: ignore[no-any-return]


library = torch.library.Library("chronotope", "DEF")
library.define("attend(Tensor q, Tensor k, Tensor v, Tensor[] tensors, str call) -> (Tensor, Tensor)")
library.define(
    "attend_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dout, Tensor? dlse, "
    "Tensor[] tensors, bool[] wanted, str call) -> (Tensor, Tensor, Tensor, Tensor[])"
)


def attend(q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], call: str) -> tuple[Tensor, Tensor]:
    """(out, lse) by the kernel of the call."""
    found = _call(call)
    out, lse = found.backend.forward(q, k, v, found.tiles, found.scores.given(tuple(tensors)))
    return _laid(out, q), lse.contiguous()


def _laid(x: Tensor, like: Tensor) -> Tensor:
    """x in the order of memory that `blank` gives: what a compiled graph was promised."""
    if like.stride(1) < like.stride(2):
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous()


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    tensors: list[Tensor],
    wanted: list[bool],
    call: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients of q, k, v, and of those tensors that are wanted."""
    found = _call(call)
    known = Known(q, k, v, out, lse, dout, dlse, tuple(wanted))
    compute = found.backend.backward or _by_autograd(found.backend)
    dq, dk, dv, rest = compute(known, found.tiles, found.scores.given(tuple(tensors)))
    return _laid(dq, q), _laid(dk, k), _laid(dv, v), _wanted(rest, tensors, wanted)


def _wanted(found: list[Tensor | None], tensors: list[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """One gradient for each tensor that wants one; zero where no kernel met it."""
    pairs = zip(found, tensors, strict=True)
    return [_as(x, d) for (d, x), want in zip(pairs, wanted, strict=True) if want]


def _as(x: Tensor, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros_like(x)
    promised = torch.empty_like(x)
    return gradient if gradient.stride() == promised.stride() else promised.copy_(gradient)


def _by_autograd(backend: Backend) -> Any:
    """The backward pass of a kernel that has none of its own."""

    def compute(known: Known, tiles: Tiling, scores: Scores) -> Gradients:
        def run(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            return backend.forward(q, k, v, tiles, scores.given(tensors))

        # Not autograd itself, which is switched off inside an operator.
        _, pull = torch.func.vjp(
            run,  # type: ignore[misc]
            known.q,
            known.k,
            known.v,
            *scores.tensors,
        )
        zero = (torch.zeros_like(known.out), torch.zeros_like(known.lse))
        given = (d if d is not None else z for d, z in zip((known.dout, known.dlse), zero, strict=True))
        dq, dk, dv, *rest = pull(tuple(given))
        return dq, dk, dv, rest

    return compute


def _fake(q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], call: str) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    return blank(q, v.shape[3], q.dtype), q.new_empty(q.shape[:3], dtype=exact)


def _fake_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    tensors, wanted = rest[4], rest[5]
    given = [torch.empty_like(x) for x, want in zip(tensors, wanted, strict=True) if want]
    return blank(q, q.shape[3], q.dtype), blank(k, k.shape[3], k.dtype), blank(v, v.shape[3], v.dtype), given


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tensors, call = inputs
    ctx.set_materialize_grads(False)
    # The name lives as long as the call; in a compiled graph the name is a constant and the call is pinned.
    ctx.call, ctx.name = _call(call), call
    ctx.save_for_backward(q, k, v, *output, *tensors)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, [None] * len(tensors), None
    wanted = [bool(want) for want in ctx.needs_input_grad[3]] if tensors else []
    dq, dk, dv, given = torch.ops.chronotope.attend_backward(q, k, v, out, lse, dout, dlse, tensors, wanted, ctx.name)
    rest = iter(given)
    return dq, dk, dv, [next(rest) if want else None for want in wanted], None


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *given, tensors, wanted, call = inputs
    ctx.set_materialize_grads(False)
    ctx.call, ctx.wanted, ctx.has = _call(call), tuple(wanted), [x is not None for x in given]
    ctx.save_for_backward(*[x for x in given if x is not None], *tensors)


def _backward_twice(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """The gradient of the gradients: the formulas of the torch kernel, differentiated."""
    saved = [x.detach().requires_grad_() for x in ctx.saved_tensors]
    left = iter(saved)
    given = [next(left) if has else None for has in ctx.has]
    tensors = list(left)
    with torch.enable_grad():
        known = Known(*given, wanted=ctx.wanted)  # type: ignore[arg-type, misc]
        dq, dk, dv, rest = gradients(known, ctx.call.tiles, ctx.call.scores.given(tuple(tensors)), differentiable=True)
        results = [dq, dk, dv, *_wanted(rest, tensors, ctx.wanted)]
        above = [*grads[:3], *(grads[3] or [None] * (len(results) - 3))]
        pairs = [(y, g) for y, g in zip(results, above, strict=True) if g is not None and y.requires_grad]
        found = torch.autograd.grad([y for y, _ in pairs], saved, [g for _, g in pairs], allow_unused=True)
    back = iter(found)
    first = [next(back) if has else None for has in ctx.has]
    # torch takes an empty list of numbers for one of tensors.
    return *first, list(back), None if ctx.wanted else [], None


library.impl("attend", attend, "CompositeExplicitAutograd")
library.impl("attend_backward", attend_backward, "CompositeExplicitAutograd")
torch.library.register_fake("chronotope::attend", _fake, lib=library)
torch.library.register_fake("chronotope::attend_backward", _fake_backward, lib=library)
torch.library.register_autograd("chronotope::attend", _backward, setup_context=_keep, lib=library)
torch.library.register_autograd(
    "chronotope::attend_backward", _backward_twice, setup_context=_keep_backward, lib=library
)
