"""How much of a trained model's attention each route keeps, beside static patterns and the best there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

import chronotope as ct
from chronotope.papers.pattern.radial import radial
from chronotope.planning import Layout, Sight
from chronotope.planning.sight import sight
from chronotope.tasks import language
from chronotope.tasks.clips import load
from chronotope.tasks.measure import QKV, qkv
from chronotope.tasks.training import Recipe, train

VIDEO, TEXT = ct.Grid(t=8, h=12, w=12), ct.Grid(n=1024)
KEEP = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
CHANNELS, TEACHING_STEPS = 16, 300
STATIC, ROUTE, LIMIT = "static", "route", "limit"


@dataclass(frozen=True)
class Sample:
    """The layers of a trained model on what it was not trained on (`layers`) and on what it was (`seen`).

    block: tokens of a block by axis, for routes. dense: who looks at whom in the model.
    """

    name: str
    grid: ct.Grid
    block: dict[str, int]
    dense: ct.Pattern
    layers: list[QKV]
    seen: list[QKV]


@dataclass(frozen=True)
class Kept:
    """One row: means over layers, batch and heads. above: mass, less that of the best static pattern as dense as it."""

    model: str
    name: str
    kind: str
    density: float
    mass: float
    error: float
    recall: float
    above: float | None = None


def video(path: Path | None, minutes: float, folder: Path, console: Console) -> Sample:
    """The predictor of `chronotope compare`, trained on a video; None: digits that move."""
    clips = load(path, VIDEO, patch=4, channels=1, seed=0)
    model = train(Recipe(VIDEO, minutes=minutes), clips, folder, console).model
    layers = [qkv(model, x[:, :-1]) for x in (clips.valid[:1], clips.train[:2])]
    return Sample(f"predictor on {clips.name}", VIDEO, {"t": 1, "h": 4, "w": 4}, ct.causal("t"), *layers)


def text(path: Path | None, steps: int, console: Console) -> Sample:
    """A language model, trained on a text; None: the source of Python's standard library."""
    learned, held_out = language.split(language.read_text(path))
    model = language.learn(learned, TEXT.size, steps)
    n = TEXT.size
    bits = float(model.loss(held_out[: 8 * (n + 1)].long().view(8, -1)).detach()) / math.log(2)
    console.print(f"the language model: {bits:.2f} bits for each byte that it has not seen")
    batches = [held_out[None, :n].long(), learned[: 2 * n].long().view(2, n)]
    layers = [qkv(model, x) for x in batches]
    name = f"language model on {'Python' if path is None else path.name}"
    return Sample(name, TEXT, {"n": 16}, ct.causal(), *layers)


def compare(sample: Sample, console: Console) -> list[Kept]:
    """Every entry of the menu at every density."""
    teachers = [teach(layer, sample) for layer in sample.seen]
    rows = []
    for name, kind, make in menu(sample):
        for keep in KEEP:
            found = [
                ct.fidelity(layer.q, layer.k, layer.v, grid=sample.grid, where=where, dense=sample.dense)
                for layer, taught in zip(sample.layers, teachers, strict=True)
                if (where := make(keep, taught)) is not None
            ]
            if found:
                means = [
                    float(torch.stack([getattr(one, column) for one in found]).mean())
                    for column in ("density", "mass", "error", "recall")
                ]
                rows.append(Kept(sample.name, name, kind, *means))
        console.print(f"  {sample.name}: {name}")
    return [_placed(row, rows) for row in rows]


Make = Callable[[float, ct.route.Bilinear], ct.Pattern | None]


def menu(sample: Sample) -> Iterator[tuple[str, str, Make]]:
    """(name, kind, pattern for a share to keep and a learned score)."""
    grid, block = sample.grid, sample.block
    cut = ct.route.Cut.of("fidelity", block)
    one: Any = dict.fromkeys(block, 1)
    own: Any = block
    yield from static(grid)
    parts: list[tuple[str, Any, Any]] = [
        ("mean of block", ct.route.Mean(), ct.route.Dot()),
        ("largest of block", ct.route.Max(), ct.route.Dot()),
        ("middle of block", ct.route.Middle(), ct.route.Dot()),
        ("mean, by cosine", ct.route.Mean(), ct.route.Cosine()),
        ("mean, 64 hash bits", ct.route.Mean(), ct.route.Hashed(64)),
    ]
    for name, summary, score in parts:
        yield name, ROUTE, partial(_blockwise, cut, summary, score)
    yield "random blocks", ROUTE, lambda keep, _: ct.route.Blockwise(cut, ct.route.Sampled(keep, temperature=1e6))
    yield "each query, mean of block", ROUTE, lambda keep, _: ct.route.top_blocks(keep, queries=one, **own)
    yield "mass by mean of block", ROUTE, lambda keep, _: ct.route.top_blocks(mass=min(0.95, 2 * keep), **own)
    if grid.axes == ("n",):
        yield (
            "tree search",
            ROUTE,
            lambda keep, _: ct.route.tree_search(max(1, round(keep * grid.size / block["n"])), queries=block, **own),
        )
    yield (
        "learned",
        ROUTE,
        lambda keep, taught: ct.route.Blockwise(cut, ct.route.TopK(keep), ct.route.Moments(), taught),
    )
    yield "oracle, blocks", LIMIT, lambda keep, _: ct.route.by(_oracle(keep, sample), **own)
    yield "oracle, keys of each query", LIMIT, lambda keep, _: ct.route.by(_oracle(keep, sample), **one)


def _blockwise(cut: ct.route.Cut, summary: Any, score: Any, keep: float, taught: ct.route.Bilinear) -> ct.Pattern:
    return ct.route.Blockwise(cut, ct.route.TopK(keep), summary, score)


def static(grid: ct.Grid) -> Iterator[tuple[str, str, Make]]:
    """Patterns that know places alone."""
    if grid.axes == ("n",):

        def near(keep: float) -> ct.Pattern:
            # A window of w of n keys back holds about w / n * (2 - w / n) of the causal pairs.
            return ct.window(n=(round(grid.size * (1 - math.sqrt(1 - keep))) - 1, 0))

        yield "window", STATIC, lambda keep, _: near(keep)
        yield "window and 8 first", STATIC, lambda keep, _: near(keep) | ct.sinks(8)
        yield "strided and window of 16", STATIC, lambda keep, _: ct.strided(n=round(1 / keep)) | ct.window(n=(15, 0))
        return
    sizes = {1 / 16: (1, 5), 1 / 8: (2, 5), 1 / 4: (3, 7), 1 / 2: (7, 9)}
    yield "window", STATIC, lambda keep, _: ct.window(t=(sizes[keep][0], 0), h=sizes[keep][1], w=sizes[keep][1])
    yield "window in space", STATIC, lambda keep, _: ct.window(h=round(12 * math.sqrt(keep)) // 2 * 2 + 1, w=7)
    yield "window in time", STATIC, lambda keep, _: ct.window(t=(round(8 * keep), 0))
    yield "space or time", STATIC, lambda keep, _: (ct.along("t") | ct.along("h", "w")) if keep == 1 / 4 else None
    yield "radial", STATIC, lambda keep, _: radial(block=16) if keep == 1 / 2 else None


def _oracle(keep: float, sample: Sample) -> Callable[[Tensor, Tensor, Sight], Tensor]:
    """The blocks that get the largest share of dense attention from each block of queries, in causal order too."""

    def choose(q: Tensor, k: Tensor, sight: Sight) -> Tensor:
        share = torch.where(sight.visible, shares(q, k, sight, sample), -torch.inf)
        return ct.route.TopK(keep)(share, torch.zeros_like(sight.visible))

    return choose


def shares(q: Tensor, k: Tensor, sight: Sight, sample: Sample) -> Float[Tensor, "b h nq nk"]:
    """The share of attention that each block of queries gives to each block of keys. For small grids."""
    grid = sample.grid
    mask = ct.plan(sample.dense, grid).mask()
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf).softmax(-1)
    rows, cols = (torch.zeros(grid.size, n) for n in sight.counts)
    rows[torch.arange(grid.size), sight.q.tile_of - sight.q.prefix_tiles] = 1.0
    cols[torch.arange(grid.size), sight.k.tile_of - sight.k.prefix_tiles] = 1.0
    return rows.T / rows.sum(0)[:, None] @ weights @ cols


def teach(layer: QKV, sample: Sample) -> ct.route.Bilinear:
    """A score that has learned, from a layer on what its model was trained on, the share that each block gets."""
    heads, size = layer.q.shape[1], layer.q.shape[3]
    tile = ct.route.Cut.of("fidelity", sample.block).tiles(sample.grid, sample.grid)
    own = sight(sample.dense, *(Layout(sample.grid, sizes) for sizes in tile))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        score = ct.route.Bilinear(heads, 3 * size, CHANNELS)
    moments = ct.route.Moments()
    left, right = moments(layer.q, own.queries), moments(layer.k, own.keys)
    target = shares(layer.q, layer.k, own, sample)
    optimizer = torch.optim.Adam(score.parameters(), lr=1e-2)
    rows = slice(0, own.counts[0])
    for _ in range(TEACHING_STEPS):
        found = own.spread(score(left, right, own.keys.count), rows).log_softmax(-1)
        loss = -(target * torch.where(own.visible, found, 0.0)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return score.requires_grad_(False)


def _placed(row: Kept, rows: Sequence[Kept]) -> Kept:
    """With `above`, where static patterns are at hand on both sides of its density."""
    best = [
        mass
        for name in dict.fromkeys(one.name for one in rows if one.kind == STATIC)
        if (mass := _between([(one.density, one.mass) for one in rows if one.name == name], row.density)) is not None
    ]
    if row.kind == STATIC or not best:
        return row
    return Kept(row.model, row.name, row.kind, row.density, row.mass, row.error, row.recall, row.mass - max(best))


def _between(points: list[tuple[float, float]], at: float) -> float | None:
    """The mass at a density, on straight lines between points; (0, 0) and (1, 1) are two of them."""
    known = sorted([(0.0, 0.0), *points, (1.0, 1.0)])
    for (x, y), (x2, y2) in pairwise(known):
        if x <= at <= x2 and x2 > x:
            return y + (y2 - y) * (at - x) / (x2 - x)
    return None
