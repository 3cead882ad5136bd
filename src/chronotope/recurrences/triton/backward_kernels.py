"""Kernels of the backward pass, by chunks.

With G the gradient of the state after a chunk, and for a reader x (see forward_kernels) g the gradient of what it read:

    dW = scores^T dout + exp(b_C - b) K G,    dV = dW, with `erase` solve^T dW,
    dS = exp(b_C) G + sum over readers of (exp(b) X)^T g,
    dpairs = tril(g W^T),    dX = exp(b) g S^T + (dpairs exp(b_i - b_j)) K,
    dK = exp(b_C - b) W G^T + sum over readers of (dpairs exp(b_i - b_j))^T X

where g is dout for queries, and dV for what erases. Every number is summed by one program in one order.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from chronotope.recurrences.triton.device import (
    PRECISION,
    between,
    from_start,
    kept,
    place,
    rows,
    summed,
    to_end,
    write,
)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def carry_back(
    q, k, erase, scores, solve, dout, dv, dstates, sums, n,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dv, and the gradients of all states, for some columns of values; `dstates` has that of the last state."""
    chunks = tl.cdiv(n, CHUNK)
    part, _, head = place(tl.cdiv(dout.size, VALUES), 1)
    d, column, i = tl.arange(0, KEYS), part * VALUES + tl.arange(0, VALUES), tl.arange(0, CHUNK)
    dstate = rows(dstates, head * (chunks + 1) + chunks, q.size, d, column)
    for back in range(chunks):
        chunk = chunks - 1 - back
        token = chunk * CHUNK + i
        row = head * (chunks * CHUNK) + token
        last = head * (chunks * CHUNK) + chunk * CHUNK + CHUNK - 1
        grad = rows(dout, head, n, token, column)
        score = rows(scores, head * chunks + chunk, CHUNK, i, i)
        key = to_end(rows(k, head, n, token, d), sums, row, last, d)
        value = tl.dot(tl.trans(score), grad, input_precision=PRECISION)
        value = tl.dot(key, dstate, value, input_precision=PRECISION)
        reader = from_start(rows(q, head, n, token, d), sums, row, d)
        dstate = tl.dot(tl.trans(reader), grad, kept(dstate, sums, last, d), input_precision=PRECISION)
        if erase is not None:
            inverse = rows(solve, head * chunks + chunk, CHUNK, i, i)
            value = tl.dot(tl.trans(inverse), value, input_precision=PRECISION)
            reader = from_start(rows(erase, head, n, token, d), sums, row, d)
            dstate = tl.dot(tl.trans(reader), value, dstate, input_precision=PRECISION)
        write(dv, head, n, token, column, value)
        write(dstates, head * (chunks + 1) + chunk, q.size, d, column, dstate)


@triton.jit
@no_type_check
def of_pairs(dpairs, index, own, other, CHUNK: tl.constexpr, EARLIER: tl.constexpr):
    """dpairs between `own` tokens [rows] and `other` tokens [columns] of a chunk, which are earlier, or later."""
    if EARLIER:
        return rows(dpairs, index, CHUNK, own, other)
    else:
        return tl.trans(rows(dpairs, index, CHUNK, other, own))


@triton.jit
@no_type_check
def apart(own, other, seen, EARLIER: tl.constexpr):
    """The decay between own tokens and others, which are earlier, or later."""
    if EARLIER:
        return between(own, other, seen)
    else:
        return between(other, own, seen)


@triton.jit
@no_type_check
def gather_by_channel(
    total, dpairs, y, sums, index, head, n, base, origin, own, other, column,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, EARLIER: tl.constexpr,
):  # fmt: skip
    """`gather` where decays differ by channel: split at the border between own tokens and others, as in the forward
    pass; among own tokens channel by channel, and without a token's pair with itself."""
    start = tl.min(own, 0)
    b = summed(sums, origin + own, column)
    if EARLIER:
        border, beyond = tl.maximum(start - 1, 0), other < start
    else:
        border, beyond = start + ROWS - 1, other >= start + ROWS
    split = summed(sums, origin + border + tl.arange(0, 1), column)
    far = rows(y, head, n, base + other, column)
    far *= apart(split, summed(sums, origin + other, column), beyond[:, None], EARLIER)
    pair = tl.where(beyond[None, :], of_pairs(dpairs, index, own, other, CHUNK, EARLIER), 0.0)
    near = apart(b, split, (own >= 0)[:, None], EARLIER)
    total += tl.dot(pair, far, input_precision=PRECISION) * near
    for one in range(ROWS):
        token = start + one + tl.arange(0, 1)
        seen = own > token if EARLIER else own < token
        weight = apart(b, summed(sums, origin + token, column), seen[:, None], EARLIER)
        one_pair = of_pairs(dpairs, index, own, token, CHUNK, EARLIER)
        total += one_pair * rows(y, head, n, base + token, column) * weight
    return total


@triton.jit
@no_type_check
def gather(
    total, dpairs, y, sums, index, head, n, base, own, other, column,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, EARLIER: tl.constexpr,
):  # fmt: skip
    """Adds the sum of dpairs_ij y_j exp(b_i - b_j) over earlier j, or over later ones the transpose of it."""
    origin = index * CHUNK
    if sums.form == 2:
        return gather_by_channel(
            total, dpairs, y, sums, index, head, n, base, origin, own, other, column, CHUNK, ROWS, EARLIER
        )
    else:
        pair = of_pairs(dpairs, index, own, other, CHUNK, EARLIER)
        if sums.form == 1:
            seen = own[:, None] >= other[None, :] if EARLIER else own[:, None] <= other[None, :]
            others = tl.trans(summed(sums, origin + other, other))
            pair *= apart(summed(sums, origin + own, own), others, seen, EARLIER)
        return tl.dot(pair, rows(y, head, n, base + other, column), total, input_precision=PRECISION)


@triton.jit
@no_type_check
def with_itself(dpairs, y, index, head, n, base, own, column, CHUNK: tl.constexpr):
    """The share of each token's pair with itself, which no decay is between."""
    pair = tl.where(own[:, None] == own[None, :], rows(dpairs, index, CHUNK, own, own), 0.0)
    return tl.sum(pair, 1)[:, None] * rows(y, head, n, base + own, column)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def readers_back(
    grads, dpairs, x, k, states, dx, shares, sums, n,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dX of ROWS readers and some key channels: from the state before their chunk, and from the writers in it.

    `shares`: X * dX of the first, for decays of tokens; of both, for decays of channels.
    """
    chunks, parts = tl.cdiv(n, CHUNK), tl.cdiv(dx.size, COLUMNS)
    part, chunk, head = place(CHUNK // ROWS * parts, chunks)
    own, other = part // parts * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    column = part % parts * COLUMNS + tl.arange(0, COLUMNS)
    base, index = chunk * CHUNK, head * chunks + chunk
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, grads.size, VALUES):
        value = first + tl.arange(0, VALUES)
        state = rows(states, head * (chunks + 1) + chunk, dx.size, column, value)
        grad = rows(grads, head, n, base + own, value)
        total = tl.dot(grad, tl.trans(state), total, input_precision=PRECISION)
    total = from_start(total, sums, index * CHUNK + own, column)
    if sums.form == 1:
        write(shares, head, n, base + own, column, rows(x, head, n, base + own, column) * total)
    total = gather(total, dpairs, k, sums, index, head, n, base, own, other, column, CHUNK, ROWS, True)
    if sums.form == 2:
        write(shares, head, n, base + own, column, rows(x, head, n, base + own, column) * total)
        total += with_itself(dpairs, k, index, head, n, base, own, column, CHUNK)
    write(dx, head, n, base + own, column, total)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def writers_back(
    written, dstates, k, q, dscores, erase, dlinks, dk, ends, shares, sums, n,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dK of ROWS writers and some key channels: from the state after their chunk, and from the readers in it.

    `ends`: K * dK of the first; `shares`: of the second, for decays of channels.
    """
    chunks, parts = tl.cdiv(n, CHUNK), tl.cdiv(dk.size, COLUMNS)
    part, chunk, head = place(CHUNK // ROWS * parts, chunks)
    own, other = part // parts * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    column = part % parts * COLUMNS + tl.arange(0, COLUMNS)
    base, index = chunk * CHUNK, head * chunks + chunk
    end = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, written.size, VALUES):
        value = first + tl.arange(0, VALUES)
        dstate = rows(dstates, head * (chunks + 1) + chunk + 1, dk.size, column, value)
        wrote = rows(written, head, n, base + own, value)
        end = tl.dot(wrote, tl.trans(dstate), end, input_precision=PRECISION)
    end = to_end(end, sums, index * CHUNK + own, index * CHUNK + CHUNK - 1, column)
    if sums.form != 0:
        write(ends, head, n, base + own, column, rows(k, head, n, base + own, column) * end)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = gather(total, dscores, q, sums, index, head, n, base, own, other, column, CHUNK, ROWS, False)
    if erase is not None:
        total = gather(total, dlinks, erase, sums, index, head, n, base, own, other, column, CHUNK, ROWS, False)
    if sums.form == 2:
        write(shares, head, n, base + own, column, rows(k, head, n, base + own, column) * total)
        total += with_itself(dscores, q, index, head, n, base, own, column, CHUNK)
    write(dk, head, n, base + own, column, end + total)
