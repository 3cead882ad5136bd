"""HyperAttention: what answers a query most is found by sorting, the rest is estimated from a few keys.

    out, lse = merge( exact over the keys in the query's own block, sorted by bucket;
                      m keys drawn uniformly without those of the block, lse + log(N / m) )

The bucket of a query or key is told by its sides of `bits` random hyperplanes, and buckets are numbered in Gray order
(`route.Buckets`). Queries and keys are sorted by bucket; blocks of the two orders face each other. The second part
stands for all keys outside of the block: the means of its numerator and denominator over draws are theirs. Causal: both
halves of the sequence by themselves, and all of the second over the first, which needs no mask; halved again until a
part has `min_length` tokens, which are computed exactly.

Sizes: q [B, H, Nq, D], k [B, Hk, Nk, D], v [B, Hk, Nk, Dv]; O(N (block + samples) D) work, log N times that if causal.
8 bits, blocks of 256, 256 samples and 2,048 tokens computed exactly are the defaults of the released code.

Example:
    >>> hyper = HyperAttention(block=128, samples=64, min_length=256)
    >>> q = k = v = torch.randn(1, 2, 1024, 32)
    >>> out, lse = hyper(q, k, v, causal=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 2, 1024, 32]), torch.Size([1, 2, 1024]))

Causal, no key or value of the future is looked at; but queries of a half are sorted together, and so a later query can
move an earlier one to another block. For the same reason the mechanism does not stream: it reads prompts.

Left out: sampling by the row norms of v, which the proof has and the experiments have not. Gradients pass through
values and logits, none through the order or the draw.

The released code (commit aa5bb45) departs from the paper in two ways. Its samples are the first m keys, unweighted and
counted again where they lie in the block: `HyperAttention.released()`. And it numbers a bucket by word i ^ (i >> 1) of
the Gray code where the place of the word in the code is meant, so that neighbours differ in up to 4 of 8 bits.

Paper: Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh 2023, "HyperAttention: Long-context Attention in Near-Linear
Time", arXiv 2310.05869.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.merge import merge
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, blocks, causal
from chronotope.routing import route
from chronotope.routing.tokens import back, take

Part = tuple[Tensor, Tensor]


@paper(
    system=57,
    name="HyperAttention",
    family="routing",
    claim="near-linear attention: one sort by hash finds the large weights, uniform samples stand for the rest",
    evidence=["tests/papers/routing/test_hyper.py"],
)
@dataclass(frozen=True)
class HyperAttention:
    """Attention by one sort and a draw of keys.

    Args:
        bits: hyperplanes of the hash; 0: the order stays as it is.
        block: keys that a query sees exactly, at most; all blocks of a call are of one size.
        samples: keys drawn for each head; 0: none.
        min_length: shorter parts are computed exactly.
        sample: "uniform", or "first": the first keys of the sequence.
        weight: each of the m samples stands for N / m keys; False: for itself.
        distinct: samples that lie in a query's own block are dropped; False: counted again.
        step: so many queries have the `block` keys around them, and not the block in which they lie; None: blocks.
        seed: of hyperplanes and samples.
    """

    bits: int = 8
    block: int = 256
    samples: int = 256
    min_length: int = 2048
    sample: Literal["uniform", "first"] = "uniform"
    weight: bool = True
    distinct: bool = True
    step: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block < 1 or self.samples < 0 or self.min_length < 1 or (self.step is not None and self.step < 1):
            raise ChronotopeError(f"{self!r}: block, min_length and step must be 1 or more, samples 0 or more.")
        if self.sample not in ("uniform", "first"):
            raise ChronotopeError(f"HyperAttention(sample={self.sample!r}): expected 'uniform' or 'first'.")

    @classmethod
    def released(cls) -> HyperAttention:
        """The samples of the released code."""
        return cls(sample="first", weight=False, distinct=False)

    def __call__(
        self,
        q: Float[Tensor, "b h nq d"],
        k: Float[Tensor, "b hk nk d"],
        v: Float[Tensor, "b hk nk dv"],
        *,
        causal: bool = False,
        keep: Bool[Tensor, "b nk"] | None = None,
        scale: float | None = None,
    ) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"]]:
        """(out, lse). keep: False leaves a key out. scale: default 1 / sqrt(D)."""
        if causal and q.shape[2] != k.shape[2]:
            raise ChronotopeError(f"causal HyperAttention: {q.shape[2]} queries over {k.shape[2]} keys; give as many.")
        draw = torch.Generator().manual_seed(self.seed)
        return (self._halves if causal else self._whole)(q, k, v, keep, scale, draw)

    def _halves(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float | None, draw: torch.Generator
    ) -> Part:
        """Causal attention."""
        n = q.shape[2]
        if n <= self.min_length:
            before = causal()
            return attend(q, k, v, before if keep is None else kept(keep, n) & before, scale)
        half = n // 2
        (q0, q1), (k0, k1), (v0, v1) = (x.split((half, n - half), 2) for x in (q, k, v))
        keep0, keep1 = (None, None) if keep is None else (keep[:, :half], keep[:, half:])
        first, second = self._halves(q0, k0, v0, keep0, scale, draw), self._halves(q1, k1, v1, keep1, scale, draw)
        second = merge([second, self._whole(q1, k0, v0, keep0, scale, draw)])
        return torch.cat((first[0], second[0]), 2), torch.cat((first[1], second[1]), 2)

    def _whole(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float | None, draw: torch.Generator
    ) -> Part:
        """All queries over all keys."""
        nq, nk, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        if max(nq, nk) < self.min_length:
            return attend(q, k, v, None if keep is None else kept(keep, nq), scale)
        bucket = route.Buckets(self.bits, self.seed)
        to_q, number = bucket(q).argsort(dim=-1, stable=True), bucket(k)
        if keep is not None:  # at the end of the order, beyond all blocks and samples
            number = number.masked_fill(~keep[:, None], 1 << self.bits)
        to_k = number.argsort(dim=-1, stable=True)
        valid = torch.full((k.shape[0],), nk, device=k.device) if keep is None else keep.sum(1)
        q, k, v = take(q, to_q), take(k, to_k), take(v, to_k)
        facing = route.Facing.blocks(nq, nk, self.block)
        if self.step is not None:
            facing = route.Facing.band(nq, nk, self.block, self.step)
        where = blocks(n=facing.size)
        if not facing.plain or keep is not None:
            where = route.chosen(facing.keys(valid, nk), queries={"n": facing.size}, n=1)
        parts = [attend(q, k, v, where, scale)]
        if self.samples:
            place = self._drawn(to_k, valid, draw)
            real = place < valid[:, None, None]
            seen = real[:, :, None] & facing.beyond(place, nk) if self.distinct else real[:, :, None]
            rows = {"n": facing.size if self.distinct else nq}
            where = route.chosen(seen.repeat_interleave(group, 1), queries=rows, m=1)
            out, lse = attend(q, take(k, place), take(v, place), where, scale, axis="m")
            if self.weight:
                each = (valid[:, None].double() / real.sum(-1).clamp(min=1)).log()
                lse = lse + each.repeat_interleave(group, 1)[..., None].to(lse)
            parts.append((out, lse))
        out, lse = merge(parts)
        return back(out, to_q), back(lse[..., None], to_q)[..., 0]

    def _drawn(
        self, to_k: Int64[Tensor, "b h nk"], valid: Int64[Tensor, "b"], draw: torch.Generator
    ) -> Int64[Tensor, "b h m"]:
        """Sorted places of the samples; those from `valid` on are none."""
        count = min(self.samples, to_k.shape[2])
        if self.sample == "first":
            return to_k.argsort(-1)[:, :, :count].sort().values
        lot = torch.rand(to_k.shape, generator=draw).to(to_k.device)
        lot = lot.masked_fill(torch.arange(to_k.shape[2], device=to_k.device) >= valid[:, None, None], -1)
        return lot.topk(count).indices.sort().values


def kept(keep: Bool[Tensor, "b nk"], queries: int) -> Pattern:
    """Every query sees the keys that are kept."""
    return route.chosen(keep[:, None, None], queries={"n": queries}, n=1)


def attend(q: Tensor, k: Tensor, v: Tensor, where: Pattern | None, scale: float | None, axis: str = "n") -> Part:
    """Exact attention, keys lying on `axis`."""
    grid, key_grid = Grid(n=q.shape[2]), Grid(prefix=0, **{axis: k.shape[2]})
    return attention(q, k, v, grid=grid, key_grid=key_grid, where=where, scale=scale, return_lse=True)
