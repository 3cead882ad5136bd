"""The backward pass of a call: which kernels run, and what they write."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from chronotope.kernels.call import Gradients, Known, Scores, blank
from chronotope.kernels.triton.backward_kernels import keys, prepare, queries
from chronotope.kernels.triton.launch import Shape, dense, fit, launch, shape, strided
from chronotope.kernels.triton.learn import Totals, of_tables, of_tensor, totals
from chronotope.kernels.triton.lists import lists
from chronotope.kernels.triton.pairs import pairs as every_pair
from chronotope.kernels.triton.scoring import pairs, scoring
from chronotope.kernels.triton.tables import masks
from chronotope.planning import Tiling

ROWS = 64  # queries of a program of `prepare`


def backward(known: Known, tiles: Tiling, scores: Scores, *, blocks: Shape | None = None) -> Gradients:
    """Gradients of q, k, v and of the tensors behind the bias. `blocks`: instead of those for the head size."""
    run = Backward(known, tiles, scores, blocks)
    dq = run.of_queries()
    dk, dv = run.of_keys()
    return dq, dk, dv, run.of_bias()


class Backward:
    """What the kernels of one call share. dS has no memory of its own; a bias takes its sums from all kernels."""

    def __init__(self, known: Known, tiles: Tiling, scores: Scores, blocks: Shape | None):
        self.known, self.tiles, self.scores, self.blocks = known, tiles, scores, blocks
        self.q, self.k, self.v = dense(known.q), dense(known.k), dense(known.v)
        out = dense(known.out)
        dout = torch.zeros_like(out) if known.dout is None else dense(known.dout)
        self.lse = known.lse.contiguous()
        self.batch, self.heads, self.n_query, _ = known.q.shape
        self.key_heads = known.k.shape[1]
        self.given, self.terms = scoring(scores, tiles, self.q.device)
        self.masks = masks(tiles, self.q.device)
        self.inputs = tuple(strided(x) for x in (self.q, self.k, self.v, dout))
        self.shift = torch.empty_like(self.lse)
        dlse = None if known.dlse is None else known.dlse.contiguous()
        launch(
            prepare, triton.cdiv(self.n_query, ROWS) * self.batch * self.heads, self.q.device, Shape(ROWS, 0, 4, 1),
            strided(out), strided(dout), self.lse, dlse, self.shift, self.n_query, self.heads, ROWS,
        )  # fmt: skip
        self.bias: Tensor | None = None  # a bias tensor that learns
        self.sums: Totals | None = None
        self.columns: Tensor | None = None  # dS summed over queries
        if any(known.wanted):
            self.bias = scores.tensor if scores.bias is None else None
            if self.terms:
                self.sums = totals(known, dout, tiles, self.heads, self.given.entries)

    def shape(self, which: str) -> Shape:
        """The blocks of a pass."""
        return self.blocks or shape(which, self.q.dtype, self.q.shape[3], self.v.shape[3])

    def of_queries(self) -> Tensor:
        """dq; and the sums of dS for relative tables."""
        out, blocks = blank(self.q, self.q.shape[3], self.q.dtype), self.shape("dq")
        work = lists(self.tiles, True, blocks.queries, blocks.keys, self.q.device)
        count = len(work.blocks)
        launch(
            queries, count * self.batch * self.heads, self.q.device, fit(blocks, work, True),
            *self.inputs, strided(out), self.lse, self.shift, work, self.masks, self.given, self.sums,
            count, self.heads, self.heads // self.key_heads, self.n_query, self.terms,
        )  # fmt: skip
        return out

    def of_keys(self) -> tuple[Tensor, Tensor]:
        """dk and dv; and the sums of dS over queries for a bias that has one row for all of them."""
        dk, dv = (blank(x, x.shape[3], x.dtype) for x in (self.k, self.v))
        n_key, blocks = self.k.shape[2], self.shape("dkv")
        if self.bias is not None and self.bias.shape[2] == 1:
            self.columns = self.lse.new_empty(self.batch, self.heads, n_key)
        work = lists(self.tiles, False, blocks.keys, blocks.queries, self.q.device)
        count = len(work.blocks)
        launch(
            keys, count * self.batch * self.key_heads, self.q.device, fit(blocks, work, False),
            *self.inputs, strided(dk), strided(dv), self.lse, self.shift, self.columns, work, self.masks, self.given,
            count, self.heads, self.heads // self.key_heads, self.n_query, n_key, self.terms,
        )  # fmt: skip
        return dk, dv

    def of_bias(self) -> list[Tensor | None]:
        """The gradients of the tensors behind the bias."""
        if self.sums is not None:
            return of_tables(self.sums, self.scores, self.tiles)
        if self.bias is None:
            return [None] * len(self.scores.tensors)
        if self.columns is not None:
            return of_tensor(self.columns[:, :, None], self.scores)
        if self.bias.shape[3] == 1:
            # One entry for all keys: dS of a query adds up to dlse, whatever the logits are.
            dlse = torch.zeros_like(self.lse) if self.known.dlse is None else self.known.dlse
            return of_tensor(torch.where(self.lse == -torch.inf, 0.0, dlse)[..., None], self.scores)
        return of_tensor(self._every_pair(self.bias), self.scores)

    def _every_pair(self, bias: Tensor) -> Tensor:
        out, blocks = torch.zeros_like(bias, memory_format=torch.contiguous_format), self.shape("dq")
        work = lists(self.tiles, True, blocks.queries, blocks.keys, self.q.device)
        count, (batch, heads) = len(work.blocks), bias.shape[:2]
        launch(
            every_pair, count * batch * heads, self.q.device, fit(blocks, work, True),
            *self.inputs, pairs(out), self.lse, self.shift, work, self.masks, self.given,
            count, heads, self.batch // batch, self.heads // heads, self.heads, self.heads // self.key_heads,
            self.n_query,
        )  # fmt: skip
        return out
