"""What forward and backward kernels share: rows of tensors, and how decays weigh them.

Decays come as sums from the start of their chunk, in float64, so that differences keep what a small decay beside a
large one needs. Only such differences are exponents, and none of them is positive.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl
from torch import Tensor

PRECISION = tl.constexpr("tf32x3")
"""Products of float32 on tensor cores: of three parts in TF32. Without them, ptxas spills kilobytes in most kernels."""


class Rows(NamedTuple):
    """A dense tensor [stacks, rows, size]: tokens of heads, states [D, Dv] of chunks, pairs [C, C] of chunks."""

    data: Tensor
    size: tl.constexpr


class Sums(NamedTuple):
    """Sums of decays, of tokens padded to chunks: [heads, tokens] (form 1), [heads, tokens, size] (2), none (0)."""

    data: Tensor | None
    form: tl.constexpr
    size: tl.constexpr


@triton.jit
@no_type_check
def rows(x, stack, count, row, column):
    """x[stack, row, column], zero beyond its `count` rows and its size."""
    mask = (row < count)[:, None] & (column < x.size)[None, :]
    at = (stack * count + row)[:, None] * x.size + column[None, :]
    return tl.load(x.data + at, mask=mask, other=0.0)


@triton.jit
@no_type_check
def write(x, stack, count, row, column, value):
    """Stores x[stack, row, column]."""
    mask = (row < count)[:, None] & (column < x.size)[None, :]
    at = (stack * count + row)[:, None] * x.size + column[None, :]
    tl.store(x.data + at, value, mask=mask)


@triton.jit
@no_type_check
def place(parts, chunks):
    """The part of a chunk, the chunk, and the head of this program; the last as int64, for it is multiplied."""
    program = tl.program_id(0)
    rest = program // parts
    return program % parts, rest % chunks, (rest // chunks).to(tl.int64)


@triton.jit
@no_type_check
def summed(sums, row, column):
    """The sums of decays of rows, counted over all heads: [rows, 1], or [rows, columns]."""
    if sums.form == 1:
        return tl.load(sums.data + row)[:, None]
    else:
        at = row[:, None] * sums.size + column[None, :]
        return tl.load(sums.data + at, mask=(column < sums.size)[None, :], other=0.0)


@triton.jit
@no_type_check
def from_start(x, sums, row, column):
    """Rows of x, decayed from the start of the chunk to each."""
    if sums.form == 0:
        return x
    else:
        return x * tl.exp(summed(sums, row, column).to(tl.float32))


@triton.jit
@no_type_check
def to_end(x, sums, row, last, column):
    """Rows of x, decayed from each to the last row of the chunk."""
    if sums.form == 0:
        return x
    else:
        gap = summed(sums, last + tl.arange(0, 1), column) - summed(sums, row, column)
        return x * tl.exp(gap.to(tl.float32))


@triton.jit
@no_type_check
def kept(state, sums, last, d):
    """A state [D, values], decayed over a chunk."""
    if sums.form == 0:
        return state
    elif sums.form == 1:
        return state * tl.exp(tl.load(sums.data + last).to(tl.float32))
    else:
        over = tl.load(sums.data + last * sums.size + d, mask=d < sums.size, other=0.0)
        return state * tl.exp(over.to(tl.float32))[:, None]


@triton.jit
@no_type_check
def between(later, earlier, seen):
    """exp(later - earlier) where a pair is seen, else 0."""
    return tl.exp(tl.where(seen, (later - earlier).to(tl.float32), -float("inf")))
