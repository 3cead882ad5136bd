"""Profiles say what attention looks at and what candidates keep; a search finds the cheapest under a budget."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, composite
from plain import GRID, WHERE, C, N, Own, Stack, near, nothing_is_left  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.adapt import Profile, profile, search
from chronotope.adapt.search import Key, Option, _cheapest, _hull, mean_cost, options
from chronotope.errors import ChronotopeError
from strategies import build, expressions, grids


class Plain(nn.Module):
    """Attention of what it is given."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)


@dataclass(frozen=True)
class Case:
    grid: ct.Grid
    text: str
    causal: bool
    key_heads: int
    batch: int
    seed: int


@composite
def cases(draw: DrawFn) -> Case:
    grid = draw(grids(most=24))
    each = [draw(expressions(grid, grid, depth=1)) for _ in range(2)]
    text = draw(st.sampled_from([each[0], f"per_head([{each[0]}, {each[1]}])"]))
    causal = draw(st.booleans()) and grid.prefix <= 1  # else token order is no pattern
    return Case(grid, text, causal, draw(st.sampled_from([1, 2])), draw(st.integers(1, 2)), draw(st.integers(0, 99)))


def numbers(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    return tuple(
        torch.randn(case.batch, h, case.grid.size, 4, generator=generator) for h in (2, case.key_heads, case.key_heads)
    )


@settings(max_examples=20, deadline=None)
@given(cases(), st.booleans())
def test_all_queries_give_what_fidelity_says(case: Case, routed: bool) -> None:
    """Mass and error of each head, beside the model's own causality, of patterns and of routes."""
    q, k, v = numbers(case)
    where = ct.route.top_blocks(keep=0.5, **dict.fromkeys(case.grid.axes, 2)) if routed else build(case.text)
    model = Plain(is_causal=case.causal, enable_gqa=True)
    found = profile(model, [(q, k, v)], [where], grid=case.grid, queries=case.grid.size)
    one = found.layers[""][0]
    dense = ct.causal() if case.causal else ct.full()
    k, v = (x.repeat_interleave(2 // case.key_heads, 1) for x in (k, v))
    expected = ct.fidelity(q, k, v, grid=case.grid, where=where, dense=dense)
    whole = ct.attention(q, k, v, grid=case.grid, where=dense).double()
    energy = whole.square().sum((2, 3))
    near(one.mass(where), expected.mass.double().mean(0), 2e-5)
    near(one.sums["energy"], energy.sum(0), 2e-5)
    near(
        one.kept[where].error / energy.sum(0), (expected.error.double().square() * energy).sum(0) / energy.sum(0), 2e-5
    )
    near(one.error(where).square(), one.kept[where].error / one.sums["energy"], 1e-9)
    assert one.queries == case.batch * case.grid.size and one.rule == dense


def test_some_queries_are_near_to_all() -> None:
    grid = ct.Grid(t=4, h=8, w=8)
    torch.manual_seed(0)
    inputs = tuple(torch.randn(1, 2, grid.size, 8) * 2 for _ in range(3))
    where = ct.window(t=3, h=5)
    found = [profile(Plain(), [inputs], [where], grid=grid, queries=count).layers[""][0] for count in (grid.size, 64)]
    near(found[1].mass(where), found[0].mass(where), 0.05)
    near(found[1].error(where), found[0].error(where), 0.1)
    near(found[1].mean("h"), found[0].mean("h"), 0.1)
    assert found[1].queries == 64
    again = profile(Plain(), [inputs], [where], grid=grid, queries=64).layers[""][0]
    assert torch.equal(again.mass(where), found[1].mass(where))
    other = profile(Plain(), [inputs], [where], grid=grid, queries=64, seed=1).layers[""][0]
    assert not torch.equal(other.mass(where), found[1].mass(where))


def looking(at: list[int], grid: ct.Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys such that token i looks at token at[i] alone."""
    own = torch.eye(grid.size)
    return 200 * own[at][None, None], own[None, None], torch.randn(1, 1, grid.size, 3)


def test_statistics_say_what_is_looked_at() -> None:
    grid = ct.Grid(prefix=2, t=3, w=4)
    size, places = grid.size, grid.places
    rest = torch.arange(2, size)

    def means(at: list[int]) -> dict[str, float]:
        """Sums over all queries, but the number of keys that each looks at."""
        one = profile(Plain(), [looking(at, grid)], grid=grid, queries=99).layers[""][0]
        sums = {name: float(one.sums[name]) for name in ("own", "first", "prefix", "t", "w")}
        return {name: round(x, 3) for name, x in sums.items()} | {"keys": round(float(one.mean("keys")), 3)}

    far = {"t": float(((rest - 2) // 4).sum()), "w": float(((rest - 2) % 4).sum())}
    assert means(list(range(size))) == {"own": places, "first": 1, "prefix": 2, "t": 0, "w": 0, "keys": 1}
    assert means([2] * size) == {"own": 1, "first": size, "prefix": 0, **far, "keys": 1}
    assert means([1] * size) == {"own": 0, "first": 0, "prefix": size, "t": 0, "w": 0, "keys": 1}
    back = means([max(0, i - 4) for i in range(size)])
    assert back["t"] == size - 6 and back["w"] == 0 and back["prefix"] == 6
    uniform = (torch.zeros(1, 1, size, 3), torch.randn(1, 1, size, 3), torch.randn(1, 1, size, 3))
    even = profile(Plain(), [uniform], grid=grid, queries=99).layers[""][0]
    assert round(float(even.mean("keys")), 3) == size and round(float(even.mean("first")), 5) == round(1 / size, 5)


def test_queries_that_see_nothing_keep_nothing() -> None:
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[:3] = False
    q, k, v = torch.randn(3, 1, 2, N, 4)
    wheres = [WHERE, ct.route.top_blocks(keep=2, w=2)]
    one = profile(Plain(attn_mask=mask), [(q, k, v)], wheres, grid=GRID, queries=N).layers[""][0]
    for where in wheres:
        assert bool((one.mass(where) <= (N - 3) / N + 1e-6).all()) and bool(one.error(where).isfinite().all())
    full = profile(Plain(attn_mask=mask), [(q, k, v)], [ct.full()], grid=GRID, queries=N).layers[""][0]
    near(full.mass(ct.full()), torch.full((2,), (N - 3) / N).double(), 1e-6)
    near(full.error(ct.full()), torch.zeros(2).double(), 1e-6)


def test_autocast_rounds_no_profile() -> None:
    inputs = tuple(torch.randn(3, 1, 2, N, 4).bfloat16())
    wheres = [WHERE, ct.route.top_blocks(keep=2, w=2)]
    plain = profile(Plain(), [inputs], wheres, grid=GRID, queries=N).layers[""][0]
    with torch.autocast("cpu", torch.bfloat16):
        found = profile(Plain(), [inputs], wheres, grid=GRID, queries=N).layers[""][0]
    for where in wheres:
        near(found.mass(where), plain.mass(where), 1e-6)
        near(found.error(where), plain.error(where), 1e-6)


def test_noise_levels_are_profiled_apart() -> None:
    class Denoiser(nn.Module):
        def forward(self, x: Tensor, timestep: float) -> Tensor:
            return F.scaled_dot_product_attention(x * timestep, x, x)

    x = torch.randn(1, 2, N, 4)
    found = profile(Denoiser(), [(x, t) for t in (0.0, 1.0, 5.0)], [WHERE], grid=GRID, levels=[4.0, 0.5], queries=N)
    assert sorted(found.layers[""]) == [0, 1, 2]
    near(found.layers[""][0].mean("keys"), torch.full((2,), float(N)).double(), 1e-5)
    assert found.layers[""][2].mean("keys").mean() < found.layers[""][1].mean("keys").mean()
    assert "at level 2" in repr(found)


def test_influence_is_what_an_error_does_to_the_output() -> None:
    """y = x + c a: an error of the attention by itself arrives times |c a| / |x + c a|."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Plain(), Plain()

        def forward(self, x: Tensor) -> Tensor:
            return x + 3 * self.one(x, x, x) + 0.1 * self.two(x, x, x)

    model, x = Scaled(), torch.randn(1, 2, N, 4)
    found = profile(model, [x], [WHERE], grid=GRID, queries=N)
    a, y = F.scaled_dot_product_attention(x, x, x), model(x)
    for name, c in (("one", 3), ("two", 0.1)):
        gain = found.influence(name, WHERE) / found.layers[name][0].together(WHERE)
        assert math.isclose(gain, float((c * a).norm() / y.norm()), rel_tol=1e-3)


def test_candidates_may_come_later() -> None:
    model, x = Stack(), torch.randn(1, N, C)
    later = profile(model, [x], grid=GRID, queries=5)
    assert not later.candidates
    later.measure([WHERE])
    later.measure([WHERE, ct.along("w")])
    once = profile(model, [x], [WHERE, ct.along("w")], grid=GRID, queries=5)
    for name, levels in once.layers.items():
        for where in (WHERE, ct.along("w")):
            near(later.layers[name][0].error(where), levels[0].error(where), 1e-9)
            near(later.layers[name][0].mass(where), levels[0].mass(where), 1e-9)
    before = dict(later.layers)
    with pytest.raises(ChronotopeError, match="has the axes"):
        later.measure([ct.window(z=3)])
    assert later.layers == before and not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_profiled_is_refused() -> None:
    model, x = Stack(), torch.randn(1, N, C)
    with pytest.raises(ChronotopeError, match="no inputs"):
        profile(model, [])
    with pytest.raises(ChronotopeError, match="queries=0"):
        profile(model, [x], queries=0)
    with pytest.raises(ChronotopeError, match=r"no attention on a grid(.|\n)*12 tokens do not lie on"):
        profile(model, [x], grid=ct.Grid(h=5, w=5))
    with pytest.raises(ChronotopeError, match="no attention layer"):
        profile(model, [x], layers="none")
    with pytest.raises(ChronotopeError, match="one size at a time"):
        profile(model, [x, torch.randn(1, 6, C)], grid=lambda x: ct.Grid(n=x.shape[1]))
    noisy = nn.TransformerEncoderLayer(C, 2, 32, 0.1, batch_first=True)
    with pytest.raises(ChronotopeError, match=r"dropout drops at random.*model.eval"):
        profile(noisy, [x], grid=GRID)
    profile(noisy.eval(), [x], grid=GRID)


# Search


NARROW = [ct.window(n=size) for size in (1, 3, 5)]


@composite
def heads_of_options(draw: DrawFn) -> dict[Key, list[Option]]:
    number = st.floats(0, 1, width=16)
    out = {}
    for head in range(draw(st.integers(1, 4))):
        own = [Option(ct.full(), 1.0, 0.0)]
        own += [Option(NARROW[i], draw(number), draw(number)) for i in range(draw(st.integers(0, 3)))]
        out["layer", 0, head] = own
    return out


@settings(max_examples=60, deadline=None)
@given(heads_of_options(), st.floats(0, 3, width=16))
def test_a_choice_is_within_one_step_of_the_best(heads: dict[Key, list[Option]], budget: float) -> None:
    found, bound = _cheapest(heads, budget)
    best = min(
        sum(option.cost for option in choice) / len(heads)
        for choice in itertools.product(*heads.values())
        if sum(option.risk for option in choice) <= budget
    )
    steps = [a.cost - b.cost for own in heads.values() for a, b in itertools.pairwise(_hull(own))]
    assert sum(option.risk for option in found.values()) <= budget + 1e-9
    assert bound <= best + 1e-9 and best <= mean_cost(found) + 1e-9
    assert mean_cost(found) <= bound + max(steps, default=0) / len(heads) + 1e-9
    assert all(found[key] in own for key, own in heads.items())


@settings(max_examples=50, deadline=None)
@given(heads_of_options(), st.lists(st.floats(0, 3, width=16), min_size=2, max_size=6))
def test_more_budget_never_costs_more(heads: dict[Key, list[Option]], budgets: list[float]) -> None:
    costs = [mean_cost(_cheapest(heads, budget)[0]) for budget in sorted(budgets)]
    bounds = [_cheapest(heads, budget)[1] for budget in sorted(budgets)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(costs))
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(bounds))
    hulls = [_hull(own) for own in heads.values()]
    assert _cheapest(heads, 0.0)[0] == {key: hull[0] for key, hull in zip(heads, hulls, strict=True)} or any(
        option.risk == 0 for own in heads.values() for option in own[1:]
    )
    most = _cheapest(heads, 99.0)[0]
    assert all(most[key].cost == min(option.cost for option in own) for key, own in heads.items())


LONG = ct.Grid(h=8, w=16)
CANDIDATES = [ct.window(h=3), ct.window(h=1, w=5), ct.window(h=5, w=9), ct.route.top_blocks(keep=4, h=2, w=4)]


def trained(seed: int, depth: int = 3) -> nn.Module:
    """A random transformer whose attention is sharp enough to differ."""
    torch.manual_seed(seed)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True), depth, enable_nested_tensor=False
    )
    for layer in model.layers:
        nn.init.normal_(layer.self_attn.in_proj_weight, std=0.35)
    return model.eval()


@pytest.fixture(scope="module")
def measured() -> Profile:
    return profile(trained(0), [torch.randn(2, LONG.size, 32)], CANDIDATES, grid=LONG, queries=LONG.size)


def test_budgets(measured: Profile) -> None:
    dense = search(measured, max_error=0)
    assert dense.density == 1 and dense.error == 0 and all(dense.where(name) is None for name in dense.layers)
    cheapest = search(measured, max_error=1e9)
    most = {key: min(own, key=lambda option: option.cost) for key, own in options(measured, CANDIDATES).items()}
    assert math.isclose(cheapest.density, mean_cost(most)) and cheapest.bound <= cheapest.density
    last = 2.0
    for budget in (0.0, 0.02, 0.1, 0.3, 1.0, 3.0):
        found = search(measured, max_error=budget, verify=False)
        assert found.bound <= found.density <= last and found.error <= budget
        last = found.density
    one = search(measured, [ct.window(h=3)], max_error=1e9)
    assert {pattern for own in one.layers.values() for pattern in own} == {ct.window(h=3)}


def test_budgets_are_kept_where_they_can_be_checked(measured: Profile) -> None:
    for budget in (0.3, 0.6):
        found = search(measured, max_error=budget)
        inputs = measured.batches[0]
        with torch.no_grad():
            plain = measured.model(inputs)
            with ct.adapt.apply(measured.model, found, LONG):
                error = float((measured.model(inputs) - plain).norm() / plain.norm())
        assert error <= budget * (1 + 1e-6)
        assert found.density < 1 and math.isclose(found.measured["error on its inputs"], error, rel_tol=1e-3)


def test_densities(measured: Profile) -> None:
    last = math.inf
    for density in (0.5, 0.7, 0.9, 1.0):
        found = search(measured, max_density=density)
        assert found.density <= density + 1e-9 and found.error <= last + 1e-9
        last = found.error
    assert last == 0
    with pytest.raises(ChronotopeError, match="no choice among these candidates has a density"):
        search(measured, max_density=0.01)


@pytest.mark.parametrize(
    "limits", [{}, {"max_error": 0.1, "max_density": 0.5}, {"max_error": -1.0}, {"max_density": math.nan}]
)
def test_limits_that_make_no_sense_are_refused(measured: Profile, limits: dict[str, float]) -> None:
    with pytest.raises(ChronotopeError, match="max_"):
        search(measured, **limits)
    with pytest.raises(ChronotopeError, match="no candidates"):
        search(measured, [], max_error=1.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_error_that_is_told_is_near_to_that_of_the_model(seed: int) -> None:
    """On inputs that the profile has not met."""
    model = trained(seed)
    found = profile(model, [torch.randn(2, LONG.size, 32)], CANDIDATES, grid=LONG, queries=64)
    x = torch.randn(2, LONG.size, 32)
    for density in (0.9, 0.7, 0.5):
        plan = search(found, max_density=density)
        with torch.no_grad():
            plain = model(x)
            with ct.adapt.apply(model, plan, LONG):
                error = float((model(x) - plain).norm() / plain.norm())
            assert torch.equal(model(x), plain)
        assert 0.7 < error / plan.error < 1.4, (error, plan.error)


def test_costs_are_pairs_of_tiles(measured: Profile) -> None:
    heads = options(measured, CANDIDATES)
    for pattern in CANDIDATES[:3]:
        expected = ct.plan(pattern, LONG).tile_density
        assert all(math.isclose(own[1 + CANDIDATES.index(pattern)].cost, expected) for own in heads.values())
    # 4 of 16 blocks, 2 x 4 tokens each, in tiles of 16 tokens or more.
    assert all(0.25 <= own[4].cost <= 1 for own in heads.values())


# Memory

MEMORY = """
import resource, sys, torch
from torch import nn
from torch.nn import functional as F
import chronotope as ct

class Layer(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)

grid = ct.Grid(t={t}, h=64, w=64)
x = torch.randn(1, 2, grid.size, 32)
found = ct.adapt.profile(Layer(), [x], [ct.window(t=3, h=9, w=9), ct.along("h", "w")], grid=grid, queries=64)
assert found.layers[""][0].queries == 64
assert 0.8 < found.influence("", found.candidates[0]) / found.layers[""][0].together(found.candidates[0]) < 1.2
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize(("frames", "most"), [(4, 0.8), pytest.param(16, 2.0, marks=pytest.mark.slow)])
def test_memory_grows_with_tokens_alone(frames: int, most: float) -> None:
    """16 and 64 thousand tokens: weights of a head alone would be 1 and 17 GB."""
    command = [sys.executable, "-c", MEMORY.replace("{t}", str(frames))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) / 1e6 < most
