"""S2-Attention: every head sees the last blocks, and its own strided shard of all blocks.

    query block i sees key block j  iff  i - j < local  or  (j + h * step + offset) mod stride = 0,   and  key <= query
    step = max(1, floor(stride / heads)),  h the head of the keys

Shards lie at absolute places: a block outside the band and the shard is never seen again, so its keys and values are
dropped for good (`ShardCache`). Where heads >= stride, the shards of all heads together are the whole past.

Sizes: block 64 tokens, local 32, stride 8, 32 heads at 8192 tokens. Per head about local + blocks / stride blocks.

Example:
    >>> rule = LocalStride(heads=8, block=16, local=4, stride=8)
    >>> grid = ct.Grid(n=1024)
    >>> q = k = v = torch.randn(1, 8, 1024, 32)
    >>> ct.attention(q, k, v, grid=grid, where=rule.where).shape
    torch.Size([1, 8, 1024, 32])

`s2_blocks.block_tables` takes patterns of one's own, [H, blocks, blocks], and refuses those that no cache can serve.

Left out: the Triton kernels (Chronotope's own run the plan); which layers of the trained models are dense; shards at
relative places for two-sided attention (here they are absolute there too); the published 25.3x, 6x and 10x. The pairs
that a plan computes follow the density within 20%, as does the time of a plain loop over blocks; the time of the torch
kernel on a CPU falls less than its pairs do.

Paper: Lin et al. 2024, "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention
Heads", arXiv 2407.17678.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.pattern.s2_blocks import Band, Shard
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, causal, full, per_head


def _frames(grid: Grid) -> Pattern:
    """The shard of head 0 (others are its rotations), a frame for a block: a quarter of the axis local, stride 8."""
    axis = grid.axes[0]
    size = grid.sizes[axis]
    return (Band(axis, 1, max(1, size // 4) - 1, 0) | Shard(axis, 1, min(8, size), 0)) & causal(axis)


@paper(
    system=40,
    name="S2-Attention",
    family="pattern",
    claim="heads share out the past in strided shards of blocks; what a head does not see it can drop for good",
    evidence=["tests/papers/pattern/test_s2_attention.py"],
    menu=_frames,
)
@dataclass(frozen=True)
class LocalStride:
    """Which blocks each head sees on `axis`.

    Args:
        heads: query heads; `kv_heads` of them differ (default: all).
        block: tokens of a block.
        local: blocks of the band, the query's own among them (two-sided: local - 1 on either side).
        stride: one block in `stride` belongs to a head's shard.
        offset: rotates all shards.
        dense_heads: the last heads of the keys that see everything.
    """

    heads: int
    block: int = 64
    local: int = 32
    stride: int = 8
    offset: int = 0
    dense_heads: int = 0
    kv_heads: int | None = None
    causal: bool = True
    axis: str = "n"

    def __post_init__(self) -> None:
        if min(self.heads, self.block, self.local, self.stride, self.groups) < 1 or self.heads % self.groups:
            raise ChronotopeError(
                f"{self!r}: heads, block, local and stride must be 1 or more, heads a multiple of kv_heads."
            )
        if not 0 <= self.dense_heads <= self.groups:
            raise ChronotopeError(f"{self!r}: dense_heads must be 0 to {self.groups}, the number of heads of the keys.")

    @property
    def groups(self) -> int:
        """Number of heads of the keys."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def shard(self, head: int) -> Shard | None:
        """The shard of a head of the keys; None: it sees everything."""
        if head >= self.groups - self.dense_heads:
            return None
        return Shard(self.axis, self.block, self.stride, head * max(1, self.stride // self.heads) + self.offset)

    @cached_property
    def where(self) -> Pattern:
        """The pattern, one for each query head."""
        band = Band(self.axis, self.block, self.local - 1, 0 if self.causal else self.local - 1)
        shards = [self.shard(head // (self.heads // self.groups)) for head in range(self.heads)]
        seen = per_head([full() if shard is None else band | shard for shard in shards])
        return seen & causal(self.axis) if self.causal else seen

    def evicts(self, head: int, block: int, now: int) -> bool:
        """Whether a head of the keys never again sees `block` once the queries have come to block `now`."""
        shard = self.shard(head)
        return shard is not None and now - block >= self.local and (block + shard.turn) % self.stride != 0

    def blocks(self, count: int) -> Bool[Tensor, "h nb nb"]:
        """Which of `count` query blocks sees which key block, for each query head."""
        x = torch.arange(count)
        delta = x[:, None] - x
        near = (delta if self.causal else delta.abs()) < self.local
        shards = [self.shard(head // (self.heads // self.groups)) for head in range(self.heads)]
        far = torch.stack([torch.ones(count) > 0 if s is None else (x + s.turn) % s.stride == 0 for s in shards])
        seen = near | far[:, None]
        return seen & (delta >= 0) if self.causal else seen


class ShardCache:
    """Keys and values that decoding still needs, block by block for each head of the keys."""

    def __init__(self, rule: LocalStride):
        if not rule.causal:
            raise ChronotopeError(f"ShardCache({rule!r}): only a causal rule can be decoded token by token.")
        self.rule = rule
        self.length = 0
        self.kept: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(rule.groups)]

    def step(
        self, q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b hk 1 d"], v: Float[Tensor, "b hk 1 dv"]
    ) -> Float[Tensor, "b h 1 dv"]:
        """Takes one token in, drops what no later token sees, and returns the token's attention."""
        now = self.length // self.rule.block
        self.length += 1
        group = self.rule.heads // self.rule.groups
        outs = []
        for head, kept in enumerate(self.kept):
            new = (k[:, head : head + 1], v[:, head : head + 1])
            old = kept.get(now)
            kept[now] = new if old is None else (torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2))
            for block in [block for block in kept if self.rule.evicts(head, block, now)]:
                del kept[block]
            keys, values = (torch.cat([pair[i] for pair in kept.values()], 2) for i in (0, 1))
            asks = q[:, head * group : (head + 1) * group]
            outs.append(attention(asks, keys, values, grid=Grid(n=1), key_grid=Grid(m=keys.shape[2])))
        return torch.cat(outs, 1)  # type: ignore[arg-type]
