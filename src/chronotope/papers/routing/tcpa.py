"""Token Coordinated Prompt Attention (TCPA): of a pool of learned prompts, each token of a frozen model meets its own.

Every layer has P entries of a key e_p [D] and m prompt vectors [m, D], one pool for the class token and one for
patches. With x the tokens that enter the layer, token i takes S_i = the `keep` entries of its pool with the largest
cos(x_i, e_p), and prompts are keys and values only:

    pre    out_i = softmax over [all tokens ; prompts of S_i]                     one softmax over what i may see
    post   out_i = softmax over [all tokens ; all prompts], then 0 outside S_i    as the released code has it: weights
                                                                                  add up to less than 1
    loss   + 0.1 * sum over layers and pools of mean(1 - cos(x_i, e_p)), p in S_i

The first is `ct.merge` of attention over the tokens and attention over the prompts, to whose blocks of m a route
sends each token; the second is the first times exp(lse over what i sees - lse over all). Only pools and what follows
the model learn. For the first epochs entries are drawn at random.

Sizes: x [B, N, D]; 20 entries of 4 prompts, 3 kept: 160 prompts in all and 12 for each token.

    >>> stack = ct.nn.Stack([ct.nn.Block([ct.nn.Attention(64, 4)], mlp="gelu") for _ in range(2)])
    >>> model, grid = TCPA(stack), ct.Grid(h=8, w=8, prefix=1)
    >>> y, loss = model.prompted(torch.randn(2, grid.size, 64), grid)
    >>> y.shape, loss.shape
    (torch.Size([2, 65, 64]), torch.Size([]))

Left out: results on HTA and VTAB, dropout of prompts, the prompts transformed by Fourier (VFPT) and prompts added to
pixels, with which the released code joins this.

Paper: Liu, Zou, Hua and Zhou 2025, "Token Coordinated Prompt Attention is Needed for Visual Prompting",
arXiv 2505.02406.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.merge import merge
from chronotope.nn.attention import Attention
from chronotope.nn.block import Block, Stack
from chronotope.nn.mixer import Context, Whole, require_tokens
from chronotope.papers.registry import paper
from chronotope.patterns import Route
from chronotope.routing import route

MODES = ("pre", "post")


class PromptRouter(nn.Module):
    """A pool: keys [P, D] and prompts [P, m, D], both uniform in -1..1 at first."""

    def __init__(self, dim: int, entries: int = 20, length: int = 4, keep: int = 3):
        super().__init__()
        if length < 1 or not 1 <= keep <= entries:
            raise ChronotopeError(
                f"PromptRouter(entries={entries}, length={length}, keep={keep}): 1 <= keep <= entries."
            )
        self.keep = keep
        self.keys = nn.Parameter(torch.empty(entries, dim).uniform_(-1, 1))
        self.prompts = nn.Parameter(torch.empty(entries, length, dim).uniform_(-1, 1))

    def forward(
        self, x: Float[Tensor, "b n d"], generator: torch.Generator | None = None
    ) -> tuple[Int64[Tensor, "b n keep"], Float[Tensor, ""]]:
        """The entries of each token, and the mean of 1 - cosine over them. With a generator they are drawn."""
        cosine = F.normalize(x, dim=-1) @ F.normalize(self.keys, dim=-1).T
        by = cosine if generator is None else torch.rand(cosine.shape, generator=generator).to(cosine)
        index = by.detach().topk(self.keep).indices
        return index, (1 - cosine.gather(2, index)).mean()

    def where(self, index: Int64[Tensor, "b n keep"]) -> Route:
        """The entries chosen as a route from Grid(n=N) to Grid(p=P, m=m); for many heads alike."""
        return route.chosen(index[:, None], queries={"n": 1}, p=1)

    def visible(self, index: Int64[Tensor, "b n keep"]) -> Bool[Tensor, "b n prompts"]:
        """Which of the P * m prompts each token sees."""
        entries, length, _ = self.prompts.shape
        seen = torch.zeros(*index.shape[:2], entries, dtype=torch.bool, device=index.device).scatter(2, index, True)
        return seen.repeat_interleave(length, 2)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk prompts d"],
        v: Float[Tensor, "b hk prompts d"],
        index: Int64[Tensor, "b n keep"],
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n"]]:
        """(out, lse) of each token over the prompts that it sees, given as keys and values of a layer."""
        entries, length, _ = self.prompts.shape
        grid, key_grid = Grid(n=q.shape[2]), Grid(p=entries, m=length)
        return attention(q, k, v, grid=grid, key_grid=key_grid, where=self.where(index), return_lse=True)


@paper(
    system=191,
    name="TCPA",
    family="routing",
    claim="prompt tuning of a frozen model in which every token attends to prompts chosen by its own features",
    evidence=["tests/papers/routing/test_tcpa.py"],
)
class TCPA(Whole):
    """A stack of blocks, frozen from here on, whose attention layers have prompts.

    Args:
        stack: blocks of one `ct.nn.Attention` each. On grids with a prefix, its tokens are the class tokens.
        entries, length, keep: of each pool.
        mask: "pre" or "post", see above.
        shared: one pool for class tokens and patches.
    """

    why = "its class token sees every patch"

    def __init__(
        self, stack: Stack, entries: int = 20, length: int = 4, keep: int = 3, mask: str = "pre", shared: bool = False
    ):
        super().__init__()
        if mask not in MODES:
            raise ChronotopeError(f"TCPA(mask={mask!r}): expected one of {', '.join(MODES)}.")
        for block in stack.blocks:
            if not isinstance(block, Block) or len(block.mixers) > 1 or not isinstance(block.mixers[0], Attention):
                raise ChronotopeError(f"TCPA: expected blocks of one ct.nn.Attention each, got {block}.")
        self.stack, self.dim, self.mask, self.shared = stack.requires_grad_(False), stack.dim, mask, shared
        pools = 1 if shared else 2
        self.pools = nn.ModuleList(
            nn.ModuleList(PromptRouter(stack.dim, entries, length, keep) for _ in range(pools)) for _ in stack.blocks
        )

    def prompted(
        self, x: Float[Tensor, "b n c"], grid: Grid, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, ""]]:
        """What the stack gives with prompts, and the loss of matching, to be added times 0.1.

        With a generator, entries are drawn instead of matched.
        """
        require_tokens(x, grid, self.dim, "x")
        losses = []
        for block, pools in zip(self.stack.blocks, self.pools, strict=True):
            out, own = self._attend(block, list(pools), x, grid, generator)  # type: ignore[arg-type,call-overload]
            x = x + out
            x = x if block.mlp is None else x + block.mlp(block.mlp_norm(x))  # type: ignore[operator]
            losses += own
        return self.stack.norm(x), torch.stack(losses).sum()

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """What the stack gives with prompts. Takes no context."""
        if context is not None:
            raise ChronotopeError("TCPA takes no context: its prompts are what tokens see beside themselves.")
        return self.prompted(x, grid)[0]

    def _attend(
        self, block: Block, pools: list[PromptRouter], x: Tensor, grid: Grid, generator: torch.Generator | None
    ) -> tuple[Tensor, list[Tensor]]:
        """What the attention of a block gives, and the losses of its pools."""
        layer = block.mixers[0]
        assert isinstance(layer, Attention)
        prompts = torch.cat([pool.prompts.flatten(0, 1) for pool in pools])
        count, prefix = len(prompts), grid.prefix
        # Prompts have no place: in the layer's own words they are more tokens of the prefix.
        both = torch.cat((prompts.expand(len(x), -1, -1), x), 1)
        normed = block.norms[0](both)
        q, k = layer.qk(normed, grid.replace(prefix=count + prefix))
        v = F.linear(normed, layer.qkv.weight[-layer.kv_heads * layer.head_dim :])
        v = v.unflatten(2, (layer.kv_heads, -1)).transpose(1, 2)
        q, (extra_k, k), (extra_v, v) = q[:, :, count:], *(y.split((count, x.shape[1]), 2) for y in (k, v))
        own = attention(q, k, v, grid=grid, where=layer.where, bias=layer.bias, softcap=layer.softcap, return_lse=True)
        parts, losses, first = [], [], 0
        for pool, rows in zip(pools, self._rows(prefix, x.shape[1]), strict=True):
            if rows.stop > rows.start:
                index, loss = pool(x[:, rows], generator)
                mine = slice(first, first + len(pool.prompts) * pool.prompts.shape[1])
                parts.append(pool.attend(q[:, :, rows], extra_k[:, :, mine], extra_v[:, :, mine], index))
                losses.append(loss)
            first += pool.prompts.shape[:2].numel()
        seen = tuple(torch.cat(y, 2) for y in zip(*parts, strict=True))
        out, lse = merge([own, seen])  # type: ignore[list-item]
        if self.mask == "post":
            every = attention(q, extra_k, extra_v, grid=Grid(n=x.shape[1]), key_grid=Grid(p=count), return_lse=True)
            out = out * (lse - torch.logaddexp(own[1], every[1])).exp()[..., None].to(out.dtype)
        return layer.out(out.transpose(1, 2).flatten(2)), losses

    def _rows(self, prefix: int, size: int) -> list[slice]:
        """The tokens of each pool."""
        return [slice(0, size)] if self.shared else [slice(0, prefix), slice(prefix, size)]
