"""Keys and values so far, in pages: the blocks among which a route chooses, with what stands for each of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import ref

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.carried import Carried
from chronotope.checks import check_tensors
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.patterns import And, Pattern
from chronotope.patterns.order import Causal
from chronotope.planning import Pool
from chronotope.routing.blockwise import Blockwise
from chronotope.routing.selections import Sampled, Selection

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
        return _cut(self.where, self.grid)

    @property
    def route(self) -> Blockwise:
        """What chooses."""
        return _parts(self.where)[0][0]


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
    _, queries = _cut(where, grid)
    kv_heads, value_size = heads if kv_heads is None else kv_heads, size if value_size is None else value_size
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ChronotopeError(f"pages: heads={heads} is not a multiple of kv_heads={kv_heads}.")
    k = torch.zeros(batch, kv_heads, 0, size, dtype=dtype, device=device)
    one = _parts(where)[0][0].summary(k.new_zeros(batch, heads, 1, size), _sets(1, 1))
    lead = one.new_zeros(batch, heads, one.shape[3]) if queries > 1 else None
    summary = one.new_zeros(batch, kv_heads, 0, one.shape[3])
    return Pages(k, k.new_zeros(batch, kv_heads, 0, value_size), summary, lead, 0, grid, where, Room())


def append(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], v: Float[Tensor, "b hk n dv"], state: Pages
) -> Pages:
    """The cache with whole slices more, such as a prompt whose output `ct.attention` computes.

    q is looked at only where several slices of queries share the choice of the first. The state is left as it was.
    """
    check(q, k, v, state)
    return grown(k, v, state, None if state.lead is None else leads(q, state))


def _parts(where: Pattern) -> tuple[list[Blockwise], list[Causal], int]:
    """The routes and the orders that are joined, and how many patterns in all."""
    parts = where.parts if isinstance(where, And) else ()
    return [x for x in parts if isinstance(x, Blockwise)], [x for x in parts if isinstance(x, Causal)], len(parts)


@lru_cache(maxsize=256)
def _cut(where: Pattern, grid: Grid) -> tuple[int, int]:
    """Slices of a page, and slices of queries that choose together; raises where this cannot be decoded."""
    axis = grid.axes[0]
    fits = f"expected a route & causal({axis!r}), such as route.top_blocks(8, {axis}=64) & causal({axis!r})"
    if grid.prefix or grid.shape[0] != 1:
        one = grid.replace(prefix=0, **{axis: 1})
        raise ChronotopeError(f"{grid!r}: expected one slice of the first axis, without a prefix; give {one!r}.")
    routes, orders, parts = _parts(where)
    if (parts, len(routes), len(orders)) != (2, 1, 1):
        raise ChronotopeError(f"{where!r} cannot be decoded: {fits}.")
    route, order = routes[0], orders[0]
    if order.strict or not (order.axes == (axis,) or (not order.axes and grid.size == 1)):
        raise ChronotopeError(f"{where!r} cannot be decoded along {axis!r}, slice by slice: {fits}.")
    chooses = route.selection
    if type(route).choose is not Blockwise.choose or chooses.together or _draws(chooses):
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
    return page[0], own[0]


def _draws(selection: Selection) -> bool:
    """Whether it, or a part of it, draws numbers by the shape of the call."""
    parts: list[Any] = [getattr(selection, x.name) for x in fields(selection)] if is_dataclass(selection) else []
    return isinstance(selection, Sampled) or any(isinstance(part, Selection) and _draws(part) for part in parts)


def grown(k: Tensor, v: Tensor, state: Pages, by: Float[Tensor, "b h slices c"] | None) -> Pages:
    """The state after these slices; `by`: their `leads`, which a state with a lead needs."""
    route, (page, _) = state.route, state.slices
    size, held = state.grid.size, (state.k, state.v, state.summary)
    first, end = state.length, state.length + k.shape[2] // size
    ours = state.room.ends(state.k, first) and not any(x.requires_grad for x in (k, v, *held))
    ours &= torch.is_inference_mode_enabled() or not any(x.is_inference() for x in held)
    keys, values = (_written(x, new, first * size, page * size, ours) for x, new in ((state.k, k), (state.v, v)))
    before, after = first // page, end // page
    found = state.summary[:, :, :0]
    if after > before:
        with torch.no_grad():
            full = keys[:, :, before * page * size : after * page * size]
            found = route.summary(full, _sets(after - before, page * size))
    summary = _written(state.summary, found, before, 1, ours)
    room = state.room if keys is state.k else Room(keys)
    # Of a buffer left behind too: its summaries may have been written on.
    room.used, state.room.used = end, end if ours else state.room.used
    lead = None if state.lead is None or by is None else by[:, :, -1].clone()
    return replace(state, k=keys, v=values, summary=summary, lead=lead, length=end, room=room)


def check(q: Tensor, k: Tensor, v: Tensor, state: Pages) -> None:
    """Raises ChronotopeError unless these are whole slices that fit the cache."""
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
def leads(q: Tensor, state: Pages) -> Float[Tensor, "b h slices c"]:
    """The summary by which each coming slice chooses: that of the first slice of its block of queries.

    The other slices of a block come after it, so that they are in its future.
    """
    queries = state.slices[1]
    n = q.shape[2] // state.grid.size
    own = state.route.summary(q, _sets(n, state.grid.size))
    if state.lead is None:
        return own
    at = torch.arange(state.length, state.length + n, device=q.device)
    begun = (at - at % queries - state.length).clamp(min=-1) + 1  # 0: before these slices
    return torch.cat((state.lead[:, :, None].to(own), own), 2).index_select(2, begun)


@lru_cache(maxsize=16)
def _sets(count: int, tokens: int) -> Pool:
    """Sets of as many tokens each, one after the other."""
    with torch.inference_mode(False):
        return Pool(torch.arange(count * tokens).view(count, tokens), torch.ones(count, tokens, dtype=torch.bool))
