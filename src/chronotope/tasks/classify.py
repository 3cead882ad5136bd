"""Classification of time series: the sets of the UCR and UEA archives, or any `.ts` files like them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.boxes import chunks
from chronotope.data.series import Series, read_pair
from chronotope.errors import ChronotopeError
from chronotope.models.classifier import Classifier
from chronotope.tasks.learning import VALID, Makes, Numbers, Published, Schedule, Task

AT_ONCE = 256  # cases asked at once
TOKENS = 64  # at most, unless `patch` says otherwise
KNOTS = 4

DTW = "1-NN DTW, learned window"
ARCHIVE = "UCR/UEA archive, as remembered"
TABLES = {
    "ArrowHead": (Published(DTW, {"accuracy": 0.800}, ARCHIVE),),
    "GunPoint": (
        Published(DTW, {"accuracy": 0.913}, ARCHIVE),
        Published("ROCKET", {"accuracy": 1.000}, ARCHIVE),
    ),
    "ItalyPowerDemand": (Published(DTW, {"accuracy": 0.955}, ARCHIVE),),
    "OSULeaf": (Published(DTW, {"accuracy": 0.612}, ARCHIVE),),
    "BasicMotions": (
        Published("1-NN DTW, dependent", {"accuracy": 0.975}, ARCHIVE),
        Published("ROCKET", {"accuracy": 1.000}, ARCHIVE),
    ),
    "JapaneseVowels": (
        Published("1-NN DTW, dependent", {"accuracy": 0.949}, ARCHIVE),
        Published("ROCKET", {"accuracy": 0.962}, ARCHIVE),
        Published("TST, supervised", {"accuracy": 0.994}, "Zerveas et al., KDD 2021, as remembered"),
        Published("TST, pre-trained", {"accuracy": 0.997}, "Zerveas et al., KDD 2021, as remembered"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Classify(Task):
    """Classes of series; `data` is the TRAIN or the TEST file of a set, or the name before `_TRAIN`.

    `held`: the share of each class of TRAIN that is kept to validate, drawn with the seed `split`; 0: none.

    In training, series are changed at random. `warp`: standard deviation of the logarithm of their speed, see `warped`;
    `scaling`: of the logarithm of a factor for each channel; `noise`: of what is added to each value, over that of its
    channel.
    """

    name: ClassVar[str] = "classify"
    about: ClassVar[str] = "the class of a time series"
    # Not accuracy: a validation part of ten cases has many ties.
    best: ClassVar[str] = "cross-entropy"
    models: ClassVar[Mapping[str, str]] = {
        "convolution+attention": "depthwise convolution, then rotary attention, in each block",
        "attention": "rotary attention, all to all",
        "convolution": "depthwise convolution",
        "recurrence": "gated linear attention, there and back",
        "convolution+recurrence": "depthwise convolution, then the recurrence, in each block",
    }

    held: float = 0.0
    split: int = 0
    warp: float = 0.2
    scaling: float = 0.1
    noise: float = 0.1

    @property
    def protocol(self) -> str:
        train, test = self.sets
        kept = f"{len(self.parts[1])} of them to validate (each class by share, seed {self.split})"
        how = kept if self.held else "none of them to validate"
        return f"{train.name}: the archive's {len(train)} series to learn from, {how}; accuracy on {len(test)}"

    @cached_property
    def sets(self) -> tuple[Series, Series]:
        """TRAIN and TEST."""
        return read_pair(self.data)

    @cached_property
    def parts(self) -> tuple[Int64[Tensor, "learned"], Int64[Tensor, "held"]]:
        """Cases of TRAIN that are learned from, and those that validate."""
        return parted(self.sets[0].labels, self.held, self.split)

    @property
    def examples(self) -> int:
        return len(self.parts[0])

    def batch(self, index: Int64[Tensor, "b"], rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Values [B, N, channels], 0 after the end; lengths [B]; classes [B]."""
        values, lengths, labels = gathered(self.sets[0], self.parts[0][index])
        values = warped(values, lengths, self.warp, rng)
        values = values * torch.exp(self.scaling * torch.randn(len(values), 1, values.shape[2], generator=rng))
        return values + torch.randn(values.shape, generator=rng) * (self.noise * self.scale[1]), lengths, labels

    @cached_property
    def scale(self) -> tuple[Float[Tensor, "channels"], Float[Tensor, "channels"]]:
        """Mean and standard deviation of each channel in what is learned from."""
        own = torch.cat([self.sets[0].values[case] for case in self.parts[0].tolist()])
        return own.mean(0), own.std(0, correction=0).clamp(min=1e-8)

    def maker(self, model: str) -> Makes:
        return partial(_classifier, self, model)

    def loss(self, model: Any, batch: Any) -> Float[Tensor, ""]:
        values, lengths, labels = batch
        return F.cross_entropy(model(values, lengths), labels)

    def measure(self, model: Any, part: str) -> Numbers:
        """Accuracy, its standard error, and the mean cross-entropy in nats."""
        series = self.sets[0] if part == VALID else self.sets[1]
        cases = torch.arange(len(series))
        if part == VALID:
            cases = self.parts[1] if self.held else self.parts[0]
        logits = []
        for some in chunks(len(cases), 1, AT_ONCE):
            values, lengths, _ = gathered(series, cases[some])
            logits.append(model(values, lengths))
        labels, found = series.labels[cases], torch.cat(logits)
        return accuracy(found.argmax(1), labels) | {"cross-entropy": float(F.cross_entropy(found, labels))}

    def schedule(self, model: str) -> Schedule:
        # One for all sets: of those tried, with warp, scaling, noise and stem, it had the least cross-entropy over cuts
        # of TRAIN (held=0.25), summed over eight sets. The last weights count: nothing held tells of better ones.
        return Schedule(steps=300, batch=16, rate=2e-3, decay=0.01, warmup=0.05, falls=True, clip=1.0, every=300)

    def floors(self) -> dict[str, Numbers]:
        """The commonest class, and the class of the nearest series, in all of TRAIN."""
        train, test = self.sets
        commonest = torch.bincount(train.labels).argmax().expand(len(test))
        return {
            "majority class": accuracy(commonest, test.labels),
            "1-NN Euclidean": accuracy(nearest(train, test), test.labels),
        }

    @property
    def published(self) -> tuple[Published, ...]:
        return TABLES.get(self.sets[0].name, ())


def _classifier(
    task: Classify,
    mixers: str,
    dim: int = 64,
    heads: int = 4,
    layers: int = 2,
    patch: int = 0,
    pool: str = "mean",
    width: int = 9,
    dropout: float = 0.1,
) -> nn.Module:
    train = task.sets[0]
    patch = patch or math.ceil(int(train.lengths.max()) / TOKENS)
    units = torch.stack(task.scale, 1).tolist()
    return Classifier(
        train.channels, len(train.classes), [mixers] * layers, dim, heads, patch, width, pool, dropout, units
    )


def parted(labels: Int64[Tensor, "n"], held: float, seed: int) -> tuple[Int64[Tensor, "a"], Int64[Tensor, "b"]]:
    """Cases split in two, the second with a share `held` of each class; where it is above 0, at least one of each."""
    if not 0 <= held < 1:
        raise ChronotopeError(f"held={held}: expected a share from 0 to below 1.")
    rng = torch.Generator().manual_seed(seed)
    learned, kept = [], []
    for label in labels.unique().tolist():
        cases = (labels == label).nonzero()[:, 0]
        cases = cases[torch.randperm(len(cases), generator=rng)]
        count = max(1, round(held * len(cases))) if held else 0
        if count == len(cases):
            raise ChronotopeError(f"class {label} has {len(cases)} cases; held={held} leaves none to learn from.")
        kept.append(cases[:count])
        learned.append(cases[count:])
    return torch.cat(learned).sort().values, torch.cat(kept).sort().values


def gathered(
    series: Series, cases: Int64[Tensor, "b"]
) -> tuple[Float[Tensor, "b n channels"], Int64[Tensor, "b"], Int64[Tensor, "b"]]:
    """Values side by side, 0 after the end of each; lengths; classes."""
    rows = [series.values[case] for case in cases.tolist()]
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, series.labels[cases]


def warped(
    values: Float[Tensor, "b n channels"], lengths: Int64[Tensor, "b"], spread: float, rng: torch.Generator
) -> Float[Tensor, "b n channels"]:
    """The same way at another speed, from the first value to the last; 0 after the end of each.

    The logarithm of the speed is normal with this standard deviation at `KNOTS` moments; speed is straight between.
    """
    knots = torch.exp(spread * torch.randn(len(values), 1, KNOTS, generator=rng))
    speed = F.interpolate(knots, size=values.shape[1], mode="linear", align_corners=True)[:, 0]
    way, last = speed.cumsum(1) - speed[:, :1], (lengths - 1)[:, None]
    at = torch.minimum(way * (last / way.gather(1, last).clamp(min=1e-8)), last)
    low = at.floor().long()
    first, second = (values.gather(1, x[..., None].expand_as(values)) for x in (low, torch.minimum(low + 1, last)))
    inside = torch.arange(values.shape[1]) <= last
    return torch.where(inside[..., None], torch.lerp(first, second, (at - low)[..., None]), 0.0)


def accuracy(chosen: Int64[Tensor, "n"], labels: Int64[Tensor, "n"]) -> Numbers:
    """The share that is right, and its standard error."""
    share = float((chosen == labels).double().mean())
    return {"accuracy": share, "standard error": math.sqrt(share * (1 - share) / len(labels))}


def nearest(train: Series, test: Series) -> Int64[Tensor, "test"]:
    """The class of the nearest series of TRAIN, by Euclidean distance over all values of all channels.

    Where lengths differ, every series is first stretched to the longest of TRAIN, linearly.
    """
    length = int(train.lengths.max())
    flat = [torch.stack([stretched(x, length) for x in one.values]).flatten(1).double() for one in (train, test)]
    # Not by the product of the two: rounding would break ties among series that are close.
    away = torch.cdist(flat[1], flat[0], compute_mode="donot_use_mm_for_euclid_dist")
    return train.labels[away.argmin(1)]


def stretched(x: Float[Tensor, "n channels"], length: int) -> Float[Tensor, "{length} channels"]:
    """As many values, from the first to the last, straight between those that are there."""
    if len(x) == length:
        return x
    return F.interpolate(x.T[None], size=length, mode="linear", align_corners=True)[0].T
