"""How much of dense attention a pattern or a route keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from chronotope.attention import attention
from chronotope.checks import check_grids, check_tensors
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.patterns import Pattern, full
from chronotope.patterns.order import Constant
from chronotope.planning import heads_alike
from chronotope.routed import chosen, of_heads

SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Fidelity:
    """Of each batch element and head: how close attention under a pattern or route comes to dense attention.

    mass: share of the dense attention weights that lies on visible pairs, the mean over queries. error: norm of the
    difference of the outputs by the norm of the dense output. recall: of the c keys that a query sees, the share that
    is among its c best by dense weights, the mean over queries that see any. density: visible pairs by those of dense.
    """

    mass: Float[Tensor, "b h"]
    error: Float[Tensor, "b h"]
    recall: Float[Tensor, "b h"]
    density: Float[Tensor, "b h"]

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {getattr(self, name).mean():.3f}" for name in ("mass", "error", "recall", "density"))
        return f"Fidelity({found})"


@torch.no_grad()
def fidelity(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk dv"],
    *,
    grid: Grid,
    where: Pattern,
    key_grid: Grid | None = None,
    dense: Pattern | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Fidelity:
    """What `where` keeps of dense attention, [B, H] each, see `Fidelity`. Two routes compare at equal density.

    `dense`: what counts as dense, such as `causal()` for a language model; default: everybody sees everybody. `where`
    is joined with it. Densities are shares of its pairs.

    Scores are looked at some queries at a time: memory grows with N. Time is that of dense attention several times.
    """
    key_grid = grid if key_grid is None else key_grid
    if not isinstance(where, Pattern):
        raise ChronotopeError(f"where={where!r}: expected a pattern or a route, such as ct.route.top_blocks(n=64).")
    check_grids(grid, key_grid)
    check_tensors(q, k, v, grid, key_grid)
    dense = full() if dense is None else dense
    where = where if isinstance(dense, Constant) else where & dense
    where.check(grid, key_grid)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    whole, out = (
        attention(q, k, v, grid=grid, key_grid=key_grid, where=pattern, scale=scale, backend=backend).double()
        for pattern in (dense, where)
    )
    error = (out - whole).norm(dim=(2, 3)) / whole.norm(dim=(2, 3))
    mass, recall, seen, sighted, possible = (q.new_zeros(q.shape[:2], dtype=torch.float64) for _ in range(5))
    exact = torch.promote_types(q.dtype, torch.float32)
    keys_at = Coords.of(key_grid, torch.arange(key_grid.size)).view(1, -1)
    for heads, tokens, mask in _rows(where, q, k, grid, key_grid):
        own, keys = of_heads(q, k, k, heads)[:2]
        group = own.shape[1] // keys.shape[1]
        own, keys = own[:, :, tokens].to(exact), keys.repeat_interleave(group, 1).to(exact)
        logits = scale * own @ keys.transpose(-1, -2)
        mask = mask.to(q.device)
        allowed = dense.sees(Coords.of(grid, tokens).view(-1, 1), keys_at).expand(mask.shape[-2:]).to(q.device)
        logits = logits.masked_fill(~allowed, -torch.inf)
        count = mask.sum(-1)
        kept = torch.where(mask, torch.nan_to_num(logits.softmax(-1)), 0.0).sum(-1)
        # As many as are seen are best; what equals the last of them is one too.
        least = logits.sort(dim=-1, descending=True).values.gather(-1, (count[..., None] - 1).clamp(min=0))
        found = (mask & (logits >= least)).sum(-1) / count.clamp(min=1)
        at = torch.tensor(heads, device=q.device)
        for total, new in (
            (mass, kept),
            (recall, found),
            (seen, count),
            (sighted, count > 0),
            (possible, allowed.sum(-1).expand_as(count)),
        ):
            total.index_add_(1, at, new.double().sum(-1))
    parts = (mass / q.shape[2], error, recall / sighted.clamp(min=1), seen / possible.clamp(min=1))
    return Fidelity(*(part.float() for part in parts))


def _rows(
    where: Pattern, q: Tensor, k: Tensor, grid: Grid, key_grid: Grid
) -> Iterator[tuple[tuple[int, ...], Int64[Tensor, "tokens"], Bool[Tensor, "b h tokens nk"]]]:
    """What some queries of some heads see."""
    batch, heads = q.shape[:2]
    if where.routes:
        for own, tiles in chosen(where, q, k, grid, key_grid):
            for tokens, seen in tiles.strips(range(len(tiles.layouts[0].sizes))):
                yield own, tokens, seen.view(batch, len(own), *seen.shape[1:])
        return
    step = max(1, SCORES_AT_ONCE // (batch * heads * key_grid.size))
    keys = Coords.of(key_grid, torch.arange(key_grid.size)).view(1, -1)
    for pattern, own in heads_alike(where, heads).items():
        for start in range(0, grid.size, step):
            tokens = torch.arange(start, min(grid.size, start + step))
            seen = pattern.sees(Coords.of(grid, tokens).view(-1, 1), keys).expand(len(tokens), key_grid.size)
            yield own, tokens, seen.expand(batch, len(own), *seen.shape)
