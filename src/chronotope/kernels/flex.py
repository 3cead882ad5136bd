"""FlexAttention of torch over the tiles of a plan: block mask, element masks and scores are looked up by index.

Positions are the plan's layout with every tile padded to the same length, a multiple of the kernel's own block. A pair
of tiles is a pair of blocks: a full one needs no mask, a partial one looks up the mask of its kind. Nothing here is
worked out from pairs of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from chronotope.bias import Relative
from chronotope.grid import Coords
from chronotope.kernels.call import Backend, Facts, Scores
from chronotope.kernels.relative import only_relative, relative
from chronotope.planning import Order, Tiling

BLOCK = 128  # what FlexAttention's kernels take whatever their own block sizes are
SMALLEST_HEAD = 16
PAIRS_OF_TILES = 1 << 24
MASK_BYTES = 1 << 26
PADDING = 8  # positions for each token
KERNELS = 64  # compiled in one process: one for each shape of plan and tensors; torch's own limit is 8

Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(score, batch, head, query position, key position) -> score, all scalars."""


@dataclass(frozen=True)
class Side:
    """Where the tokens of a layout lie among positions: tile i from i * length on.

    `token`: at each position, 0 where there is none; `real`: whether there is one; `place`: the position of each token;
    `sighted`: whether a token sees or is seen by any other; `whole`: whether all do and all positions are real.
    """

    length: int
    token: Int64[Tensor, "positions"]
    real: Bool[Tensor, "positions"]
    place: Int64[Tensor, "tokens"]
    sighted: Bool[Tensor, "tokens"]
    whole: bool

    @classmethod
    def of(cls, layout: Order, sighted: Bool[Tensor, "tokens"], block: int) -> Side:
        """The positions of a layout."""
        length, count = padded(layout, block), len(layout.sizes)
        tile = torch.arange(count).repeat_interleave(layout.sizes)
        position = tile * length + torch.arange(len(tile)) - layout.start[tile]
        token = torch.zeros(count * length, dtype=torch.int64)
        real = torch.zeros(count * length, dtype=torch.bool)
        token[position] = layout.order
        real[position] = torch.ones((), dtype=torch.bool)
        place = torch.empty_like(position)
        place[layout.order] = position
        return cls(length, token, real, place, sighted, bool(real.all() and sighted.all()))

    def spread(self, x: Float[Tensor, "b h tokens d"]) -> Float[Tensor, "b h positions d"]:
        """Tokens at their positions; zeros where there is none that matters, since 0 * NaN is NaN."""
        x = x.index_select(2, self.token)
        return x if self.whole else torch.where((self.real & self.sighted[self.token])[:, None], x, 0.0)

    def to(self, device: torch.device) -> Side:
        """The same on a device."""
        token, real, place, sighted = (x.to(device) for x in (self.token, self.real, self.place, self.sighted))
        return Side(self.length, token, real, place, sighted, self.whole)


def padded(layout: Order, block: int) -> int:
    """Positions of a tile: the tokens of the largest, up to a multiple of the block."""
    return -(-int(layout.sizes.max()) // block) * block


@dataclass(frozen=True)
class Tables:
    """A plan on a device, as FlexAttention reads it.

    `at`: coordinates at the positions of queries, on the axes of the keys, and of keys; `blind`: whether some query
    sees nothing.
    """

    q: Side
    k: Side
    mask: Any
    at: tuple[Coords, Coords]
    blind: bool


@lru_cache(maxsize=16)
def tables(tiles: Tiling, device: torch.device, block: int) -> Tables:
    """Kept by value: a plan is read by many calls."""
    # What is made in inference mode could not be used by a later training step.
    with torch.inference_mode(False), torch.no_grad():
        q, k = (
            Side.of(layout, sighted, block) for layout, sighted in zip((tiles.q, tiles.k), tiles.sighted, strict=True)
        )
        at = Coords.of(tiles.q.grid, q.token.to(device)), Coords.of(tiles.k.grid, k.token.to(device))
        mask = block_mask(tiles, q.length, k.length, k.real.to(device))
        blind = not bool(tiles.sighted[0].all())
        return Tables(q.to(device), k.to(device), mask, (at[0].aligned(tiles.k.grid), at[1]), blind)


def block_mask(tiles: Tiling, height: int, width: int, real: Bool[Tensor, "positions"]) -> Any:
    """The BlockMask of blocks of `height` queries and `width` keys; `real`: which key positions hold a token."""
    from torch.nn.attention.flex_attention import BlockMask

    rows = tiles.by_query
    shape = len(tiles.q.sizes), len(tiles.k.sizes)
    query, key = torch.arange(shape[0]).repeat_interleave(rows.start.diff()), rows.tile.long()
    full = (rows.kind < 0) & (tiles.k.sizes[key] == width)
    kind = torch.zeros(shape, dtype=torch.int32)
    kind[query, key] = rows.kind + 2
    kind, masks = kind.to(real.device), element_masks(tiles, height, width).to(real.device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = masks[kind[q // height, k // width], q % height, k % width]
        return seen & real[k]

    some, every = (
        tuple(x.to(real.device) for x in listed(query[chosen], key[chosen], shape)) for chosen in (~full, full)
    )
    return BlockMask.from_kv_blocks(
        some[0],
        some[1],
        every[0],
        every[1],
        BLOCK_SIZE=(height, width),
        mask_mod=mask_mod,
        seq_lengths=(shape[0] * height, shape[1] * width),
    )


def listed(
    query: Int64[Tensor, "pairs"], key: Int64[Tensor, "pairs"], shape: tuple[int, int]
) -> tuple[Int32[Tensor, "1 1 rows"], Int32[Tensor, "1 1 rows columns"]]:
    """How many key tiles each query tile has, and which, from the left; pairs come in order of the query."""
    count = torch.bincount(query, minlength=shape[0])
    before = count.cumsum(0) - count
    index = torch.zeros(shape, dtype=torch.int32)
    index[query, torch.arange(len(query)) - before[query]] = key.int()
    return count.int()[None, None], index[None, None]


def element_masks(tiles: Tiling, height: int, width: int) -> Bool[Tensor, "kinds height width"]:
    """What is seen inside a pair of tiles: nothing (0), everything (1), from 2 on the plan's kinds of partial pairs."""
    out = torch.zeros(2 + len(tiles.kinds[0]), height, width, dtype=torch.bool)
    out[1] = torch.ones((), dtype=torch.bool)
    for part, seen in tiles.kind_masks():
        out[part.start + 2 : part.stop + 2, : seen.shape[1], : seen.shape[2]] = seen
    return out


def score_mod(tiles: Tiling, scores: Scores, found: Tables) -> Score | None:
    """softcap and bias as a function of one score and its indices; None where there are neither."""
    steps: list[Score] = []
    if scores.softcap is not None:
        steps.append(_capped(scores.softcap))
    if scores.bias is not None:
        steps.extend(_relative(one, *found.at) for one in relative(scores, tiles))
    elif scores.biased:
        steps.append(_table(scores.tensor, found.q.token, found.k.token))
    if not steps:
        return None

    def every(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        for step in steps:
            score = step(score, b, h, q, k)
        return score

    return every


def _capped(softcap: float) -> Score:
    def step(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return step


def _relative(one: Relative, query: Coords, key: Coords) -> Score:
    table, q_prefix, k_prefix = one.table, query.prefix, key.prefix
    axes = [(query.axes[axis], key.axes[axis], reach) for axis, reach in one.extent.items()]

    def step(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        index = torch.zeros_like(q)
        for q_at, k_at, reach in axes:
            index = index * (2 * reach + 1) + torch.clamp(k_at[k] - q_at[q], -reach, reach) + reach
        return score + torch.where(q_prefix[q] | k_prefix[k], 0.0, table[h, index])

    return step


def _table(table: Float[Tensor, "b h nq nk"], q_token: Tensor, k_token: Tensor) -> Score:
    used = [dim for dim in range(4) if table.shape[dim] > 1]
    # A copy where it learns: FlexAttention gives no gradient to a view that it looks up in (torch 2.11 to 2.13).
    table = table.squeeze().clone() if table.requires_grad else table.squeeze()

    def step(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if not used:  # looked up all the same: what is not has no gradient there
            return score + table.reshape(1)[torch.zeros_like(b)]
        index = (b, h, q_token[q], k_token[k])
        return score + table[tuple([index[dim] for dim in used])]

    return step


def attend(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk dv"],
    tiles: Tiling,
    scores: Scores,
    inner: Callable[..., Any],
    block: int = BLOCK,
) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"]]:
    """(out, lse) by `inner`, which is `flex_attention`, compiled or as it is. The meaning is `kernels.reference`."""
    from torch.nn.attention.flex_attention import AuxRequest

    found = tables(tiles, q.device, block)
    out, extra = inner(
        found.q.spread(q),
        found.k.spread(k),
        found.k.spread(v),
        score_mod=score_mod(tiles, scores, found),
        block_mask=found.mask,
        scale=scores.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    out, lse = out.index_select(2, found.q.place), extra.lse.index_select(2, found.q.place)
    if found.blind:  # not left to the kernels of a GPU, forward and back, as long as they are untested
        sees = found.q.sighted
        out, lse = torch.where(sees[:, None], out, 0.0), torch.where(sees, lse, -torch.inf)
    return out, lse


@cache
def compiled() -> Callable[..., Any]:
    """torch.compile of `flex_attention`, which takes a second to import."""
    from torch.nn.attention.flex_attention import flex_attention

    # `fullgraph`: beyond the limit of compilations an error, not the dense formula in silence.
    kernel: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(*tensors: Tensor, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=KERNELS):
            return kernel(*tensors, **kwargs)

    return run


def forward(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk dv"],
    tiles: Tiling,
    scores: Scores,
) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"]]:
    """Attention over the tiles of a plan by compiled FlexAttention."""
    return attend(q, k, v, tiles, scores, compiled())


def reasons(facts: Facts, tiles: Tiling, scores: Scores) -> list[str]:
    """Why FlexAttention cannot, or should not, run these tiles."""
    out = only_relative(facts, tiles, scores)
    if min(facts.head_size, facts.value_size) < SMALLEST_HEAD:
        out.append(f"takes heads of {SMALLEST_HEAD} or more, got {facts.head_size} and {facts.value_size}")
    for layout, name in ((tiles.q, "query"), (tiles.k, "key")):
        positions = len(layout.sizes) * padded(layout, BLOCK)
        if positions > max(PADDING * layout.grid.size, BLOCK * BLOCK):
            out.append(
                f"pads every tile to {padded(layout, BLOCK)} tokens, which makes {positions:,} positions of "
                f"{layout.grid.size:,} {name} tokens: plan with larger tiles"
            )
    pairs = len(tiles.q.sizes) * len(tiles.k.sizes)
    if pairs > PAIRS_OF_TILES:
        out.append(
            f"lists pairs of tiles in a table: at most {PAIRS_OF_TILES:,}, got {pairs:,}: plan with larger tiles"
        )
        return out
    size = len(tiles.kinds[0]) * padded(tiles.q, BLOCK) * padded(tiles.k, BLOCK)
    if size > MASK_BYTES:
        out.append(f"holds the element mask of every kind of tile pair: at most {MASK_BYTES:,} bytes, got {size:,}")
    return out


FLEX = Backend(
    name="flex",
    about="tiles as a block mask of torch's FlexAttention, compiled when first used",
    forward=forward,
    devices=("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_sizes=f">= {SMALLEST_HEAD}",
    differentiable="once",
    tested_on="no GPU yet; its tables and scores on cpu",
    priority=5,
    also=reasons,
)
