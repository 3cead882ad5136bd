"""A route that finds keys by a search in a tree: groups of blocks are halved, and the halves with the best
representatives live on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from chronotope.boxes import chunks
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.patterns import Pattern, Route, full
from chronotope.planning import Pool, Sight
from chronotope.planning.sight import LOWEST, UNKNOWN, sight
from chronotope.routing.blockwise import AT_ONCE, Cut, Cutting

SAMPLES = ("middle", "first")
Positions = Int64[Tensor, "*rows some"]


def refine(
    score: Callable[[Positions], Float[Tensor, "*rows some"]],
    count: Int64[Tensor, "*rows"],
    keep: int,
    sample: str = "middle",
) -> Int64[Tensor, "*rows keep"]:
    """The `keep` best of `count` items in a line, of each row; found by halving, not by scoring them all.

    `keep` runs tile the line. Each is cut in two halves, `score` says how good the item is that stands for a half, and
    the `keep` best halves are the runs of the next round, until every run is one item. Rounds: log2(count / keep), up
    to 2 keep scores each. Good where neighbours have similar scores.

    Args:
        score: from numbers of items, -1 for none, to scores; asked once in each round.
        sample: the item that stands for a half: its "middle" or its "first".

    Returns numbers of items, none twice; -1 in the places that are over.
    """
    edge = count[..., None] * torch.arange(keep + 1, device=count.device) // keep
    start, size = edge[..., :-1], edge.diff(dim=-1)
    while True:
        busy = (size > 1).any(-1, keepdim=True)
        if not bool(busy.any()):
            return torch.where(size > 0, start, -1)
        half = size // 2
        start, size = torch.cat([start, start + half], -1), torch.cat([half, size - half], -1)
        item = start + size // 2 if sample == "middle" else start
        found = score(torch.where(busy & (size > 0), item, -1))
        found = torch.where(found.isnan(), LOWEST, found.clamp(min=LOWEST))
        # A row that is done has no more than `keep` halves with something in them, and keeps these.
        found = torch.where(busy, found, 0.0).masked_fill(size == 0, -torch.inf)
        best = found.topk(keep, dim=-1).indices
        start, size = start.gather(-1, best), size.gather(-1, best)


@dataclass(frozen=True, repr=False)
class TreeSearch(Cutting):
    """What `tree_search` returns."""

    cut: Cut
    keep: int
    stride: int
    sample: str
    beside: Pattern | None
    ahead: bool

    def check(self, grid: Grid, key_grid: Grid) -> None:
        super().check(grid, key_grid)
        if self.beside is not None:
            self.beside.check(grid, key_grid)

    def choose(
        self, q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], sight: Sight
    ) -> Int64[Tensor, "pairs"]:
        votes, voting = self._votes(q, sight)
        keys = sight.keys.gather(k)
        may = self._may(sight)
        # The blocks that may be found, in order: what the tree is over.
        order = may.int().argsort(dim=1, descending=True, stable=True)
        batch, heads, _, most = q.shape[0], q.shape[1], *keys.shape[2:4]
        each = batch * heads * 2 * self.keep * most * q.shape[3]
        found, parts = [], chunks(len(may), each, AT_ONCE)
        largest = max((rows.stop - rows.start for rows in parts), default=0)
        room = keys.new_empty(batch * heads * largest * 2 * self.keep, most * q.shape[3])
        for rows in parts:
            answer = _Answer(votes[:, :, rows], voting[rows], keys, room, sight, rows, order[rows].to(q.device))
            count = may[rows].sum(1).expand(batch, heads, -1).to(q.device)
            found.append(answer.block(refine(answer, count, self.keep, self.sample)))
        own = torch.where(sight.own, torch.arange(sight.counts[1]), -1).sort(dim=1, descending=True).values
        own = own[:, : max(1, int(sight.own.sum(1).max()))].expand(batch, heads, -1, -1)
        return sight.listed(torch.cat([torch.cat(found, 2).cpu(), own], -1))

    def _votes(self, q: Tensor, sight: Sight) -> tuple[Float[Tensor, "b h nq votes d"], Bool[Tensor, "nq votes"]]:
        """The queries that speak for each block, and which are real."""
        pool = Sight(full(), sight.q, sight.k).queries if self.ahead else sight.queries
        pool = Pool(pool.token[:, :: self.stride], pool.real[:, :: self.stride])
        return pool.gather(q), pool.real.to(q.device)

    def _may(self, seen: Sight) -> Bool[Tensor, "nq nk"]:
        """Pairs of blocks that compete: visible, not kept anyway, and not seen anyway."""
        may = seen.visible & ~seen.own
        return may if self.beside is None else may & sight(seen.pattern & ~self.beside, seen.q, seen.k).visible

    def __repr__(self) -> str:
        given = f"keep={self.keep}, {self.cut}, stride={self.stride}, sample={self.sample!r}"
        return f"route.tree_search({given}, beside={self.beside!r}, ahead={self.ahead})"


@dataclass(frozen=True, eq=False)
class _Answer:
    """score(block) = the largest q . k over the queries that vote and the keys of the block, for some query blocks."""

    votes: Float[Tensor, "b h rows votes d"]
    voting: Bool[Tensor, "rows votes"]
    keys: Float[Tensor, "b hk sets most d"]
    room: Float[Tensor, "most_items keys"]
    sight: Sight
    rows: slice
    order: Int64[Tensor, "rows nk"]

    def block(self, item: Int64[Tensor, "b h rows some"]) -> Int64[Tensor, "b h rows some"]:
        """The block at each place of the line that is searched; -1 stays."""
        order = self.order.expand(*item.shape[:2], -1, -1)
        return torch.where(item < 0, -1, order.gather(3, item.clamp(min=0)))

    def __call__(self, item: Int64[Tensor, "b h rows some"]) -> Float[Tensor, "b h rows some"]:
        batch, heads, rows, some = item.shape
        number = self.block(item).clamp(min=0)
        if self.sight.column is not None:
            column = self.sight.column[self.rows].long().to(number.device)
            number = column.expand(batch, heads, -1, -1).gather(3, number)
        known, number = number != UNKNOWN, number.clamp(min=0)
        _, kv, sets, most, dim = self.keys.shape
        first = torch.arange(batch, device=number.device)[:, None] * kv
        slab = first + torch.arange(heads, device=number.device) // (heads // kv)
        number = (slab[:, :, None, None] * sets + number).flatten()
        chosen = torch.index_select(self.keys.view(-1, most * dim), 0, number, out=self.room[: len(number)])
        scores = self.votes @ chosen.view(batch, heads, rows, some * most, dim).transpose(-1, -2)
        best = scores.masked_fill_(~self.voting[:, :, None], -torch.inf).amax(3).unflatten(3, (some, most))
        real = self.sight.keys.real.to(number.device)[number % sets].view(best.shape)
        return best.masked_fill_(~real, -torch.inf).amax(4).masked_fill_(~known, LOWEST)


def tree_search(
    keep: int,
    *,
    stride: int = 1,
    sample: str = "middle",
    beside: Pattern | None = None,
    ahead: bool = False,
    queries: Mapping[str, int] | None = None,
    **block: int,
) -> Route:
    """About the `keep` key blocks with the key that answers a query of a query block best, found in a tree.

    score(J) = max over i of the query block, j of J, of q_i . k_j. `keep` runs of key blocks, in row-major order of
    the blocks, tile what the query block may see; see `refine`: no more than 2 keep log2(blocks / keep) blocks are
    scored instead of all. The block of the query itself is kept besides.

    Args:
        keep: how many key blocks each query block finds.
        stride: one query out of so many votes, the first of the block among them.
        sample: the block that stands for a run: its "middle" or its "first".
        beside: a pattern that the query sees anyway, such as a window; blocks that lie in it are not searched. It must
            be joined to the route all the same: `(tree_search(..., beside=near) | near) & causal()`.
        ahead: under a causal pattern, only what no query of a block has in its future votes for the block: in a
            sequence its first query. True: all its queries do. The queries then depend, in what they see but not
            where they look, on later ones of their block.
        queries, block: as in `top_blocks`.

    Example:
        >>> grid = Grid(n=256)
        >>> q = k = v = torch.randn(1, 2, grid.size, 16)
        >>> attention(q, k, v, grid=grid, where=tree_search(8, queries={"n": 32}, n=2) & causal()).shape
        torch.Size([1, 2, 256, 16])
    """
    for name, given in (("keep", keep), ("stride", stride)):
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise ChronotopeError(f"tree_search: {name}={given!r}; expected an int from 1 on.")
    if sample not in SAMPLES:
        raise ChronotopeError(f"tree_search: sample={sample!r}; expected one of {', '.join(SAMPLES)}.")
    if beside is not None and (beside.routes or beside.heads is not None):
        raise ChronotopeError(
            f"tree_search: beside={beside!r}; expected a pattern of coordinates, alike for all heads."
        )
    return TreeSearch(Cut.of("tree_search", block, queries), keep, stride, sample, beside, ahead)
