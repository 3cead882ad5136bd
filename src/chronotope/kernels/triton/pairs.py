"""The gradient of a bias tensor with an entry for every pair: dS itself, in the tensor's own memory and no more."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from chronotope.kernels.triton.device import kind, logits, plain, rows, saved, span, tokens, whose


@triton.jit
@no_type_check
def store(
    piece, q, k, v, dout, dbias, lse, shift, lists, masks, scores, batch, head, batches, shared, heads, group,
    n_query, q_at, q_token, q_live, q_inside, MASKED: tl.constexpr,
):  # fmt: skip
    """Sums dS of one piece over the batch and heads that have these entries in common, and stores it."""
    entry = lists.pieces + 3 * piece
    at, inside = span(entry, lists.width)
    k_token, k_live = tokens(masks.k_order, at, inside)
    mask = kind(lists, entry, masks, at, True, MASKED)[None, :]
    both = q_inside[:, None] & inside[None, :]
    total = tl.zeros((lists.height, lists.width), tl.float32)
    for other in range(batches * shared):
        b, h = batch + other // shared, head + other % shared
        x, g = rows(q, b, h, q_token, q_live), rows(dout, b, h, q_token, q_live)
        y, z = rows(k, b, h // group, k_token, k_live), rows(v, b, h // group, k_token, k_live)
        log, d = saved(lse, shift, b, h, heads, n_query, q_token, q_inside)
        s, _ = logits(
            tl.dot(x, tl.trans(y), input_precision="ieee"), scores, masks, mask, b, h,
            q_at[:, None], at[None, :], q_token[:, None], k_token[None, :], both, MASKED, (),
        )  # fmt: skip
        total += tl.exp2(s - log[:, None]) * (tl.dot(g, tl.trans(z), input_precision="ieee") - d[:, None])
    start = dbias.data + batch * dbias.batch + head * dbias.head
    to = start + q_token.to(tl.int64)[:, None] * dbias.query + k_token.to(tl.int64)[None, :] * dbias.key
    tl.store(to, total.to(dbias.data.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=["count", "own_heads", "batches", "shared", "heads", "group", "n_query"])
@no_type_check
def pairs(
    q, k, v, dout, dbias, lse, shift, lists, masks, scores, count, own_heads, batches, shared, heads, group, n_query
):  # fmt: skip
    """A block of queries of one batch and head of the bias, which `batches` and `shared` heads of q have in common."""
    block, batch, head = whose(count, own_heads)
    entry = lists.blocks + 7 * block
    at, inside = span(entry, lists.height)
    token, live = tokens(masks.q_order, at, inside)
    number, common, first, rest = plain(entry)
    for index in range(number):
        piece = index + tl.where(index < common, first, rest)
        store(
            piece, q, k, v, dout, dbias, lse, shift, lists, masks, scores, batch, head, batches, shared, heads, group,
            n_query, at, token, live, inside, False,
        )  # fmt: skip
    if masks.relations != 0:
        for piece in range(tl.load(entry + 5), tl.load(entry + 6)):
            store(
                piece, q, k, v, dout, dbias, lse, shift, lists, masks, scores, batch, head, batches, shared, heads,
                group, n_query, at, token, live, inside, True,
            )  # fmt: skip
