"""The memory of ColorMNet: working frames, of which the most used elements live on in a long-term store.

Elements have a key k, a shrinkage s >= 1 and a value v; a query has a key q and a selection e of its channels:

    similarity_ij = -s_j sum_c e_ic (k_jc - q_ic)^2 / sqrt(C) = f(q_i, e_i) . g(k_j, s_j)
    f = [-e, 2 e q, -sum e q^2],  g = s [k^2, k, 1] / sqrt(C)

so reading is attention with these features: over all elements, or over the `top_k` most similar ones of each query.
The usage of an element is the sum of its weights in all reads over their number. A full working memory keeps its first
frame and its latest ones; of those between, the `prototypes` most used elements, with values and shrinkages averaged
over those between by similarity to them, go to the long-term store, whose least used ones make room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chronotope.attention import attention
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid

BLOCK = 1 << 22
"""Similarities that are held at one time."""


def query_features(q: Float[Tensor, "b n c"], select: Float[Tensor, "b n c"]) -> Float[Tensor, "b n f"]:
    """f(q, e), F = 2 C + 1."""
    return torch.cat((-select, 2 * select * q, -(select * q * q).sum(-1, keepdim=True)), -1)


def key_features(key: Float[Tensor, "b n c"], shrink: Float[Tensor, "b n"]) -> Float[Tensor, "b n f"]:
    """g(k, s), F = 2 C + 1."""
    features = torch.cat((key * key, key, torch.ones_like(key[..., :1])), -1)
    return features * (shrink / math.sqrt(key.shape[-1]))[..., None]


@dataclass(frozen=True)
class Store(Carried):
    """Elements: keys, shrinkages, values, selections, the sum of the weights they were read with, and reads seen."""

    key: Float[Tensor, "b n c"]
    shrink: Float[Tensor, "b n"]
    value: Float[Tensor, "b n v"]
    selection: Float[Tensor, "b n c"]
    use: Float[Tensor, "b n"]
    life: Float[Tensor, "b n"]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.key.shape[1]

    @property
    def usage(self) -> Float[Tensor, "b n"]:
        """Weight for each read."""
        return self.use / self.life.clamp(min=1)

    def cut(self, start: int, stop: int | None = None) -> Store:
        """The elements from start to stop."""
        return self.each(lambda x: x[:, start:stop])

    def take(self, index: Int[Tensor, "b n"]) -> Store:
        """The elements of these numbers, for each member of the batch its own."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        return self.each(lambda x: x[rows, index])

    def most_used(self, n: int) -> Int[Tensor, "b n"]:
        """The numbers of the n most used elements, in their order; of equally used ones the earlier."""
        return self.usage.argsort(dim=1, descending=True, stable=True)[:, :n].sort(1).values


def joined(first: Store, *others: Store) -> Store:
    """The elements of several stores."""
    parts = zip(first.tensors(), *(store.tensors() for store in others), strict=True)
    return Store(*(torch.cat(part, 1) for part in parts))


@dataclass(frozen=True)
class MemoryState(Carried):
    """The working and the long-term store, and the elements of one frame."""

    work: Store
    long: Store
    tokens: int


@dataclass(frozen=True)
class FeatureMemory:
    """Reads and writes a `MemoryState`.

    Args:
        top_k: elements that a query reads; None: all, as in training, at memory linear in their number.
        every: a frame is stored when this many have passed since the last one.
        min_frames, max_frames: frames of the working memory after and before it is consolidated.
        prototypes: elements that a consolidation leaves.
        cap: elements of the long-term store.
    """

    top_k: int | None = 30
    every: int = 5
    min_frames: int = 5
    max_frames: int = 10
    prototypes: int = 128
    cap: int = 10_000

    def __post_init__(self) -> None:
        if not (1 <= self.min_frames < self.max_frames and 1 <= self.prototypes <= self.cap and self.every >= 1):
            raise ChronotopeError(
                f"{self!r}: expected 1 <= min_frames < max_frames, 1 <= prototypes <= cap and every >= 1."
            )

    def init_state(
        self, batch: int, tokens: int, key_dim: int, value_dim: int, like: Tensor | None = None
    ) -> MemoryState:
        """A memory of nothing, for frames of this many tokens, of the dtype and device of `like`."""
        like = torch.zeros(()) if like is None else like
        key, value, count = (like.new_zeros(batch, 0, n) for n in (key_dim, value_dim, 1))
        empty = Store(key, count[..., 0], value, key, count[..., 0], count[..., 0])
        return MemoryState(empty, empty, tokens)

    def write(
        self,
        state: MemoryState,
        key: Float[Tensor, "b n c"],
        shrink: Float[Tensor, "b n"],
        value: Float[Tensor, "b n v"],
        select: Float[Tensor, "b n c"] | None = None,
    ) -> MemoryState:
        """The memory with one more frame; `select` (default 1) is used when the frame is consolidated."""
        if key.shape[1] != state.tokens:
            raise ChronotopeError(f"a frame of {key.shape[1]} tokens, in a memory for frames of {state.tokens}.")
        select = torch.ones_like(key) if select is None else select
        new = Store(key, shrink, value, select, torch.zeros_like(shrink), torch.zeros_like(shrink))
        work = joined(state.work, new)
        if work.size < self.max_frames * state.tokens:
            return replace(state, work=work)
        return self._consolidated(work, state.long, state.tokens)

    def read(
        self, state: MemoryState, q: Float[Tensor, "b n c"], select: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "b n v"], MemoryState]:
        """What the queries find, and the memory that has noted what was used."""
        every = joined(state.long, state.work)
        if not every.size:
            raise ChronotopeError("nothing to read: write a frame first.")
        queries, keys = query_features(q, select), key_features(every.key, every.shrink)
        out, use = self._all(queries, keys, every) if self.top_k is None else self._best(queries, keys, every)
        use, split = use.detach(), state.long.size
        noted = replace(every, use=every.use + use, life=every.life + 1)
        return out, replace(state, long=noted.cut(0, split), work=noted.cut(split))

    def _all(self, queries: Tensor, keys: Tensor, store: Store) -> tuple[Float[Tensor, "b n v"], Float[Tensor, "b m"]]:
        """A softmax over all elements."""
        grids = Grid(n=queries.shape[1]), Grid(n=store.size)
        parts = (queries[:, None], keys[:, None], store.value[:, None])
        out, lse = attention(*parts, grid=grids[0], key_grid=grids[1], scale=1.0, return_lse=True)
        with torch.no_grad():
            uses = [
                (some @ keys.mT - part[..., None]).exp().sum(1)
                for some, part in zip(
                    queries.split(self._rows(store), 1), lse[:, 0].split(self._rows(store), 1), strict=True
                )
            ]
        return out[:, 0], torch.stack(uses).sum(0)

    def _best(self, queries: Tensor, keys: Tensor, store: Store) -> tuple[Float[Tensor, "b n v"], Float[Tensor, "b m"]]:
        """A softmax over the most similar elements of each query, some queries at a time."""
        assert self.top_k is not None
        outs, use = [], torch.zeros_like(store.use)
        rows = torch.arange(len(queries), device=queries.device)[:, None, None]
        for some in queries.split(self._rows(store), 1):
            best, index = (some @ keys.mT).topk(min(self.top_k, store.size))
            weight = best.softmax(-1)
            outs.append((weight[..., None, :] @ store.value[rows, index]).squeeze(-2))
            use = use.scatter_add(1, index.flatten(1), weight.detach().flatten(1))
        return torch.cat(outs, 1), use

    def _rows(self, store: Store) -> int:
        """Queries at a time, by what one of them takes: its similarities, and the values that it reads."""
        each = store.size + (self.top_k or 0) * store.value.shape[2]
        return max(1, BLOCK // (len(store.key) * each))

    def _consolidated(self, work: Store, long: Store, tokens: int) -> MemoryState:
        stop = work.size - (self.min_frames - 1) * tokens
        between = work.cut(tokens, stop)
        index = between.most_used(min(self.prototypes, between.size))
        chosen = between.take(index)
        similarity = query_features(chosen.key, chosen.selection) @ key_features(between.key, between.shrink).mT
        weight = similarity.softmax(-1)
        chosen = replace(
            chosen,
            value=weight @ between.value,
            shrink=(weight @ between.shrink[..., None])[..., 0],
            use=torch.zeros_like(chosen.use),
            life=torch.zeros_like(chosen.life),
        )
        if long.size > self.cap - chosen.size:
            long = long.take(long.most_used(self.cap - chosen.size))
        return MemoryState(joined(work.cut(0, tokens), work.cut(stop)), joined(long, chosen), tokens)
