"""Combiner: full attention at sparse cost, by summaries of regions that share one softmax with the direct keys.

    p(j | i) = p_direct(j | i)            j in the direct set of i
    p(j | i) = p(r | i) p(j | r)          j in a region r of i;  direct set and regions divide up all that i may see
    k_r = max of the region's keys,   v_r = softmax(q_r K_r^T / sqrt(d)) V_r,   q_r = max of the region's queries

v_r does not depend on i, so out_i = sum_direct p v_j + sum_r p(r | i) v_r is one softmax over few logits.

    fixed   direct: the own segment of S tokens up to i; regions: all earlier segments;   N (S + N/S) / 2 logits
    logn    direct: i; regions: the dyadic spans before i, one at most of each length;    N (1 + log2(N) / 2) logits

Without `causal` the own segment is whole and later regions count too. Sizes: S about sqrt(N). N need not divide.

Example:
    >>> q = k = v = torch.randn(1, 2, 100, 16)
    >>> combiner(q, k, v, pattern="fixed", segment=8).shape
    torch.Size([1, 2, 100, 16])

`combiner_axial.axial_mixture` is the variant for h x w grids.

Left out: the row-major axial variant (its keys pass through layers of their own), pooling by a learned class query
("cls"), dropout of the weights, published perplexities and bits per dim.

Paper: Ren et al. 2021, "Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv 2107.05768.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.merge import merge
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, along, blocks, causal, window

POOLS = ("max", "mean")


@paper(
    system=50,
    name="Combiner",
    family="pattern",
    claim="every allowed key has weight: directly, or through the summary of its region; O(N sqrt N) or O(N log N)",
    evidence=["tests/papers/pattern/test_combiner.py"],
)
def combiner(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    *,
    pattern: str = "fixed",
    segment: int = 64,
    is_causal: bool = True,
    summary_q: str = "max",
    summary_k: str = "max",
    real: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """Combiner attention on a sequence.

    Args:
        pattern: "fixed" (segments of `segment` tokens) or "logn".
        summary_q, summary_k: how the queries and the keys of a region are pooled: "max" or "mean".
        real: False at padding, which is neither a direct key nor part of a summary.
    """
    if pattern not in ("fixed", "logn") or segment < 1:
        raise ChronotopeError(
            f"combiner(pattern={pattern!r}, segment={segment}): expected 'fixed' or 'logn', and 1 or more."
        )
    if summary_q not in POOLS or summary_k not in POOLS:
        raise ChronotopeError(
            f"combiner(summary_q={summary_q!r}, summary_k={summary_k!r}): expected each to be one of {POOLS}."
        )
    size = q.shape[2]
    whole = -(-size // segment) * segment if pattern == "fixed" else 1 << (size - 1).bit_length()
    if real is None and whole > size and not is_causal:
        real = torch.ones(len(q), size, dtype=torch.bool, device=q.device)
    q, k, v = (pad(x, (0, 0, 0, whole - size)) for x in (q, k, v))
    real = None if real is None else pad(real, (0, whole - size))
    parts = []
    for i, (grid, key_grid, where) in enumerate(layout(pattern, whole, segment, is_causal)):
        keys, values, seen = (k, v, real) if i == 0 else summaries(q, k, v, grid, summary_q, summary_k, real)
        parts.append(
            attention(q, keys, values, grid=grid, key_grid=key_grid, where=where, bias=_hide(seen, q), return_lse=True)
        )
    return merge(parts)[0][:, :, :size]  # type: ignore[arg-type]


def layout(pattern: str, size: int, segment: int, is_causal: bool) -> list[tuple[Grid, Grid, Pattern]]:
    """(query grid, key grid, pattern) of the direct keys, then of each kind of region.

    Queries lie on s (region) and m (place in it), summaries on s. The size must be whole regions.
    """
    if pattern == "fixed":
        grid = Grid(s=size // segment, m=segment)
        direct = along("m") & causal("m") if is_causal else along("m")
        others = causal("s", strict=True) if is_causal else ~window(s=1)
        return [(grid, grid, direct), (grid, Grid(s=size // segment), others)]
    flat = Grid(s=size)
    sibling = blocks(s=2) & causal("s", strict=True)
    if not is_causal:
        sibling = blocks(s=2) & ~window(s=1)
    out: list[tuple[Grid, Grid, Pattern]] = [(flat, flat, window(s=1))]
    for level in range(size.bit_length() - 1):
        out.append((Grid(s=size >> level, m=1 << level), Grid(s=size >> level), sibling))
    return out


def summaries(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    grid: Grid,
    summary_q: str = "max",
    summary_k: str = "max",
    real: Bool[Tensor, "b n"] | None = None,
) -> tuple[Float[Tensor, "b h s d"], Float[Tensor, "b h s dv"], Bool[Tensor, "b s"] | None]:
    """Key and value of each region of `grid` (axes s, m), and which regions have a real token."""
    regions = Grid(s=grid.sizes["s"])
    asks, keys = (_pool(x, grid, how, real) for x, how in ((q, summary_q), (k, summary_k)))
    values = attention(asks, k, v, grid=regions, key_grid=grid, where=along("m"), bias=_hide(real, q))
    return keys, values, None if real is None else real.unflatten(1, grid.shape).any(2)  # type: ignore[return-value]


def effective_map(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], **options: object
) -> Float[Tensor, "b h n n"]:
    """The dense map p(j | i) that `combiner` with these options stands for, for small N: its output for unit values."""
    batch, heads, size, _ = q.shape
    unit = torch.eye(size, dtype=q.dtype, device=q.device).expand(batch, heads, size, size)
    return combiner(q, k, unit, **options)  # type: ignore[arg-type]


def _pool(x: Tensor, grid: Grid, how: str, real: Tensor | None) -> Tensor:
    """Maximum or mean over the real tokens of each region; 0 where there is none."""
    x = x.unflatten(2, grid.shape)
    if real is None:
        return x.amax(3) if how == "max" else x.mean(3)
    here = real.unflatten(1, grid.shape)[:, None, :, :, None]
    if how == "mean":
        return torch.where(here, x, 0.0).sum(3) / here.sum(3).clamp(min=1)
    return torch.where(here.any(3), torch.where(here, x, -torch.inf).amax(3), 0.0)


def _hide(real: Tensor | None, like: Tensor) -> Tensor | None:
    """A bias [B, 1, 1, N] of -inf at padding."""
    if real is None:
        return None
    return torch.zeros(real.shape, dtype=like.dtype, device=like.device).masked_fill(~real, -torch.inf)[:, None, None]


class FixedStream:
    """The causal fixed pattern token by token: summaries of the finished segments, and the open segment's tokens."""

    def __init__(self, segment: int):
        self.segment = segment
        self.done: tuple[Tensor, Tensor] | None = None
        self.open: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (*(self.done or ()), *(self.open or ())))

    def step(
        self, q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b h 1 d"], v: Float[Tensor, "b h 1 dv"]
    ) -> Float[Tensor, "b h 1 dv"]:
        """Takes one token in and returns its output."""
        new = (q, k, v)
        self.open = new if self.open is None else _append(self.open, new)  # type: ignore[assignment]
        assert self.open is not None
        pairs = [self.open[1:]] if self.done is None else [self.open[1:], self.done]
        parts = [attention(q, a, b, grid=Grid(n=1), key_grid=Grid(m=a.shape[2]), return_lse=True) for a, b in pairs]
        if self.open[0].shape[2] == self.segment:
            summary = summaries(*self.open, Grid(s=1, m=self.segment))[:2]
            self.done = summary if self.done is None else _append(self.done, summary)  # type: ignore[assignment]
            self.open = None
        return merge(parts)[0]  # type: ignore[arg-type]


def _append(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat([a, b], 2) for a, b in zip(old, new, strict=True))
