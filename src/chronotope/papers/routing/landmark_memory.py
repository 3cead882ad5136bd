"""The cache of Landmark Attention: finished blocks, where they are placed, and who reads which."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from chronotope.attention import attention
from chronotope.carried import Carried
from chronotope.grid import Grid
from chronotope.position import Rope

SHARES = ("token_head", "heads", "tokens")
Part = tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]


@dataclass(frozen=True)
class Cache(Carried):
    """Finished blocks, keys before rotation: keys, values [B, H, C * block, D], anywhere; landmarks [B, H, C, D]."""

    keys: Float[Tensor, "b h n d"]
    values: Float[Tensor, "b h n dv"]
    landmarks: Float[Tensor, "b h c d"]
    block: int

    def grown(self, k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n dv"]) -> Cache:
        """With more blocks, landmarks included. What was given is left as it was."""
        if not k.shape[2]:
            return self
        k, v = (x.unflatten(2, (-1, self.block + 1)) for x in (k, v))
        keys, values = (
            torch.cat((old, new[:, :, :, : self.block].flatten(2, 3).to(old.device)), 2)
            for old, new in ((self.keys, k), (self.values, v))
        )
        return replace(self, keys=keys, values=values, landmarks=torch.cat((self.landmarks, k[:, :, :, self.block]), 2))


@dataclass(frozen=True)
class LandmarkState(Carried):
    """The cache, and k, v [B, H, up to block, D] of the block that is not full yet; keys before rotation."""

    cache: Cache
    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n dv"]
    grid: Grid


def rotated(x: Float[Tensor, "b h n d"], position: Rope | None, place: Tensor) -> Float[Tensor, "b h n d"]:
    """x at places [N] or, each head its own, [B, H, N]."""
    if position is None:
        return x
    if place.ndim == 1:
        return position(x, coords=place[:, None])
    own = x.flatten(0, 1)[:, None]
    return position(own, coords=place.expand(*x.shape[:3]).flatten(0, 1)[..., None])[:, 0].unflatten(0, x.shape[:2])


def scored_slots(count: int, keep: int, device: torch.device) -> Int64[Tensor, "count"]:
    """The slot of each cached block while blocks are chosen; the chunk begins in the one after the last.

    Beyond keep + 1 blocks, all but the latest share slot 0.
    """
    return (torch.arange(count, device=device) - max(count - keep - 1, 0)).clamp(min=0)


def read_slots(index: Int64[Tensor, "b h n kept"], count: int, keep: int) -> Int64[Tensor, "b h n kept"]:
    """The slot of each block that is read, `index` being sorted: old ones first, the latest `keep` last."""
    slot = torch.arange(index.shape[3], device=index.device)
    return slot + ((count > keep) & (index >= count - keep)).long()


def chosen_blocks(scores: Float[Tensor, "b h n count"], keep: int, share: str) -> Int64[Tensor, "b h n kept"]:
    """The blocks that each query reads, in order of time."""
    weights = scores.detach().softmax(-1)
    if share == "heads":
        weights = weights.amax(1, keepdim=True)
    elif share == "tokens":
        weights = weights.amax(2, keepdim=True)
    best = weights.topk(min(keep, scores.shape[3])).indices.sort(-1).values
    return best.expand(*scores.shape[:3], -1)


def read(
    q: Float[Tensor, "b h n d"],
    place: Int64[Tensor, "n"],
    cache: Cache,
    position: Rope | None,
    keep: int | None = None,
    share: str = "token_head",
) -> list[Part]:
    """What queries, at places counted from the first block of the chunk, read of the cache, without rotation as yet.

    A list of (out, score of the landmark), one for each block that a query reads, for `ct.merge`.
    """
    count, block = cache.landmarks.shape[2], cache.block
    if not count:
        return []
    size, keep = block + 1, count if keep is None else keep
    slots = scored_slots(count, keep, q.device)
    place = place + size * (slots[-1] + 1)
    scale = q.shape[3] ** -0.5
    marks = rotated(cache.landmarks, position, size * slots + block)
    index = chosen_blocks(scale * rotated(q, position, place) @ marks.transpose(2, 3), keep, share)
    # A rotary score knows only how far query and key are apart: keys stay where they are in their block, and each
    # query is turned by its distance from the block. One row for each block that is read.
    away = (place[:, None] - size * read_slots(index, count, keep)).transpose(2, 3)
    kept = index.shape[3]
    rows = rotated(q.repeat(1, 1, kept, 1), position, away.flatten(2))
    within = rotated(cache.landmarks, position, torch.full((count,), block, device=q.device))
    wanted = index.transpose(2, 3).flatten(2)
    score = scale * (rows * within.take_along_dim(wanted[..., None], 2)).sum(-1)
    # What is fetched, and nothing else, leaves the place where the cache lies.
    first = count * torch.arange(len(q) * q.shape[1], device=q.device).view(*q.shape[:2], 1)
    fetched = (first + wanted).flatten().to(cache.keys.device)
    keys, values = (
        x.reshape(-1, 1, block, x.shape[3]).index_select(0, fetched).to(q.device) for x in (cache.keys, cache.values)
    )
    keys = rotated(keys, position, torch.arange(block, device=q.device))
    out = attention(rows.reshape(-1, 1, 1, q.shape[3]), keys, values, grid=Grid(n=1), key_grid=Grid(m=block))
    out = out.view(*rows.shape[:3], -1)
    both = (x.unflatten(2, (kept, -1)).unbind(2) for x in (out, score.to(torch.promote_types(q.dtype, torch.float32))))
    return list(zip(*both, strict=True))
