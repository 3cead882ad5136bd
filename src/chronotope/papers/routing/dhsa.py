"""DHSA: chunks of a sequence, of any lengths, are scored against each other, and tokens inherit the scores.

With boundaries b_0 = 0 <= .. <= b_Nc = N, chunk c the tokens b_c .. b_(c+1) - 1, c(i) the chunk of token i, and in each
head

    Q_c = sqrt(|c|) mean of q in c,   K_c = sqrt(|c|) mean of k in c,   S_t[i, j] = Q_c(i) . K_c(j)

query i keeps the N_b keys j with the largest S_t[i, j] among those it may see, and attends to these exactly. The root
keeps scores of chance matches at one variance, D, for chunks of all lengths. Of a chunk for which there is no room, the
last keys are kept.

Sizes: Nc^2 D for the scores, N (Nc log Nc + N_b) for the choice. Tokens near by and the first ones are kept where the
pattern says so: `(dhsa(...) | ct.window(n=(63, 0)) | ct.sinks(4)) & ct.causal()`.

    >>> grid, boundaries = ct.Grid(n=128), torch.tensor([0, 20, 60, 75, 128])
    >>> q = k = v = torch.randn(1, 2, grid.size, 16)
    >>> ct.attention(q, k, v, grid=grid, where=dhsa(boundaries, 32) & ct.causal()).shape
    torch.Size([1, 2, 128, 16])
    >>> state = ChunkState.of(k, v, boundaries)
    >>> one = [x[:, :, :1] for x in (q, k, v)]
    >>> out, state = decode(*one, state, budget=32, opens=torch.tensor([True]))

A whole chunk holds what is later than its first tokens. So under a causal pattern a query is scored by itself, and its
own chunk by the keys up to it, as the paper does when it decodes: N Nc D, and decoding is the rows of the whole. The
paper's prefill scores whole chunks there too: `ahead=True`.

Where the authors' code (commit cc8e9c7, folder legacy) departs, this follows the paper: there one choice is made for
all heads, for blocks of queries, by plain means unless told otherwise, and some tokens near by and some first ones are
kept always.

Left out: Gemma2 and LongBench; the per-head predictors of the authors' later code. Choices carry no gradient.

Paper: Xiong, Zou, Fekri, Cho 2025, "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device
LLMs", arXiv 2510.24606. The predictor of boundaries: `dhsa_boundaries`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

import chronotope as ct
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.papers.registry import paper
from chronotope.patterns import Route
from chronotope.planning import Sight

Boundaries = Int64[Tensor, "*b chunks_and_1"]


@paper(
    system=92,
    name="DHSA",
    family="routing",
    claim="keys chosen for each query by scores of variable-length chunks, normalised by their length",
    evidence=["tests/papers/routing/test_dhsa.py", "tests/papers/routing/test_dhsa_boundaries.py"],
)
def dhsa(boundaries: Boundaries, budget: int, *, ahead: bool = False, axis: str = "n") -> Route:
    """The route of Dynamic Hierarchical Sparse Attention on a sequence, for `ct.attention(where=...)`.

    Args:
        boundaries: where chunks begin, and N behind: [Nc + 1], or [B, Nc + 1]; repeats are empty chunks.
        budget: N_b, keys that each query keeps.
        ahead: under a causal pattern score whole chunks, as the paper's prefill does: what a token sees then depends on
            later ones of its chunk. Without a causal pattern whole chunks are scored anyway.
        axis: name of the sequence's axis.
    """
    if budget < 1:
        raise ChronotopeError(f"dhsa: budget={budget}; expected keys for each query, 1 or more.")

    def top_chunks(q: Tensor, k: Tensor, sight: Sight) -> Int64[Tensor, "b h n budget"]:
        return choose(q, k, boundaries, budget, sight, ahead)

    blocks: Any = {axis: 1}
    return ct.route.by(top_chunks, **blocks)


def choose(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], boundaries: Boundaries, budget: int, sight: Sight,
    ahead: bool,
) -> Int64[Tensor, "b h places budget"]:  # fmt: skip
    """The keys that each query keeps, by number; -1: there are no more."""
    grid = sight.q.grid
    if len(grid.axes) > 1 or grid != sight.k.grid:
        raise ChronotopeError(
            f"dhsa: queries on {grid!r}, keys on {sight.k.grid!r}; expected one sequence, that of both."
        )
    exact = torch.promote_types(q.dtype, torch.float32)
    k = k.to(exact).repeat_interleave(q.shape[1] // k.shape[1], 1)
    q, k = q.to(exact)[:, :, grid.prefix :], k[:, :, grid.prefix :]
    edges = checked(boundaries, q.shape[0], q.shape[2]).to(q.device)
    first, size, own = edges[:, :-1], edges.diff(), chunk_of(edges)
    token = torch.arange(q.shape[2], device=q.device)
    causal = sight.arrow is not None
    vectors = chunk_vectors(k, edges)
    index = own[:, None, :, None].expand(-1, q.shape[1], -1, 1)
    if causal and not ahead:
        scores = q @ vectors.transpose(-1, -2)
        begun = (q * _running(k, edges, own)).sum(-1, keepdim=True)
        scores = scores.scatter(3, index, begun)
    else:
        scores = chunk_vectors(q, edges) @ vectors.transpose(-1, -2)
        scores = scores.gather(2, index.expand(-1, -1, -1, scores.shape[3]))
    visible = size[:, None].expand(-1, len(token), -1)
    if causal:
        visible = (token[:, None] + 1 - first[:, None]).clamp(min=0).minimum(visible)
    return fill(scores, first[:, None], visible, budget)


def checked(boundaries: Boundaries, batch: int, tokens: int) -> Int64[Tensor, "b chunks_and_1"]:
    """The boundaries of each batch element. Raises ChronotopeError unless they tile the sequence."""
    edges = boundaries.expand(batch, -1) if boundaries.ndim == 1 else boundaries
    tiled = edges.ndim == 2 and len(edges) == batch and edges.shape[1] > 1 and not edges.is_floating_point()
    if not tiled or bool((edges[:, 0] != 0).any() | (edges[:, -1] != tokens).any() | (edges.diff() < 0).any()):
        raise ChronotopeError(
            f"dhsa: boundaries {list(boundaries.shape)} for {batch} sequences of {tokens} tokens; expected [chunks + 1]"
            f" or [{batch}, chunks + 1] integers that rise from 0 to {tokens}."
        )
    return edges


def chunk_of(edges: Int64[Tensor, "b chunks_and_1"]) -> Int64[Tensor, "b n"]:
    """The chunk of each token."""
    token = torch.arange(int(edges[0, -1]), device=edges.device).expand(len(edges), -1).contiguous()
    return torch.searchsorted(edges[:, 1:].contiguous(), token, right=True)


def chunk_vectors(x: Float[Tensor, "b h n d"], edges: Int64[Tensor, "b chunks_and_1"]) -> Float[Tensor, "b h chunks d"]:
    """sqrt(|c|) times the mean of each chunk c; zeros of an empty one."""
    return _normalized(_sums(x, edges), edges.diff())


def _sums(x: Float[Tensor, "b h n d"], edges: Int64[Tensor, "b chunks_and_1"]) -> Float[Tensor, "b h chunks d"]:
    index = chunk_of(edges)[:, None, :, None].expand_as(x)
    return x.new_zeros(*x.shape[:2], edges.shape[1] - 1, x.shape[3]).scatter_add(2, index, x)


def _normalized(sums: Float[Tensor, "b h sets d"], count: Int64[Tensor, "b sets"]) -> Float[Tensor, "b h sets d"]:
    """sqrt(count) times the mean."""
    return sums / count.clamp(min=1).sqrt().to(sums)[:, None, :, None]


def _running(
    x: Float[Tensor, "b h n d"], edges: Int64[Tensor, "b chunks_and_1"], own: Int64[Tensor, "b n"]
) -> Float[Tensor, "b h n d"]:
    """The same for the chunk of each token as it stands at this token."""
    first = edges.gather(1, own)
    # In float64: a chunk is the difference of sums over all that came before.
    before = F.pad(x.double(), (0, 0, 1, 0)).cumsum(2)
    sums = (before[:, :, 1:] - before.gather(2, first[:, None, :, None].expand_as(x))).to(x)
    return _normalized(sums, torch.arange(x.shape[2], device=x.device) + 1 - first)


def fill(
    scores: Float[Tensor, "b h rows chunks"],
    first: Int64[Tensor, "b #rows chunks"],
    size: Int64[Tensor, "b rows chunks"],
    budget: int,
) -> Int64[Tensor, "b h rows budget"]:
    """Keys of the chunks with the best scores, in falling order, until there are `budget`; -1: there are no more.

    Each row sees `size` keys of a chunk from `first` on, and takes the last ones of them first.
    """
    size = size[:, None].expand_as(scores)
    order = scores.masked_fill(size == 0, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    sizes = size.gather(-1, order)
    upto = sizes.cumsum(-1)
    place = torch.arange(budget, device=scores.device).expand(*scores.shape[:3], -1).contiguous()
    rank = torch.searchsorted(upto, place, right=True)
    over, rank = rank == scores.shape[3], rank.clamp(max=scores.shape[3] - 1)
    chunk = order.gather(-1, rank)
    end = (first[:, None] + size).gather(-1, chunk)
    return torch.where(over, -1, end - 1 - (place - (upto - sizes).gather(-1, rank)))


@dataclass(frozen=True)
class ChunkState(Carried):
    """Keys and values so far, the sum of the keys of each chunk [B, Hk, Nc, D], and its tokens [B, Nc]."""

    k: Float[Tensor, "b hk n d"]
    v: Float[Tensor, "b hk n dv"]
    sums: Float[Tensor, "b hk chunks d"]
    count: Int64[Tensor, "b chunks"]

    @classmethod
    def of(cls, k: Float[Tensor, "b hk n d"], v: Float[Tensor, "b hk n dv"], boundaries: Boundaries) -> ChunkState:
        """After a prompt, whose last chunk is open; an empty one has the boundaries [0, 0]."""
        edges = checked(boundaries, k.shape[0], k.shape[2]).to(k.device)
        return cls(k, v, _sums(k.to(torch.promote_types(k.dtype, torch.float32)), edges), edges.diff())


def decode(
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b hk 1 d"],
    v: Float[Tensor, "b hk 1 dv"],
    state: ChunkState,
    *,
    budget: int,
    opens: Bool[Tensor, "b"],
) -> tuple[Float[Tensor, "b h 1 dv"], ChunkState]:
    """The next token, which opens a chunk or joins the last one: its row of `dhsa(...) & causal()`, and the state.

    The query is scored against Nc running sums, and N_b keys are read.
    """
    state = _joined(state, k, v, opens)
    group = q.shape[1] // k.shape[1]
    token = kept(q, state, budget)
    index = token.unflatten(1, (-1, group)).flatten(2)[..., None]  # of the heads that share keys
    keys, values = (
        x.gather(2, index.expand(-1, -1, -1, x.shape[3])).unflatten(2, (group, -1)).flatten(1, 2)
        for x in (state.k, state.v)
    )
    grid = ct.Grid(n=token.shape[2])
    return ct.attention(q, keys, values, grid=ct.Grid(n=1), key_grid=grid), state


def kept(q: Float[Tensor, "b h 1 d"], state: ChunkState, budget: int) -> Int64[Tensor, "b h some"]:
    """The keys so far that a query keeps, by number: `budget`, or all that there are."""
    vectors = _normalized(state.sums, state.count).repeat_interleave(q.shape[1] // state.k.shape[1], 1)
    scores = q.to(vectors) @ vectors.transpose(-1, -2)
    first = (state.count.cumsum(1) - state.count)[:, None]
    return fill(scores, first, state.count[:, None], min(budget, state.k.shape[2]))[:, :, 0]


def _joined(state: ChunkState, k: Tensor, v: Tensor, opens: Bool[Tensor, "b"]) -> ChunkState:
    chunk = torch.arange(1, state.count.shape[1] + 1, device=k.device)
    number = (chunk * (state.count > 0)).amax(1) - 1 + opens.long()
    if bool((number < 0).any()):
        raise ChronotopeError("dhsa: the first token of a sequence opens a chunk; give opens=True for it.")
    spare = max(0, int(number.max()) + 1 - state.count.shape[1])
    count = F.pad(state.count, (0, spare)).scatter_add(1, number[:, None], torch.ones_like(number)[:, None])
    index = number[:, None, None, None].expand_as(k)
    sums = F.pad(state.sums, (0, 0, 0, spare)).scatter_add(2, index, k.to(state.sums))
    return replace(state, k=torch.cat([state.k, k], 2), v=torch.cat([state.v, v], 2), sums=sums, count=count)
