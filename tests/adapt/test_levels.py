"""Noise levels: patterns of their own, chosen, saved and applied."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from plain import C, N, Own, near, nothing_is_left  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import chronotope as ct
from chronotope.adapt import Assignment, apply, load, profile, search
from chronotope.errors import ChronotopeError

LINE = ct.Grid(n=256)
NEAR = ct.window(n=9)
AWAY = (torch.arange(LINE.size)[:, None] - torch.arange(LINE.size)).abs().float()


class Denoiser(nn.Module):
    """Looks everywhere while the level is low, and near where it is high."""

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=-2 * timestep * AWAY)


def inputs(*levels: float) -> list[tuple[Tensor, float]]:
    rng = torch.Generator().manual_seed(3)
    return [(torch.randn(1, 2, LINE.size, 4, generator=rng), level) for level in levels]


def test_each_level_has_what_it_needs(tmp_path: Path) -> None:
    model, given = Denoiser(), inputs(0.0, 0.1, 0.9, 1.0, 1.0)
    seen = profile(model, given, [NEAR], grid=LINE, levels=[0.5], queries=LINE.size)
    assert seen.met == [0, 0, 1, 1, 1] and math.isclose(seen.share(1), 0.6)
    found = search(seen, max_error=0.01)
    assert found.where("", 0) is None and found.where("", 1) == NEAR
    narrow = ct.plan(NEAR, LINE).tile_density
    assert math.isclose(found.density, 0.4 + 0.6 * narrow) and found.bound <= found.density
    assert found.measured["at most"] <= 0.01
    assert "from noise level 0.5 on" in repr(found)
    assert load(found.save(tmp_path / "plan.json")) == found

    with apply(model, tmp_path / "plan.json", LINE):
        for x, level in given:
            where = NEAR if level > 0.5 else ct.full()
            near(model(x, level), ct.attention(x, x, x, grid=LINE, where=where, bias=-2 * level * AWAY))
            assert torch.equal(model(x, level), Denoiser()(x, level)) == (level < 0.5)
    whole = search(profile(model, given, [NEAR], grid=LINE, queries=LINE.size), max_error=0.01)
    assert whole.density == 1 and not whole.above  # one pattern for all levels errs too much at the low ones


def test_risks_and_costs_are_shares_of_the_levels() -> None:
    seen = profile(Denoiser(), inputs(0.1, 0.9, 0.9, 0.9), [NEAR], grid=LINE, levels=[0.5], queries=LINE.size)
    cheapest = search(seen, max_error=9.0, verify=False)
    expected = 0.25 * seen.influence("", NEAR, 0) ** 2 + 0.75 * seen.influence("", NEAR, 1) ** 2
    assert math.isclose(cheapest.error**2, expected, rel_tol=1e-6)
    assert math.isclose(cheapest.density, ct.plan(NEAR, LINE).tile_density)


def test_a_level_without_inputs_stays_dense() -> None:
    seen = profile(Denoiser(), inputs(0.9, 1.0), [NEAR], grid=LINE, levels=[0.5, 2.0], queries=LINE.size)
    found = search(seen, max_error=0.01)
    assert [found.where("", level) for level in range(3)] == [None, NEAR, None]
    assert math.isclose(found.density, ct.plan(NEAR, LINE).tile_density)


def test_a_model_without_noise_levels_is_refused() -> None:
    layer, x = Own(), torch.randn(1, N, C)
    with pytest.raises(ChronotopeError, match=r"levels 0\.5 were named.*without one"):
        profile(layer, [x], levels=[0.5])
    choice = Assignment({"": (ct.window(n=3),) * 2}, above={0.5: {}})
    with apply(layer, choice), pytest.raises(ChronotopeError, match="without one"):
        layer(x)
    with pytest.raises(ChronotopeError, match="names other"):
        apply(layer, Assignment({}, above={0.5: {"other": (NEAR,)}}))


class Again(nn.Module):
    """Runs its layer again for the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Own()

    def forward(self, x: Tensor, t: float) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def test_layers_run_again_have_the_pattern_of_their_level() -> None:
    model, x = Again(), torch.randn(1, N, C, requires_grad=True)
    choice = Assignment({"layer": (ct.window(n=3),) * 2}, above={0.5: {"layer": (ct.window(n=5),) * 2}})
    with apply(model, choice):
        for t, size in ((0.1, 3), (0.9, 5), (0.2, 3)):
            (found,) = torch.autograd.grad(model(x, t).square().sum(), x)
            with ct.adapt.attach(model.layer, ct.window(n=size)):
                (expected,) = torch.autograd.grad(model.layer(x).square().sum(), x)
            near(found, expected)
        both = model(x, 0.1).square().sum() + model(x, 0.9).square().sum()
        with pytest.raises(ChronotopeError, match="call backward after each"):
            both.backward()
