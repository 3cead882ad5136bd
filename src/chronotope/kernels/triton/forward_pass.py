"""The forward pass: a program holds a block of queries of one head and runs over the keys that its tile lists."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from chronotope.kernels.call import Scores, blank
from chronotope.kernels.triton.device import kind, logits, plain, rows, span, tokens, whose, write
from chronotope.kernels.triton.launch import Shape, dense, fit, launch, shape, strided
from chronotope.kernels.triton.lists import lists
from chronotope.kernels.triton.scoring import scoring
from chronotope.kernels.triton.tables import masks
from chronotope.planning import Tiling


@triton.jit
@no_type_check
def accumulate(
    piece, x, top, total, acc, k, v, lists, masks, scores, batch, head, key_head, q_at, q_token, q_inside,
    MASKED: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Online softmax: the largest logit so far, the sum of 2^(logit - top), and the values weighted so."""
    entry = lists.pieces + 3 * piece
    at, inside = span(entry, lists.width)
    token, live = tokens(masks.k_order, at, inside)
    y, z = rows(k, batch, key_head, token, live), rows(v, batch, key_head, token, live)
    products = tl.dot(x, tl.trans(y), input_precision="ieee")
    s, _ = logits(
        products, scores, masks, kind(lists, entry, masks, at, True, MASKED)[None, :], batch, head,
        q_at[:, None], at[None, :], q_token[:, None], token[None, :], q_inside[:, None] & inside[None, :],
        MASKED, TERMS,
    )  # fmt: skip
    higher = tl.maximum(top, tl.max(s, 1))
    # A query that has seen nothing yet has no largest logit; without this it would be -inf - -inf.
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weight = tl.exp2(s - base[:, None])
    fade = tl.exp2(top - base)
    acc = tl.dot(weight.to(z.dtype), z, acc * fade[:, None], input_precision="ieee")
    return higher, total * fade + tl.sum(weight, 1), acc


@triton.jit(do_not_specialize=["count", "heads", "group", "n_query"])
@no_type_check
def attend(
    q, k, v, out, lse, lists, masks, scores, count, heads, group, n_query, TERMS: tl.constexpr
):  # fmt: skip
    """out and lse of one block of queries."""
    block, batch, head = whose(count, heads)
    entry = lists.blocks + 7 * block
    at, inside = span(entry, lists.height)
    token, live = tokens(masks.q_order, at, inside)
    x = rows(q, batch, head, token, live)
    key_head = head // group
    top = tl.full((lists.height,), -float("inf"), tl.float32)
    total = tl.zeros((lists.height,), tl.float32)
    acc = tl.zeros((lists.height, v.block), tl.float32)
    number, common, first, rest = plain(entry)
    for index in range(number):
        piece = index + tl.where(index < common, first, rest)
        top, total, acc = accumulate(
            piece, x, top, total, acc, k, v, lists, masks, scores, batch, head, key_head, at, token, inside,
            False, TERMS,
        )  # fmt: skip
    if masks.relations != 0:
        for piece in range(tl.load(entry + 5), tl.load(entry + 6)):
            top, total, acc = accumulate(
                piece, x, top, total, acc, k, v, lists, masks, scores, batch, head, key_head, at, token, inside,
                True, TERMS,
            )  # fmt: skip
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    write(out, batch, head, token, inside, acc / total[:, None])
    log = tl.where(blind, -float("inf"), (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + (batch * heads + head) * n_query + token, log, mask=inside)


def forward(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk dv"],
    tiles: Tiling,
    scores: Scores,
    *,
    blocks: Shape | None = None,
) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"]]:
    """Attention over the tiles of a plan: (out, lse). `blocks`: instead of those for the head size."""
    q, k, v = dense(q), dense(k), dense(v)
    out, lse = blank(q, v.shape[3], q.dtype), q.new_empty(q.shape[:3], dtype=torch.float32)
    blocks = blocks or shape("forward", q.dtype, q.shape[3], v.shape[3])
    batch, heads, n_query, _ = q.shape
    work = lists(tiles, True, blocks.queries, blocks.keys, q.device)
    given, terms = scoring(scores, tiles, q.device)
    count = len(work.blocks)
    launch(
        attend, count * batch * heads, q.device, fit(blocks, work, True),
        strided(q), strided(k), strided(v), strided(out), lse, work, masks(tiles, q.device), given,
        count, heads, heads // k.shape[1], n_query, terms,
    )  # fmt: skip
    return out, lse
