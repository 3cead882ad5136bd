"""What forward and backward kernels share: tokens and rows of a block, logits with masks and bias.

Logits are to base 2 (natural ones times log2 e): the exponential of the hardware is 2^x. Positions, tokens and
`inside` reach `logits` with a dimension of 1 where the other side has its own, so that it serves [queries, keys] and
[keys, queries] alike.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

PACKED = tl.constexpr(-1)  # in place of a number of relations
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def whose(count, heads):
    """The block, batch and head of this program; the last two as int64, for they are multiplied by strides."""
    program = tl.program_id(0)
    rest = program // count
    return program % count, (rest // heads).to(tl.int64), (rest % heads).to(tl.int64)


@triton.jit
@no_type_check
def plain(block):
    """The pieces of a block without a mask: their number, that of those that blocks share, and what makes an index of
    one the number of a piece, for these and for the others."""
    shared, own = tl.load(block + 3), tl.load(block + 4)
    return shared + tl.load(block + 5) - own, shared, tl.load(block + 2), own - shared


@triton.jit
@no_type_check
def span(entry, SIZE: tl.constexpr):
    """The positions of an entry of a list, [SIZE], and which of them are in it: beyond its end the last is repeated."""
    offset = tl.arange(0, SIZE)
    count = tl.load(entry + 1)
    return tl.load(entry) + tl.minimum(offset, count - 1), offset < count


@triton.jit
@no_type_check
def tokens(order, at, inside):
    """Tokens of positions, and which of them are to be read."""
    code = tl.load(order + at)
    return tl.where(code >= 0, code, -1 - code), inside & (code >= 0)


@triton.jit
@no_type_check
def rows(x, batch, head, token, live):
    """Rows [tokens, x.block] of x, zero where they are not to be read and beyond the size of x."""
    column = tl.arange(0, x.block)
    mask = live[:, None]
    if x.size < x.block:
        mask = mask & (column < x.size)[None, :]
    start = x.data + batch * x.batch + head * x.head
    return tl.load(start + token.to(tl.int64)[:, None] * x.token + column[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def write(x, batch, head, token, inside, value):
    """Stores rows [tokens, x.block]."""
    column = tl.arange(0, x.block)
    mask = inside[:, None] & (column < x.size)[None, :]
    start = x.data + batch * x.batch + head * x.head
    to = start + token.to(tl.int64)[:, None] * x.token + column[None, :]
    tl.store(to, value.to(x.data.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def saved(lse, shift, batch, head, heads, n_query, token, inside):
    """lse to base 2 and D of queries; +inf in place of -inf, which makes every probability 0."""
    at = (batch * heads + head) * n_query + token
    log = tl.load(lse + at, mask=inside, other=-float("inf"))
    return tl.where(log == -float("inf"), float("inf"), log * LOG2E), tl.load(shift + at, mask=inside, other=0.0)


@triton.jit
@no_type_check
def tanh(x):
    """tanh with a relative error of some roundings: near 0 by its series, for 1 - exp(-2 x) cancels there."""
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    tail = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - tail) / (1.0 + tail)
    return tl.where(square < 0.0625, x * series, tl.where(x < 0, -far, far))


@triton.jit
@no_type_check
def kind(lists, entry, masks, at, OF_KEYS: tl.constexpr, MASKED: tl.constexpr):
    """Which element mask the tile of each position has with that of the block; anything where masks are not packed."""
    if MASKED and masks.relations == PACKED:
        if OF_KEYS:  # noqa: SIM108
            tile = tl.load(masks.k_tile + at)
        else:
            tile = tl.load(masks.q_tile + at)
        return tl.load(lists.kinds + tl.load(entry + 2) + tile)
    else:
        return at


@triton.jit
@no_type_check
def visible(masks, kind, q_at, k_at, inside):
    """Which pairs of positions of partial pairs of tiles are visible."""
    seen = inside
    if masks.relations == PACKED:
        row, column = tl.load(masks.q_within + q_at), tl.load(masks.k_within + k_at)
        index = (kind * masks.rows + row) * masks.words + (column >> 5)
        seen = seen & (((tl.load(masks.bits + index) >> (column & 31)) & 1) != 0)
    else:
        for r in tl.static_range(masks.relations):
            low = masks.q_bounds + (q_at * masks.relations + r) * 2
            place = tl.load(masks.k_places + k_at * masks.relations + r)
            seen = seen & (tl.load(low) <= place) & (place <= tl.load(low + 1))
    return seen


@triton.jit
@no_type_check
def step(scores, q_at, k_at, AXIS: tl.constexpr, REACH: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr):
    """What one axis adds to the index of a pair in a relative table."""
    x = tl.load(scores.q_places + q_at * scores.axes + AXIS)
    y = tl.load(scores.k_places + k_at * scores.axes + AXIS)
    return (tl.minimum(tl.maximum(y - x, -REACH), REACH) + REACH) * STRIDE + OFFSET


@triton.jit
@no_type_check
def bias(scores, batch, head, q_at, k_at, q_token, k_token, inside, TERMS: tl.constexpr):
    """The bias of pairs, natural: a tensor's value, or the sum of the relative tables."""
    if scores.dense:
        start = scores.tensor + batch * scores.batch + head * scores.head
        at = q_token.to(tl.int64) * scores.query + k_token.to(tl.int64) * scores.key
        return tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
    else:
        real = inside & (q_at >= scores.q_prefix) & (k_at >= scores.k_prefix)
        score = tl.zeros(inside.shape, tl.float32)
        index = tl.zeros(inside.shape, tl.int32)
        for t in tl.static_range(len(TERMS)):
            index += step(scores, q_at, k_at, TERMS[t][0], TERMS[t][1], TERMS[t][2], TERMS[t][3])
            if TERMS[t][4]:
                score += tl.load(scores.table + head * scores.entries + index, mask=real, other=0.0)
                index = tl.zeros(inside.shape, tl.int32)
        return score


@triton.jit
@no_type_check
def logits(
    products, scores, masks, kind, batch, head, q_at, k_at, q_token, k_token, inside,
    MASKED: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """softcap(scale * products) + bias to base 2, -inf where not visible; and the tanh of the softcap."""
    bend = products * scores.inner
    if scores.capped:
        bend = tanh(bend)
        s = bend * scores.outer
    else:
        s = bend
    if scores.dense or len(TERMS) > 0:
        s += bias(scores, batch, head, q_at, k_at, q_token, k_token, inside, TERMS) * LOG2E
    if MASKED:
        s = tl.where(visible(masks, kind, q_at, k_at, inside), s, -float("inf"))
    else:
        s = tl.where(inside, s, -float("inf"))
    return s, bend
