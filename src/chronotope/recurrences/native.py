"""The recurrence in C++ for CPUs, built with the attention kernels on first use."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.kernels.call import blank
from chronotope.kernels.native import build
from chronotope.kernels.native.kernel import room
from chronotope.kernels.native.tables import Int, Pointer, Strided, pointer
from chronotope.recurrences import chunked
from chronotope.recurrences.call import FLOOR, Backend, Inputs, Outputs

CHUNK = 32
MOST_CHUNK = 128
MOST_SIZE = 1024


def place(x: Tensor) -> Strided:
    """Where the tokens of x [B, H, N, size] are; the last stride is 1."""
    return Strided(x.data_ptr(), *x.stride()[:3])


class Scalars(ctypes.Structure):
    """`Scalars` of recurrence.h."""

    _fields_ = (("data", Pointer), ("batch", Int), ("head", Int), ("token", Int), ("channels", Int))

    @classmethod
    def of(cls, x: Tensor | None) -> Scalars:
        """A tensor [B, H, N] or [B, H, N, channels], the numbers of a token side by side; or none."""
        return cls() if x is None else cls(x.data_ptr(), *x.stride()[:3], 1 if x.ndim == 3 else x.shape[3])


class Start(ctypes.Structure):
    """`Start` of recurrence.h."""

    _fields_ = (("data", Pointer), ("batch", Int), ("head", Int), ("row", Int), ("column", Int))

    @classmethod
    def of(cls, x: Tensor) -> Start:
        """A state [B, H, D, Dv], in any order of memory."""
        return cls(x.data_ptr(), *x.stride())


class Recurrence(ctypes.Structure):
    """`Recurrence` of recurrence.h."""

    _fields_ = (
        *((name, Int) for name in ("batch", "heads", "tokens", "depth", "value_depth", "chunk")),
        *((name, Strided) for name in ("q", "k", "v", "out")),
        ("decay", Scalars), ("beta", Scalars),
        ("memory", Start),
        *((name, Pointer) for name in ("memory_after", "normalizer", "normalizer_after", "total")),
        *((name, Strided) for name in ("dout", "dq", "dk", "dv")),
        *((name, Pointer) for name in ("dtotal", "dmemory_after", "dnormalizer_after")),
        ("ddecay", Scalars),
        *((name, Pointer) for name in ("dbeta", "dmemory", "dnormalizer")),
    )  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """The C++ functions, built where they are not."""
    found = build.library()
    found.chronotope_recurrence_size.restype = Int
    assert found.chronotope_recurrence_size() == ctypes.sizeof(Recurrence), "native.py and recurrence.h differ"
    return found


def described(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, memory: Tensor,
    normalizer: Tensor | None, chunk: int,
) -> Recurrence:  # fmt: skip
    """What both passes start from; the caller holds on to the tensors, whose last strides are 1."""
    return Recurrence(
        *q.shape, v.shape[3], min(chunk, MOST_CHUNK), place(q), place(k), place(v), (), Scalars.of(decay),
        Scalars.of(beta), Start.of(memory), None, pointer(normalizer),
    )  # fmt: skip


def run(function: str, problem: Recurrence) -> None:
    """Calls the library."""
    if getattr(library(), function)(ctypes.byref(problem)):
        raise ChronotopeError("the native recurrence could not get the memory that it works in; use a smaller batch.")


Make = Callable[[Tensor, int], Tensor]


def _plain(x: Tensor, size: int) -> Tensor:
    """Memory for a result like x, in the same order."""
    return blank(x, size, x.dtype)


def packed(x: Tensor) -> Tensor:
    """x with the numbers of a token side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _by_token(decay: Tensor | None) -> Tensor | None:
    return packed(decay) if decay is not None and decay.ndim == 4 else decay


GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor memory, Tensor? normalizer, int chunk"
operators = torch.library.Library("chronotope", "FRAGMENT")
operators.define(f"recur({GIVEN}) -> (Tensor, Tensor, Tensor, Tensor)")
operators.define(
    f"recur_backward({GIVEN}, Tensor dout, Tensor dtotal, Tensor dmemory, Tensor dnormalizer) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def recur(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, memory: Tensor,
    normalizer: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, total, memory and normalizer after the last token; what is not wanted is empty."""
    q, k, v, decay = packed(q), packed(k), packed(v), _by_token(decay)
    normalizer = None if normalizer is None else normalizer.contiguous()
    problem = described(q, k, v, decay, beta, memory, normalizer, chunk)
    out, total, after, sums = _results(q, v, memory, normalizer, room)
    problem.out, problem.memory_after = place(out), after.data_ptr()
    if normalizer is not None:
        problem.total, problem.normalizer_after = pointer(total), pointer(sums)
    run("chronotope_recurrence_forward", problem)
    return out, total, after, sums


def _results(
    q: Tensor, v: Tensor, memory: Tensor, normalizer: Tensor | None, make: Make = _plain
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, after = make(v, v.shape[3]), torch.empty_like(memory, memory_format=torch.contiguous_format)
    if normalizer is None:
        return out, q.new_empty(0), after, q.new_empty(0)
    return out, q.new_empty(q.shape[:3]), after, q.new_empty(normalizer.shape)


def recur_backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, memory: Tensor,
    normalizer: Tensor | None, chunk: int, dout: Tensor, dtotal: Tensor, dmemory: Tensor, dnormalizer: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, decay, beta, memory, normalizer; empty for those that are none."""
    q, k, v, dout, decay = packed(q), packed(k), packed(v), packed(dout), _by_token(decay)
    dtotal, dmemory, dnormalizer = dtotal.contiguous(), dmemory.contiguous(), dnormalizer.contiguous()
    normalizer = None if normalizer is None else normalizer.contiguous()
    problem = described(q, k, v, decay, beta, memory, normalizer, chunk)
    grads = _gradients(q, k, v, decay, beta, memory, normalizer, room)
    problem.dout, problem.dmemory_after = place(dout), pointer(dmemory)
    problem.dq, problem.dk, problem.dv = (place(x) for x in grads[:3])
    problem.ddecay = Scalars.of(None if decay is None else grads[3])
    problem.dbeta = pointer(grads[4]) if beta is not None else None
    problem.dmemory = pointer(grads[5])
    if normalizer is not None:
        problem.total = problem.dtotal = pointer(dtotal)  # `total` says that there is one
        problem.dnormalizer_after = pointer(dnormalizer)
        problem.dnormalizer = pointer(grads[6])
    run("chronotope_recurrence_backward", problem)
    return grads


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, memory: Tensor,
    normalizer: Tensor | None, make: Make = _plain,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (make(x, x.shape[3]) for x in (q, k, v))
    by_channel = decay is not None and decay.ndim == 4
    ddecay = make(decay, decay.shape[3]) if by_channel else _like(decay, q)  # type: ignore[arg-type, union-attr]
    return dq, dk, dv, ddecay, _like(beta, q), q.new_empty(memory.shape), _like(normalizer, q)


def _like(x: Tensor | None, q: Tensor) -> Tensor:
    """Memory for the gradient of x, side by side; empty where there is none."""
    return q.new_empty(0) if x is None else q.new_empty(x.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, chunk = inputs
    ctx.chunk, ctx.shapes = chunk, [x.shape for x in output]
    ctx.save_for_backward(*tensors)


def _backward(ctx, *douts):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    given = [tensors[0].new_zeros(shape) if d is None else d for d, shape in zip(douts, ctx.shapes, strict=True)]
    grads = torch.ops.chronotope.recur_backward(*tensors, ctx.chunk, *given)
    return *(None if x is None else grad for x, grad in zip(tensors, grads, strict=True)), None


def _keep_twice(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.chunk = inputs[:8]
    ctx.save_for_backward(*tensors, *inputs[8:])


def _backward_twice(ctx, *dgrads):  # type: ignore[no-untyped-def]
    """By the chunked form of torch's operators, which can be differentiated as often as one likes."""
    saved = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in saved]
        bounded = [x if i != 3 or x is None else x.clamp(min=FLOOR) for i, x in enumerate(leaves[:7])]
        found = chunked.compute(Inputs(*bounded), ctx.chunk)  # type: ignore[arg-type]
        pairs = [
            (x, d)
            for x, d in zip((found.out, found.total, found.memory, found.normalizer), leaves[7:], strict=True)
            if x is not None
        ]
        inputs = [x for x in leaves[:7] if x is not None]
        firsts = torch.autograd.grad(
            [x for x, _ in pairs], inputs, [d for _, d in pairs], create_graph=True, materialize_grads=True
        )
        wanted = [d for x, d in zip(leaves[:7], dgrads, strict=True) if x is not None]
        terms = [(x, d) for x, d in zip(firsts, wanted, strict=True) if d is not None and x.requires_grad]
        targets = [x for x in leaves if x is not None]
        grads = iter(torch.autograd.grad([x for x, _ in terms], targets, [d for _, d in terms], allow_unused=True))
    out = [None if x is None else next(grads) for x in leaves]
    return (*out[:7], None, *out[7:])


operators.impl("recur", recur, "CPU")
operators.impl("recur_backward", recur_backward, "CPU")
torch.library.register_fake("chronotope::recur", lambda q, k, v, g, b, memory, z, chunk: _results(q, v, memory, z))
torch.library.register_fake("chronotope::recur_backward", lambda *given: _gradients(*given[:7]))
torch.library.register_autograd("chronotope::recur", _backward, setup_context=_keep)
torch.library.register_autograd("chronotope::recur_backward", _backward_twice, setup_context=_keep_twice)


def compute(inputs: Inputs, chunk: int) -> Outputs:
    """The recurrence, by chunks of `chunk` tokens, rounded up to whole vectors."""
    i = inputs
    if i.q.shape[2] == 0:
        return chunked.compute(inputs, chunk)
    out, total, memory, normalizer = torch.ops.chronotope.recur(
        i.q, i.k, i.v, i.decay, i.beta, i.memory, i.normalizer, chunk
    )
    if i.normalizer is None:
        return Outputs(out, None, memory, None)
    return Outputs(out, total, memory, normalizer)


def reasons(inputs: Inputs, chunk: int) -> list[str]:
    """Why the C++ kernels cannot run a call."""
    out = []
    if max(inputs.q.shape[3], inputs.v.shape[3]) > MOST_SIZE:
        out.append(f"takes heads of at most {MOST_SIZE}")
    if out or not torch.compiler.is_compiling():
        return out or list(unbuilt())
    from chronotope.recurrences.tracing import unbuilt_constant  # imports the compiler, which takes a second

    return list(unbuilt_constant())


@cache
def unbuilt() -> tuple[str, ...]:
    """Why there is no library; asked once."""
    return tuple(build.reasons())


NATIVE = Backend(
    name="native",
    about="C++ for CPUs, built on first use",
    compute=compute,
    devices=("cpu",),
    dtypes=(torch.float32,),
    chunk=CHUNK,
    priority=30,
    also=reasons,
)
