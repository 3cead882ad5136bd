"""Decoding with routes: new tokens against a long cache, of which only the pages that the route keeps are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal, NamedTuple, overload

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from chronotope.boxes import chunks
from chronotope.checks import check_scores
from chronotope.planning.sight import LOWEST
from chronotope.routing.pages import Pages, check, grown, leads

AT_ONCE = 1 << 22
"""Numbers of keys and values gathered at once."""


@overload
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Pages,
    *,
    scale: float | int | None = None,
    softcap: float | int | None = None,
    return_lse: Literal[False] = False,
) -> tuple[Tensor, Pages]: ...


@overload
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Pages,
    *,
    scale: float | int | None = None,
    softcap: float | int | None = None,
    return_lse: Literal[True],
) -> tuple[tuple[Tensor, Tensor], Pages]: ...


def decode(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n dv"],
    state: Pages,
    *,
    scale: float | int | None = None,
    softcap: float | int | None = None,
    return_lse: bool = False,
) -> tuple[Tensor | tuple[Tensor, Tensor], Pages]:
    """Appends whole slices, and attends from them to the pages that the route keeps: (out, state), ((out, lse), state).

    What `ct.attention(..., where=state.where)` gives for these rows of the whole sequence. A slice of queries scores
    one summary of each page, then reads the pages kept: work grows with the number of pages and of tokens kept.

    q [B, H, N, D], k [B, Hk, N, D], v [B, Hk, N, Dv], N a multiple of state.grid.size -> out [B, H, N, Dv], lse
    [B, H, N]. scale, softcap: as for `ct.attention`.

    Example:
        >>> state = pages(top_blocks(2, n=4, queries={"n": 1}) & causal(), Grid(n=1), batch=1, heads=2, size=16)
        >>> for _ in range(10):
        ...     q = k = v = torch.randn(1, 2, 1, 16)
        ...     out, state = decode(q, k, v, state)
        >>> out.shape, state.length
        (torch.Size([1, 2, 1, 16]), 10)
    """
    check_scores(scale, softcap)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    first = state.length
    check(q, k, v, state)
    by = leads(q, state)
    state = grown(k, v, state, by)
    size = state.grid.size
    outs, lses = [], []
    with torch.autocast(q.device.type, enabled=False) if q.device.type in ("cpu", "cuda") else nullcontext():
        for part, read in _reads(by, state, first):
            own = q[:, :, part.start * size : part.stop * size].unflatten(2, (-1, size))
            out, lse = _attend(own, state, read, scale, softcap)
            outs.append(out.flatten(2, 3))
            lses.append(lse.flatten(2, 3))
    out = torch.cat(outs, 2).to(q.dtype)
    return (out, torch.cat(lses, 2)) if return_lse else out, state


class _Read(NamedTuple):
    """The pages that some slices read: as many for all, of which `real` are kept; `at`: the place of each slice."""

    page: Int64[Tensor, "b h slices most"]
    real: Bool[Tensor, "b h slices most"]
    at: Int64[Tensor, "slices"]


@torch.no_grad()
def _reads(by: Float[Tensor, "b h slices c"], state: Pages, first: int) -> Iterator[tuple[slice, _Read]]:
    """What each slice reads, some slices at a time; `first`: the place of the first one."""
    page = state.slices[0]
    batch, heads, n, _ = by.shape
    by_page = page * state.grid.size * (state.k.shape[3] + state.v.shape[3])
    for scored in chunks(n, batch * heads * (state.length // page + 1), AT_ONCE):
        at = torch.arange(scored.start, scored.stop, device=by.device) + first
        kept = _kept(by[:, :, scored], state, at)
        most = int(kept.sum(-1).max())
        # In order of place, what is kept first.
        index = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
        real = kept.gather(-1, index)
        for part in chunks(len(at), batch * heads * most * by_page, AT_ONCE):
            yield (
                slice(scored.start + part.start, scored.start + part.stop),
                _Read(index[:, :, part], real[:, :, part], at[part]),
            )


def _kept(
    by: Float[Tensor, "b h slices c"], state: Pages, at: Int64[Tensor, "slices"]
) -> Bool[Tensor, "b h slices pages"]:
    """The pages that the slices at these places keep, by the summaries of those that they know in full."""
    route, (page, queries) = state.route, state.slices
    own = at // page
    count = int(own[-1]) + 1
    full = min(count, state.length // page)
    scores = by.new_zeros(*by.shape[:3], 0)
    if full:
        sets = state.summary[:, :, :full].repeat_interleave(by.shape[1] // state.summary.shape[1], dim=1)
        scores = route.score(by, sets, torch.full((full,), float(page * state.grid.size)))
        scores = torch.where(scores.isnan(), LOWEST, scores.clamp(min=LOWEST))
    scores = torch.nn.functional.pad(scores, (0, count - full))
    places = torch.arange(count, device=at.device)
    inside = places == own[:, None]
    # Of its own page, only a slice that comes last in it knows all, if it chooses for itself.
    part = inside if queries > 1 else inside & (at % page < page - 1)[:, None]
    scores = scores.masked_fill(part, LOWEST).masked_fill(places > own[:, None], -torch.inf)
    return route.selection(scores, inside)


def _attend(
    q: Float[Tensor, "b h slices size d"], state: Pages, read: _Read, scale: float, softcap: float | int | None
) -> tuple[Float[Tensor, "b h slices size dv"], Float[Tensor, "b h slices size"]]:
    """Exact attention over the pages read, up to the slice itself."""
    page, size = state.slices[0], state.grid.size
    within = torch.arange(page * size, device=q.device) // size
    seen = (read.page[..., None] * page + within <= read.at[:, None, None]) & read.real[..., None]
    seen = seen.flatten(3)
    k, v = (_gathered(x, read.page, q.shape[1], page * size) for x in (state.k, state.v))
    exact = torch.promote_types(q.dtype, torch.float32)
    if not bool(seen.all()):
        # What a slice does not see must not be multiplied, be it NaN.
        k, v = (x.masked_fill(~seen[..., None], 0.0) for x in (k, v))
    logits = scale * (q.to(exact) @ k.to(exact).transpose(-1, -2))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # A softmax over nothing is NaN: a slice without any page has zeros for values, and so for its output.
    blind = ~seen.any(-1)[..., None, None]
    logits = logits.masked_fill(~(seen[..., None, :] | blind), -torch.inf)
    lse = logits.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
    return logits.softmax(-1) @ v.to(exact), lse


def _gathered(
    x: Float[Tensor, "b hk room d"], index: Int64[Tensor, "b h slices most"], heads: int, tokens: int
) -> Float[Tensor, "b h slices kept d"]:
    """The tokens of some pages of each head, and of nothing else."""
    held = x.unflatten(2, (-1, tokens))
    batch, kv_heads, count = held.shape[:3]
    member = torch.arange(batch, device=x.device)[:, None] * kv_heads
    owner = member + torch.arange(heads, device=x.device) // (heads // kv_heads)
    at = owner[:, :, None, None] * count + index
    return held.flatten(0, 2).index_select(0, at.flatten()).unflatten(0, index.shape).flatten(3, 4)
