r"""The cheapest candidate for each head under an error budget.

Heads and layers are taken to err independently, so the relative error of the output of the model is

$$
e^2 = \sum_v s_v \sum_l \sum_h I_{v l c(v,l,h)}^2 \; \frac{E_{v l h c(v,l,h)}}{\sum_h E_{v l h c(v,l,h)}}
$$

with the influences I and the error energies E of the profile, whose noise levels v (one, where none are kept apart)
have the shares s_v of the inputs. One candidate c for each head and level, least mean cost, e <= budget: a
multiple-choice knapsack. Its relaxation, in which a head may have two candidates in part, is solved exactly by taking
steps along the convex hull of each head's (cost, error) in order of cost saved for error added; that cost is the
`bound`. What is left of the budget is spent on steps that still fit, so the choice is dearer than the bound by less
than one step of one head.

Cost: pairs in tiles, as a share of those that the model computes as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from chronotope.adapt.assignment import Assignment, apply
from chronotope.adapt.inputs import call, output_of, relative
from chronotope.adapt.profile import LayerProfile, Profile
from chronotope.adapt.solve import both
from chronotope.errors import ChronotopeError
from chronotope.patterns import Pattern, full
from chronotope.planning import plan

Key = tuple[str, int, int]
"""A head of a layer at a noise level: the layer, the level, the head."""
HALF = 0.5
"""A candidate is not tried where another of no higher cost errs at most so much of its error."""
TRIES, SHRINKS = 6, 0.95
"""How often a choice that errs too much is made again, and how far below its due share the next budget is."""


@dataclass(frozen=True)
class Option:
    """A candidate of a head: its part in the mean cost and in the squared error."""

    pattern: Pattern
    cost: float
    risk: float


Heads = dict[Key, list[Option]]


def search(
    profile: Profile,
    candidates: Iterable[Pattern] | None = None,
    *,
    max_error: float | int | None = None,
    max_density: float | int | None = None,
    verify: bool = True,
) -> Assignment:
    """One candidate, or dense, for each head of each layer, at each noise level that the profile keeps apart.

    Args:
        profile: of the model; candidates that it has not met are measured now, on its inputs.
        candidates: patterns and routes; default: those of the profile.
        max_error: the least cost whose expected relative error of the output is not above this; or
        max_density: the least error whose mean cost is not above this. One of the two.
        verify: whether the model is run with the choice, on the inputs of the profile, and the choice made again with a
            smaller budget where one of them errs by more than `max_error`. Of n inputs of a kind, one more is likely to
            err more than all of them in 1 of n + 1 cases.

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
    if not verify:
        return _assignment(profile, *_cheapest(heads, float(limit) ** 2))
    return _verified(profile, heads, float(limit))


def _verified(profile: Profile, heads: Heads, limit: float) -> Assignment:
    """A choice by which no input of the profile errs more."""
    target, plain = limit, outputs(profile)
    for _ in range(TRIES):
        found = _assignment(profile, *_cheapest(heads, target**2))
        errors = measured_errors(profile, found, plain)
        if max(errors) <= limit:
            told = {"error on its inputs": fmean(errors), "at most": max(errors)}
            return replace(found, measured=found.measured | told)
        target *= SHRINKS * limit / max(errors)
    return _assignment(profile, {key: own[0] for key, own in heads.items()}, _cheapest(heads, limit**2)[1])


def outputs(profile: Profile) -> list[Tensor]:
    """Of the model, for the inputs of the profile."""
    with torch.no_grad():
        return [output_of(call(profile.model, batch)) for batch in profile.batches]


def measured_errors(profile: Profile, found: Assignment, plain: list[Tensor]) -> list[float]:
    """Relative error of the output of the model, for each input of the profile."""
    with apply(profile.model, found, profile.grid):
        return [relative([old], [new]) for old, new in zip(plain, outputs(profile), strict=True)]


def options(profile: Profile, candidates: list[Pattern]) -> Heads:
    """What each head may have: dense first."""
    out: Heads = {}
    for name, levels in profile.layers.items():
        for level, one in levels.items():
            share = profile.share(level)
            costs = {pattern: cost(one, pattern) for pattern in candidates}
            risks = {}
            for pattern in _promising(one, costs):
                lost = one.kept[pattern].error
                risk = share * profile.influence(name, pattern, level) ** 2
                risks[pattern] = risk * lost / lost.sum().clamp(min=1e-300)
            part = share * len(levels)  # so that the mean over heads and levels is that over heads and inputs
            for head in range(one.heads):
                own = [Option(full(), part, 0.0)]
                own += [Option(other, part * costs[other][head], float(risk[head])) for other, risk in risks.items()]
                out[name, level, head] = own
    return out


def _promising(layer: LayerProfile, costs: dict[Pattern, list[float]]) -> list[Pattern]:
    """Candidates of a layer without those that another does not exceed in cost while it errs at most half as much."""
    facts = {one: (sum(own), layer.together(one)) for one, own in costs.items()}
    return [
        one
        for one, (price, error) in facts.items()
        if not any(
            other <= price and HALF * error >= less for other, less in facts.values() if (other, less) != (price, error)
        )
    ]


def cost(layer: LayerProfile, pattern: Pattern) -> list[float]:
    """Of each head: pairs in tiles as a share of those of the model as it is."""
    rule, grid = layer.rule, layer.grid
    dense = plan(rule, grid, heads=layer.heads).tile_density
    if pattern.routes:
        kept = layer.kept[pattern]
        return [kept.pairs / max(1, kept.calls) / dense] * layer.heads
    return [plan(both(rule, pattern.head(head)), grid).tile_density / dense for head in range(layer.heads)]


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


def _cheapest(heads: Heads, budget: float) -> tuple[dict[Key, Option], float]:
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
    return _assignment(profile, found, bound)


def density(profile: Profile, layers: Mapping[str, Sequence[Pattern]]) -> float:
    """Mean cost over the heads of these layers, a pattern for each head, at all noise levels."""
    found: list[float] = []
    for name, own in layers.items():
        levels = [(profile.share(level), one) for level, one in profile.layers[name].items()]
        costs = {
            one: [sum(share * cost(layer, one)[head] for share, layer in levels) for head in range(len(own))]
            for one in dict.fromkeys(own)
        }
        found += [costs[one][head] for head, one in enumerate(own)]
    return sum(found) / len(found)


def mean_cost(found: dict[Key, Option]) -> float:
    """Of a choice."""
    return sum(option.cost for option in found.values()) / len(found)


def _assignment(profile: Profile, found: dict[Key, Option], bound: float) -> Assignment:
    first, *others = [
        {name: _patterns(found, name, level) for name, levels in profile.layers.items() if level in levels}
        for level in range(len(profile.levels) + 1)
    ]
    measured: dict[str, Any] = {
        "model": type(profile.model).__name__,
        "grids": {name: repr(next(iter(levels.values())).grid) for name, levels in profile.layers.items()},
        "inputs": len(profile.batches),
        "queries": profile.queries,
        "seed": profile.seed,
        "torch": torch.__version__,
    }
    error = sum(option.risk for option in found.values()) ** 0.5
    above = dict(zip(profile.levels, others, strict=True))
    return Assignment(first, error, mean_cost(found), min(bound, mean_cost(found)), measured, above)


def _patterns(found: dict[Key, Option], name: str, level: int) -> tuple[Pattern, ...]:
    heads = [head for layer, at, head in found if (layer, at) == (name, level)]
    return tuple(found[name, level, head].pattern for head in heads)
