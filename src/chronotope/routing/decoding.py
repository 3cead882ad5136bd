"""Decoding with routes: new tokens against a long cache, of which only the pages that the route keeps are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload
from weakref import ref

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from chronotope.boxes import chunks
from chronotope.carried import Carried
from chronotope.checks import check_scores, check_tensors
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.patterns import And, Pattern
from chronotope.patterns.order import Causal
from chronotope.planning import Pool
from chronotope.planning.sight import LOWEST
from chronotope.routing.blockwise import Blockwise
from chronotope.routing.selections import Sampled

AT_ONCE = 1 << 22
"""Numbers of keys and values gathered at once."""
ENDLESS = 1 << 40
"""Slices of an axis that has not ended."""


class Room:
    """Who may write behind the tokens of a buffer: the state whose end is that of all that was written.

    A state is left as it was when one more token joins it: tokens are written behind its end, once. Who comes second,
    from the same state again (a fork), or with tensors of its own (a state selected, moved, read), writes a copy.
    """

    def __init__(self, buffer: Tensor | None = None, used: int = 0):
        self.used = used
        self._buffer = None if buffer is None else ref(buffer)

    def ends(self, buffer: Tensor, used: int) -> bool:
        """Whether the buffer is the one kept here, and nothing was written in it behind `used`."""
        return self._buffer is not None and self._buffer() is buffer and self.used == used

    def __reduce__(self) -> tuple[Any, ...]:
        return Room, ()


@dataclass(frozen=True)
class Pages(Carried):
    """Keys and values so far, in pages: the blocks of `where`'s route, which lie along the first axis.

    k [B, Hk, room, D], v [B, Hk, room, Dv]: the first `length` slices are real, and room behind them. summary
    [B, Hk, pages, C]: what stands for each page that is full, made once, when it fills. lead [B, H, C]: the query
    that the block of queries begun chose by; None where each slice chooses for itself. `grid`: one slice.
    """

    k: Float[Tensor, "b hk room d"]
    v: Float[Tensor, "b hk room dv"]
    summary: Float[Tensor, "b hk pages c"]
    lead: Float[Tensor, "b h c"] | None
    length: int
    grid: Grid
    where: Pattern
    room: Room

    @property
    def slices(self) -> tuple[int, int]:
        """Slices of a page, and slices of queries that share a choice."""
        return _cut(self.where, self.grid)[1:]


def pages(
    where: Pattern,
    grid: Grid,
    *,
    batch: int,
    heads: int,
    size: int,
    kv_heads: int | None = None,
    value_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Pages:
    """An empty cache for `append` and `decode`.

    Args:
        where: a route & `causal` along the first axis, such as `top_blocks(8, n=64, queries={"n": 1}) & causal()`. The
            route cuts the first axis alone, and its blocks of queries (default: as those of keys) divide the pages.
        grid: of ONE slice of the first axis: Grid(n=1) for a sequence, Grid(t=1, h=8, w=8) for frames.
        batch, heads, size, kv_heads, value_size: B, H, D, Hk, Dv.

    Raises ChronotopeError: a pattern that cannot be decoded; it says why.
    """
    route, _, queries = _cut(where, grid)
    kv_heads, value_size = heads if kv_heads is None else kv_heads, size if value_size is None else value_size
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ChronotopeError(f"pages: heads={heads} is not a multiple of kv_heads={kv_heads}.")
    k = torch.zeros(batch, kv_heads, 0, size, dtype=dtype, device=device)
    one = route.summary(k.new_zeros(batch, heads, 1, size), _sets(1, 1))
    lead = one.new_zeros(batch, heads, one.shape[3]) if queries > 1 else None
    summary = one.new_zeros(batch, kv_heads, 0, one.shape[3])
    return Pages(k, k.new_zeros(batch, kv_heads, 0, value_size), summary, lead, 0, grid, where, Room())


def append(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], v: Float[Tensor, "b hk n dv"], state: Pages
) -> Pages:
    """The cache with whole slices more, such as a prompt whose output `ct.attention` computes. The state is left as it
    was. q is of use only where several slices of queries share the choice of the first."""
    return _append(q, k, v, state)[0]


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
    state, leads = _append(q, k, v, state)
    size = state.grid.size
    outs, lses = [], []
    with torch.autocast(q.device.type, enabled=False) if q.device.type in ("cpu", "cuda") else nullcontext():
        for part, read in _reads(leads, state, first):
            own = q[:, :, part.start * size : part.stop * size].unflatten(2, (-1, size))
            out, lse = _attend(own, state, read, scale, softcap)
            outs.append(out.flatten(2, 3))
            lses.append(lse.flatten(2, 3))
    out = torch.cat(outs, 2).to(q.dtype)
    return (out, torch.cat(lses, 2)) if return_lse else out, state


@lru_cache(maxsize=256)
def _cut(where: Pattern, grid: Grid) -> tuple[Blockwise, int, int]:
    """The route, slices of a page, and slices of queries that choose together; raises where this cannot be decoded."""
    axis = grid.axes[0]
    fits = f"expected a route & causal({axis!r}), such as route.top_blocks(8, {axis}=64) & causal({axis!r})"
    if grid.prefix or grid.shape[0] != 1:
        one = grid.replace(prefix=0, **{axis: 1})
        raise ChronotopeError(f"{grid!r}: expected one slice of the first axis, without a prefix; give {one!r}.")
    parts = where.parts if isinstance(where, And) else ()
    routes = [part for part in parts if isinstance(part, Blockwise)]
    orders = [part for part in parts if isinstance(part, Causal)]
    if len(parts) != 2 or len(routes) != 1 or len(orders) != 1:
        raise ChronotopeError(f"{where!r} cannot be decoded: {fits}.")
    route, order = routes[0], orders[0]
    if order.strict or not (order.axes == (axis,) or (not order.axes and grid.size == 1)):
        raise ChronotopeError(f"{where!r} cannot be decoded along {axis!r}, slice by slice: {fits}.")
    chooses = route.selection
    if type(route).choose is not Blockwise.choose or chooses.together or isinstance(chooses, Sampled):
        raise ChronotopeError(
            f"{route!r} cannot be decoded: what a query keeps depends on the other queries of the call. Use a "
            "selection for each query by its scores alone, such as TopK or Mass."
        )
    route.cut.check(grid, grid)
    long = grid.replace(**{axis: ENDLESS})
    own, page = route.cut.tiles(long, long)
    if own[1:] != grid.shape[1:] or page[1:] != grid.shape[1:]:
        raise ChronotopeError(f"{route!r} cannot be decoded: pages are blocks of the first axis, {axis!r}, alone.")
    if page[0] == ENDLESS or page[0] % own[0]:
        raise ChronotopeError(
            f"{route!r} cannot be decoded: blocks of queries ({own[0]} on {axis!r}) must divide those of keys "
            f"({page[0]}); name both, such as {axis}=64, queries={{{axis!r}: 1}}."
        )
    return route, page[0], own[0]


def _append(q: Tensor, k: Tensor, v: Tensor, state: Pages) -> tuple[Pages, Float[Tensor, "b h slices c"]]:
    """The state after these slices, and the summary of queries by which each slice chooses."""
    _check(q, k, v, state)
    route, page, _ = _cut(state.where, state.grid)
    size = state.grid.size
    first, n = state.length, k.shape[2] // size
    fixed = any(x.requires_grad for x in (k, v, state.k, state.v))
    fixed |= state.k.is_inference() and not torch.is_inference_mode_enabled()
    ours = state.room.ends(state.k, first) and not fixed
    keys, values = (_written(held, new, first * size, page * size, ours) for held, new in ((state.k, k), (state.v, v)))
    before, after = first // page, (first + n) // page
    summary = state.summary
    if after > before:
        full = keys[:, :, before * page * size : after * page * size]
        found = route.summary(full, _sets(after - before, page * size))
        summary = _written(summary, found, before, 1, ours)
    room = state.room if keys is state.k else Room(keys)
    room.used = first + n
    leads, lead = _leads(q, state)
    state = replace(state, k=keys, v=values, summary=summary, lead=lead, length=first + n, room=room)
    return state, leads


def _check(q: Tensor, k: Tensor, v: Tensor, state: Pages) -> None:
    size = state.grid.size
    n = k.shape[2] if isinstance(k, Tensor) and k.ndim == 4 else 0
    if not n or n % size:
        raise ChronotopeError(f"decode: {n} tokens of k; expected whole slices of {size}, of {state.grid!r}.")
    grid = state.grid.replace(**{state.grid.axes[0]: n // size})
    check_tensors(q, k, v, grid, grid)
    given = tuple((*x.shape[:2], x.shape[3]) for x in (k, v))
    held = tuple((*x.shape[:2], x.shape[3]) for x in (state.k, state.v))
    if given != held or (state.length and k.dtype != state.k.dtype):
        raise ChronotopeError(
            f"decode: k {list(k.shape)} and v {list(v.shape)} of {k.dtype}; the cache is for [B, heads, size] = "
            f"{held[0]} and {held[1]} of {state.k.dtype}."
        )
    if state.lead is not None and state.lead.shape[1] != q.shape[1]:
        raise ChronotopeError(f"decode: q has {q.shape[1]} heads; the cache is for {state.lead.shape[1]}.")


def _written(held: Tensor, new: Tensor, used: int, whole: int, ours: bool) -> Tensor:
    """`held` with `new` behind its first `used` entries: the same tensor where there is room and it is ours, else a
    copy with room for as many again, a multiple of `whole`."""
    end = used + new.shape[2]
    if ours and end <= held.shape[2]:
        held[:, :, used:end] = new
        return held
    spare = -(-2 * end // whole) * whole - end
    return torch.cat((held[:, :, :used].to(new), new, new.new_zeros(*new.shape[:2], spare, new.shape[3])), 2)


@torch.no_grad()
def _leads(q: Tensor, state: Pages) -> tuple[Float[Tensor, "b h slices c"], Float[Tensor, "b h c"] | None]:
    """The summary by which each slice chooses: that of the first slice of its block of queries; and the last of them.

    The other slices of a block come after it, so that they are in its future.
    """
    route, _, queries = _cut(state.where, state.grid)
    n = q.shape[2] // state.grid.size
    own = route.summary(q, _sets(n, state.grid.size))
    if state.lead is None:
        return own, None
    at = torch.arange(state.length, state.length + n, device=q.device)
    begun = (at - at % queries - state.length).clamp(min=-1) + 1  # 0: before these slices
    leads = torch.cat((state.lead[:, :, None].to(own), own), 2).index_select(2, begun)
    return leads, leads[:, :, -1].clone()


class _Read(NamedTuple):
    """The pages that some slices read: as many for all, of which `real` are kept; `at`: the place of each slice."""

    page: Int64[Tensor, "b h slices most"]
    real: Bool[Tensor, "b h slices most"]
    at: Int64[Tensor, "slices"]


@torch.no_grad()
def _reads(leads: Float[Tensor, "b h slices c"], state: Pages, first: int) -> Iterator[tuple[slice, _Read]]:
    """What each slice reads, some slices at a time; `first`: the place of the first one."""
    page = state.slices[0]
    batch, heads, n, _ = leads.shape
    by_page = page * state.grid.size * (state.k.shape[3] + state.v.shape[3])
    for scored in chunks(n, batch * heads * (state.length // page + 1), AT_ONCE):
        at = torch.arange(scored.start, scored.stop, device=leads.device) + first
        kept = _kept(leads[:, :, scored], state, at // page)
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
    leads: Float[Tensor, "b h slices c"], state: Pages, own: Int64[Tensor, "slices"]
) -> Bool[Tensor, "b h slices pages"]:
    """The pages that each slice keeps, lying itself in page `own`: of those before, by their summaries."""
    route, page, _ = _cut(state.where, state.grid)
    last = int(own[-1])
    scores = leads.new_zeros(*leads.shape[:3], 0)
    if last:
        sets = state.summary[:, :, :last].repeat_interleave(leads.shape[1] // state.summary.shape[1], dim=1)
        count = torch.full((last,), float(page * state.grid.size))
        scores = route.score(leads, sets, count)
        scores = torch.where(scores.isnan(), LOWEST, scores.clamp(min=LOWEST))
    scores = torch.nn.functional.pad(scores, (0, 1))
    places = torch.arange(last + 1, device=own.device)
    inside = places == own[:, None]
    scores = scores.masked_fill(inside, LOWEST).masked_fill(places > own[:, None], -torch.inf)
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
    logits = logits.masked_fill(~seen[..., None, :], -torch.inf)
    return logits.softmax(-1) @ v.to(exact), logits.logsumexp(-1)


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


@lru_cache(maxsize=256)
def _sets(count: int, tokens: int) -> Pool:
    """Sets of as many tokens each, one after the other."""
    with torch.inference_mode(False):
        return Pool(torch.arange(count * tokens).view(count, tokens), torch.ones(count, tokens, dtype=torch.bool))
