"""Fidelity against its definition, written out."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import chronotope as ct

GRID = ct.Grid(t=4, h=5, prefix=2)
WHERE = {
    "window": ct.window(t=3),
    "route": ct.route.top_blocks(2, t=2, h=2),
    "each query": ct.route.top_blocks(2, queries={"t": 1, "h": 1}, t=2, h=2),
    "heads": ct.per_head([ct.window(t=3), ct.route.top_blocks(1, t=2), ct.full(), ct.window(h=3)]),
    "nothing": ct.nothing(),
}


def numbers(seed: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, GRID.size, 6, generator=rng) for heads in (4, 2, 2)]


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("dense", [None, ct.causal("t")], ids=["all", "causal"])
def test_the_definition(name: str, dense: ct.Pattern | None) -> None:
    q, k, v = numbers(0)
    found = ct.fidelity(q, k, v, grid=GRID, where=WHERE[name], dense=dense)
    joined = WHERE[name] if dense is None else WHERE[name] & dense
    mask = joined.select(q, k, GRID)
    allowed = torch.ones(GRID.size, GRID.size, dtype=torch.bool) if dense is None else ct.plan(dense, GRID).mask()
    keys, values = (x.repeat_interleave(2, 1).double() for x in (k, v))
    scores = (q.double() @ keys.transpose(-1, -2) / math.sqrt(6)).masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1)
    kept = torch.nan_to_num(scores.masked_fill(~mask, -torch.inf).softmax(-1)) @ values
    exact = weights @ values
    assert torch.allclose(found.mass.double(), (weights * mask).sum(-1).mean(-1), atol=1e-5)
    error = (kept - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
    assert torch.allclose(found.error.double(), error, atol=1e-5)
    assert torch.allclose(found.density.double(), mask.sum((-1, -2)).double() / allowed.sum(), atol=1e-6)
    for batch, head in ((0, 0), (1, 3)):
        recalls = []
        for row in range(GRID.size):
            seen = mask[batch, head, row]
            best = scores[batch, head, row].topk(int(seen.sum())).indices
            if len(best):
                recalls.append(float(seen[best].double().mean()))
        expected = sum(recalls) / max(1, len(recalls))
        assert abs(float(found.recall[batch, head]) - expected) < 1e-5


def test_the_oracle_is_above_all_others_and_more_is_kept_of_more() -> None:
    grid = ct.Grid(n=64)
    q, k, v = (torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))

    def oracle(q: Tensor, k: Tensor, sight: ct.route.Sight) -> Tensor:
        return (q @ k.transpose(-1, -2)).topk(16, dim=-1).indices

    best = ct.fidelity(q, k, v, grid=grid, where=ct.route.by(oracle, n=1))
    assert torch.allclose(best.density, torch.tensor(0.25)) and torch.allclose(best.recall, torch.tensor(1.0))
    masses = [ct.fidelity(q, k, v, grid=grid, where=ct.route.top_blocks(keep, n=4)).mass for keep in (2, 4, 8, 16)]
    assert all((more > less).all() for less, more in pairwise(masses))
    assert (masses[1] < best.mass).all() and torch.allclose(masses[3], torch.tensor(1.0))


def test_another_grid_is_refused() -> None:
    q, k, v = numbers(1)
    with pytest.raises(ct.ChronotopeError, match="tokens"):
        ct.fidelity(q, k, v, grid=ct.Grid(n=7), where=ct.window(n=3))
