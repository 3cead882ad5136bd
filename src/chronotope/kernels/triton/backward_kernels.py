"""Kernels of the backward pass: one over blocks of queries for dq, one over blocks of keys for dk and dv.

With P the probabilities and D = sum(dout * out) - dlse per query: dV = P^T dout, dS = P * (dout V^T - D),
dQ = scale * dS' K, dK = scale * dS'^T Q, dbias = dS, where dS' is dS through the softcap. Every number of dq, dk and
dv is summed by one program in one order: two runs give the same bits.
Source: Dao et al. 2022 (arXiv 2205.14135), appendix B.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from chronotope.kernels.triton.device import kind, logits, plain, rows, saved, span, tokens, whose, write
from chronotope.kernels.triton.learn import add_to_tables


@triton.jit(do_not_specialize=["n_query", "heads"])
@no_type_check
def prepare(out, dout, lse, dlse, shift, n_query, heads, ROWS: tl.constexpr):
    """D of every query: sum(dout * out) - dlse, and 0 for a query that sees nothing."""
    count = tl.cdiv(n_query, ROWS)
    block, batch, head = whose(count, heads)
    token = block * ROWS + tl.arange(0, ROWS)
    inside = token < n_query
    at = (batch * heads + head) * n_query + token
    sees = inside & (tl.load(lse + at, mask=inside, other=-float("inf")) > -float("inf"))
    x, g = rows(out, batch, head, token, sees), rows(dout, batch, head, token, sees)
    total = tl.sum(x.to(tl.float32) * g.to(tl.float32), 1)
    if dlse is not None:
        total -= tl.load(dlse + at, mask=sees, other=0.0)
    tl.store(shift + at, total, mask=inside)


@triton.jit
@no_type_check
def add_queries(
    piece, x, g, log, d, dx, k, v, lists, masks, scores, totals, batch, head, key_head, q_at, q_token, q_inside,
    MASKED: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """The share of one piece of keys in dq, without the scale."""
    entry = lists.pieces + 3 * piece
    at, inside = span(entry, lists.width)
    token, live = tokens(masks.k_order, at, inside)
    y, z = rows(k, batch, key_head, token, live), rows(v, batch, key_head, token, live)
    both = q_inside[:, None] & inside[None, :]
    s, bend = logits(
        tl.dot(x, tl.trans(y), input_precision="ieee"), scores, masks,
        kind(lists, entry, masks, at, True, MASKED)[None, :], batch, head,
        q_at[:, None], at[None, :], q_token[:, None], token[None, :], both, MASKED, TERMS,
    )  # fmt: skip
    ds = tl.exp2(s - log[:, None]) * (tl.dot(g, tl.trans(z), input_precision="ieee") - d[:, None])
    if totals is not None:
        add_to_tables(totals, ds, scores, head, q_at[:, None], at[None, :], both, TERMS)
    if scores.capped:
        ds *= 1.0 - bend * bend
    return tl.dot(ds.to(y.dtype), y, dx, input_precision="ieee")


@triton.jit(do_not_specialize=["count", "heads", "group", "n_query"])
@no_type_check
def queries(
    q, k, v, dout, dq, lse, shift, lists, masks, scores, totals, count, heads, group, n_query, TERMS: tl.constexpr
):  # fmt: skip
    """dq of one block of queries; and into `totals`, the gradients of relative tables."""
    block, batch, head = whose(count, heads)
    entry = lists.blocks + 7 * block
    at, inside = span(entry, lists.height)
    token, live = tokens(masks.q_order, at, inside)
    x, g = rows(q, batch, head, token, live), rows(dout, batch, head, token, live)
    log, d = saved(lse, shift, batch, head, heads, n_query, token, inside)
    key_head = head // group
    dx = tl.zeros((lists.height, q.block), tl.float32)
    number, common, first, rest = plain(entry)
    for index in range(number):
        piece = index + tl.where(index < common, first, rest)
        dx = add_queries(
            piece, x, g, log, d, dx, k, v, lists, masks, scores, totals, batch, head, key_head, at, token, inside,
            False, TERMS,
        )  # fmt: skip
    if masks.relations != 0:
        for piece in range(tl.load(entry + 5), tl.load(entry + 6)):
            dx = add_queries(
                piece, x, g, log, d, dx, k, v, lists, masks, scores, totals, batch, head, key_head, at, token, inside,
                True, TERMS,
            )  # fmt: skip
    write(dq, batch, head, token, inside, dx * scores.scale)


@triton.jit
@no_type_check
def add_keys(
    piece, y, z, dy, dz, columns, q, dout, lse, shift, dcolumns, lists, masks, scores, batch, head, heads, n_query,
    k_at, k_token, k_inside, MASKED: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """The share of one piece of queries in dk, without the scale, in dv and in the sums of dS over queries."""
    entry = lists.pieces + 3 * piece
    at, inside = span(entry, lists.width)
    token, live = tokens(masks.q_order, at, inside)
    x, g = rows(q, batch, head, token, live), rows(dout, batch, head, token, live)
    log, d = saved(lse, shift, batch, head, heads, n_query, token, inside)
    s, bend = logits(
        tl.dot(y, tl.trans(x), input_precision="ieee"), scores, masks,
        kind(lists, entry, masks, at, False, MASKED)[None, :], batch, head,
        at[None, :], k_at[:, None], token[None, :], k_token[:, None], inside[None, :] & k_inside[:, None],
        MASKED, TERMS,
    )  # fmt: skip
    p = tl.exp2(s - log[None, :])
    dz = tl.dot(p.to(g.dtype), g, dz, input_precision="ieee")
    ds = p * (tl.dot(z, tl.trans(g), input_precision="ieee") - d[None, :])
    if dcolumns is not None:
        columns += tl.sum(ds, 1)
    if scores.capped:
        ds *= 1.0 - bend * bend
    return tl.dot(ds.to(x.dtype), x, dy, input_precision="ieee"), dz, columns


@triton.jit(do_not_specialize=["count", "heads", "group", "n_query", "n_key"])
@no_type_check
def keys(
    q, k, v, dout, dk, dv, lse, shift, dcolumns, lists, masks, scores, count, heads, group, n_query, n_key,
    TERMS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, over all query heads of its head; into `dcolumns`, sums of dS over queries."""
    block, batch, key_head = whose(count, heads // group)
    entry = lists.blocks + 7 * block
    at, inside = span(entry, lists.height)
    token, live = tokens(masks.k_order, at, inside)
    y, z = rows(k, batch, key_head, token, live), rows(v, batch, key_head, token, live)
    dy = tl.zeros((lists.height, k.block), tl.float32)
    dz = tl.zeros((lists.height, v.block), tl.float32)
    number, common, first, rest = plain(entry)
    for member in range(group):
        head = key_head * group + member
        columns = tl.zeros((lists.height,), tl.float32)
        for index in range(number):
            piece = index + tl.where(index < common, first, rest)
            dy, dz, columns = add_keys(
                piece, y, z, dy, dz, columns, q, dout, lse, shift, dcolumns, lists, masks, scores, batch, head, heads,
                n_query, at, token, inside, False, TERMS,
            )  # fmt: skip
        if masks.relations != 0:
            for piece in range(tl.load(entry + 5), tl.load(entry + 6)):
                dy, dz, columns = add_keys(
                    piece, y, z, dy, dz, columns, q, dout, lse, shift, dcolumns, lists, masks, scores, batch, head,
                    heads, n_query, at, token, inside, True, TERMS,
                )  # fmt: skip
        if dcolumns is not None:
            tl.store(dcolumns + (batch * heads + head) * n_key + token, columns, mask=inside)
    write(dk, batch, key_head, token, inside, dy * scores.scale)
    write(dv, batch, key_head, token, inside, dz)
