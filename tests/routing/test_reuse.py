"""Choices that are used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import chronotope as ct

GRID = ct.Grid(n=32)


def numbers(seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, 32, 8, generator=rng), torch.randn(1, 2, 32, 8, generator=rng)


def test_every_third_call_chooses() -> None:
    fresh = ct.route.top_blocks(2, n=4)
    route = ct.route.reuse(fresh, every=3)
    masks = [route.select(*numbers(i), GRID) for i in range(5)]
    new = [fresh.select(*numbers(i), GRID) for i in range(5)]
    assert masks[0].equal(new[0]) and masks[1].equal(new[0]) and masks[2].equal(new[0])
    assert masks[3].equal(new[3]) and masks[4].equal(new[3]) and not new[3].equal(new[0])


def test_as_long_as_queries_are_alike() -> None:
    fresh = ct.route.top_blocks(2, n=4)
    route = ct.route.reuse(fresh, similarity=0.9)
    q, k = numbers(0)
    first = route.select(q, k, GRID)
    _, other = numbers(1)
    assert route.select(q + 0.01, other, GRID).equal(first)
    assert route.select(-q, other, GRID).equal(fresh.select(-q, other, GRID))


def test_until_it_is_told_to_forget_and_for_each_grid_its_own() -> None:
    fresh = ct.route.top_blocks(2, n=4)
    route = ct.route.reuse(fresh)
    first = route.select(*numbers(0), GRID)
    assert route.select(*numbers(1), GRID).equal(first)
    short = tuple(x[:, :, :20] for x in numbers(1))
    assert route.select(*short, ct.Grid(n=20)).equal(fresh.select(*short, ct.Grid(n=20)))
    beside = route & ct.causal()
    assert beside.select(*numbers(1), GRID).equal((fresh & ct.causal()).select(*numbers(1), GRID))
    route.forget()
    assert route.select(*numbers(1), GRID).equal(fresh.select(*numbers(1), GRID))


@pytest.mark.parametrize("wrong", [{"every": 0}, {"similarity": 2.0}])
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ct.ChronotopeError, match="expected"):
        ct.route.reuse(ct.route.top_blocks(n=4), **wrong)  # type: ignore[arg-type]
