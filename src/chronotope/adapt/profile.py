"""What the attention of a model looks at on given inputs, and what candidates would keep of it.

    mass = sum over visible keys of the weights        error^2 = sum |o_candidate - o|^2 / sum |o|^2

are taken at some queries, drawn anew for each call, and the energies |o_candidate - o|^2 and |o|^2 are summed over
them: no layer holds more than some rows of its weights. What such an error does to the output of the model depends on
its direction, and is measured: `influence` runs the model with one candidate in one layer alone,

    influence = |y' - y| / |y|
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from chronotope.adapt.asked import Asked
from chronotope.adapt.attach import Grids, Layers, Lies, attach, attention_names, selection
from chronotope.adapt.inputs import Batch, call, output_of, relative
from chronotope.adapt.solve import both, exactly, fronted, joined, logits, rows_of_bias
from chronotope.adapt.tap import Handler, Tap
from chronotope.attention import attention
from chronotope.boxes import chunks
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.patterns import Pattern
from chronotope.planning import heads_alike
from chronotope.routed import chosen

Routed = tuple[tuple[Tensor, Tensor], float]
AT_ONCE = 1 << 24
"""Weights that are held at once."""
INFLUENCED = 4
"""Inputs by which influences are measured, spread evenly over those of a level."""


@dataclass
class Kept:
    """What a candidate keeps of a layer, summed over queries: float64 [H] each; `pairs`: tiles' share of the pairs."""

    error: Float[Tensor, "h"]
    mass: Float[Tensor, "h"]
    pairs: float = 0.0
    calls: int = 0


@dataclass
class LayerProfile:
    """One layer at one noise level; sums over `queries` queries, float64 [H].

    energy: |o|^2. distance: mean distance of what is looked at on each axis, in tokens. prefix, first, own: weight on
    tokens without a place, on the first token that has one, and on the query itself. keys: exp of the entropy.
    """

    grid: Grid
    heads: int
    rule: Pattern
    queries: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[Pattern, Kept] = field(default_factory=dict)

    def mean(self, name: str) -> Float[Tensor, "h"]:
        """A statistic per query."""
        return self.sums[name] / max(1, self.queries)

    def add(self, name: str, value: Float[Tensor, "h"]) -> None:
        self.sums[name] = self.sums.get(name, torch.zeros(self.heads, dtype=torch.float64)) + value.double().cpu()

    def error(self, candidate: Pattern) -> Float[Tensor, "h"]:
        """Relative error of each head's output."""
        return (self.kept[candidate].error / self.sums["energy"].clamp(min=1e-300)).sqrt()

    def together(self, candidate: Pattern) -> float:
        """Relative error of the output of all heads."""
        return math.sqrt(float(self.kept[candidate].error.sum()) / max(float(self.sums["energy"].sum()), 1e-300))

    def mass(self, candidate: Pattern) -> Float[Tensor, "h"]:
        """Share of the weights that the candidate keeps."""
        return self.kept[candidate].mass / max(1, self.queries)


class Profile:
    """What `profile` measured: `layers[name][level]`; `met`: the level of each input."""

    def __init__(
        self, model: nn.Module, batches: list[Batch], grid: Grids | None, layers: Layers | None, queries: int,
        levels: Sequence[float], seed: int,
    ):  # fmt: skip
        self.model, self.batches, self.grid, self.seed = model, batches, grid, seed
        self.queries, self.levels, self.chosen = queries, tuple(sorted(levels)), layers
        self.layers: dict[str, dict[int, LayerProfile]] = {}
        self.left: dict[str, str] = {}
        self.candidates: list[Pattern] = []
        self.met: list[int] = []
        self._influences: dict[tuple[str, int, Pattern], float] = {}
        self._plain: dict[int, list[Tensor]] = {}

    def measure(self, candidates: Iterable[Pattern]) -> None:
        """What these keep, where it is not known yet: one more pass over the inputs."""
        new = [one for one in dict.fromkeys(candidates) if one not in self.candidates]
        if not new and self.layers:
            return
        known, self.layers, self.met = self.layers, {}, []
        watcher = Watcher(self, new)
        tap = Tap.on(self.model)
        tap.add(watcher)
        try:
            with torch.no_grad():
                for batch in self.batches:
                    call(self.model, batch)
                    self.met.append(watcher.lies.level)
        except BaseException:
            self.layers = known
            raise
        finally:
            tap.drop(watcher)
        for name, levels in known.items():
            for level, before in levels.items():
                self.layers[name][level].kept |= before.kept
        self.candidates += new
        if not self.layers:
            told = "; ".join(f"{name}: {why}" for name, why in self.left.items())
            raise ChronotopeError(f"profile: no attention on a grid was seen in these inputs. {told}")

    def share(self, level: int) -> float:
        """Of the inputs."""
        return self.met.count(level) / len(self.met)

    def influence(self, name: str, candidate: Pattern, level: int = 0) -> float:
        """Relative error of the output of the model with this candidate in this layer alone, on some inputs at this
        noise level.

        One call of the model for each of them, where it is not known yet.
        """
        key = name, level, candidate
        if key not in self._influences:
            own = [batch for batch, met in zip(self.batches, self.met, strict=True) if met == level]
            some = own[:: -(-len(own) // INFLUENCED)]
            with torch.no_grad():
                if level not in self._plain:
                    self._plain[level] = [output_of(call(self.model, batch)) for batch in some]
                with attach(self.model, {name: candidate}, grid=self.grid):
                    changed = [output_of(call(self.model, batch)) for batch in some]
            self._influences[key] = relative(self._plain[level], changed)
        return self._influences[key]

    def __repr__(self) -> str:
        lines = [f"{len(self.layers)} layers, {len(self.batches)} inputs, {self.queries} queries of each"]
        for name, levels in self.layers.items():
            for level, one in levels.items():
                far = ", ".join(f"{axis} {float(one.mean(axis).mean()):.1f}" for axis in one.grid.axes)
                told = f"{name}{f' at level {level}' if len(levels) > 1 else ''}: looks at {far} tokens away"
                lines.append(
                    f"{told}, {float(one.mean('keys').mean()):.0f} keys, prefix {float(one.mean('prefix').mean()):.2f}"
                )
        return "\n".join(lines)


def profile(
    model: nn.Module,
    batches: Iterable[Batch],
    candidates: Iterable[Pattern] = (),
    *,
    grid: Grids | None = None,
    layers: Layers | None = None,
    queries: int = 256,
    levels: Sequence[float] = (),
    seed: int = 0,
) -> Profile:
    """Runs a model on inputs and keeps what its attention looks at, and what candidates would keep of it.

    Args:
        model: as for `attach`; it is run as it is.
        batches: inputs: dicts of keyword arguments, tuples of arguments, or single arguments. They are kept, for
            candidates that are asked for later.
        candidates: patterns and routes, joined with the model's own mask.
        grid, layers: as for `attach`.
        queries: how many of each call are looked at; time and memory grow with queries x keys.
        levels: borders between noise levels, which are profiled apart, and get patterns of their own; default: all are
            one.

    Raises ChronotopeError where no attention on a grid is seen, or a layer of dropout is in training.
    """
    given = list(batches)
    if not given:
        raise ChronotopeError("profile: no inputs were given.")
    if queries < 1:
        raise ChronotopeError(f"profile: queries={queries}; expected 1 or more.")
    modules = model.named_modules()
    drops = [name for name, one in modules if isinstance(one, _DropoutNd) and one.training and one.p > 0]
    if drops:
        raise ChronotopeError(f"profile: {drops[0]} drops at random, no error of attention; call model.eval().")
    out = Profile(model, given, grid, layers, queries, levels, seed)
    out.measure(candidates)
    return out


class Watcher(Handler):
    """Measures the calls of a model that runs."""

    def __init__(self, out: Profile, candidates: list[Pattern]):
        self.out, self.candidates = out, candidates
        self.chosen = selection(out.chosen, attention_names(out.model))
        self.rng = torch.Generator().manual_seed(out.seed)
        self.lies = Lies(out.grid, out.levels)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.lies.begin(model, args, kwargs)

    def wants(self, layer: str) -> bool:
        return self.chosen(layer)

    def seen(self, layer: str, asked: Asked, out: Tensor) -> Tensor:
        laid = self.lies.lay(layer, asked)
        if isinstance(laid, str) or not asked.square:
            self.out.left[layer] = laid if isinstance(laid, str) else "decoding is not profiled"
            return out
        grid, tail = laid
        asked = asked.but(grid=grid, tail=tail, scores=(), probs=())
        if tail:
            asked = fronted(asked)
        at = torch.randperm(grid.size, generator=self.rng)[: self.out.queries].sort().values
        rule, bias = joined(asked)
        own = self.out.layers.setdefault(layer, {})
        found = own.setdefault(self.lies.level, LayerProfile(grid, asked.q.shape[1], rule))
        if found.grid != grid:
            raise ChronotopeError(f"{layer}: inputs on {found.grid!r} and on {grid!r}; profile one size at a time.")
        _measure(found, asked, rule, bias, at, self.candidates)
        return out


def _measure(
    found: LayerProfile, asked: Asked, rule: Pattern, bias: Any, at: Int64[Tensor, "s"], candidates: list[Pattern]
) -> None:
    for one in candidates:
        one.check(found.grid, found.grid)
    routed = {one: _routed(asked, both(rule, one), bias, at) for one in candidates if one.routes}
    for one, (_, pairs) in routed.items():
        kept = found.kept.setdefault(one, _none(found.heads))
        kept.pairs, kept.calls = kept.pairs + pairs, kept.calls + 1
    patterns = [one for one in candidates if not one.routes]
    for one in patterns:
        found.kept.setdefault(one, _none(found.heads))
    with exactly(asked.q):
        _look(found, asked, rule, bias, at, patterns, routed)


def _look(
    found: LayerProfile, asked: Asked, rule: Pattern, bias: Any, at: Int64[Tensor, "s"], patterns: list[Pattern],
    routed: dict[Pattern, Routed],
) -> None:  # fmt: skip
    grid = found.grid
    keys = Coords.of(grid, torch.arange(grid.size))
    k, v = (x.repeat_interleave(found.heads // x.shape[1], 1).float() for x in (asked.k, asked.v))
    for part in chunks(len(at), asked.q.shape[0] * found.heads * grid.size, AT_ONCE):
        some = at[part]
        here = Coords.of(grid, some[:, None])
        scores = _scores(asked, k, rule, bias, some, here, keys)
        lse = scores.logsumexp(-1)
        weights, left = _weights(scores, asked.sinks)
        out = weights @ v
        _statistics(found, weights, out, here, keys, grid)
        for one in patterns:
            for own, heads in heads_alike(one, found.heads).items():
                seen = own.sees(here, keys).to(weights.device)
                index = list(heads)
                visible = weights[:, index] * seen
                mass = visible.sum(-1)
                new = visible @ v[:, index] / (mass + left[:, index]).clamp(min=1e-30)[..., None]
                _add(found.kept[one], index, mass, new - out[:, index])
        for one, (rows, _) in routed.items():
            kept_out, share = rows[0][:, :, part], rows[1][:, :, part]
            mass = (share - lse).exp().nan_to_num(0.0) * (1 - left)  # queries that see nothing keep nothing
            _add(found.kept[one], list(range(found.heads)), mass, kept_out - out)
        found.queries += weights.shape[0] * len(some)


def _weights(
    scores: Float[Tensor, "b h s nk"], sinks: Float[Tensor, "h"] | None
) -> tuple[Float[Tensor, "b h s nk"], Float[Tensor, "b h s"]]:
    """Dense weights of some queries, and what sinks take of each row."""
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, column), -1).softmax(-1)
        return weights[..., :-1], weights[..., -1]
    weights = torch.nan_to_num(scores.softmax(-1))
    return weights, torch.zeros_like(weights[..., 0])


def _scores(
    asked: Asked, k: Tensor, rule: Pattern, bias: Any, some: Tensor, here: Coords, keys: Coords
) -> Float[Tensor, "b h s nk"]:
    scores = logits(asked.q[:, :, some].float(), k, asked.scale, asked.softcap)
    if isinstance(bias, Tensor):
        scores = scores + rows_of_bias(bias, some).float()
    elif bias is not None:
        scores = scores + bias(here, keys.view(1, -1)).float()
    heads = heads_alike(rule, scores.shape[1])
    seen = [rule.head(head).sees(here, keys) for head in range(scores.shape[1])] if len(heads) > 1 else None
    visible: Bool[Tensor, "..."] = rule.sees(here, keys) if seen is None else torch.stack(seen)
    return scores.masked_fill(~visible.to(scores.device), -torch.inf)


def _routed(asked: Asked, where: Pattern, bias: Any, at: Tensor) -> Routed:
    """Output and lse of some queries under a route, and the share of pairs that its tiles hold."""
    assert asked.grid is not None
    given = {"grid": asked.grid, "where": where, "bias": bias, "scale": asked.scale, "softcap": asked.softcap}
    out, lse = attention(asked.q, asked.k, asked.v, **given, return_lse=True)
    done = sum(
        float((tiles.q.sizes[tiles.found.rows].double() * tiles.k.sizes[tiles.found.cols].double()).sum())
        for _, tiles in chosen(where, asked.q, asked.k, asked.grid, asked.grid)
    )
    pairs = done / (asked.q.shape[0] * asked.q.shape[1] * asked.grid.size**2)
    if asked.sinks is not None:
        out = out * torch.sigmoid(lse - asked.sinks.float()[:, None])[..., None]
    return (out[:, :, at].float(), lse[:, :, at].float()), pairs


def _statistics(found: LayerProfile, weights: Tensor, out: Tensor, here: Coords, keys: Coords, grid: Grid) -> None:
    def total(x: Tensor) -> Tensor:
        return x.sum((0, 2))

    placed = weights * ~(here.prefix | keys.prefix)
    for axis in grid.axes:
        away = (here.axes[axis] - keys.axes[axis]).abs()
        found.add(axis, total((placed * away).sum(-1)))
    found.add("energy", total(out.square().sum(-1)))
    found.add("prefix", total(weights[..., : grid.prefix].sum(-1)))
    found.add("first", total(weights[..., grid.prefix]))
    same = (here.place == keys.place) & (here.prefix == keys.prefix) & ~keys.prefix
    found.add("own", total((weights * same).sum(-1)))
    found.add("keys", total((-(weights * weights.clamp(min=1e-30).log()).sum(-1)).exp()))


def _none(heads: int) -> Kept:
    return Kept(torch.zeros(heads, dtype=torch.float64), torch.zeros(heads, dtype=torch.float64))


def _add(kept: Kept, heads: list[int], mass: Tensor, lost: Tensor) -> None:
    kept.error[heads] += lost.square().sum((0, 2, 3)).double().cpu()
    kept.mass[heads] += mass.sum((0, 2)).double().cpu()
