"""Kernels of the forward pass, by chunks of CHUNK tokens.

A reader x (queries; in the delta rule also what erases) reads the state before its chunk, and in the chunk what others
wrote before it: exp(b) X S + tril(X K^T exp(b_i - b_j)) W, b being the sums of decays from the start of the chunk.
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


@triton.jit
@no_type_check
def channel_pairs(total, x, y, sums, head, n, base, origin, own, other, column, ROWS: tl.constexpr):
    """Adds sum_d x_id y_jd exp(b_id - b_jd), over these columns d, for rows i = `own` and all j <= i of a chunk.

    Before the rows, the exponent is split at the last token before them, so that both parts are sums of decays; among
    the rows it is taken channel by channel.
    """
    start = tl.min(own, 0)
    left, b = rows(x, head, n, base + own, column), summed(sums, origin + own, column)
    split = summed(sums, origin + tl.maximum(start - 1, 0) + tl.arange(0, 1), column)
    far = between(split, summed(sums, origin + other, column), (other < start)[:, None])
    right = rows(y, head, n, base + other, column) * far
    total = tl.dot(left * tl.exp((b - split).to(tl.float32)), tl.trans(right), total, input_precision=PRECISION)
    for one in range(ROWS):
        token = start + one + tl.arange(0, 1)
        near = left * rows(y, head, n, base + token, column)
        near *= between(b, summed(sums, origin + token, column), (own >= token)[:, None])
        total += tl.where(other[None, :] == token[:, None], tl.sum(near, 1)[:, None], 0.0)
    return total


@triton.jit(do_not_specialize=["n"])
@no_type_check
def pairs(
    x, y, out, sums, n,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """sum_d x_id y_jd exp(b_id - b_jd) for j <= i (STRICT: j < i) of a chunk, else 0; ROWS rows of it."""
    chunks = tl.cdiv(n, CHUNK)
    part, chunk, head = place(CHUNK // ROWS, chunks)
    own, other = part * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    base = chunk * CHUNK
    origin = head * (chunks * CHUNK) + base
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    for first in range(0, x.size, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        if sums.form == 2:
            total = channel_pairs(total, x, y, sums, head, n, base, origin, own, other, column, ROWS)
        else:
            left, right = rows(x, head, n, base + own, column), rows(y, head, n, base + other, column)
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    seen = own[:, None] > other[None, :] if STRICT else own[:, None] >= other[None, :]
    if sums.form == 1:
        earlier = tl.trans(summed(sums, origin + other, other))
        total *= between(summed(sums, origin + own, other), earlier, seen)
    write(out, head * chunks + chunk, CHUNK, own, other, tl.where(seen, total, 0.0))


@triton.jit
@no_type_check
def invert(links, out, CHUNK: tl.constexpr, LEVELS: tl.constexpr):
    """(I - L)^-1 of strictly lower L, of CHUNK = 2^LEVELS rows, by substitution of blocks that double.

    Of two neighbours with inverses A and B, and the corner L' of L that joins them, it is [[A, 0], [B L' A, B]].
    """
    chunk = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, CHUNK)
    link = rows(links, chunk, CHUNK, i, i)
    row, column = i[:, None], i[None, :]
    solve = tl.where(row == column, 1.0, 0.0)
    for level in range(LEVELS):
        corner = (row >> (level + 1) == column >> (level + 1)) & (row >> level != column >> level)
        joined = tl.dot(solve, tl.where(corner, link, 0.0), input_precision=PRECISION)
        solve = tl.dot(joined, solve, solve, input_precision=PRECISION)
    write(out, chunk, CHUNK, i, i, solve)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def carry(
    k, v, erase, solve, written, states, sums, n,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The state after each chunk, S' = exp(b_C) S + (exp(b_C - b) K)^T W, for some columns of values.

    `states` has the state before the first chunk. W = V; with `erase` E, W = solve (V + exp(b) E S), which is written.
    """
    chunks = tl.cdiv(n, CHUNK)
    part, _, head = place(tl.cdiv(v.size, VALUES), 1)
    d, column, i = tl.arange(0, KEYS), part * VALUES + tl.arange(0, VALUES), tl.arange(0, CHUNK)
    state = rows(states, head * (chunks + 1), k.size, d, column)
    for chunk in range(chunks):
        token = chunk * CHUNK + i
        row = head * (chunks * CHUNK) + token
        last = head * (chunks * CHUNK) + chunk * CHUNK + CHUNK - 1
        value = rows(v, head, n, token, column)
        if erase is not None:
            reader = from_start(rows(erase, head, n, token, d), sums, row, d)
            value = tl.dot(reader, state, value, input_precision=PRECISION)
            value = tl.dot(rows(solve, head * chunks + chunk, CHUNK, i, i), value, input_precision=PRECISION)
            write(written, head, n, token, column, value)
        key = to_end(rows(k, head, n, token, d), sums, row, last, d)
        state = tl.dot(tl.trans(key), value, kept(state, sums, last, d), input_precision=PRECISION)
        write(states, head * (chunks + 1) + chunk + 1, k.size, d, column, state)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def read(
    q, scores, written, states, out, sums, n,
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """out = exp(b) Q S + scores W of a chunk, for some columns of values."""
    chunks = tl.cdiv(n, CHUNK)
    part, chunk, head = place(tl.cdiv(out.size, VALUES), chunks)
    column, i = part * VALUES + tl.arange(0, VALUES), tl.arange(0, CHUNK)
    token = chunk * CHUNK + i
    score, value = rows(scores, head * chunks + chunk, CHUNK, i, i), rows(written, head, n, token, column)
    total = tl.dot(score, value, input_precision=PRECISION)
    for first in range(0, q.size, COLUMNS):
        d = first + tl.arange(0, COLUMNS)
        state = rows(states, head * (chunks + 1) + chunk, q.size, d, column)
        reader = from_start(rows(q, head, n, token, d), sums, head * (chunks * CHUNK) + token, d)
        total = tl.dot(reader, state, total, input_precision=PRECISION)
    write(out, head, n, token, column, total)
