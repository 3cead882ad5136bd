"""Attention of one new slice over the slices kept."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from chronotope.bias import Bias
from chronotope.grid import Coords, Grid
from chronotope.patterns import Pattern


def attend_slice(
    q: Float[Tensor, "b h s d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n d"],
    time: int,
    grid: Grid,
    where: Pattern,
    bias: Bias | None,
    softcap: float | None,
) -> Float[Tensor, "b h s d"]:
    """Attention of the slice at `time` over the last slices up to it, whose keys and values are given.

    `grid`: one slice. Coordinates are those in the whole, so the pattern and the bias mean what they mean there.
    Dense over the keys that some query of the slice sees; where a query sees its own place in other slices only
    (`along("t")`), place by place. A query that sees no key gets 0.
    """
    sight = _sight(where, grid, time, k.shape[2], q.device)
    if keeps_place(where, grid):
        k, v = (x.unflatten(2, (-1, grid.size)).transpose(2, 3) for x in (k, v))
    else:
        k, v = k[:, :, None], v[:, :, None]
    if sight.chosen is not None:
        k, v = k.index_select(3, sight.chosen), v.index_select(3, sight.chosen)
    score = None if bias is None else bias(sight.queries, sight.keys)
    return _dense(q, k, v, sight.seen, score, softcap)


class _Sight(NamedTuple):
    """Who sees whom: s queries and n keys in each of some places, places * s being the slice."""

    queries: Coords
    keys: Coords
    seen: Bool[Tensor, "*heads places s n"]
    chosen: Tensor | None
    """The keys that somebody sees, of those kept; None: all."""


# Layers of one pattern ask for the same; few are held, since each has as many entries as there are scores.
@lru_cache(maxsize=4)
def _sight(where: Pattern, grid: Grid, time: int, kept: int, device: torch.device) -> _Sight:
    whole = grid.replace(**{grid.axes[0]: time + 1})
    size, end = grid.size, whole.size
    with torch.inference_mode(False):
        own, past = (torch.arange(start, end, device=device) for start in (end - size, end - kept))
        own, past = (own[:, None], past.view(-1, size).T) if keeps_place(where, grid) else (own[None], past[None])
        queries, keys = Coords.of(whole, own[:, :, None]), Coords.of(whole, past[:, None, :])
        seen = _seen(where, queries, keys)
        columns = seen.flatten(0, -2).any(0)
        if bool(columns.all()):
            return _Sight(queries, keys, seen, None)
        # Fewer keys to read; and what nobody sees cannot leak, be it NaN.
        chosen = columns.nonzero()[:, 0]
        return _Sight(queries, Coords.of(whole, past[:, None, chosen]), seen[..., chosen], chosen)


@lru_cache(maxsize=256)
def keeps_place(where: Pattern, grid: Grid) -> bool:
    """Whether a query can see no key but at its own place in the slices. `grid`: one slice. Safe where it says no."""
    if where.heads is not None:
        return False
    two = grid.replace(**{grid.axes[0]: 2})
    reaches = where.reaches(two, two)
    if reaches is None:
        return False
    for axis in grid.axes[1:]:
        own, found = torch.arange(grid.sizes[axis]), reaches.get(axis, [])
        if len(own) > 1 and not any(bool(((r.first == own) & (r.counts() == 1)).all()) for r in found):
            return False
    return True


def _seen(where: Pattern, q: Coords, k: Coords) -> Bool[Tensor, "*heads places s n"]:
    if where.heads is None:
        return where.sees(q, k)
    patterns = [where.head(head) for head in range(where.heads)]
    masks = {pattern: pattern.sees(q, k) for pattern in patterns}
    return torch.stack([masks[pattern] for pattern in patterns])


def _dense(
    q: Float[Tensor, "b h slice d"],
    k: Float[Tensor, "b hk places n d"],
    v: Float[Tensor, "b hk places n d"],
    seen: Bool[Tensor, "*heads places s n"],
    score: Tensor | None,
    softcap: float | None,
) -> Float[Tensor, "b h slice d"]:
    """Attention of s queries over n keys in each of some places, places * s being the slice."""
    if k.shape[3] == 0:
        return torch.zeros_like(q)
    (batch, heads, _, d), (key_heads, places) = q.shape, k.shape[1:3]
    sighted = seen.any(-1)
    blind = not bool(sighted.all())
    if blind:
        # A softmax over nothing is NaN, and so its gradient: these rows see everything, and are set to 0 afterwards.
        seen = seen | ~sighted[..., None]
    mask: Tensor | None = None if bool(seen.all()) else seen
    if score is not None:
        score = score.to(q.dtype)
        mask = score if mask is None else score.masked_fill(~mask, -torch.inf)
    # The query heads that share a key head lie in the rows, so keys are read once; places count as heads, and key heads
    # as members of the batch, so that keys cached slice by slice are read where they lie.
    group = heads // key_heads
    rows = q.reshape(batch, key_heads, group, places, -1, d).transpose(2, 3).flatten(3, 4).flatten(0, 1)
    if mask is not None and mask.ndim == 3:  # one for all heads
        mask = mask.repeat(1, group, 1)[None]
    elif mask is not None:
        mask = mask.expand(heads, *mask.shape[-3:]).unflatten(0, (key_heads, group)).transpose(1, 2).flatten(2, 3)
        mask = mask.repeat(batch, 1, 1, 1)
    attend = F.scaled_dot_product_attention if softcap is None else _Capped(softcap)
    out = attend(rows, k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask)
    out = out.reshape(batch, key_heads, places, group, -1, d).transpose(2, 3).reshape(q.shape)
    return torch.where(sighted.flatten(-2)[..., None], out, 0.0) if blind else out


class _Capped:
    """scaled_dot_product_attention with c * tanh(logits / c) in place of the logits."""

    def __init__(self, cap: float):
        self.cap = cap

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = self.cap * torch.tanh(q.to(exact) @ k.to(exact).transpose(2, 3) / (self.cap * math.sqrt(q.shape[3])))
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
        return (scores.softmax(-1) @ v.to(exact)).to(q.dtype)
