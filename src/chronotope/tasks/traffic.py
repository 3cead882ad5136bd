"""Traffic: the speed at every sensor of a road network, a quarter of an hour to three quarters ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from chronotope.boxes import chunks
from chronotope.data.traffic import Traffic, edges, read_traffic
from chronotope.errors import ChronotopeError
from chronotope.papers.spacetime.sttn import STTN, Space
from chronotope.tasks.learning import TEST, VALID, Makes, Numbers, Published, Schedule, Task

DAY, MINUTES = 288, 5  # steps of a day, and minutes of a step
HORIZONS = (3, 6, 9)
AT_ONCE = 256  # windows forecast at once

README = "README of VeritasYin/STGCN_IJCAI-18: all 228 sensors, so a guide only"
KINDS: Mapping[str, tuple[Space, bool]] = {
    "sttn": ("gated", True),
    "sttn-no-graph": ("attention", True),
    "sttn-no-time": ("gated", False),
}

Part = Float[Tensor, "days steps v"]


def _row(*numbers: float) -> Numbers:
    names = [f"{kind}@{MINUTES * step}" for step in HORIZONS for kind in ("MAE", "MAPE", "RMSE")]
    return dict(zip(names, numbers, strict=True))


@dataclass(frozen=True, kw_only=True)
class TrafficSpeed(Task):
    """Speeds. `window`: steps that are looked at; `train`, `valid`, `test`: days of each part, in this order."""

    name: ClassVar[str] = "traffic"
    about: ClassVar[str] = "the speed at every sensor of a road network, 15 to 45 minutes ahead"
    best: ClassVar[str] = "MAE"
    models: ClassVar[Mapping[str, str]] = {
        "sttn": "attention over sensors, gated against a convolution on the graph, then attention over time",
        "sttn-no-graph": "the same without its graph: no convolution, and nothing told of who is near whom",
        "sttn-no-time": "the same without its attention over time: the last step alone is known",
    }

    window: int = 12
    train: int = 34
    valid: int = 5
    test: int = 5

    @property
    def protocol(self) -> str:
        sensors = self.traffic.speeds.shape[1]
        return (
            f"{sensors} sensors, {self.train}/{self.valid}/{self.test} days, {self.window} steps in and "
            f"{HORIZONS[-1]} out, windows within a day; errors in the unit of the speeds, MAPE in %"
        )

    @cached_property
    def traffic(self) -> Traffic:
        """What the files hold. Raises ChronotopeError where these are not the days that are asked for."""
        out = read_traffic(self.data)
        steps, days = len(out.speeds), self.train + self.valid + self.test
        if steps != DAY * days:
            raise ChronotopeError(
                f"traffic {self.data}: {steps} steps, which are {steps / DAY:g} days of {DAY}; expected "
                f"{self.train} + {self.valid} + {self.test} days (set train, valid, test)."
            )
        return out

    def days(self, part: str) -> Part:
        """The days of "train", "valid" or "test"."""
        parts = self.traffic.speeds.unflatten(0, (-1, DAY)).split([self.train, self.valid, self.test])
        return parts[("train", VALID, TEST).index(part)]

    @property
    def windows(self) -> int:
        """Of a day: all that lie within it, forecast included."""
        return DAY - self.window - HORIZONS[-1] + 1

    @property
    def examples(self) -> int:
        return self.train * self.windows

    def batch(self, index: Int64[Tensor, "b"], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Readings [B, window, V, 1], and those that follow [B, 9, V]."""
        return self._cut(self.days("train"), index)

    def _cut(self, days: Part, index: Int64[Tensor, "b"]) -> tuple[Tensor, Tensor]:
        first = index % self.windows
        steps = first[:, None] + torch.arange(self.window + HORIZONS[-1])
        rows = days[(index // self.windows)[:, None], steps]
        return rows[:, : self.window, :, None], rows[:, self.window :]

    def maker(self, model: str) -> Makes:
        return partial(_sttn, self, *KINDS[model])

    def loss(self, model: Any, batch: Any) -> Float[Tensor, ""]:
        return model.loss(*batch)

    def measure(self, model: Any, part: str) -> Numbers:
        """MAE, MAPE in % and RMSE at each horizon over all windows and sensors; MAE: the mean over horizons."""
        return self._errors(part, lambda past, index: model(past))

    def _errors(self, part: str, forecast: Callable[[Tensor, Tensor], Tensor]) -> Numbers:
        days = self.days(part)
        told, came = [], []
        for some in chunks(len(days) * self.windows, 1, AT_ONCE):
            index = torch.arange(some.start, some.stop)
            past, future = self._cut(days, index)
            told.append(forecast(past, index))
            came.append(future)
        return errors(torch.cat(told), torch.cat(came))

    def schedule(self, model: str) -> Schedule:
        return Schedule(steps=900, batch=50, rate=2e-3, beta2=0.999, warmup=0.03, falls=True, clip=5.0, every=150)

    def floors(self) -> dict[str, Numbers]:
        """The last reading again; and the mean of the training days at that time of day."""
        usual = self.days("train").mean(0)
        ahead = self.window + torch.arange(HORIZONS[-1])
        return {
            "repeat last": self._errors(TEST, lambda past, _: past[:, -1:, :, 0].expand(-1, HORIZONS[-1], -1)),
            "time of day": self._errors(TEST, lambda _, index: usual[(index % self.windows)[:, None] + ahead]),
        }

    @property
    def published(self) -> tuple[Published, ...]:
        return (
            Published("HA", _row(*(4.01, 10.61, 7.20) * 3), README),
            Published("FC-LSTM", _row(3.57, 8.60, 6.20, 3.94, 9.55, 7.03, 4.16, 10.10, 7.51), README),
            Published("GCGRU", _row(2.37, 5.54, 4.21, 3.31, 8.06, 5.96, 4.01, 9.99, 7.13), README),
            Published("STGCN(Cheb)", _row(2.25, 5.26, 4.04, 3.03, 7.33, 5.70, 3.57, 8.69, 6.77), README),
        )


def errors(told: Float[Tensor, "n horizons v"], came: Float[Tensor, "n horizons v"]) -> Numbers:
    """MAE, MAPE in % (where something came that is not 0) and RMSE at each horizon, and the mean of the MAEs."""
    out = {}
    for step in HORIZONS:
        truth = came[:, step - 1].double()
        off, name = (told[:, step - 1].double() - truth).abs(), MINUTES * step
        out[f"MAE@{name}"] = float(off.mean())
        out[f"MAPE@{name}"] = 100 * float((off / truth)[truth > 0].mean())
        out[f"RMSE@{name}"] = float(off.square().mean().sqrt())
    return out | {"MAE": sum(out[f"MAE@{MINUTES * step}"] for step in HORIZONS) / len(HORIZONS)}


def _sttn(
    task: TrafficSpeed,
    space: Space,
    time: bool,
    dim: int = 32,
    heads: int = 4,
    blocks: int = 1,
    hidden: int = 128,
    order: int = 3,
) -> nn.Module:
    known = task.days("train").double()
    return STTN(
        edges(task.traffic.distances).tolist(),
        task.window,
        HORIZONS[-1],
        mean=float(known.mean()),
        std=float(known.std()),
        dim=dim,
        heads=heads,
        blocks=blocks,
        hidden=hidden,
        order=order,
        space=space,
        time=time,
    )
