"""Landmark Attention: a landmark token ends every block of l tokens, and its key decides how much the block is read.

With s_ij = q_i . k_j / sqrt(d), and m_b the landmark of block b, a query i in block c has the weights

    own block     w_ij = p_i(j)                  p_i = softmax of s over the tokens j <= i of block c that are no
    block b < c   w_ij = p_i(m_b) p_ib(j)              landmarks, and the landmarks of all earlier blocks
    landmarks     w_ij = 0                       p_ib = softmax of s over the l tokens of block b

so that every row adds up to 1. Block b is one attention (o_ib, lse_ib) of its own; w is `ct.merge` of the own block
and these, with the landmark's score s_im_b in the place of lse_ib. Where the two are equal, this is dense attention.

Memory (`step`): text comes in chunks; finished blocks go to a cache, keys without rotation. Of C cached blocks each
query reads the `keep` whose landmarks it scores best; the chunk, and the block before it that is not full, are read
as a whole. They begin at place (keep + 1)(l + 1) at the latest, so that no place grows with the text: the latest `keep`
blocks keep their order in slots 1 .. keep before the chunk, and all older ones are scored in slot 0; of the blocks that
are read, older ones are moved to the first slots and later ones to the last, in order. Up to `keep` cached blocks all
stay where they are, and stepping is the same as `forward`.

Sizes: q, k, v [B, H, N, D], landmarks included. In training as many pairs are scored as by dense causal attention; from
the cache a query scores C landmarks and fetches keep (l + 1) tokens.

    >>> layer = LandmarkAttention(64, heads=4, block=15)
    >>> x = insert_landmarks(torch.randn(2, 60, 64), torch.zeros(64), block=15)
    >>> layer(x, ct.Grid(n=64)).shape
    torch.Size([2, 64, 64])

On video a landmark for each frame is `block` = tokens of a frame, on Grid(t=frames, n=block + 1).

Left out: LLaMA at 32 thousand tokens, the fused kernel, and the random jumps of positions at landmarks in training.
The released code gives the chunk and the last block one slot where just `keep` blocks are cached; here slots differ.

Paper: Mohtashami and Jaggi 2023, "Landmark Attention: Random-Access Infinite Context Length for Transformers",
arXiv 2305.16300.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.merge import merge
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.papers.registry import paper
from chronotope.papers.routing.landmark_memory import SHARES, Cache, LandmarkState, read, rotated
from chronotope.patterns import blocks, causal
from chronotope.position import Rope

ORDER = Rope("n")
"""The place of a token in the order of the grid."""


def insert_landmarks(
    x: Float[Tensor, "b n c"], landmark: Float[Tensor, "c"], block: int
) -> Float[Tensor, "b with_landmarks c"]:
    """x with the landmark after every `block` tokens; a last block that is not full gets none."""
    whole = x.shape[1] // block * block
    full = F.pad(x[:, :whole].unflatten(1, (-1, block)), (0, 0, 0, 1))
    full[:, :, block] = landmark
    return torch.cat((full.flatten(1, 2), x[:, whole:]), 1)


def landmarks(n: int, block: int) -> Bool[Tensor, "n"]:
    """Which of n tokens, landmarks included, are landmarks."""
    return torch.arange(n) % (block + 1) == block


def grouped_softmax(
    logits: Float[Tensor, "b h nq nk"], landmark: Bool[Tensor, "b nk"], group_dropout: float = 0.0
) -> Float[Tensor, "b h nq nk"]:
    """The weights w, for landmarks anywhere after one token or more: a landmark ends the block of the tokens before it.

    Queries are the last nq of the nk tokens. This is the meaning of the mechanism, for N x N logits.
    """
    nq, nk = logits.shape[2:]
    here = torch.arange(nk, device=logits.device)
    seen = here <= here[nk - nq :, None]
    group = (landmark.cumsum(1) - landmark.long())[:, None, None]
    own = group[..., nk - nq :].transpose(2, 3)
    mark = landmark[:, None, None] & (group < own)
    first = seen & ((~landmark[:, None, None] & (group == own)) | mark)
    rest = ~landmark[:, None, None] & (group < own)
    direct = logits.masked_fill(~first, -torch.inf).softmax(-1)
    group = group.expand_as(logits)
    empty = logits.new_zeros(*logits.shape[:3], int(group.max()) + 1)
    # Logits of the own block and of landmarks have groups of their own in what follows, whose sums nobody asks for.
    top = empty.scatter_reduce(3, group, logits.detach().masked_fill(~rest, -torch.inf), "amax", include_self=False)
    shifted = torch.where(rest, logits - top.gather(3, group), -torch.inf).exp()
    total = empty.scatter_add(3, group, shifted).gather(3, group)
    read = F.dropout(empty.scatter_add(3, group, direct * mark), group_dropout).gather(3, group)
    return torch.where(rest, read * shifted / torch.where(rest, total, 1.0), direct.masked_fill(mark, 0.0))


def attend(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b h nk d"],
    v: Float[Tensor, "b h nk dv"],
    block: int,
    group_dropout: float = 0.0,
) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"]]:
    """(out, lse) of the last nq of nk tokens, the first of which begins a block; lse is that of the first group."""
    size, new, n = block + 1, q.shape[2], k.shape[2]
    hidden = torch.where(landmarks(n, block), -torch.inf, 0.0).to(q)[None, None, None]
    q = F.pad(q, (0, 0, n - new, 0))  # tokens of the first block that have been queries before
    out, lse = attention(q, k, v, grid=Grid(n=n), where=blocks(n=size) & causal(), bias=hidden, return_lse=True)
    for mark in range(block, n - 1, size):
        rows, tokens = slice(max(mark + 1, n - new), None), slice(mark - block, mark)
        asks = q[:, :, rows]
        part, _ = attention(
            asks, k[:, :, tokens], v[:, :, tokens], grid=Grid(n=asks.shape[2]), key_grid=Grid(m=block), return_lse=True
        )
        score = (asks @ k[:, :, mark, :, None])[..., 0].to(lse.dtype) / q.shape[3] ** 0.5
        if group_dropout:
            part = part * F.dropout(torch.ones_like(part[..., :1]), group_dropout)
        joined = merge([(out[:, :, rows], lse[:, :, rows]), (part, score)])
        before = slice(0, rows.start)
        out, lse = (torch.cat((x[:, :, before], y), 2) for x, y in zip((out, lse), joined, strict=True))
    return out[:, :, n - new :], lse[:, :, n - new :]


def landmark_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    *,
    block: int | None = None,
    landmark: Bool[Tensor, "b n"] | None = None,
    group_dropout: float = 0.0,
) -> Float[Tensor, "b h n dv"]:
    """All tokens at once, as in training.

    Args:
        block: tokens in a block without its landmark; landmarks are at block, 2 block + 1, ...
        landmark: where landmarks are, if anywhere else; then weights N x N are made.
        group_dropout: share of earlier blocks, for each query and head, that is left out of the sum.
    """
    if (block is None) == (landmark is None) or (block is not None and block < 1):
        raise ChronotopeError(f"landmark_attention(block={block}): give a block of 1 or more, or `landmark`, not both.")
    if block is not None:
        return attend(q, k, v, block, group_dropout)[0]
    assert landmark is not None
    return grouped_softmax(q @ k.transpose(2, 3) / q.shape[3] ** 0.5, landmark, group_dropout) @ v


@paper(
    system=74,
    name="Landmark Attention",
    family="routing",
    claim="the key of a landmark token gates its block; memory of any length is read by the blocks of the best ones",
    evidence=["tests/papers/routing/test_landmark.py", "tests/papers/routing/test_landmark_passkey.py"],
)
class LandmarkAttention(Mixer):
    """y = W_o landmark_attention(rope(W_q x), rope(W_k x), W_v x), tokens and landmarks in the order of the grid.

    Args:
        dim: channels of x.
        heads: a divisor of dim.
        block: tokens in a block without its landmark, l.
        keep: cached blocks that a query reads in `step`; None: all, then stepping equals `forward`.
        share: who chooses blocks: "token_head" (each query and head), "heads" (each token: the best over heads) or
            "tokens" (each head for all queries of a slice, where a later one has a say in what an earlier one reads).
        position: rotary code of the place in the order, axis "n", or None.
        group_dropout: in training, the share of earlier blocks left out.
        cache_device: where finished blocks lie; default: where they are made. Landmarks stay there in any case.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        block: int = 50,
        keep: int | None = None,
        share: str = "token_head",
        position: Rope | None = ORDER,
        group_dropout: float = 0.0,
        cache_device: torch.device | str | None = None,
    ):
        super().__init__()
        if heads < 1 or dim % heads or block < 1 or (keep is not None and keep < 1) or share not in SHARES:
            raise ChronotopeError(
                f"LandmarkAttention(dim={dim}, heads={heads}, block={block}, keep={keep}, share={share!r}): heads must "
                f"divide dim, block and keep are 1 or more, share is one of {', '.join(SHARES)}."
            )
        self.dim, self.heads, self.block, self.keep, self.share = dim, heads, block, keep, share
        self.position, self.group_dropout, self.cache_device = position, group_dropout, cache_device
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once, every block read. Takes no context."""
        if context is not None:
            raise ChronotopeError("LandmarkAttention takes no context: landmarks divide up its own tokens.")
        require_tokens(x, grid, self.dim, "x")
        q, k, v = self._heads(x)
        place = torch.arange(x.shape[1], device=x.device)
        q, k = (rotated(y, self.position, place) for y in (q, k))
        dropout = self.group_dropout if self.training else 0.0
        return self._left(landmark_attention(q, k, v, block=self.block, group_dropout=dropout))

    def init_state(self, batch: int, grid: Grid) -> LandmarkState:
        """Nothing cached. `grid`: of one slice, which is a chunk, such as Grid(t=1, n=256)."""
        require_slice(grid)
        empty = self.out.weight.new_zeros(batch, self.heads, 0, self.dim // self.heads)
        kept = empty.to(self.cache_device or empty.device)
        return LandmarkState(Cache(kept, kept, empty, self.block), empty, empty, grid)

    def step(self, x: Float[Tensor, "b s c"], state: LandmarkState) -> tuple[Float[Tensor, "b s c"], LandmarkState]:
        """The next slice: over itself, the block before it that is not full, and the cached blocks that it chooses."""
        require_tokens(x, state.grid, self.dim, "x")
        q, k, v = self._heads(x)
        k, v = torch.cat((state.k, k), 2), torch.cat((state.v, v), 2)
        place = torch.arange(k.shape[2], device=x.device)
        new = place[-q.shape[2] :]
        chunk = attend(rotated(q, self.position, new), rotated(k, self.position, place), v, self.block)
        fetched = read(q, new, state.cache, self.position, self.keep, self.share)
        done = k.shape[2] // (self.block + 1) * (self.block + 1)
        after = replace(
            state, cache=state.cache.grown(k[:, :, :done], v[:, :, :done]), k=k[:, :, done:], v=v[:, :, done:]
        )
        return self._left(merge([chunk, *fetched])[0]), after

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _left(self, out: Tensor) -> Tensor:
        return self.out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
