"""Associative scans: all prefixes y_t = x_1 o x_2 o ... o x_t of an associative operator, in a logarithm of steps.

An element is a tuple of tensors, all of the same length along the scanned dimension. An operator takes two such tuples,
`op(earlier, later)`, and works on many pairs at once. The neighbours are combined, the sequence of half the length is
scanned, and the places between follow from it: at most 2 ceil(log2 N) calls, which combine fewer than 2 N pairs in all.
Source: Blelloch 1990, "Prefix sums and their applications".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from chronotope.errors import ChronotopeError

Elements = tuple[Tensor, ...]
Op = Callable[[Elements, Elements], Elements]


def scan(op: Callable[[Any, Any], Any], elements: Any, dim: int = 1, reverse: bool = False) -> Any:
    """All prefixes of an associative operator, the element itself included.

    Args:
        op: `op(earlier, later)` on two tuples of tensors; returns a tuple of the same shapes. It must be associative.
        elements: tensors with N along `dim`; their other dimensions, and how many there are, may differ. One tensor
            instead of a tuple: `op` takes and returns tensors, and so does `scan`.
        dim: the scanned dimension of every tensor; negative numbers count from the end of each.
        reverse: scan from the last element to the first: what is earlier then has the larger index.

    Returns tensors of the shapes of `elements`; differentiable where `op` is.

    Raises ChronotopeError: no elements, differing lengths, an operator that changes shapes.

    Example:
        >>> scan(torch.mul, torch.tensor([1.0, 2.0, 3.0, 4.0]), dim=0)
        tensor([ 1.,  2.,  6., 24.])
    """
    if isinstance(elements, Tensor):
        return scan(lambda a, b: (op(a[0], b[0]),), (elements,), dim, reverse)[0]
    dims = _check(elements, dim)
    if reverse:
        flipped = tuple(x.flip(d) for x, d in zip(elements, dims, strict=True))
        return tuple(x.flip(d) for x, d in zip(_scan(op, flipped, dims), dims, strict=True))
    return _scan(op, elements, dims)


def _scan(op: Op, elements: Elements, dims: tuple[int, ...]) -> Elements:
    n = elements[0].shape[dims[0]]
    if n < 2:
        return elements
    even, odd = _every_other(elements, dims, 0, n - n % 2), _every_other(elements, dims, 1, n)
    # The prefixes of the pairs are the prefixes that end at odd places.
    odd = _scan(op, _combined(op, even, odd), dims)
    first = tuple(x.narrow(d, 0, 1) for x, d in zip(elements, dims, strict=True))
    if n == 2:
        return _interleaved(first, odd, dims)
    before = tuple(x.narrow(d, 0, (n - 1) // 2) for x, d in zip(odd, dims, strict=True))
    between = _combined(op, before, _every_other(elements, dims, 2, n))
    even = tuple(torch.cat(parts, d) for *parts, d in zip(first, between, dims, strict=True))
    return _interleaved(even, odd, dims)


def _every_other(elements: Elements, dims: tuple[int, ...], start: int, stop: int) -> Elements:
    return tuple(x[(slice(None),) * d + (slice(start, stop, 2),)] for x, d in zip(elements, dims, strict=True))


def _interleaved(even: Elements, odd: Elements, dims: tuple[int, ...]) -> Elements:
    """even[0], odd[0], even[1], ...; there may be one more of the even."""
    out = []
    for a, b, d in zip(even, odd, dims, strict=True):
        n = b.shape[d]
        both = torch.stack((a.narrow(d, 0, n), b), d + 1).flatten(d, d + 1)
        out.append(both if a.shape[d] == n else torch.cat((both, a.narrow(d, n, 1)), d))
    return tuple(out)


def _combined(op: Op, earlier: Elements, later: Elements) -> Elements:
    out = op(earlier, later)
    if not isinstance(out, tuple) or not all(isinstance(x, Tensor) for x in out):
        raise ChronotopeError(f"scan: the operator returned a {type(out).__name__}; expected a tuple of tensors.")
    given, found = [list(x.shape) for x in later], [list(x.shape) for x in out]
    if given != found:
        raise ChronotopeError(f"scan: the operator returned shapes {found} for {given}; expected the same shapes.")
    return out


def _check(elements: Any, dim: int) -> tuple[int, ...]:
    """The scanned dimension of every tensor, counted from the front."""
    if not isinstance(elements, tuple) or not elements or not all(isinstance(x, Tensor) for x in elements):
        raise ChronotopeError(f"scan: elements is {_said(elements)}; expected a tuple of one or more tensors.")
    if any(not -x.ndim <= dim < x.ndim for x in elements):
        raise ChronotopeError(f"scan: dim={dim} is not a dimension of every element: {_said(elements)}.")
    dims = tuple(dim % x.ndim for x in elements)
    if len({x.shape[d] for x, d in zip(elements, dims, strict=True)}) > 1:
        raise ChronotopeError(f"scan: lengths along dim={dim} differ: {_said(elements)}; give all the same length.")
    return dims


def _said(elements: Any) -> str:
    if isinstance(elements, tuple):
        inside = ", ".join(str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in elements)
        return f"({inside})"
    return f"a {type(elements).__name__}"


def affine(earlier: Elements, later: Elements) -> Elements:
    """(a1, b1) o (a2, b2) = (a2 a1, a2 b1 + b2): the maps x -> a x + b, one after the other; real or complex."""
    (a1, b1), (a2, b2) = earlier, later
    return a2 * a1, a2 * b1 + b2


def softmax_prefix(earlier: Elements, later: Elements) -> Elements:
    """Sums of exp(score) and of exp(score) value, kept as m, u, w with exp(m) u and exp(m) w their true values.

    m and u [...], w [..., D]: m is the largest score, u = sum exp(s - m), w = sum exp(s - m) v; the element of one
    token is (s, 1, v), that of none is (-inf, 0, 0). Source: Feng et al. 2024, arXiv 2405.13956.
    """
    (m1, u1, w1), (m2, u2, w2) = earlier, later
    m = torch.maximum(m1, m2)
    # Where neither holds a token, -inf less -inf would be NaN.
    top = torch.where(m == -torch.inf, 0.0, m)
    e1, e2 = (m1 - top).exp(), (m2 - top).exp()
    return m, u1 * e1 + u2 * e2, w1 * e1[..., None] + w2 * e2[..., None]


def segmented(op: Op) -> Op:
    """The operator on (starts, *elements) that forgets what is earlier wherever `starts` is true.

    starts is bool, with the leading dimensions of every element, up to the scanned one or further.

    Example:
        >>> x = torch.ones(1, 5)
        >>> scan(segmented(lambda a, b: (a[0] + b[0],)), (starts(torch.tensor([[0, 0, 0, 1, 1]])), x))[1]
        tensor([[1., 2., 3., 1., 2.]])
    """

    def combined(earlier: Elements, later: Elements) -> Elements:
        (before, *left), (begins, *right) = earlier, later
        joined = op(tuple(left), tuple(right))
        kept = (
            torch.where(begins.reshape(begins.shape + (1,) * (own.ndim - begins.ndim)), own, both)
            for own, both in zip(right, joined, strict=True)
        )
        return before | begins, *kept

    return combined


def starts(segments: Int[Tensor, "*b n"]) -> Bool[Tensor, "*b n"]:
    """Where the id differs from that of the token before; the first token starts nothing.

    For `segmented`; `linear_recurrence` forgets where its factor is 0: a.masked_fill(starts(ids), 0).
    """
    out = torch.zeros_like(segments, dtype=torch.bool)
    out[..., 1:] = segments[..., 1:] != segments[..., :-1]
    return out


def linear_recurrence(
    a: Tensor, b: Tensor, initial: Tensor | None = None, dim: int = 1, reverse: bool = False
) -> Tensor:
    """The states x_t = a_t x_{t-1} + b_t of all times at once; real or complex.

    Args:
        a: the factors, with as many dimensions as b, each of b's size or 1; 1 along `dim` is one factor for all times.
        b: what is added, N along `dim`.
        initial: x_0, of b's shape without `dim`; default 0.
        dim: time.
        reverse: x_t = a_t x_{t+1} + b_t, and `initial` is what comes after the last time.

    Returns the states, of b's shape. Differentiable, twice too; for the gradient a, the states and nothing else are
    kept.

    Raises ChronotopeError: shapes that do not fit.

    Example:
        >>> linear_recurrence(torch.tensor([0.5]), torch.ones(4), dim=0)
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    if not -b.ndim <= dim < b.ndim or a.ndim != b.ndim or not _fits(a, b):
        raise ChronotopeError(
            f"linear_recurrence: a {list(a.shape)}, b {list(b.shape)}, dim={dim}: expected a of b's shape, or 1 in "
            "some of its dimensions, and a dimension that b has."
        )
    dim %= b.ndim
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if initial is not None:
        expected = [*b.shape[:dim], *b.shape[dim + 1 :]]
        if list(initial.shape) != expected:
            raise ChronotopeError(f"linear_recurrence: initial is {list(initial.shape)}; expected {expected}.")
        b = _begun(a, b, initial.to(dtype), dim, reverse)
    return b if b.shape[dim] < 2 else _Affine.apply(a, b, dim, reverse)  # type: ignore[no-any-return,no-untyped-call]


def _fits(a: Tensor, b: Tensor) -> bool:
    return all(m in (1, n) for m, n in zip(a.shape, b.shape, strict=True))


def _begun(a: Tensor, b: Tensor, initial: Tensor, dim: int, reverse: bool) -> Tensor:
    """b with a x_0 added at the first time."""
    n = b.shape[dim]
    if n == 0:
        return b
    at = n - 1 if reverse else 0
    factor = a.select(dim, at if a.shape[dim] == n else 0)
    first = (b.select(dim, at) + factor * initial).unsqueeze(dim)
    rest = b.narrow(dim, 0 if reverse else 1, n - 1)
    return torch.cat((rest, first) if reverse else (first, rest), dim)


class _Affine(torch.autograd.Function):
    """x_t = a_t x_{t-1} + b_t. The gradient runs the other way: g_t = dx_t + conj(a_{t+1}) g_{t+1}."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, dim: int, reverse: bool) -> Tensor:
        if a.shape[dim] != b.shape[dim]:
            a = a.expand(*a.shape[:dim], b.shape[dim], *a.shape[dim + 1 :])
        return scan(affine, (a, b), dim, reverse)[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, _, ctx.dim, ctx.reverse = inputs
        ctx.save_for_backward(a, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        a, states = ctx.saved_tensors
        dim, reverse = ctx.dim, ctx.reverse
        after = a if a.shape[dim] == 1 else _shifted(a, dim, not reverse)
        found = linear_recurrence(after.conj(), gradients[0], None, dim, not reverse)
        wanted = ctx.needs_input_grad[0]
        slope = (found * _shifted(states, dim, reverse).conj()).sum_to_size(a.shape) if wanted else None
        return slope, found, None, None


def _shifted(x: Tensor, dim: int, back: bool) -> Tensor:
    """What was there one place before, 0 at the first; `back`: one place after, 0 at the last."""
    n = x.shape[dim]
    rest, zero = x.narrow(dim, 1 if back else 0, max(n - 1, 0)), torch.zeros_like(x.narrow(dim, 0, min(n, 1)))
    return torch.cat((rest, zero) if back else (zero, rest), dim)
