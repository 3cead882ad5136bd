"""Scores as arguments of kernels: scale, softcap, bias tensors, and bias objects as tables of relative offsets."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from chronotope.kernels.call import Scores
from chronotope.kernels.relative import relative
from chronotope.kernels.triton.device import LOG2E
from chronotope.kernels.triton.tables import coordinates
from chronotope.planning import Tiling

Term = tuple[int, int, int, int, bool]
"""Axis, reach, stride, the start of the table where it is the table's first axis, and whether it is the last."""


class Pairs(NamedTuple):
    """A tensor that broadcasts to [B, H, Nq, Nk]: its strides, 0 where it has one entry."""

    data: Tensor | None
    batch: int
    head: int
    query: int
    key: int


class Scoring(NamedTuple):
    """Logits to base 2 are outer * tanh(inner * q . k) where `capped`, else inner * q . k; plus the bias times log2 e.

    The bias is `tensor` with its strides where `dense`; else the sum of relative tables, side by side in `table`
    [H, entries], of coordinates `q_places` and `k_places` [positions, axes]. `scale` is that of the gradients of q and
    k. (One level of fields, as in `Masks`.)
    """

    scale: float
    inner: float
    outer: float
    capped: tl.constexpr
    dense: tl.constexpr
    tensor: Tensor | None
    batch: int
    head: int
    query: int
    key: int
    table: Tensor | None
    entries: int
    q_places: Tensor | None
    k_places: Tensor | None
    axes: tl.constexpr
    q_prefix: int
    k_prefix: int


def pairs(x: Tensor) -> Pairs:
    """A tensor of four dimensions, any of which may be 1, as an argument of a kernel."""
    return Pairs(x, *(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)))


def scoring(scores: Scores, tiles: Tiling, device: torch.device) -> tuple[Scoring, tuple[Term, ...]]:
    """The scores of a call, and the terms of the indices of its relative tables, which kernels are compiled for."""
    cap, log2e = scores.softcap, LOG2E.value
    tensor = Pairs(None, 0, 0, 0, 0)
    table, q_places, k_places, entries = None, None, None, 0
    axes: tuple[str, ...] = ()
    terms: tuple[Term, ...] = ()
    if scores.biased and scores.bias is None:
        tensor = pairs(scores.tensor)
    elif scores.biased:
        found = relative(scores, tiles)
        if found:
            axes = tuple(dict.fromkeys(axis for one in found for axis in one.extent))
            table = torch.cat([one.table for one in found], 1).contiguous()
            (q_places, k_places), entries = coordinates(tiles, axes, device), table.shape[1]
            terms = _terms([dict(one.extent) for one in found], axes)
    arguments = Scoring(
        scale=scores.scale,
        inner=scores.scale * log2e if cap is None else scores.scale / cap,
        outer=1.0 if cap is None else cap * log2e,
        capped=tl.constexpr(cap is not None),
        dense=tl.constexpr(tensor.data is not None),
        tensor=tensor.data,
        batch=tensor.batch,
        head=tensor.head,
        query=tensor.query,
        key=tensor.key,
        table=table,
        entries=entries,
        q_places=q_places,
        k_places=k_places,
        axes=tl.constexpr(len(axes)),
        q_prefix=tiles.q.grid.prefix,
        k_prefix=tiles.k.grid.prefix,
    )
    return arguments, terms


def _terms(extents: list[dict[str, int]], axes: tuple[str, ...]) -> tuple[Term, ...]:
    terms: list[Term] = []
    start = 0
    for extent in extents:
        stride, own = 1, []
        for axis, reach in reversed(extent.items()):
            own.append((axes.index(axis), reach, stride, 0, False))
            stride *= 2 * reach + 1
        own.reverse()
        own[0] = (*own[0][:3], start, own[0][4])
        own[-1] = (*own[-1][:4], True)
        terms.extend(own)
        start += stride
    return tuple(terms)
