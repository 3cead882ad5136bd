"""Sequential recommendation: the next item, ranked among all that the user has not had."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from chronotope.boxes import chunks
from chronotope.data.interactions import Interactions, Questions, Sequences, read_interactions
from chronotope.nn.catalogue import cross_entropy
from chronotope.papers.model.sasrec import SASRec, gbce, gbce_prior
from chronotope.tasks.learning import VALID, Makes, Numbers, Published, Schedule, Task

CUTS = (1, 10)
AT_ONCE = 256  # users asked at once

README = "README of asash/gSASRec-pytorch"
TABLES = {
    "ml1m_gsasrec_split": (
        Published("SASRec", {"R@1": 0.0442, "R@10": 0.2392, "NDCG@10": 0.1259}, README),
        Published("gSASRec", {"R@1": 0.0754, "R@10": 0.3003, "NDCG@10": 0.1726}, README),
    ),
    "Beauty": (
        Published(
            "PopRec",
            {"R@10": 0.0152, "NDCG@10": 0.0068},
            "S3-Rec, arXiv 2008.07873, full rank; counts what is asked for too, our floor the training alone",
        ),
        Published("SASRec", {"R@10": 0.0605, "NDCG@10": 0.0318}, "S3-Rec, arXiv 2008.07873, full rank"),
    ),
}

AMONG = 100
"""Random items beside the one taken, in the ranking by which others tell this floor."""


@dataclass(frozen=True, kw_only=True)
class Recommend(Task):
    """Next items.

    `length`: past items that are looked at; `negatives` (0: all items) and `t`: of the loss; `half`: whether scores of
    all items are products of bfloat16 in training.
    """

    name: ClassVar[str] = "recommend"
    about: ClassVar[str] = "the next item of each user, ranked among all"
    best: ClassVar[str] = "NDCG@10"
    larger: ClassVar[bool] = True
    models: ClassVar[Mapping[str, str]] = {
        "sasrec": "causal self-attention; one negative, binary cross-entropy",
        "gsasrec": "the same taught by 256 negatives and gBCE, t = 0.75",
        "sasrec-softmax": "the same taught by cross-entropy over all items",
    }

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gsasrec": {"negatives": 256, "t": 0.75},
        "sasrec-softmax": {"negatives": 0},
    }

    length: int = 200
    negatives: int = 1
    t: float = 0.0
    half: bool = False

    @property
    def protocol(self) -> str:
        users = len(self.log.test.taken)
        told = f"{self.log.count:,} items, the last of {users:,} users; rank over all items they have not had"
        if self.log.skipping is None:
            return told
        every = len(self.log.last)
        return (
            f"{told}; skip-one: of all {every:,}, the item before it left out; estimated: what all {every:,} would give"
        )

    @cached_property
    def log(self) -> Interactions:
        """What the file holds."""
        return read_interactions(self.data)

    @property
    def examples(self) -> int:
        return len(self.log.train)

    def batch(self, index: Int64[Tensor, "b"], rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Items [B, N + 1] from 0 at the end on, lengths [B] of the input, and a generator's seed for negatives."""
        rows = [self.log.train[user][-self.length - 1 :] for user in index.tolist()]
        return (*padded(rows), torch.randint(2**31, (1,), generator=rng))

    def maker(self, model: str) -> Makes:
        return partial(_sasrec, self)

    def loss(self, model: Any, batch: Any) -> Float[Tensor, ""]:
        items, lengths, seed = batch
        h = model.known(items[:, :-1], (lengths - 1).clamp(min=0))
        taken = items[:, 1:][torch.arange(items.shape[1] - 1) < lengths[:, None] - 1]
        if self.negatives == 0:
            return cross_entropy(h, model.scored[1:], taken - 1, torch.bfloat16 if self.half else None)
        rng = torch.Generator().manual_seed(int(seed))
        others = torch.randint(1, self.log.count + 1, (len(taken), self.negatives), generator=rng)
        return gbce(model.score_of(h, torch.cat([taken[:, None], others], 1)), self.log.count, self.t)

    def measure(self, model: Any, part: str) -> Numbers:
        """R@k and NDCG@k of the one item that was taken, and the standard error of the first.

        Of a split, to test also of all users with the item before it left out, "skip-one", and what all users would
        give: the test times (skip-one of all / skip-one of those tested), the ratio estimator of survey sampling.
        """

        def scores(rows: list[Tensor]) -> Float[Tensor, "b items_and_none"]:
            items, lengths = padded([row[-self.length :] for row in rows])
            h = model(items, lengths)
            return model.score(h[torch.arange(len(rows)), lengths - 1])

        if part == VALID:
            return ranked(self.log.valid, scores)
        tested = places_of(self.log.test, scores)
        if self.log.skipping is None:
            return _cut(tested)
        skipped = places_of(self.log.skipping, scores)
        found = _cut(tested) | {f"skip-one {name}": value for name, value in _cut(skipped).items()}
        return found | estimated(tested, skipped[self.log.asked], skipped)

    def schedule(self, model: str) -> Schedule:
        steps = 6000 if self.negatives == 1 else 3000  # each step teaches more where many items are its negatives
        # Of many negatives, gradients are large until popularity is learnt: second moments have to forget them.
        beta2 = 0.9 if self.negatives > 1 else 0.999
        return Schedule(steps, batch=64, rate=2e-3, beta2=beta2, warmup=0.02, falls=True, every=200, patience=40)

    def floors(self) -> dict[str, Numbers]:
        """Items by how often they were taken."""
        often = torch.bincount(self.log.train.items, minlength=self.log.count + 1).float()
        often[0] = -torch.inf
        drawn = among(self.log, often, AMONG)
        sampled = {f"{metric} among {AMONG} random": drawn[metric] for metric in ("R@10", "NDCG@10")}
        return {"popularity": ranked(self.log.test, lambda rows: often.repeat(len(rows), 1)) | sampled}

    @property
    def published(self) -> tuple[Published, ...]:
        return TABLES.get(self.data.name.split(".")[0], ())


def _sasrec(
    task: Recommend, dim: int = 64, heads: int = 1, layers: int = 2, dropout: float = 0.2, tied: bool = False
) -> nn.Module:
    prior = gbce_prior(task.negatives, task.log.count, task.t) if task.negatives else 0.0
    return SASRec(task.log.count, task.length, dim, heads, layers, dropout, tied, max(0.0, prior))


def padded(rows: list[Tensor]) -> tuple[Int64[Tensor, "b n"], Int64[Tensor, "b"]]:
    """Sequences side by side, 0 after their end; and their lengths."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def ranked(questions: Questions, scores: Callable[[list[Tensor]], Tensor]) -> Numbers:
    """R@k and NDCG@k: where the item taken stands among all that the user has not had; ties count against it."""
    return _cut(places_of(questions, scores))


def places_of(questions: Questions, scores: Callable[[list[Tensor]], Tensor]) -> Float[Tensor, "users"]:
    """How many items stand before the one taken, of each user."""
    return torch.cat([_places(rows, taken, scores(rows)) for rows, taken in _asked(questions)])


def estimated(tested: Float[Tensor, "n"], skipped: Float[Tensor, "n"], every: Float[Tensor, "users"]) -> Numbers:
    """What all users would give, from places of some with and without their item before, and of all without it.

    Mean y times X / x, where y and x are the gains of some, X those of all; its standard error is that of the mean of
    y - (y / x) x, times X / x. Nothing where x is 0. Source: Cochran, "Sampling Techniques", chapter 6.
    """
    out = {}
    for name in (f"R@{CUTS[-1]}", f"NDCG@{CUTS[-1]}"):
        y, x, whole = (_gains(one)[name] for one in (tested, skipped, every))
        if len(y) > 1 and x.any():
            off, stretch = y - y.mean() / x.mean() * x, whole.mean() / x.mean()
            out[f"estimated {name}"] = float(y.mean() * stretch)
            out[f"standard error of estimated {name}"] = float(off.std() / math.sqrt(len(y)) * stretch)
    return out


def _gains(places: Float[Tensor, "users"]) -> dict[str, Float[Tensor, "users"]]:
    hits = {k: (places < k).float() for k in CUTS}
    return {f"R@{k}": hit for k, hit in hits.items()} | {
        f"NDCG@{k}": hit / torch.log2(places + 2) for k, hit in hits.items()
    }


def _cut(places: Float[Tensor, "users"]) -> Numbers:
    gains = _gains(places)
    out = {name: float(gains[name].mean()) for k in CUTS for name in (f"R@{k}", f"NDCG@{k}")}
    share = out[f"R@{CUTS[-1]}"]
    return out | {"standard error of R@10": math.sqrt(share * (1 - share) / len(places))}


def among(log: Interactions, scores: Float[Tensor, "items_and_none"], count: int = AMONG, seed: int = 0) -> Numbers:
    """R@k and NDCG@k of every user's last item among as many that the user has not had, drawn uniformly."""
    rng, places = torch.Generator().manual_seed(seed), torch.empty(len(log.last))
    for user, taken in enumerate(log.last.tolist()):
        free = torch.ones(log.count + 1, dtype=torch.bool)
        free[0] = free[taken] = False
        free[log.train[user]] = torch.tensor(False)
        drawn = torch.randperm(int(free.sum()), generator=rng)[:count]
        places[user] = (~(scores[free.nonzero()[drawn, 0]] < scores[taken])).sum()
    return _cut(places)


def _asked(questions: Questions) -> Iterator[tuple[list[Tensor], Tensor]]:
    before: Sequences = questions.before
    for part in chunks(len(before), 1, AT_ONCE):
        yield [before[user] for user in range(part.start, part.stop)], questions.taken[part]


def _places(rows: list[Tensor], taken: Tensor, scores: Tensor) -> Float[Tensor, "b"]:
    """How many items are not scored below the one taken, which may be among those had: NaN ranks last."""
    user = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    own = scores.gather(1, taken[:, None])
    scores = scores.index_put((user, torch.cat(rows)), torch.tensor(-torch.inf))
    scores.scatter_(1, taken[:, None], -torch.inf)
    return (~(scores < own)).sum(1).float()
