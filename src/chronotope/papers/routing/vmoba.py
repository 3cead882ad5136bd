"""VMoBA: blocks of a video change with the layer, and all pairs (query, block) of a head compete for a share of gates.

    gate(s, J) = q_s . mean_J(k)                      blocks J: by l mod 3 whole frames, columns over all frames, boxes
    kept       = pairs with s in J, then others by falling gate, until sum of level(gate) >= tau * total of the head
    out_s      = softmax(q_s k^T / sqrt(D)) v         over the keys of the kept blocks of s

level moves the gates of a head to [0, 1]: (gate - lowest) / (highest - lowest). A head whose gates have few peaks
keeps few blocks, a flat head many, and a query that matters to its head more than others do.

Sizes: q, k, v [B, H, t h w, D]; C blocks give N C gates a head and work in proportion to the density. tau 0.25; blocks
of 2 frames, (3, 4) and (4, 6, 4) tokens; the first 12 sampling steps are dense.

    >>> grid = ct.Grid(t=4, h=6, w=8)
    >>> q = k = v = torch.randn(1, 2, grid.size, 16)
    >>> ct.attention(q, k, v, grid=grid, where=vmoba(layer=2)).shape
    torch.Size([1, 2, 192, 16])

Other scopes are other selections: `Threshold(tau)` or `TopK(k)` for each query, `Joint(..., "block")` for each block
over the queries of all heads, `Joint(..., "all")` for all heads; a top k of each query on average over a head is
`Joint(TopK(k / C))`.

Left out: the speed-ups of 2.92x in FLOPs and 1.48x in time and the quality of videos are not shown. The four threshold
functions of the authors' code (commit 4da72ff) choose the same pairs, except for at most one more where own blocks
alone hold tau, and for an early stop by rounding at tau = 1. Their code also chooses over all videos of a packed batch,
here each video for itself, and is dense where no head chooses any other block.

Paper: Wu et al. 2025, "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", arXiv 2506.23858.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, full
from chronotope.planning import plan
from chronotope.routed import chosen
from chronotope.routing.route import Blockwise, Cut, Dot, Joint, Mean, Selection, Threshold

PARTITIONS: tuple[Mapping[str, int], ...] = ({"t": 2}, {"h": 3, "w": 4}, {"t": 4, "h": 6, "w": 4})
"""Blocks of the layers 0, 1, 2, which then repeat: whole frames, columns over all frames, boxes."""
SELECTION = Joint(Threshold(0.25))
"""All pairs of a head compete."""


@paper(
    system=8,
    name="VMoBA",
    family="routing",
    claim="temporal, spatial and 3D blocks by layer; all (query, block) pairs of a head compete until a share is kept",
    evidence=["tests/papers/routing/test_vmoba.py"],
)
def vmoba(
    layer: int = 0,
    step: int | None = None,
    *,
    selection: Selection = SELECTION,
    partitions: Sequence[Mapping[str, int]] = PARTITIONS,
    dense_steps: int = 12,
) -> Pattern:
    """Who may look at whom in one layer of a video model on a grid with axes t, h, w, for `ct.attention(where=...)`.

    Args:
        layer: number of the layer; its blocks are `partitions[layer % len(partitions)]`.
        step: sampling step; the first `dense_steps` are dense. None: training, or no schedule.
        selection: which pairs are kept.
        partitions: tokens of a block by axis; a grid that they do not divide has smaller blocks at its ends.
    """
    if not partitions:
        raise ChronotopeError("vmoba(partitions=()): give the blocks of one layer at least, such as {'t': 2}.")
    if step is not None and step < dense_steps:
        return full()
    each = {"t": 1, "h": 1, "w": 1}
    cut = Cut.of("vmoba", partitions[layer % len(partitions)], queries=each)
    return Blockwise(cut, selection, Mean(), Dot(counted=False))


def density(
    where: Pattern, q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], grid: Grid
) -> Float[Tensor, "b h"]:
    """The share of visible pairs, which q and k decide, of each head."""
    if not where.routes:
        return q.new_full(q.shape[:2], plan(where, grid, heads=q.shape[1]).density, dtype=torch.float32)
    out = q.new_empty(q.shape[:2], dtype=torch.float32)
    for heads, tiles in chosen(where, q, k, grid, grid):
        out[:, list(heads)] = tiles.visible_by_slab.view(len(q), -1).to(out) / grid.size**2
    return out
