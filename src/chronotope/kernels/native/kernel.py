"""The C++ kernels for CPUs as a backend."""

from __future__ import annotations

import ctypes
import weakref
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.kernels.call import Backend, Facts, Gradients, Known, Scores, blank
from chronotope.kernels.native import build
from chronotope.kernels.native.calibrate import calibrate
from chronotope.kernels.native.tables import (
    MOST_AXES,
    MOST_TERMS,
    Problem,
    Strided,
    Tables,
    Term,
    pointer,
    too_large,
)
from chronotope.kernels.relative import only_relative, pull, relative
from chronotope.planning import Tiling

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGE = 1 << 24

_tables: weakref.WeakKeyDictionary[Tiling, Tables] = weakref.WeakKeyDictionary()


@cache
def library() -> ctypes.CDLL:
    """The C++ functions, built where they are not."""
    return build.library()


def tables_of(tiles: Tiling) -> Tables:
    """The tables of a plan, made when it first runs."""
    found = _tables.get(tiles)
    if found is None:
        found = _tables[tiles] = Tables.of(tiles, library())
    return found


class Request:
    """One call, described for C++; holds on to every tensor that the description points to."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tiling, scores: Scores):
        tables = tables_of(tiles)
        self.scores, self.tiles, self.tables = scores, tiles, tables
        self.held: list[Tensor] = []
        self.problem = Problem(
            batch=q.shape[0],
            heads=q.shape[1],
            key_heads=k.shape[1],
            depth=q.shape[3],
            value_depth=v.shape[3],
            type=TYPES[q.dtype],
            tokens=q.shape[2],
            key_tokens=k.shape[2],
            scale=scores.scale,
            softcap=scores.softcap or 0.0,
            q=self.rows(q),
            k=self.rows(k),
            v=self.rows(v),
            out=self.rows(out),
            lse=self.hold(lse),
            queries=tables.queries.side(),
            keys=tables.keys.side(),
            start=pointer(tables.start),
            tile=pointer(tables.tile),
            kind=pointer(tables.kind),
            bits=pointer(tables.bits),
            mask=pointer(tables.mask),
            exclusive=tables.exclusive,
        )
        self.terms = relative(scores, tiles)
        self.dterms: list[Tensor] = []
        self.bias: Tensor | None = None
        self.dbias: Tensor | None = None
        if scores.biased:
            self._add_bias()

    def _add_bias(self) -> None:
        problem, axes = self.problem, self.tiles.k.grid.axes
        problem.terms = len(self.terms)
        for i, term in enumerate(self.terms):
            known = [(axes.index(axis), reach) for axis, reach in term.extent.items()]
            entry = Term(axes=len(known), entries=term.table.shape[1], table=self.hold(term.table.contiguous()))
            for j, (axis, reach) in enumerate(known):
                entry.axis[j], entry.reach[j] = axis, reach
            problem.term[i] = entry
        if self.scores.bias is None:
            self.bias = self.scores.tensor.float().contiguous()
            problem.bias = self.hold(self.bias)
            for i, size in enumerate(self.bias.shape):
                problem.bias_stride[i] = self.bias.stride(i) if size > 1 else 0

    def hold(self, x: Tensor) -> int | None:
        """Where x is, which lives as long as this."""
        self.held.append(x)
        return pointer(x)

    def rows(self, x: Tensor) -> Strided:
        """x with the numbers of a token side by side."""
        x = x if x.stride(3) == 1 else x.contiguous()
        self.held.append(x)
        return Strided.of(x)

    def learn(self) -> None:
        """Memory for the gradients of bias and tables: one copy for each thread, added up in the end."""
        lanes = torch.get_num_threads()
        self.problem.lanes = lanes
        for i, term in enumerate(self.terms):
            self.dterms.append(torch.zeros(lanes, *term.table.shape, dtype=torch.float64))
            self.problem.term[i].gradient = pointer(self.dterms[i])
        if self.bias is not None:
            self.dbias = torch.zeros(lanes, *self.bias.shape, dtype=torch.float64)
            self.problem.bias_size, self.problem.dbias = self.bias.numel(), pointer(self.dbias)

    def learned(self) -> list[Tensor | None]:
        """The gradients of the tensors behind the bias."""
        scores = self.scores
        if self.dbias is not None:
            (given,) = scores.tensors
            found = self.dbias.sum(0)
            if given.ndim >= 3 and given.shape[-3] > 1:  # of all heads, of which these are some
                whole = found.new_zeros(found.shape[0], given.shape[-3], *found.shape[2:])
                found = whole.index_copy_(1, torch.tensor(scores.heads), found)
            return [found.reshape(given.shape).to(given.dtype)]
        return pull(scores, self.tiles, [d.sum(0).float() for d in self.dterms])

    def run(self, function: str) -> None:
        """Calls the library."""
        if getattr(library(), function)(ctypes.byref(self.problem)):
            raise ChronotopeError("the native kernel could not get the memory that it works in; use a smaller batch.")


def room(x: Tensor, size: int) -> Tensor:
    """Memory for a result like x. Where it is so large that it comes fresh from the system, page by page, a page fault
    for every 4 kB would take longer than temporal attention itself."""
    out = blank(x, size, x.dtype)
    if out.nbytes >= LARGE:
        library().chronotope_advise(ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.nbytes))
    return out


def forward(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk dv"],
    tiles: Tiling,
    scores: Scores,
) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"]]:
    """Attention over the tiles of a plan: (out, lse). The meaning is `kernels.reference`."""
    out = room(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    Request(q, k, v, out, lse, tiles, scores).run("chronotope_forward")
    return out, lse


def backward(known: Known, tiles: Tiling, scores: Scores) -> Gradients:
    """Gradients from lse, tile by tile; formulas as in `kernels.tiled.gradients`."""
    q, k, v = known.q, known.k, known.v
    request = Request(q, k, v, known.out, known.lse.contiguous(), tiles, scores)
    problem = request.problem
    dout = torch.zeros_like(known.out) if known.dout is None else known.dout.to(q.dtype)
    grads = [room(x, x.shape[3]) for x in (q, k, v)]
    if not request.tables.covers_keys:
        for grad in grads[1:]:
            grad.zero_()
    problem.dout = request.rows(dout)
    problem.dq, problem.dk, problem.dv = (Strided.of(grad) for grad in grads)
    if known.dlse is not None:
        problem.dlse = request.hold(known.dlse.float().contiguous())
    if any(known.wanted):
        request.learn()
    request.run("chronotope_backward")
    learned = request.learned() if any(known.wanted) else list[Tensor | None]([None] * len(scores.tensors))
    return grads[0], grads[1], grads[2], learned


def reasons(facts: Facts, tiles: Tiling, scores: Scores) -> list[str]:
    """Why the C++ kernels cannot run a call."""
    out = only_relative(facts, tiles, scores)
    if not out and scores.bias is not None:
        known = {name: x.detach() for name, x in (*scores.bias.named_parameters(), *scores.bias.named_buffers())}
        terms = scores.bias.relative(known, tiles.q.grid, tiles.k.grid) or []
        if len(terms) > MOST_TERMS or len(tiles.k.grid.axes) > MOST_AXES:
            out.append(f"adds at most {MOST_TERMS} tables over {MOST_AXES} axes")
    if tiles not in _tables and too_large(tiles):
        out.append("the element masks of this plan would take gigabytes: too many differ; give larger tiles")
    return out or _unbuilt()


@cache
def _unbuilt() -> list[str]:
    """Why there is no library; where there is, the planner learns what its work costs here."""
    out = build.reasons()
    if not out:
        calibrate(forward)
    return out


NATIVE = Backend(
    name="native",
    about="C++ for CPUs, built on first use",
    forward=forward,
    backward=backward,
    devices=("cpu",),
    dtypes=tuple(TYPES),
    priority=30,
    also=reasons,
)
