"""Multivariate forecasting: all variables of a table, many steps ahead, from a look-back of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.boxes import chunks
from chronotope.data.forecast import DAY, Parts, Series, read_series
from chronotope.errors import ChronotopeError
from chronotope.models.forecaster import Forecaster
from chronotope.tasks.learning import TEST, VALID, Makes, Numbers, Published, Schedule, Task

BATCH = 32
"""The batch of the published protocol, whose last one is dropped where it is not whole."""
AT_ONCE = 2**20  # values looked back on at once

LTSF = "LTSF-Linear (Zeng et al., AAAI 2023, arXiv 2205.13504), Table 2, as in pics/Mul-results.png"
ROWS = ("Linear", "NLinear", "DLinear", "FEDformer", "Autoformer", "Informer", "Repeat")
LINEAR = ROWS[:3]
# Table, horizon, then MSE and MAE of each of the rows.
TABLE = """
ETTh1            96  0.375 0.397  0.374 0.394  0.375 0.399  0.376 0.419  0.449 0.459  0.865 0.713  1.295 0.713
ETTh1            192 0.418 0.429  0.408 0.415  0.405 0.416  0.420 0.448  0.500 0.482  1.008 0.792  1.325 0.733
ETTh1            336 0.479 0.476  0.429 0.427  0.439 0.443  0.459 0.465  0.521 0.496  1.107 0.809  1.323 0.744
ETTh1            720 0.624 0.592  0.440 0.453  0.472 0.490  0.506 0.507  0.514 0.512  1.181 0.865  1.339 0.756
ETTh2            96  0.288 0.352  0.277 0.338  0.289 0.353  0.346 0.388  0.358 0.397  3.755 1.525  0.432 0.422
ETTh2            192 0.377 0.413  0.344 0.381  0.383 0.418  0.429 0.439  0.456 0.452  5.602 1.931  0.534 0.473
ETTh2            336 0.452 0.461  0.357 0.400  0.448 0.465  0.496 0.487  0.482 0.486  4.721 1.835  0.591 0.508
ETTh2            720 0.698 0.595  0.394 0.436  0.605 0.551  0.463 0.474  0.515 0.511  3.647 1.625  0.588 0.517
ETTm1            96  0.308 0.352  0.306 0.348  0.299 0.343  0.379 0.419  0.505 0.475  0.672 0.571  1.214 0.665
ETTm1            192 0.340 0.369  0.349 0.375  0.335 0.365  0.426 0.441  0.553 0.496  0.795 0.669  1.261 0.690
ETTm1            336 0.376 0.393  0.375 0.388  0.369 0.386  0.445 0.459  0.621 0.537  1.212 0.871  1.283 0.707
ETTm1            720 0.440 0.435  0.433 0.422  0.425 0.421  0.543 0.490  0.671 0.561  1.166 0.823  1.319 0.729
exchange_rate    96  0.082 0.207  0.089 0.208  0.081 0.203  0.148 0.278  0.197 0.323  0.847 0.752  0.081 0.196
exchange_rate    192 0.167 0.304  0.180 0.300  0.157 0.293  0.271 0.380  0.300 0.369  1.204 0.895  0.167 0.289
exchange_rate    336 0.328 0.432  0.331 0.415  0.305 0.414  0.460 0.500  0.509 0.524  1.672 1.036  0.305 0.396
exchange_rate    720 0.964 0.750  1.033 0.780  0.643 0.601  1.195 0.841  1.447 0.941  2.478 1.310  0.823 0.681
national_illness 24  1.947 0.985  1.683 0.858  2.215 1.081  3.228 1.260  3.483 1.287  5.764 1.677  6.587 1.701
national_illness 36  2.182 1.036  1.703 0.859  1.963 0.963  2.679 1.080  3.103 1.148  4.755 1.467  7.130 1.884
national_illness 48  2.256 1.060  1.719 0.884  2.130 1.024  2.622 1.078  2.669 1.085  4.763 1.469  6.575 1.798
national_illness 60  2.390 1.104  1.819 0.917  2.368 1.096  2.857 1.157  2.770 1.125  5.264 1.564  5.893 1.677
"""


@dataclass(frozen=True, kw_only=True)
class Forecast(Task):
    """Values to come. `lookback`, `horizon`: rows seen and rows foretold; every row is a start.

    `drop_last`: MSE and MAE are without the last incomplete batch of 32 windows, as in the published rows; those of all
    windows stand beside them. `split`: by "months" (12, 4, 4), by "shares" (70%, 10%, 20%), or "auto": months where the
    name of the file begins with ETT, else shares. What is validated or tested looks back into the part before.
    """

    name: ClassVar[str] = "forecast"
    about: ClassVar[str] = "all variables of a table, many steps ahead"
    best: ClassVar[str] = "MSE"
    models: ClassVar[Mapping[str, str]] = {
        "linear": "one matrix from look-back to horizon (LTSF-Linear)",
        "nlinear": "the same on differences from the last value",
        "dlinear": "two matrices: for a moving average and for the rest",
        "patches": "patches of each series, attention along time (as PatchTST)",
        "variables": "each series a token, attention over variables (as iTransformer)",
        "both": "patches, attention along time and over variables in turn",
        "recurrence": "patches, a gated linear recurrence along time",
    }

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"variables": {"lookback": 96}}

    lookback: int = 336
    horizon: int = 96
    drop_last: bool = True
    split: Literal["auto", "months", "shares"] = "auto"

    @property
    def protocol(self) -> str:
        counted = "last incomplete batch of 32 dropped" if self.drop_last else "all windows"
        cut = "12/4/4 months" if self._by_months else "70/10/20%"
        return (
            f"{len(self.series.names)} variables, {self.lookback} -> {self.horizon}, split {cut}, z-score by the "
            f"training part, stride 1, {counted}"
        )

    @property
    def _by_months(self) -> bool:
        return self.split == "months" or (self.split == "auto" and self.data.name.startswith("ETT"))

    @cached_property
    def series(self) -> Series:
        """What the file holds."""
        return read_series(self.data)

    @cached_property
    def parts(self) -> Parts:
        """Where it is cut."""
        return self.series.months() if self._by_months else self.series.shares()

    @cached_property
    def scaled(self) -> Float[Tensor, "n v"]:
        """All rows, less the mean of the training part and over its standard deviation."""
        variance, mean = torch.var_mean(self.series.values[: self.parts.train], 0, correction=0)
        # A column that stands still is left as it is.
        return ((self.series.values - mean) / torch.where(variance > 0, variance.sqrt(), 1.0)).float()

    @property
    def examples(self) -> int:
        return len(self._starts(0, self.parts.train))

    def batch(self, index: Int64[Tensor, "b"], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Past [B, lookback, V] and future [B, horizon, V] of the windows of the training part; nothing is drawn."""
        rows = self.scaled[index[:, None] + torch.arange(self.lookback + self.horizon)]
        return rows[:, : self.lookback], rows[:, self.lookback :]

    def maker(self, model: str) -> Makes:
        return partial(MAKERS[model], self)

    def loss(self, model: Any, batch: Any) -> Float[Tensor, ""]:
        past, future = batch
        return F.mse_loss(model(past), future)

    def measure(self, model: Any, part: str) -> Numbers:
        """MSE and MAE over windows, steps and variables, of scaled values; with `drop_last` both ways."""
        square, absolute = self._errors(model, part)
        whole = {"MSE": float(square.mean()), "MAE": float(absolute.mean())}
        if not self.drop_last:
            return whole
        kept = len(square) // BATCH * BATCH
        if kept == 0:
            raise ChronotopeError(
                f"{self.data.name}: the {part} part has {len(square)} windows, no whole batch of {BATCH}; "
                "give drop_last=false."
            )
        dropped = {"MSE": float(square[:kept].mean()), "MAE": float(absolute[:kept].mean())}
        return dropped | {f"{key}, all windows": value for key, value in whole.items()}

    @torch.no_grad()
    def _errors(self, model: Any, part: str) -> tuple[Float64[Tensor, "windows"], Float64[Tensor, "windows"]]:
        """Mean squared and absolute error of each window, in order of time."""
        cut = {VALID: (self.parts.train, self.parts.valid), TEST: (self.parts.valid, self.parts.test)}[part]
        starts = self._starts(cut[0] - self.lookback, cut[1])
        square, absolute = [], []
        for at in chunks(len(starts), self.lookback * self.scaled.shape[1], AT_ONCE):
            rows = torch.tensor(starts[at])[:, None] + torch.arange(self.lookback + self.horizon)
            window = self.scaled[rows]
            error = (model(window[:, : self.lookback]) - window[:, self.lookback :]).double().flatten(1)
            square.append(error.square().mean(1))
            absolute.append(error.abs().mean(1))
        return torch.cat(square), torch.cat(absolute)

    def _starts(self, first: int, end: int) -> range:
        """Of windows that lie in rows [first, end)."""
        last = end - self.lookback - self.horizon
        if first < 0 or last < first:
            raise ChronotopeError(
                f"{self.data.name}: a part of {end - max(first, 0):,} rows has no window of lookback={self.lookback} "
                f"and horizon={self.horizon}; give smaller ones."
            )
        return range(first, last + 1)

    def schedule(self, model: str) -> Schedule:
        if model in ("linear", "nlinear", "dlinear"):
            return Schedule(steps=2000, batch=32, rate=2e-3, beta2=0.999, falls=True, every=100)
        if model == "variables":
            return Schedule(steps=800, batch=32, rate=5e-4, beta2=0.999, warmup=0.1, falls=True, every=100)
        # On ETTh1 and ETTh2, 96 ahead, a dropout of 0.3, and batches of 64 at 3e-3, validate worse.
        return Schedule(steps=600, batch=32, rate=2e-3, beta2=0.999, warmup=0.1, falls=True, every=100)

    def floors(self) -> dict[str, Numbers]:
        """The last value, the mean of the look-back, and where rows are shorter than a day, the last day again."""
        ahead: dict[str, Callable[[Tensor], Tensor]] = {
            "repeat": lambda past: past[:, -1:].expand(-1, self.horizon, -1),
            "mean": lambda past: past.mean(1, keepdim=True).expand(-1, self.horizon, -1),
        }
        day = self.series.rows(DAY)
        if day is not None and 1 < day <= self.lookback:
            again = torch.arange(self.horizon) % day - day
            ahead["the last day"] = lambda past: past[:, again]
        return {name: self.measure(one, TEST) for name, one in ahead.items()}

    @property
    def published(self) -> tuple[Published, ...]:
        """Rows of LTSF-Linear's table, whose look-backs are their own and not this task's."""
        name = self.data.name.split(".")[0]
        if self._by_months != name.startswith("ETT"):
            return ()
        long, short = (104, 36) if name == "national_illness" else (336, 96)
        rows = (line.split() for line in TABLE.strip().splitlines())
        numbers = next((row[2:] for row in rows if row[:2] == [name, str(self.horizon)]), [])
        given = {row: f"{LTSF}; look-back {long if row in LINEAR else short}" for row in ROWS}
        pairs = zip(ROWS, numbers[::2], numbers[1::2], strict=False)
        return tuple(Published(row, {"MSE": float(mse), "MAE": float(mae)}, given[row]) for row, mse, mae in pairs)


def _linear(task: Forecast, norm: str = "none", trend: int = 0) -> nn.Module:
    return Forecaster(task.lookback, task.horizon, norm=norm, trend=trend)


def _blocks(
    task: Forecast,
    blocks: str = "time time",
    norm: str = "last",
    patch: int | None = 16,
    stride: int = 16,
    dim: int = 16,
    heads: int = 4,
    ratio: float = 8.0,
    dropout: float = 0.1,
) -> nn.Module:
    names = blocks.split()
    return Forecaster(task.lookback, task.horizon, names, norm, 0, patch, stride, dim, heads, ratio, dropout)


MAKERS: Mapping[str, Makes] = {
    "linear": _linear,
    "nlinear": partial(_linear, norm="last"),
    "dlinear": partial(_linear, trend=25),
    "patches": _blocks,
    "variables": partial(
        _blocks, blocks="variable variable", norm="instance", patch=None, dim=128, ratio=1.0, dropout=0.2
    ),
    "both": partial(_blocks, blocks="time variable"),
    "recurrence": partial(_blocks, blocks="recurrence recurrence"),
}
