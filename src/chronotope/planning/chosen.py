"""What routes chose, as tiles: the pairs that every kernel computes, for each head of each batch element its own.

The heads of a batch lie one after the other in one long sequence (`Copies`), so that kernels know nothing of routes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import chunks, identify
from chronotope.patterns import Pattern
from chronotope.planning.choice import ALL, NONE, Choice, Decided
from chronotope.planning.layout import Copies, Layout
from chronotope.planning.tiles import Tiles
from chronotope.planning.tiling import PAIRS_AT_ONCE, Found, Tiling

NOBODY = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Chosen(Tiling):
    """The pairs of tiles that an expression of routes and patterns shows, for `slabs` heads one after the other.

    `pair`: numbers of (slab, query tile, key tile). `kind`: of the element mask, -1 where everything is visible.
    `member`: a pair of each kind. `group`: query heads that share a key head. `live`: queries that may see something,
    and keys that may be seen, whatever is chosen; None where more is seen the less is chosen.
    """

    where: Pattern
    layouts: tuple[Layout, Layout]
    choices: dict[Pattern, Choice]
    slabs: int
    group: int
    live: tuple[Bool[Tensor, "n_query"], Bool[Tensor, "n_key"]] | None
    pair: Int64[Tensor, "p"]
    kind: Int64[Tensor, "p"]
    member: Int64[Tensor, "kinds"]

    @property
    def pattern(self) -> None:  # type: ignore[override]
        return None

    @cached_property
    def q(self) -> Copies:  # type: ignore[override]
        return Copies(self.layouts[0], self.slabs)

    @cached_property
    def k(self) -> Copies:  # type: ignore[override]
        return Copies(self.layouts[1], self.slabs // self.group)

    def _apart(self, pair: Int64[Tensor, "n"]) -> tuple[Tensor, Tensor, Tensor]:
        """(slab, query tile, key tile)."""
        rows, cols = (len(layout.sizes) for layout in self.layouts)
        return pair // cols // rows, pair // cols % rows, pair % cols

    @cached_property
    def found(self) -> Found:
        slab, _, col = self._apart(self.pair)
        cols = len(self.layouts[1].sizes)
        return Found(self.pair // cols, slab // self.group * cols + col, self.kind < 0)

    @cached_property
    def partial_kinds(self) -> tuple[Int64[Tensor, "p"], Int64[Tensor, "p"], Int64[Tensor, "p"]]:
        partial = ~self.found.full
        return self.found.rows[partial], self.found.cols[partial], self.kind[partial]

    @cached_property
    def kinds(self) -> tuple[Int64[Tensor, "kinds"], Int64[Tensor, "kinds"]]:
        return self.found.rows[self.member], self.found.cols[self.member]

    def mask_of(self, kinds: Int64[Tensor, "n"]) -> Bool[Tensor, "n q_tokens k_tokens"]:
        pairs = self.pair[self.member[kinds]]
        _, row, col = self._apart(pairs)
        (x, real_x), (y, real_y) = self.layouts[0].boxes(row).tokens(), self.layouts[1].boxes(col).tokens()
        n, width, depth = *real_x.shape, real_y.shape[1]
        decided = {route: Decided(choice.seen(pairs, x, y)) for route, choice in self.choices.items()}
        seen = self.where.given(decided).sees(x.view(n, width, 1), y.view(n, 1, depth))
        return seen & real_x[:, :, None] & real_y[:, None, :]

    @cached_property
    def sighted(self) -> tuple[Bool[Tensor, "n_query"], Bool[Tensor, "n_key"]]:
        """Queries that may see something of what was chosen, and keys that may be seen: more than do, at worst."""
        if self.live is None:
            return super().sighted
        without = _without(self.where, self.layouts, self.choices).sighted
        both = []
        for side in (0, 1):
            lit = without[side].expand(self.slabs, -1)
            for choice in self.choices.values():
                lit = lit | (choice.lit[side][:, (choice.q, choice.k)[side].fine.tile_of] & self.live[side])
            both.append(lit)
        return both[0].flatten(), both[1].unflatten(0, (-1, self.group)).any(1).flatten()

    def strips(self, rows: range) -> Iterator[tuple[Int64[Tensor, "tokens"], Bool[Tensor, "slabs tokens nk"]]]:
        """Some query tiles of every slab, one tile at a time: its tokens, and what they see."""
        q, k = self.layouts
        slab, row, col = self._apart(self.pair)
        for tile in rows:
            tokens = q.order[q.start[tile] : q.start[tile + 1]]
            out = torch.zeros(self.slabs, len(tokens), k.grid.size, dtype=torch.bool)
            here = row == tile
            whole = torch.zeros(self.slabs, len(k.sizes), dtype=torch.bool)
            full = here & (self.kind < 0)
            whole[slab[full], col[full]] = torch.ones((), dtype=torch.bool)
            out |= whole[:, None, k.tile_of]
            partial = (here & (self.kind >= 0)).nonzero().flatten()
            for part in chunks(len(partial), len(tokens) * int(k.sizes.max()), PAIRS_AT_ONCE):
                some = partial[part]
                masks = self.mask_of(self.kind[some])
                pair, within = (torch.arange(masks.shape[2]) < k.sizes[col[some]][:, None]).nonzero().T
                keys = k.order[k.start[col[some[pair]]] + within]
                out[slab[some[pair]], :, keys] = masks[pair, : len(tokens), within]
            yield tokens, out

    def masks(self) -> Bool[Tensor, "slabs nq nk"]:
        """What every query of every slab sees, in token order."""
        q, k = self.layouts
        out = torch.empty(self.slabs, q.grid.size, k.grid.size, dtype=torch.bool)
        for tokens, seen in self.strips(range(len(q.sizes))):
            out[:, tokens] = seen
        return out

    def mask(self) -> Bool[Tensor, "n_query n_key"]:
        masks = self.masks()
        out = torch.zeros(self.slabs, masks.shape[1], self.slabs // self.group, masks.shape[2], dtype=torch.bool)
        slab = torch.arange(self.slabs)
        out[slab, :, slab // self.group] = masks
        return out.flatten(2).flatten(0, 1)

    @cached_property
    def visible_by_slab(self) -> Int64[Tensor, "slabs"]:
        """Number of visible pairs of tokens in each slab."""
        slab, row, col = self._apart(self.pair)
        area = self.layouts[0].sizes[row] * self.layouts[1].sizes[col]
        for part, masks in self.kind_masks():
            here = (self.kind >= part.start) & (self.kind < part.stop)
            area[here] = masks.flatten(1).sum(1)[self.kind[here] - part.start]
        return torch.zeros(self.slabs, dtype=torch.int64).index_add_(0, slab, area)


def assemble(
    where: Pattern,
    layouts: tuple[Layout, Layout],
    choices: dict[Pattern, Choice],
    slabs: int,
    group: int,
    live: tuple[Bool[Tensor, "n_query"], Bool[Tensor, "n_key"]] | None,
) -> Chosen:
    """The tiles of an expression, its routes having chosen; arguments as the fields of `Chosen`."""
    q, k = layouts
    rows, cols = len(q.sizes), len(k.sizes)
    touched = torch.unique(torch.cat([NOBODY, *(choice.pair for choice in choices.values())]))
    shares = [choice.share(touched) for choice in choices.values()]
    combination, mixed = torch.zeros_like(touched), torch.zeros(len(touched), dtype=torch.bool)
    for i, (some, every) in enumerate(shares):
        combination += every.long() << i
        mixed |= some & ~every
    rest = _untouched(_without(where, layouts, choices), touched, slabs)
    plain = torch.cat([touched[~mixed], rest])
    combination = torch.cat([combination[~mixed], torch.zeros_like(rest)])
    visible, kind = _static(where, layouts, list(choices), plain % (rows * cols), combination)
    plain, kind = plain[visible], kind[visible]
    own = touched[mixed]
    kind = torch.cat([kind, _beyond(kind) + _mixed(where, layouts, choices, own)])
    pair = torch.cat([plain, own])
    order = pair.argsort()
    pair, kind = pair[order], kind[order]
    member = torch.zeros(_beyond(kind), dtype=torch.int64)
    partial = (kind >= 0).nonzero().flatten()
    member[kind[partial]] = partial
    return Chosen(where, layouts, choices, slabs, group, live, pair, kind, member)


def _mixed(
    where: Pattern, layouts: tuple[Layout, Layout], choices: dict[Pattern, Choice], pairs: Int64[Tensor, "p"]
) -> Int64[Tensor, "p"]:
    """The kind of mask of pairs of which some blocks were chosen: the same where the same blocks were."""
    rows, cols = (len(layout.sizes) for layout in layouts)
    blocks = [choice.blocks(pairs) for choice in choices.values()]
    if not len(pairs) or any(some is None for some in blocks):
        return torch.arange(len(pairs))
    tiles, inverse = torch.unique(pairs % (rows * cols), return_inverse=True)
    q, k = layouts[0].boxes(tiles // cols), layouts[1].boxes(tiles % cols)
    alike = where.given(dict.fromkeys(choices, ALL)).alike(q, k)
    if len(choices) == 1:  # where all is seen if chosen, and nothing else, the choice is the mask
        every = where.given(dict.fromkeys(choices, ALL)).over(q, k)[1]
        alike[every & ~where.given(dict.fromkeys(choices, NONE)).over(q, k)[0]] = -1
    geometry = identify(alike, *q.sizes().values(), *k.sizes().values())
    return identify(geometry[inverse], *(some for some in blocks if some is not None))


def _beyond(kind: Tensor) -> int:
    """The first number that is not taken."""
    return int(kind.max()) + 1 if len(kind) else 0


def _without(where: Pattern, layouts: tuple[Layout, Layout], routes: Iterable[Pattern]) -> Tiles:
    """What is seen although no route chose anything."""
    return _tiles(where.given(dict.fromkeys(routes, NONE)), *layouts)


@lru_cache(maxsize=64)
def _tiles(pattern: Pattern, q: Layout, k: Layout) -> Tiles:
    return Tiles(pattern, q, k)


def _untouched(without: Tiles, touched: Int64[Tensor, "n"], slabs: int) -> Int64[Tensor, "m"]:
    """The pairs where something is seen although no route chose anything of them."""
    found, rows, cols = without.found, len(without.q.sizes), len(without.k.sizes)
    every = (torch.arange(slabs)[:, None] * rows * cols + found.rows * cols + found.cols).flatten()
    return every[~torch.isin(every, touched)]


def _static(
    where: Pattern,
    layouts: tuple[Layout, Layout],
    routes: list[Pattern],
    tiles: Int64[Tensor, "p"],
    combination: Int64[Tensor, "p"],
) -> tuple[Bool[Tensor, "p"], Int64[Tensor, "p"]]:
    """Of pairs of which each route chose all or nothing: whether something is visible, and the kind of mask."""
    rows, cols = (len(layout.sizes) for layout in layouts)
    code, inverse = torch.unique(combination * (rows * cols) + tiles, return_inverse=True)
    visible, kind = torch.zeros(len(code), dtype=torch.bool), torch.full((len(code),), -1)
    for c in torch.unique(code // (rows * cols)).tolist():
        here = (code // (rows * cols) == c).nonzero().flatten()
        own = code[here] % (rows * cols)
        q, k = layouts[0].boxes(own // cols), layouts[1].boxes(own % cols)
        pattern = where.given({route: ALL if c >> i & 1 else NONE for i, route in enumerate(routes)})
        some, every = pattern.over(q, k)
        visible[here] = some
        partial = some & ~every
        if bool(partial.any()):
            alike = pattern.alike(q[partial], k[partial])
            found = identify(alike, *q[partial].sizes().values(), *k[partial].sizes().values())
            kind[here[partial]] = _beyond(kind) + found
    return visible[inverse], kind[inverse]
