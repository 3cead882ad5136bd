"""Recycled Attention: between full steps, decode over the K tokens that the last full step looked at most.

Two caches: C_f holds all tokens, C_r some K of them for each key head. With a = softmax(q . C_f / sqrt(D)), reduced
over the query heads that share a key head by their maximum or mean:

    full step:      C_f += tokens since the last full step;  out = attention(q, C_f);  C_r = top-K of a
    recycled step:  C_r += the new token;  out = attention(q, C_r);  the entry of C_r with the lowest weight is dropped

A full step comes every S steps; or every S steps where the cosine between q and the query of the last full step, the
mean over heads, is below a bound (in a batch: of any member). The prompt counts as a full step, of its last token.
Nothing is forgotten: a full step sees every token again. What is saved is reading and work, not memory.

Sizes: q [B, H, 1, D], k [B, Hk, 1, D], v [B, Hk, 1, Dv] -> out [B, H, 1, Dv]; a recycled step reads K rows of each key
head, a full step all L. Keys come with their position code, which they keep.

    >>> policy = RecycledAttention(keep=16, every=4)
    >>> q, k, v = torch.randn(2, 8, 1, 32), torch.randn(2, 2, 100, 32), torch.randn(2, 2, 100, 32)
    >>> state = policy.prefill(q, k, v)
    >>> out, state = policy.step(q, k[:, :, :1], v[:, :, :1], state)
    >>> out.shape, state.kept.place.shape, state.stats
    (torch.Size([2, 8, 1, 32]), torch.Size([2, 2, 16]), Stats(full=1, recycled=1, rows=116))

Measured (4096 keys, K = 256, a query that turns by a cosine of 0.97 a step, 64 steps; mass of full attention that lies
on C_r): 0.80, 0.76, 0.68, 0.54 for S = 4, 8, 16, 32; the best 256 of each step 0.83; sinks and a window of 256 0.06.

Left out: RULER, latency, and the continued pretraining of language models (gradients do pass through a step); recall is
shown with a model that is built, not trained. No code of the paper was at hand: how heads of a group vote, and over
what the cosine is taken, are choices of this page.

Paper: Xu, Goyal, Choi 2024, "Recycled Attention: Efficient inference for long-context language models",
arXiv 2411.05787; a later version is called RefreshKV.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from chronotope.attention import attention
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper

REDUCE = ("max", "mean")


class Stats(NamedTuple):
    """Steps so far, the prompt's being a full one, and the rows of a cache that they read for each key head."""

    full: int
    recycled: int
    rows: int


@dataclass(frozen=True)
class Cache(Carried):
    """Keys and values, and the place of each in the sequence; -1: none (padding)."""

    k: Float[Tensor, "b hk n d"]
    v: Float[Tensor, "b hk n dv"]
    place: Int64[Tensor, "b hk n"]

    def joined(self, other: Cache) -> Cache:
        """The entries of both."""
        return Cache(*(torch.cat(x, 2) for x in ((self.k, other.k), (self.v, other.v), (self.place, other.place))))

    def best(self, weights: Float[Tensor, "b hk n"], keep: int) -> Cache:
        """The entries with the highest weights of each key head, in order; padding last."""
        index = weights.masked_fill(self.place < 0, -1.0).topk(min(keep, weights.shape[2]), dim=2).indices
        index = index.sort(dim=2).values
        k, v = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (self.k, self.v))
        return Cache(k, v, self.place.gather(2, index))


@dataclass(frozen=True)
class RecycledState(Carried):
    """C_f, what came since the last full step, C_r, and the query of the last full step [B, H, D]."""

    all: Cache
    recent: Cache
    kept: Cache
    query: Float[Tensor, "b h d"]
    length: Int64[Tensor, "b"]
    since: int
    full: int
    recycled: int
    rows: int

    @property
    def stats(self) -> Stats:
        """What the steps so far cost."""
        return Stats(self.full, self.recycled, self.rows)


@paper(
    system=72,
    name="Recycled Attention",
    family="stream",
    claim="decoding alternates full steps with steps over the K tokens that the last full step looked at most",
    evidence=["tests/papers/stream/test_recycled.py"],
)
@dataclass(frozen=True)
class RecycledAttention:
    """The policy of one layer; what it carries is in its state.

    Args:
        keep: K, entries of C_r.
        every: S, steps from one full step to the next; or, with `below`, from one comparison to the next.
        below: the cosine under which a comparison leads to a full step; None: every comparison does.
        reduce: "max" or "mean" over the query heads of a key head.
    """

    keep: int = 4096
    every: int = 50
    below: float | None = None
    reduce: str = "max"

    def __post_init__(self) -> None:
        if self.keep < 1 or self.every < 1:
            raise ChronotopeError(f"{self!r}: expected keep and every from 1 on.")
        if self.reduce not in REDUCE:
            raise ChronotopeError(f"{self!r}: expected reduce to be one of {', '.join(REDUCE)}.")

    def prefill(
        self,
        q: Float[Tensor, "b h 1 d"],
        k: Float[Tensor, "b hk n d"],
        v: Float[Tensor, "b hk n dv"],
        lengths: Int64[Tensor, "b"] | None = None,
    ) -> RecycledState:
        """The state after a prompt. q: of its last token; lengths: tokens of each member, padding behind them."""
        n = k.shape[2]
        lengths = torch.full((len(k),), n, device=k.device) if lengths is None else lengths
        if bool(((lengths < 1) | (lengths > n)).any()):
            raise ChronotopeError(f"lengths={lengths.tolist()}: expected 1 to {n} tokens.")
        place = torch.arange(n, device=k.device)
        place = torch.where(place < lengths[:, None], place, -1)[:, None].expand(*k.shape[:3]).contiguous()
        every = Cache(k, v, place)
        state = RecycledState(every, _none(every), _none(every), q[:, :, 0], lengths, 0, 0, 0, 0)
        return self._refreshed(q, state, _attend(q, every)[1])

    def step(
        self,
        q: Float[Tensor, "b h 1 d"],
        k: Float[Tensor, "b hk 1 d"],
        v: Float[Tensor, "b hk 1 dv"],
        state: RecycledState,
    ) -> tuple[Float[Tensor, "b h 1 dv"], RecycledState]:
        """The next token. The state given is left as it was."""
        new = Cache(k, v, state.length[:, None, None].expand(*k.shape[:3]).contiguous())
        length = state.length + 1
        if self.due(q, state):
            every = state.all.joined(state.recent).joined(new)
            out, lse = _attend(q, every)
            return out, self._refreshed(q, replace(state, all=every, recent=_none(new), length=length), lse)
        held = state.kept.joined(new)
        out, lse = _attend(q, held)
        kept = held.best(self._weights(q, held, lse), self.keep)
        rows = state.rows + state.kept.k.shape[2]
        state = replace(state, recent=state.recent.joined(new), kept=kept, length=length, rows=rows)
        return out, replace(state, since=state.since + 1, recycled=state.recycled + 1)

    def due(self, q: Float[Tensor, "b h 1 d"], state: RecycledState) -> bool:
        """Whether the next step is a full one."""
        if (state.since + 1) % self.every:
            return False
        return self.below is None or bool((alike(q, state) < self.below).any())

    def _refreshed(self, q: Tensor, state: RecycledState, lse: Tensor) -> RecycledState:
        """After a full step over `state.all`."""
        kept = state.all.best(self._weights(q, state.all, lse), self.keep)
        rows = state.rows + state.all.k.shape[2]
        return replace(state, kept=kept, query=q[:, :, 0], since=0, full=state.full + 1, rows=rows)

    @torch.no_grad()
    def _weights(self, q: Tensor, cache: Cache, lse: Tensor) -> Float[Tensor, "b hk n"]:
        """Softmax weights of one row, from its logarithm of the sum: kernels do not give them."""
        weights = _probabilities(q, cache, lse)
        return weights.amax(2) if self.reduce == "max" else weights.mean(2)


def alike(q: Float[Tensor, "b h 1 d"], state: RecycledState) -> Float[Tensor, "b"]:
    """The cosine between q and the query of the last full step, the mean over heads."""
    return torch.cosine_similarity(q[:, :, 0], state.query, dim=2).mean(1)


@torch.no_grad()
def recovered(q: Float[Tensor, "b h 1 d"], state: RecycledState) -> Float[Tensor, "b h"]:
    """The share of full attention of q over the tokens so far that lies on C_r. Reads all: to measure with."""
    lse = _attend(q, state.all.joined(state.recent))[1]
    return _probabilities(q, state.kept, lse).sum(3).flatten(1)


def _attend(q: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    real = cache.place[:, :, None] >= 0
    bias = None
    if not bool(real.all()):
        real = real.repeat_interleave(q.shape[1] // real.shape[1], 1)
        bias = torch.zeros(real.shape, dtype=q.dtype, device=q.device).masked_fill(~real, -torch.inf)
    grid, keys = Grid(n=1), Grid(n=cache.k.shape[2])
    return attention(q, cache.k, cache.v, grid=grid, key_grid=keys, bias=bias, return_lse=True)


def _probabilities(q: Tensor, cache: Cache, lse: Float[Tensor, "b h 1"]) -> Float[Tensor, "b hk group n"]:
    rows = q[:, :, 0].unflatten(1, (cache.k.shape[1], -1)).to(lse.dtype)
    scores = rows @ cache.k.to(lse.dtype).transpose(2, 3) / math.sqrt(q.shape[3])
    scores = scores.masked_fill(cache.place[:, :, None] < 0, -torch.inf)
    return (scores - lse.view(*rows.shape[:3], 1)).exp()


def _none(like: Cache) -> Cache:
    return Cache(like.k[:, :, :0], like.v[:, :, :0], like.place[:, :, :0])
