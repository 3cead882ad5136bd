"""How MoA finds the spans: what each attention weight is worth, what a rule masks, and which rules to take together.

    E_ij = A_ij (sum_k G_ik A_ik - G_ij) / (1 - A_ij),    G = dL / dA

is the first-order change of the loss L when weight ij of the softmax map A is masked and its row divided by what is
left. The loss of a rule is the sum of |E|, averaged over data, over the pairs that it masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.papers.pattern.moa import Rule, masked

AT_ONCE = 1 << 20


def influence(weights: Float[Tensor, "*b n n"], gradient: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b n n"]:
    """E of the formula above; 0 where the weight is 0, and in a row of one weight, of which nothing would be left."""
    left = 1 - weights
    alone = left <= 1e-6
    effect = weights * ((gradient * weights).sum(-1, keepdim=True) - gradient)
    return torch.where(alone, 0.0, effect / torch.where(alone, 1.0, left))


def by_block(effect: Float[Tensor, "samples layers h n n"], block: int) -> Float[Tensor, "layers h nb nb"]:
    """Mean over the samples, absolute value, sum over blocks of `block` x `block` tokens (the last may be smaller)."""
    size = effect.abs().shape[-1]
    pad = -size % block
    mean = torch.nn.functional.pad(effect.mean(0).abs(), (0, pad, 0, pad))
    return mean.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).sum((-1, -3))


def by_group(effect: Float[Tensor, "layers h nb nb"], groups: int) -> Float[Tensor, "layers g nb nb"]:
    """Heads that share keys share a rule: the largest influence over each group of heads."""
    return effect.unflatten(1, (groups, -1)).amax(2)


def rule_losses(
    effect: Float[Tensor, "layers h nb nb"], rules: Sequence[Rule], n: int, *, sink: int, block: int
) -> Float[Tensor, "layers h rules"]:
    """The influence that each rule masks at length n, by layer and head."""
    return torch.stack([(effect * masked(rule.span(n, block), n, sink, block)).sum((-1, -2)) for rule in rules], -1)


def search_space(lengths: Sequence[int], *, alpha_step: int = 1024, betas: int = 9, block: int = 64) -> list[Rule]:
    """alpha from -min(lengths) to max(lengths) in steps, `betas` values of beta in [0, 1]; without what has no span.

    A rule is dropped where alpha + beta N is less than a block at some profiled length, or more than N at all of them
    (the shortest that sees everything stands for these).
    """
    out: dict[tuple[int, ...], Rule] = {}
    for alpha in range(-min(lengths), max(lengths) + 1, alpha_step):
        for i in range(betas):
            rule = Rule(alpha, i / (betas - 1))
            if min(alpha + rule.beta * n for n in lengths) >= block:
                out.setdefault(tuple(rule.span(n, block) for n in lengths), rule)
    return list(out.values())


@dataclass(frozen=True)
class Choice:
    """One rule for each layer and head, its loss and its mean density at each length."""

    rules: tuple[tuple[int, ...], ...]
    loss: tuple[float, ...]
    density: tuple[float, ...]


def solve(
    losses: Float[Tensor, "lengths layers h rules"],
    density: Float[Tensor, "all_lengths rules"],
    *,
    budget: float = 0.5,
    lower: float = 0.9,
    distinct: int = 2,
) -> list[Choice]:
    """Every Pareto-optimal choice of one rule per head: no other is as good at all lengths and better at one.

    Args:
        losses: `rule_losses` at each profiled length.
        density: share of the keys that a rule keeps, at the profiled lengths and any further ones.
        budget: largest mean density over all heads, at every length; it must also reach `lower * budget`.
        distinct: rules that may differ within a layer.

    Exact: layers are added one by one, and of the sums of equal density only the Pareto-optimal are kept.
    Raises ChronotopeError where no choice meets the budget.
    """
    count, layers, heads, rules = losses.shape
    exact, load = losses.double(), density.double()
    options = _layer_options(heads, rules, distinct)
    of_head = torch.arange(heads)
    picked = torch.zeros(1, 0, dtype=torch.int64)
    value = torch.zeros(1, count + len(load), dtype=torch.float64)
    for layer in range(layers):
        own = torch.cat([exact[:, layer][:, of_head, options].sum(-1), load[:, options].sum(-1) / (layers * heads)]).T
        rows, cols = torch.cartesian_prod(torch.arange(len(value)), torch.arange(len(options))).T
        total = value[rows] + own[cols]
        within = (total[:, count:] <= budget + 1e-9).all(1)
        rows, cols, total = rows[within], cols[within], total[within]
        if layer == layers - 1:
            enough = (total[:, count:] >= lower * budget - 1e-9).all(1)
            rows, cols, total = rows[enough], cols[enough], total[enough]
        if not len(total):
            raise ChronotopeError(
                f"solve: no choice has a density from {lower * budget} to {budget} at every length; add rules."
            )
        keep = _best(total[:, :count], total[:, count:] if layer < layers - 1 else torch.zeros_like(total[:, :1]))
        picked, value = torch.cat([picked[rows[keep]], cols[keep, None]], 1), total[keep]
    return [
        Choice(tuple(tuple(row) for row in options[p].tolist()), tuple(v[:count].tolist()), tuple(v[count:].tolist()))
        for p, v in zip(picked, value, strict=True)
    ]


def _layer_options(heads: int, rules: int, distinct: int) -> Int64[Tensor, "options h"]:
    """Every assignment of rules to the heads of a layer that uses at most `distinct` of them."""
    found = [
        torch.cartesian_prod(*[torch.tensor(some)] * heads).view(-1, heads)
        for some in combinations(range(rules), min(distinct, rules))
    ]
    return torch.unique(torch.cat(found), dim=0)


def _best(loss: Float[Tensor, "p o"], group: Float[Tensor, "p g"]) -> Int64[Tensor, "kept"]:
    """Rows whose loss no other row of the same group dominates; one of each among equals."""
    group = (group * 1e9).round().long()
    kept = []
    _, index = torch.unique(group, dim=0, return_inverse=True)
    order = torch.argsort(index, stable=True)
    for rows in order.split(torch.bincount(index).tolist()):
        kept.append(rows[_front(loss[rows])])
    return torch.cat(kept)


def _front(loss: Float[Tensor, "p o"]) -> Int64[Tensor, "kept"]:
    """Pareto-optimal rows of one group: in order of the sum, a row is kept unless a kept one is as good everywhere."""
    kept: list[int] = []
    alive: Bool[Tensor, "p"] = torch.ones(len(loss), dtype=torch.bool)
    for row in torch.argsort(loss.sum(1), stable=True).tolist():
        if alive[row]:
            kept.append(row)
            alive &= (loss < loss[row]).any(1)
    return torch.tensor(kept)
