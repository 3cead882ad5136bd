"""Attention weights some rows at a time, for changes of an output that need no more of them at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.adapt.asked import Asked
from chronotope.adapt.masks import causal_mask, read_mask
from chronotope.adapt.solve import AT_ONCE, weights
from chronotope.boxes import chunks
from chronotope.errors import UnsupportedError

Block = tuple[slice, Bool[Tensor, "b h m nk"], Float[Tensor, "b h m nk"]]


def row_blocks(asked: Asked, first: int = 0, budget: int = AT_ONCE) -> Iterator[Block]:
    """Which rows, whom they may look at, and their weights, from row `first` on; about `budget` weights at once.

    Where a pattern or another control has a say, which may need all rows, they come in one block.
    """
    if asked.tail:
        raise UnsupportedError("weights by rows: not with a pattern whose tokens without a place come last.")
    if asked.where is not None or asked.scores or asked.probs:
        seen, found = _weights(asked)
        yield slice(first, asked.q.shape[2]), seen[:, :, first:], found[:, :, first:]
        return
    each = asked.q.shape[0] * asked.q.shape[1] * asked.k.shape[2]
    for part in chunks(asked.q.shape[2] - first, each, budget):
        rows = slice(first + part.start, first + part.stop)
        yield rows, *_weights(_rows_of(asked, rows))


def values(asked: Asked) -> Float[Tensor, "b h nk dv"]:
    """The values as each head of the queries sees them."""
    return asked.v.repeat_interleave(asked.q.shape[1] // asked.v.shape[1], 1)


def _weights(asked: Asked) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []

    def note(scores: Tensor) -> Tensor:
        # Models hide by -inf, or by a large negative number.
        seen.append(scores > torch.finfo(asked.q.dtype).min / 2)
        return scores

    found = weights(asked.but(scores=(*asked.scores, note)))
    return seen[0], found


def _rows_of(asked: Asked, rows: slice) -> Asked:
    q, mask = asked.q[:, :, rows], asked.mask
    if mask is not None:
        mask = read_mask(mask, q.dtype).own
        mask = mask if mask.shape[-2] == 1 else mask[..., rows, :]
    if asked.causal:
        hidden = causal_mask(q.shape[2], asked.k.shape[2], asked.start + rows.start, q)
        mask = hidden if mask is None else mask + hidden
    return asked.but(q=q, mask=mask, causal=False)
