r"""The cheapest candidate for each head under an error budget.

Heads and layers are taken to err independently, so the relative error of the output of the model is

$$
e^2 = \sum_l \sum_h I_{l c(l,h)}^2 \; \frac{E_{l h c(l,h)}}{\sum_h E_{l h c(l,h)}}
$$

with the influences I and the error energies E of the profile. One candidate c for each head, least mean cost, e <=
budget: a multiple-choice knapsack. Its relaxation, in which a head may have two candidates in part, is solved exactly
by taking steps along the convex hull of each head's (cost, error) in order of cost saved for error added; that cost is
the `bound`. What is left of the budget is spent on steps that still fit, so the choice is dearer than the bound by less
than one step of one head.

Cost: pairs in tiles, as a share of those that the model computes as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from chronotope.adapt.assignment import Assignment, apply
from chronotope.adapt.inputs import call, output_of, relative
from chronotope.adapt.profile import Profile
from chronotope.adapt.solve import both
from chronotope.errors import ChronotopeError
from chronotope.patterns import Pattern, full
from chronotope.planning import plan

HALF = 0.5
"""A candidate is not tried where another of no higher cost errs at most so much of its error."""
TRIES, SHRINKS = 6, 0.95
"""How often a choice that errs too much is made again, and how far below its due share the next budget is."""


@dataclass(frozen=True)
class Option:
    """A candidate of a head: cost as a share of dense, and what it adds to the squared error."""

    pattern: Pattern
    cost: float
    risk: float


def search(
    profile: Profile,
    candidates: Iterable[Pattern] | None = None,
    *,
    max_error: float | int | None = None,
    max_density: float | int | None = None,
    verify: bool = True,
) -> Assignment:
    """One candidate, or dense, for each head of each layer.

    Args:
        profile: of the model; candidates that it has not met are measured now, on its inputs.
        candidates: patterns and routes; default: those of the profile.
        max_error: the least cost whose expected relative error of the output is not above this; or
        max_density: the least error whose mean cost is not above this. One of the two.
        verify: whether the model is run with the choice, on the inputs of the profile, and the choice made again with a
            smaller budget where its error there is above `max_error`.

    Raises ChronotopeError without candidates, or where both or neither limit is given.
    """
    if (max_error is None) == (max_density is None):
        raise ChronotopeError(f"search: max_error={max_error}, max_density={max_density}; give one of them.")
    limit = max_error if max_error is not None else max_density
    assert limit is not None
    if not limit >= 0:
        raise ChronotopeError(
            f"search: {'max_error' if max_density is None else 'max_density'}={limit}; expected 0 or more."
        )
    wanted = list(dict.fromkeys(profile.candidates if candidates is None else candidates))
    if not wanted:
        raise ChronotopeError("search: no candidates; give patterns or routes, such as [ct.window(t=3, h=5, w=5)].")
    profile.measure(wanted)
    heads = options(profile, wanted)
    if max_density is not None:
        return _under_density(profile, heads, float(limit))
    limit = target = float(limit)
    for _ in range(TRIES):
        found = _assignment(profile, heads, *_cheapest(heads, target**2))
        if not verify:
            return found
        error = measured_error(profile, found)
        found = replace(found, measured=found.measured | {"error on its inputs": error})
        if error <= limit:
            return found
        target *= SHRINKS * limit / error
    return _dense(profile, heads, _cheapest(heads, limit**2)[1])


def measured_error(profile: Profile, found: Assignment) -> float:
    """Relative error of the output of the model on the inputs of the profile."""
    with torch.no_grad():
        plain = [output_of(call(profile.model, batch)) for batch in profile.batches]
        with apply(profile.model, found, profile.grid):
            return relative(plain, [output_of(call(profile.model, batch)) for batch in profile.batches])


def _dense(profile: Profile, heads: Heads, bound: float) -> Assignment:
    """What never errs."""
    return _assignment(profile, heads, {key: own[0] for key, own in heads.items()}, bound)


Heads = dict[tuple[str, int], list[Option]]


def options(profile: Profile, candidates: list[Pattern]) -> Heads:
    """What each head may have: dense first."""
    out: Heads = {}
    for name, levels in profile.layers.items():
        one = next(iter(levels.values()))
        costs = {pattern: cost(profile, name, pattern) for pattern in candidates}
        risks = {}
        for pattern in _promising(profile, name, costs):
            lost = profile.energy(name, pattern)[0]
            risks[pattern] = profile.influence(name, pattern) ** 2 * lost / lost.sum().clamp(min=1e-300)
        for head in range(one.heads):
            own = [Option(full(), 1.0, 0.0)]
            own += [Option(pattern, costs[pattern][head], float(risk[head])) for pattern, risk in risks.items()]
            out[name, head] = own
    return out


def _promising(profile: Profile, name: str, costs: dict[Pattern, list[float]]) -> list[Pattern]:
    """Candidates of a layer without those that another does not exceed in cost while it errs at most half as much."""
    facts = {one: (sum(own), profile.error(name, one)) for one, own in costs.items()}
    return [
        one
        for one, (price, error) in facts.items()
        if not any(
            other <= price and HALF * error >= less for other, less in facts.values() if (other, less) != (price, error)
        )
    ]


def cost(profile: Profile, name: str, pattern: Pattern) -> list[float]:
    """Of each head: pairs in tiles as a share of those of the model as it is."""
    levels = profile.layers[name].values()
    one = next(iter(levels))
    dense = plan(one.rule, one.grid, heads=one.heads).tile_density
    if pattern.routes:
        kept = [own.kept[pattern] for own in levels]
        return [sum(k.pairs for k in kept) / max(1, sum(k.calls for k in kept)) / dense] * one.heads
    return [plan(both(one.rule, pattern.head(head)), one.grid).tile_density / dense for head in range(one.heads)]


def _hull(own: list[Option]) -> list[Option]:
    """From the one without error to the cheapest, each step saving less cost for its error than the one before."""
    ordered = sorted(own, key=lambda option: (option.cost, option.risk))
    front: list[Option] = []
    for option in ordered:  # by rising cost: worth its cost only where it errs less
        if not front or option.risk < front[-1].risk:
            front.append(option)
    hull: list[Option] = []
    for option in reversed(front):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    """Cost saved for error added."""
    return (a.cost - b.cost) / max(b.risk - a.risk, 1e-300)


def _cheapest(heads: Heads, budget: float) -> tuple[dict[tuple[str, int], Option], float]:
    """The choice, and the mean cost below which none can be."""
    hulls = {key: _hull(own) for key, own in heads.items()}
    at = dict.fromkeys(heads, 0)
    steps = sorted(
        ((_slope(a, b), key, i) for key, hull in hulls.items() for i, (a, b) in enumerate(pairwise(hull))),
        key=lambda step: -step[0],
    )
    risk = sum(hull[0].risk for hull in hulls.values())
    bound = spent = sum(hull[0].cost for hull in hulls.values())
    open_, relaxed = budget - risk, True
    for _, key, i in steps:
        a, b = hulls[key][i], hulls[key][i + 1]
        more = b.risk - a.risk
        if relaxed:
            share = 1.0 if more <= open_ else max(0.0, open_ / more)
            bound = spent - share * (a.cost - b.cost)
            relaxed = share == 1.0
        if at[key] == i and more <= open_:
            at[key], open_, spent = i + 1, open_ - more, spent - (a.cost - b.cost)
    return {key: hulls[key][at[key]] for key in heads}, bound / len(heads)


def _under_density(profile: Profile, heads: Heads, most: float) -> Assignment:
    """The least error at which the mean cost is within the limit: the budget is halved until it is met."""
    high = sum(max(option.risk for option in own) for own in heads.values())
    found, bound = _cheapest(heads, high)
    if mean_cost(found) > most:
        raise ChronotopeError(
            f"search: no choice among these candidates has a density of {most}; the least is "
            f"{mean_cost(found):.3f}; give sparser candidates."
        )
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        tried = _cheapest(heads, middle)
        if mean_cost(tried[0]) <= most:
            high, (found, bound) = middle, tried
        else:
            low = middle
    return _assignment(profile, heads, found, bound)


def density(profile: Profile, layers: Mapping[str, Sequence[Pattern]]) -> float:
    """Mean cost over the heads of these layers, a pattern for each head."""
    found: list[float] = []
    for name, own in layers.items():
        costs = {one: cost(profile, name, one) for one in dict.fromkeys(own)}
        found += [costs[one][head] for head, one in enumerate(own)]
    return sum(found) / len(found)


def mean_cost(found: dict[tuple[str, int], Option]) -> float:
    """Of a choice."""
    return sum(option.cost for option in found.values()) / len(found)


def _assignment(profile: Profile, heads: Heads, found: dict[tuple[str, int], Option], bound: float) -> Assignment:
    layers = {
        name: tuple(found[name, head].pattern for head in range(next(iter(levels.values())).heads))
        for name, levels in profile.layers.items()
    }
    measured: dict[str, Any] = {
        "model": type(profile.model).__name__,
        "grids": {name: repr(next(iter(levels.values())).grid) for name, levels in profile.layers.items()},
        "inputs": len(profile.batches),
        "queries": profile.queries,
        "seed": profile.seed,
        "torch": torch.__version__,
    }
    error = sum(option.risk for option in found.values()) ** 0.5
    return Assignment(layers, error, mean_cost(found), min(bound, mean_cost(found)), measured)
