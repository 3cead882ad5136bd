"""SinkLoRA: shifted groups for fine-tuning on long inputs, with sink tokens that everybody sees and without the wrap.

    query i sees key j  iff  j <= i  and  (floor((i + s_h) / G) = floor((j + s_h) / G)  or  j < sinks)
    s_h = 0, or G / 2 in the second half of the heads

Shifted Sparse Attention (LongLoRA), the base, has no sinks and rolls the shifted heads round the end: the first G / 2
tokens join the group of the last G / 2 and come after them, so that early outputs depend on late tokens (`wrap=True`).
Without the wrap both ends are groups of their own, and nothing depends on what comes later.

Sizes: G = N / 4, 4 sinks, half of the heads shifted. Pairs grow as N G. Dense attention at inference.

Example:
    >>> where = shifted_groups(1024, 256, heads=8)
    >>> q = k = v = torch.randn(1, 8, 1024, 32)
    >>> ct.attention(q, k, v, grid=ct.Grid(n=1024), where=where).shape
    torch.Size([1, 8, 1024, 32])

`HeavyHitters` is the cache that the paper pairs with it at inference (H2O): the most recent tokens and those with the
largest accumulated attention.

Left out: LoRA itself, trainable embeddings and norms, and the interpolation of positions (a matter of the model, not of
attention); the share of groups that the paper's reassembly returns, which it does not state (here: all); the
perplexity of Llama 2. The training shown is from scratch, on a copy task.

Paper: Zhang 2024, "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
arXiv 2406.05678. Base: Chen et al. 2023, arXiv 2309.12307. Cache: Zhang et al. 2023, arXiv 2306.14048.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, blocks, causal, per_head, segments
from chronotope.patterns import sinks as first_tokens


@paper(
    system=96,
    name="SinkLoRA (SF-Attn)",
    family="pattern",
    claim="causal groups, shifted in half of the heads without a leak from the future, and sinks that all see",
    evidence=["tests/papers/pattern/test_sinklora.py"],
)
def shifted_groups(
    n: int,
    group: int,
    *,
    heads: int,
    shift_heads: int | None = None,
    sinks: int = 4,
    wrap: bool = False,
    axis: str = "n",
) -> Pattern:
    """Causal groups of `group` tokens on a sequence of n, moved by half a group in the last `shift_heads` heads.

    Args:
        shift_heads: default: half of the heads.
        sinks: tokens at the start that all later queries see; 0 for none.
        wrap: roll the shifted heads round the end as Shifted Sparse Attention does; n must be whole groups.
    """
    shift_heads = heads // 2 if shift_heads is None else shift_heads
    half = group // 2
    if heads < 1 or not 0 <= shift_heads <= heads or group < 2 or group % 2 or sinks < 0:
        raise ChronotopeError(
            f"shifted_groups(heads={heads}, shift_heads={shift_heads}, group={group}, sinks={sinks}): "
            "expected 0 to all heads shifted, an even group of 2 or more, and sinks of 0 or more."
        )
    if wrap and n % group:
        raise ChronotopeError(
            f"shifted_groups(n={n}, group={group}, wrap=True): the wrap needs n to be a multiple of the group."
        )
    moved = blocks(shift={axis: half}, **{axis: group})  # type: ignore[arg-type]
    plain, shifted = blocks(**{axis: group}) & causal(), moved & causal()  # type: ignore[arg-type]
    if wrap:
        ends = torch.arange(n)
        ends[-half:] = ends[:half] = 0
        shifted = shifted | (segments(ends) & ~moved & ~causal())
    if sinks:
        plain, shifted = (seen | (first_tokens(sinks) & causal()) for seen in (plain, shifted))
    return per_head([plain] * (heads - shift_heads) + [shifted] * shift_heads)


class HeavyHitters:
    """A cache of at most `budget` tokens for each head: the `recent` last ones, and those that got most attention."""

    def __init__(self, budget: int, recent: int):
        if not 1 <= recent <= budget:
            raise ChronotopeError(f"HeavyHitters(budget={budget}, recent={recent}): expected 1 <= recent <= budget.")
        self.budget, self.recent = budget, recent
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.got: Tensor | None = None

    def step(
        self, q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b h 1 d"], v: Float[Tensor, "b h 1 dv"]
    ) -> Float[Tensor, "b h 1 dv"]:
        """Takes one token in, returns its attention over what is kept, then drops one token if there are too many."""
        new = k.new_zeros(k.shape[:3])
        if self.keys is None or self.values is None or self.got is None:
            keys, values, got = k, v, new
        else:
            keys, values, got = (torch.cat(pair, 2) for pair in ((self.keys, k), (self.values, v), (self.got, new)))
        out, lse = attention(q, keys, values, grid=Grid(n=1), key_grid=Grid(m=keys.shape[2]), return_lse=True)
        got = got + torch.exp((keys @ q.mT)[..., 0] / math.sqrt(q.shape[3]) - lse).to(got.dtype)
        if keys.shape[2] > self.budget:
            least = got[..., : -self.recent].argmin(-1, keepdim=True)
            index = torch.arange(self.budget, device=q.device).expand(*got.shape[:2], -1)
            index = index + (index >= least)
            got = got.gather(2, index)
            keys, values = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
        self.keys, self.values, self.got = keys, values, got
        return out  # type: ignore[return-value]
