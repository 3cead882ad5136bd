"""Maps of attention of a fixed width: cell m of w stands for the keys j of T with floor((j + 1/2) w / T) = m.

Each of the T keys that a query may see lies in one cell; a cell has floor(T / w) or ceil(T / w) of them, which is none
for some where T < w. Where T differs by query, as it does under causal attention, so do the cells.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from chronotope.errors import ChronotopeError

COMPETING = {"query": (3,), "heads": (1, 3), "queries": (2, 3), "all": (1, 2, 3)}
"""The dimensions of a map [B, H, N, w] whose cells compete with each other."""


def first_keys(visible: Int64[Tensor, "*rows"], width: int) -> Int64[Tensor, "*rows cells_and_one"]:
    """The first key of each cell, and the end. `visible`: how many keys there are."""
    cell = torch.arange(width + 1, device=visible.device)
    return -((width - 2 * visible[..., None] * cell) // (2 * width))


def cell_of(visible: Int64[Tensor, "*rows"], width: int, keys: int) -> Int64[Tensor, "*rows keys"]:
    """The cell of each of the first `keys` keys; -1 for those that are not visible."""
    visible = visible[..., None]
    key = torch.arange(keys, device=visible.device)
    return torch.where(key < visible, (2 * key + 1) * width // (2 * visible.clamp(min=1)), -1)


def expand(
    cells: Float[Tensor, "b h n width"], visible: Int64[Tensor, "some n"], keys: int, empty: float
) -> Float[Tensor, "b h n keys"]:
    """For each key the number of its cell, `empty` for those that are not visible. N x N numbers: for training."""
    own = cell_of(visible, cells.shape[3], keys)[:, None].expand(*cells.shape[:3], keys)
    return torch.where(own >= 0, cells.gather(3, own.clamp(min=0)), empty)


def keep_cells(
    scores: Float[Tensor, "b h n width"], visible: Int64[Tensor, "some n"], keep: int, together: str = "query"
) -> Bool[Tensor, "b h n width"]:
    """The best cells, until they hold `keep` keys for each query and head, to half a cell; one at least.

    Where all cells are of one size, these are the round(keep * w / T) best.

    together: whose cells compete: those of one query and head ("query"), of all heads of a query ("heads"), of all
        queries of a head ("queries"), or of all heads and queries of a batch element ("all").
    """
    if together not in COMPETING:
        raise ChronotopeError(f"together={together!r}: expected one of {', '.join(COMPETING)}.")
    if keep < 1:
        raise ChronotopeError(f"keep={keep}: expected at least 1 key.")
    dims = COMPETING[together]
    apart = [dim for dim in range(4) if dim not in dims]
    order = (*apart, *dims)
    sizes = first_keys(visible, scores.shape[3]).diff()[:, None].expand_as(scores)
    scores = scores.detach().masked_fill(sizes == 0, -torch.inf).permute(order)
    flat, width = scores.flatten(len(apart)), sizes.permute(order).flatten(len(apart))
    best = flat.argsort(dim=-1, descending=True, stable=True)
    width = width.gather(-1, best)
    budget = keep * flat.shape[-1] // scores.shape[-1]
    kept = 2 * (width.cumsum(-1) - width) + width < 2 * budget
    kept[..., 0] = True
    found = torch.zeros_like(kept).scatter_(-1, best, kept & (width > 0))
    return found.view(scores.shape).permute(*(order.index(dim) for dim in range(4)))


def keys_of(kept: Bool[Tensor, "b h n width"], visible: Int64[Tensor, "some n"]) -> Int64[Tensor, "b h n most"]:
    """The keys of the cells that are kept, in order, and -1 beyond the end of each list."""
    first = first_keys(visible, kept.shape[3])
    sizes = torch.where(kept, first.diff()[:, None], 0)
    end = sizes.cumsum(-1)
    most = int(end[..., -1].max()) if end.numel() else 0
    slot = torch.arange(most, device=kept.device).expand(*kept.shape[:3], most).contiguous()
    cell = torch.searchsorted(end, slot, right=True).clamp(max=kept.shape[3] - 1)
    start = first[:, None, :, :-1].expand(kept.shape).gather(3, cell)
    key = start + slot - (end - sizes).gather(3, cell)
    return torch.where(slot < end[..., -1:], key, -1)
