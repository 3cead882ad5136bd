"""Needles in a haystack: which routes find one key of 8,192 tokens, when a query may look at a tenth of them.

A needle is a key and its value, side by side, somewhere in filler that speaks of one topic at a time; the last tokens
are questions: keys whose values are to be said. A model learns this with dense attention on shorter sequences, and then
reads long ones under each route, as it is: what a route does not choose, the model cannot say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import chronotope as ct
from chronotope.boxes import chunks
from chronotope.errors import ChronotopeError
from chronotope.nn import Attention
from chronotope.patterns import Pattern
from chronotope.planning import Sight
from chronotope.planning.parse import named
from chronotope.tasks.measure import qkv
from chronotope.tasks.recall import IGNORED, Model, Recall, Training
from chronotope.tasks.training import fit

DENSE = "dense"
AT_ONCE = 1 << 24  # scores held at once
UNIFORM = 1e9  # a temperature at which scores are nothing


@dataclass(frozen=True)
class Needles:
    """The task, the training, and what is kept of the keys.

    length, needles: tokens and questions of the sequences asked, `tested` of them. first: tokens and questions of the
    sequences learned from in the first `alone` of `steps`; then: of those after, in turn, `tokens` a batch. topics,
    words, run: of the filler, the words of each, and how many tokens it lasts on average. keep: the share of its blocks
    of `block` keys that a query may look at.
    """

    length: int = 8192
    needles: int = 32
    tested: int = 4
    first: tuple[int, int] = (64, 16)
    then: tuple[tuple[int, int], ...] = ((256, 32), (1024, 32), (2048, 32))
    alone: int = 250
    steps: int = 450
    tokens: int = 4096
    rate: float = 5e-3
    keys: int = 64
    topics: int = 8
    words: int = 16
    run: int = 32
    dim: int = 64
    heads: int = 2
    keep: float = 0.1
    block: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for length, needles in (self.first, *self.then, (self.length, self.needles)):
            if not 1 <= needles <= self.keys or length < 3 * needles:
                raise ChronotopeError(
                    f"{needles} needles in {length} tokens: expected 1 to {self.keys} of them, the number of keys, and "
                    "3 tokens for each: its key, its value and its question."
                )

    @property
    def recipe(self) -> Recall:
        """The model, and how fast it learns."""
        vocabulary = 2 * self.keys + self.topics * self.words
        return Recall(vocabulary=vocabulary, dim=self.dim, heads=self.heads, steps=self.steps, rate=self.rate)


def haystacks(
    task: Needles, length: int, needles: int, count: int, rng: torch.Generator
) -> tuple[Int64[Tensor, "count length"], Int64[Tensor, "count length"], Int64[Tensor, "count needles"]]:
    """(tokens, targets, places): the target of a question is the value of its key, of all else `IGNORED`.

    The haystack is all but the last `needles` tokens, which are the questions, in any order. It is cut in as many
    stretches of one length, with a needle somewhere in each. places: where the key is that each question asks for.
    """
    hay = length - needles
    change = torch.rand(count, hay, generator=rng) < 1 / task.run
    started = torch.where(change, torch.arange(hay), 0).cummax(1).values
    topic = torch.randint(task.topics, (count, hay), generator=rng).gather(1, started)
    word = torch.randint(task.words, (count, hay), generator=rng)
    tokens = 2 * task.keys + topic * task.words + word
    keys, values = (torch.rand(count, task.keys, generator=rng).argsort(1)[:, :needles] for _ in range(2))
    values = values + task.keys
    edge = torch.arange(needles + 1) * hay // needles
    places = edge[:-1] + (torch.rand(count, needles, generator=rng) * (edge.diff() - 1)).long()
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
    asked = torch.rand(count, needles, generator=rng).argsort(1)
    targets = torch.full((count, length), IGNORED)
    targets[:, hay:] = values.gather(1, asked)
    return torch.cat([tokens, keys.gather(1, asked)], 1), targets, places.gather(1, asked)


class Haystacks(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches without end: short sequences, with many questions for their tokens, and after `alone` of them longer."""

    def __init__(self, task: Needles):
        self.task = task

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        task, step = self.task, 0
        rng = torch.Generator().manual_seed(task.seed)
        while True:
            length, needles = task.first if step < task.alone else task.then[step % len(task.then)]
            yield haystacks(task, length, needles, max(1, task.tokens // length), rng)[:2]
            step += 1


def model_of(task: Needles, where: Pattern) -> Model:
    """Blocks of a short convolution and attention. Without a position code: a needle is as near at any distance."""
    return Model(task.recipe, (lambda: Attention(task.dim, task.heads, where=where),))


def learn(task: Needles) -> Model:
    """A model trained with dense attention."""
    torch.manual_seed(task.seed)
    model = model_of(task, ct.causal())
    fit(Training(task.recipe, model), DataLoader(Haystacks(task), batch_size=None), max_steps=task.steps)
    return model.eval()


def menu(task: Needles) -> dict[str, Pattern]:
    """Dense attention, routes, patterns of the same density, and the choice that knows the attention. All causal.

    Each token chooses for itself among blocks of `block` keys, but where a name says otherwise. Where several queries
    share a choice, the first makes it, since it must not know those after it; where they vote, it does.
    """
    keep, block = task.keep, task.block
    kept = max(2, round(keep * task.length / block))
    budget, fine = kept * block, max(1, block // 4)

    def of(size: int = block, queries: int = 1, **parts: Any) -> Pattern:
        parts = {"selection": ct.route.TopK(keep), "summary": ct.route.Mean(), "score": ct.route.Dot()} | parts
        return ct.route.Blockwise(ct.route.Cut.of("needle", {"n": size}, {"n": queries}), **parts)

    def by(level: Level, size: int = block) -> Pattern:
        return ct.route.by(_best(level, keep), n=size, queries={"n": 1})

    routes = {
        "mean key": of(),
        f"mean key, blocks of {fine}": of(fine),
        "mean key, cosine": of(score=ct.route.Cosine()),
        "mean key, 64 hash bits": of(score=ct.route.Hashed(64)),
        "largest of each channel": of(summary=ct.route.Max()),
        f"largest, blocks of {fine}": of(fine, summary=ct.route.Max()),
        "middle key": of(summary=ct.route.Middle()),
        "bounds of each channel": by(bound),
        f"bounds, blocks of {fine}": by(bound, fine),
        f"tree search, {fine} queries vote": ct.route.tree_search(kept - 1, n=block, queries={"n": fine}, ahead=True),
        f"mean key, {fine} queries": of(queries=fine),
        f"mean key, {block} queries": of(queries=block),
        "random blocks": of(selection=ct.route.Sampled(keep, task.seed, UNIFORM)),
        "window and sinks": ct.sinks(block) | ct.window(n=(budget - block - 1, 0)),
        "strides and window": ct.strided(n=round(2 / keep)) | ct.window(n=(budget // 2 - 1, 0)),
        "oracle: most attention": by(weight),
    }
    return {DENSE: ct.causal(), **{name: where & ct.causal() for name, where in routes.items()}}


Level = Callable[[Float[Tensor, "b h rows d"], Float[Tensor, "b h sets most d"]], Float[Tensor, "b h rows sets"]]
"""How good blocks of keys are for single queries."""


def weight(q: Float[Tensor, "b h rows d"], k: Float[Tensor, "b h sets most d"]) -> Float[Tensor, "b h rows sets"]:
    """The logarithm of the attention that each block gets, all of its keys looked at."""
    logits = q @ k.flatten(2, 3).transpose(-1, -2) / q.shape[3] ** 0.5
    return logits.unflatten(3, k.shape[2:4]).logsumexp(4)


def bound(q: Float[Tensor, "b h rows d"], k: Float[Tensor, "b h sets most d"]) -> Float[Tensor, "b h rows sets"]:
    """What no q . k of a block exceeds, told by the range of each channel (Tang et al. 2024, Quest, arXiv 2406.10774).

    sum over channels of max(q min k, q max k).
    """
    return q.clamp(min=0) @ k.amax(3).transpose(-1, -2) + q.clamp(max=0) @ k.amin(3).transpose(-1, -2)


def _best(level: Level, keep: float) -> Callable[[Tensor, Tensor, Sight], Bool[Tensor, "b h nq nk"]]:
    """For queries that choose one by one, so that all blocks but their own, which are kept, are past as a whole."""

    def choose(q: Tensor, k: Tensor, sight: Sight) -> Tensor:
        blocks = sight.keys.gather(k)[:, :, : sight.counts[1]]
        parts = []
        for rows in chunks(q.shape[2], q.shape[0] * q.shape[1] * k.shape[2], AT_ONCE):
            scores = level(q[:, :, rows], blocks).masked_fill(~sight.visible[rows], -torch.inf)
            parts.append(ct.route.TopK(keep)(scores, sight.own[rows]))
        return torch.cat(parts, 2)

    choose.__name__ = level.__name__
    return choose


@dataclass(frozen=True)
class Found:
    """What a model says under one route.

    found: share of questions answered; depths: of those asked for in each eighth of the haystack, from its start.
    chosen: share of questions that see their needle; mass: share of dense attention kept; density: share of the keys
    kept, all three of the questions of one sequence in the layer that finds needles under dense attention.
    """

    name: str
    where: str
    found: float
    depths: list[float]
    chosen: float
    mass: float
    density: float
    seconds: float


DEPTHS = 8


@dataclass(frozen=True)
class Layer:
    """q [1, H, N, D] and k of the layer that finds needles, and its dense attention [1, H, questions, N]."""

    q: Float[Tensor, "1 h n d"]
    k: Float[Tensor, "1 h n d"]
    weights: Float[Tensor, "1 h questions n"]
    value: Int64[Tensor, "1 h questions 1"]

    def keeps(self, where: Pattern) -> tuple[float, float, float]:
        """(chosen, mass, density), the mean over questions and heads."""
        count, length = self.weights.shape[2:]
        seen = where.select(self.q, self.k, ct.Grid(n=length))[:, :, -count:]
        past = (self.weights > 0).sum(-1)
        kept = (self.weights * seen).sum(-1).mean()
        return float(seen.gather(3, self.value).float().mean()), float(kept), float((seen.sum(-1) / past).mean())


@torch.inference_mode()
def finding(task: Needles, model: Model, tokens: Int64[Tensor, "1 n"], places: Int64[Tensor, "1 questions"]) -> Layer:
    """The layer whose dense attention gives most to the needles asked for."""
    length, count = tokens.shape[1], places.shape[1]
    future = torch.arange(length) > torch.arange(length - count, length)[:, None]
    value = (places + 1)[:, None, :, None].expand(1, task.heads, count, 1)
    out = []
    for own in qkv(model, tokens):
        logits = own.q[:, :, -count:] @ own.k.transpose(-1, -2) / own.q.shape[3] ** 0.5
        out.append(Layer(own.q, own.k, logits.masked_fill(future, -torch.inf).softmax(-1), value))
    return max(out, key=lambda layer: float(layer.weights.gather(3, value).mean()))


@torch.inference_mode()
def answers(
    task: Needles, model: Model, where: Pattern, tokens: Int64[Tensor, "b n"], targets: Int64[Tensor, "b n"]
) -> Bool[Tensor, "b questions"]:
    """Which questions the trained model answers under a route."""
    routed = model_of(task, where).eval()
    routed.load_state_dict(model.state_dict())
    said = torch.cat([routed(row).argmax(-1) for row in tokens.split(1)])
    return (said == targets)[:, -task.needles :]


def compare(task: Needles, names: Sequence[str] | None = None, tell: Callable[[str], None] = print) -> list[Found]:
    """Trains the model and asks it under the routes of the menu, or those named.

    Raises ChronotopeError on a name that is not there.
    """
    wheres = menu(task)
    names = named("route", names, wheres)
    start = time.perf_counter()
    model = learn(task)
    tell(f"trained with dense attention, {time.perf_counter() - start:.0f} s")
    return ask(task, model, {name: wheres[name] for name in names}, tell)


def ask(task: Needles, model: Model, wheres: dict[str, Pattern], tell: Callable[[str], None] = print) -> list[Found]:
    """What a trained model finds under each route, in the same sequences."""
    rng = torch.Generator().manual_seed(task.seed + 1)
    tokens, targets, places = haystacks(task, task.length, task.needles, task.tested, rng)
    layer = finding(task, model, tokens[:1], places[:1])
    depth = places * DEPTHS // (task.length - task.needles)
    tell(f"{'':32}found chosen   mass density  by depth, from the start of the {task.length} tokens")
    out = []
    for name, where in wheres.items():
        start = time.perf_counter()
        right = answers(task, model, where, tokens, targets).float()
        depths = [float(right[depth == at].mean()) if bool((depth == at).any()) else 0.0 for at in range(DEPTHS)]
        seconds = time.perf_counter() - start
        out.append(Found(name, repr(where), float(right.mean()), depths, *layer.keeps(where), seconds))
        cells = "".join(f"{value:7.3f}" for value in (out[-1].found, out[-1].chosen, out[-1].mass, out[-1].density))
        tell(f"  {name:28}{cells}   {' '.join(f'{value:.2f}' for value in depths)}  {seconds:4.0f} s")
    return out
