"""HiP Attention: each block of queries finds its keys by a search in a tree over them, T log T instead of T^2.

For a block I of b_q queries and the T keys before it, in blocks of b_k: k / b_k groups tile the keys; then again and
again each group is cut in two halves, a half h is scored by the block r(h) in its middle,

    s(h) = max of q_i . k_j over i in I (one of `stride`), j in r(h),

and the k / b_k best halves are the groups of the next round, until a group is a block. Then attention is exact:

    out_i = softmax over (found(I) and the last `window` keys and the first `sinks` keys, none after i) of q_i . k_j, v

Sizes: up to 2 k scores in each of log2(T / k) rounds; k + window + sinks + b_q keys for a query. T <= k: dense.
What lies in the window or the sinks is not searched. Locality is what it rests on: near keys have similar scores.

    >>> grid = ct.Grid(n=512)
    >>> q = k = v = torch.randn(1, 2, grid.size, 16)
    >>> where = hip(keep=64, window=32, sinks=4, query_block=32)
    >>> ct.attention(q, k, v, grid=grid, where=where).shape
    torch.Size([1, 2, 512, 16])
    >>> decoder = Decoder(PagedCache(batch=1, kv_heads=2, size=16), keep=64, window=32, sinks=4, refresh=8)
    >>> decoder.step(q[:, :, :1], k[:, :, :1], v[:, :, :1]).shape
    torch.Size([1, 2, 1, 16])

As published all queries of a block vote for what the block sees (`ahead=True`), so that what an early one sees depends
on later ones: harmless in a prompt, not causal in training. By default only the first query of a block votes. In the
authors' repository (commit fea42c7) the search of v1_1/attention2_draft.py takes the first block of a half, here
`sample="first"`, and every second query from the second one on; here from the first one, which has none before it.

Left out: kernels that never list pairs of blocks (planning makes tables of one byte for each); self-extension of rotary
codes; dense first layers, which are layers without this pattern; serving of millions of tokens. Choices carry no
gradient, attention over them does.

Paper: Lee et al. 2024, "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning" (v2: "A
Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention"),
arXiv 2406.09827.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

import chronotope as ct
from chronotope.errors import ChronotopeError
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern


@paper(
    system=37,
    name="HiP Attention",
    family="routing",
    claim="each block of queries finds its keys by a search in a tree: 2 k log2(T / k) scores instead of T",
    evidence=["tests/papers/routing/test_hip.py"],
)
def hip(
    keep: int = 512,
    *,
    window: int = 256,
    sinks: int = 16,
    query_block: int = 64,
    key_block: int = 2,
    stride: int = 2,
    sample: str = "middle",
    ahead: bool = False,
    axis: str = "n",
) -> Pattern:
    """The pattern of HiP Attention on a sequence, causal, for `ct.attention(where=...)`; defaults of the authors' code.

    Args:
        keep: keys that are found, a multiple of key_block.
        window, sinks: last keys, the query itself counted, and first keys, seen anyway.
        query_block, key_block: b_q and b_k.
        stride: one query out of so many votes.
        sample: the block that stands for a half: its "middle" or its "first".
        ahead: all queries of a block vote, as published, and not the first alone.
        axis: name of the sequence's axis.
    """
    _check(keep, window, sinks, key_block)
    near = _near(window, sinks, axis)
    search = ct.route.tree_search(
        keep // key_block,
        stride=stride,
        sample=sample,
        beside=near,
        ahead=ahead,
        queries={axis: query_block},
        **{axis: key_block},
    )
    return (search | near) & ct.causal(axis)


def _near(window: int, sinks: int, axis: str) -> Pattern:
    sides: Any = {axis: (window - 1, 0)}
    near = ct.window(**sides)
    return near | ct.sinks(sinks) if sinks else near


def _check(keep: int, window: int, sinks: int, key_block: int) -> None:
    if key_block < 1 or keep < key_block or keep % key_block:
        raise ChronotopeError(f"hip: keep={keep} keys in blocks of key_block={key_block}; expected a multiple of it.")
    if window < 1 or sinks < 0:
        raise ChronotopeError(
            f"hip: window={window}, sinks={sinks}; expected a window of 1 key or more, and 0 sinks up."
        )


@runtime_checkable
class Cache(Protocol):
    """What a `Decoder` asks of keys and values, wherever they lie: the paged cache of a server can stand behind it."""

    @property
    def length(self) -> int:
        """Tokens held of every sequence."""
        ...

    def append(self, k: Float[Tensor, "b hk n d"], v: Float[Tensor, "b hk n dv"]) -> None:
        """More tokens of every sequence."""
        ...

    def keys(self, token: Int64[Tensor, "b h m"]) -> Float[Tensor, "b h m d"]:
        """The keys of some tokens of each query head."""
        ...

    def values(self, token: Int64[Tensor, "b h m"]) -> Float[Tensor, "b h m dv"]:
        """The values of some tokens of each query head."""
        ...


class PagedCache:
    """A `Cache` of B sequences in pages of one pool; `table` [B, pages] says which page is whose.

    Only what is read moves to the device of the queries, so the pool may lie in host memory.

    Args:
        batch, kv_heads, size: B, Hk, D. value_size: Dv, default D.
        page: tokens of a page.
        dtype, device: of the pool.
    """

    def __init__(
        self,
        *,
        batch: int,
        kv_heads: int,
        size: int,
        value_size: int | None = None,
        page: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        self.page, self.length = page, 0
        self.k = torch.zeros(0, kv_heads, page, size, dtype=dtype, device=device)
        self.v = torch.zeros(0, kv_heads, page, size if value_size is None else value_size, dtype=dtype, device=device)
        self.table = torch.zeros(batch, 0, dtype=torch.int64, device=device)

    def append(self, k: Float[Tensor, "b hk n d"], v: Float[Tensor, "b hk n dv"]) -> None:
        """More tokens of every sequence."""
        batch, n = k.shape[0], k.shape[2]
        at = torch.arange(self.length, self.length + n, device=self.table.device)
        more = -(-(self.length + n) // self.page) - self.table.shape[1]
        if more > 0:
            self._grow(batch * (self.table.shape[1] + more))
            new = torch.arange(batch * more, device=self.table.device) + self.table.numel()
            # One page for each sequence in turn, as they would be asked for.
            self.table = torch.cat([self.table, new.view(more, batch).T], 1)
        page = self.table[:, at // self.page]
        self.k[page, :, at % self.page] = k.transpose(1, 2).to(self.k)
        self.v[page, :, at % self.page] = v.transpose(1, 2).to(self.v)
        self.length += n

    def _grow(self, pages: int) -> None:
        spare = 2 * pages - len(self.k)
        if len(self.k) < pages:
            self.k, self.v = (torch.cat([x, x.new_zeros(spare, *x.shape[1:])]) for x in (self.k, self.v))

    def keys(self, token: Int64[Tensor, "b h m"]) -> Float[Tensor, "b h m d"]:
        """The keys of some tokens of each query head."""
        return self._read(self.k, token)

    def values(self, token: Int64[Tensor, "b h m"]) -> Float[Tensor, "b h m dv"]:
        """The values of some tokens of each query head."""
        return self._read(self.v, token)

    def _read(self, pool: Tensor, token: Int64[Tensor, "b h m"]) -> Tensor:
        batch, heads = token.shape[:2]
        device, token = token.device, token.to(pool.device)
        owner = torch.arange(batch, device=pool.device)[:, None, None]
        head = torch.arange(heads, device=pool.device) // (heads // pool.shape[1])
        return pool[self.table[owner, token // self.page], head[:, None], token % self.page].to(device)


class Decoder:
    """Token by token over a cache: searches every `refresh` steps, and attends to what was found last.

    With refresh=1 a step gives the rows of `hip(..., query_block=1)`. Between searches the keys found stay; a key that
    leaves the window meanwhile is not seen until the next search.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        keep: int = 512,
        window: int = 256,
        sinks: int = 16,
        key_block: int = 2,
        sample: str = "middle",
        refresh: int = 8,
    ):
        _check(keep, window, sinks, key_block)
        if refresh < 1:
            raise ChronotopeError(f"Decoder: refresh={refresh}; expected steps between searches, 1 or more.")
        self.cache, self.refresh, self.sample = cache, refresh, sample
        self.keep, self.window, self.sinks, self.key_block = keep, window, sinks, key_block
        self.steps = 0
        self.found: Int64[Tensor, "b h blocks"] | None = None

    @torch.no_grad()
    def step(
        self, q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b hk 1 d"], v: Float[Tensor, "b hk 1 dv"]
    ) -> Float[Tensor, "b h 1 dv"]:
        """The next token: its key and value join the cache, and it looks at what the search found, and near by."""
        self.cache.append(k, v)
        if self.steps % self.refresh == 0 or self.found is None:
            self.found = self._search(q)
        self.steps += 1
        n, device = self.cache.length, q.device
        inside = torch.arange(self.key_block, device=device)
        token = (self.found.clamp(min=0)[..., None] * self.key_block + inside).flatten(2)
        # Blocks at the edges lie in the sinks or the window in part, which are read anyway.
        fresh = (token >= self.sinks) & (token < n - self.window)
        fresh &= (self.found >= 0).repeat_interleave(self.key_block, 2)
        first, last = (torch.arange(a, n, device=device)[:m] for a, m in self._near(n))
        near = torch.cat([first, last]).expand(*token.shape[:2], -1)
        token = torch.cat([token, near], 2)
        seen = torch.cat([fresh, torch.ones_like(near, dtype=torch.bool)], 2)[:, :, None]
        bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf)
        keys, values = self.cache.keys(token), self.cache.values(token)
        grid = ct.Grid(n=token.shape[2])
        return ct.attention(q, keys.to(q), values.to(q), grid=ct.Grid(n=1), key_grid=grid, bias=bias)

    def _near(self, n: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(first token, how many) of the sinks and of the window behind them."""
        return (0, min(self.sinks, n)), (min(n, max(self.sinks, n - self.window)), self.window)

    def _search(self, q: Float[Tensor, "b h 1 d"]) -> Int64[Tensor, "b h blocks"]:
        """The blocks found among those that do not lie in the sinks or the window."""
        first = self.sinks // self.key_block
        # Of the blocks before the one the token is in: those that begin before the window.
        last = min(-(-(self.cache.length - self.window) // self.key_block), (self.cache.length - 1) // self.key_block)
        count = torch.full((*q.shape[:2], 1), max(0, last - first), device=q.device)
        inside = torch.arange(self.key_block, device=q.device)

        def score(item: Int64[Tensor, "b h 1 m"]) -> Float[Tensor, "b h 1 m"]:
            token = ((item[:, :, 0].clamp(min=0) + first)[..., None] * self.key_block + inside).flatten(2)
            scores = q @ self.cache.keys(token).to(q).transpose(-1, -2)
            return scores.unflatten(3, (-1, self.key_block)).amax(4)

        found = ct.route.refine(score, count, self.keep // self.key_block, self.sample)[:, :, 0]
        return torch.where(found < 0, -1, found + first)
