"""Models of plain PyTorch with attention, and what they give under a mask."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.adapt import Asked, At, Control
from chronotope.adapt.tap import _RUNNING

DENSE = F.scaled_dot_product_attention
GRID = ct.Grid(h=3, w=4)
WHERE = ct.window(h=3, w=1)
N, C = GRID.size, 16


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert not _RUNNING.frames and _RUNNING.mode is None and not _RUNNING.busy


class Own(nn.Module):
    """An attention layer of somebody, whose name says nothing."""

    def __init__(self, dim: int = C, heads: int = 2, dropout: float = 0.0):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.heads, self.dropout = heads, dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.out(y.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Layers with a non-linearity in between; by which function each is run says `by`."""

    def __init__(self, depth: int = 2, by: Callable[..., Tensor] | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(Own() for _ in range(depth))
        self.by = by

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            y = block(x, mask) if self.by is None else self.by(block, x, mask)
            x = x + torch.tanh(y)
        return x


@contextmanager
def masked(*shown: Tensor) -> Iterator[None]:
    """Calls see only what is shown: the same in all, or to each call of a model its own."""
    turns = itertools.cycle(shown)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        seen = next(turns)
        return DENSE(q, k, v, seen if attn_mask is None else seen & attn_mask, *args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", sdpa):
        yield


def shown_by(where: ct.Pattern, grid: ct.Grid = GRID) -> Tensor:
    return ct.plan(where, grid).mask()


def near(found: Tensor, expected: Tensor, most: float = 2e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=most * max(1.0, float(expected.detach().abs().max())))


class Edit(Control):
    """Calls functions; overrides all."""

    def __init__(self, **edits: Callable[..., Any]):
        self.edits = edits
        self.met: list[At] = []

    def asks(self, at: At, asked: Asked) -> Asked:
        self.met.append(at)
        return self.edits.get("asks", lambda at, x: x)(at, asked)

    def scores(self, at: At, scores: Tensor) -> Tensor:
        return self.edits.get("scores", lambda at, x: x)(at, scores)

    def weights(self, at: At, weights: Tensor) -> Tensor:
        return self.edits.get("weights", lambda at, x: x)(at, weights)

    def out(self, at: At, asked: Asked, out: Tensor) -> Tensor:
        return self.edits.get("out", lambda at, x: x)(at, out)


class Out(Control):
    """Adds to the output, and holds no weights."""

    def __init__(self, plus: float = 1.0):
        self.plus, self.met = plus, []

    def out(self, at: At, asked: Asked, out: Tensor) -> Tensor:
        self.met.append(at)
        return out + self.plus
