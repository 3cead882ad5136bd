"""Bias objects as tables of relative offsets, for kernels that look scores up by themselves."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from chronotope.bias import Relative
from chronotope.kernels.call import Facts, Scores
from chronotope.planning import Tiling


def relative(scores: Scores, tiles: Tiling) -> list[Relative]:
    """The bias object of a call as tables for its heads, float32; the score of a pair is their sum."""
    if scores.bias is None:
        return []
    found = scores.bias.relative(scores.state, tiles.q.grid, tiles.k.grid)
    assert found is not None
    return [replace(one, table=one.table[list(scores.heads)].float()) for one in found]


def pull(scores: Scores, tiles: Tiling, dtables: list[Tensor]) -> list[Tensor | None]:
    """The gradients of the tensors behind a bias object, given those of its tables."""
    if not dtables:
        return [None] * len(scores.tensors)

    def tables(*tensors: Tensor) -> list[Tensor]:
        return [one.table for one in relative(scores.given(tensors), tiles)]

    _, back = torch.func.vjp(tables, *scores.tensors)  # type: ignore[misc]
    return list(back(dtables))


def only_relative(facts: Facts, tiles: Tiling, scores: Scores) -> list[str]:
    """Why a kernel that looks scores up in tables cannot add this bias."""
    if scores.bias is None:
        return []
    known = {name: x.detach() for name, x in (*scores.bias.named_parameters(), *scores.bias.named_buffers())}
    if scores.bias.relative(known, tiles.q.grid, tiles.k.grid) is None:
        return [f"{scores.bias._get_name()} gives no table of relative offsets (Bias.relative)"]
    return []
