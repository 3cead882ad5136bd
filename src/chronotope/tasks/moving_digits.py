"""Moving digits: the coming frames of two digits that bounce in a square."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.boxes import chunks
from chronotope.models.frames import Continuation, EncoderForecaster
from chronotope.papers.spacetime.predformer import PredFormer
from chronotope.tasks.bouncing import Bouncing
from chronotope.tasks.learning import TEST, VALID, Makes, Numbers, Published, Schedule

AT_ONCE = 50  # clips forecast at once
SEEDS = {VALID: 11, TEST: 12, "train": 13}
SIDE = 7  # of the windows of the structural similarity
REMEMBERED = "the standard test file, as remembered; other clips than these, so a guide only"

PLANS = {
    "joint": "full",
    "divided": "divided",
    "factorised": "fac-st",
    "factorised-ts": "fac-ts",
    "interleaved": "tsst",
    "space": "s",
}


@dataclass(frozen=True, kw_only=True)
class MovingDigits(Bouncing):
    """Forecasts of bouncing digits. `seen`, `ahead`: frames."""

    name: ClassVar[str] = "moving-digits"
    about: ClassVar[str] = "the coming frames of two digits that bounce in a square"
    best: ClassVar[str] = "MSE"
    models: ClassVar[Mapping[str, str]] = {
        "joint": "PredFormer, attention over all tokens",
        "divided": "PredFormer, attention over time and then space in each block",
        "factorised": "PredFormer, blocks over space, then blocks over time",
        "factorised-ts": "PredFormer, blocks over time, then blocks over space",
        "interleaved": "PredFormer, blocks over time, space, space, time, in turn",
        "space": "PredFormer, blocks over space alone: frames apart",
        "convlstm": "ConvLSTMs that read, ConvLSTMs that tell",
        "convspace": "blocks of a convolutional state space",
        "causal": "blocks of attention over the frames so far, then over space",
    }

    seen: int = 10
    ahead: int = 10

    @property
    def protocol(self) -> str:
        return (
            f"{self.digits} digits in {self.canvas} x {self.canvas}, {self.seen} frames in and {self.ahead} out; "
            f"{self.source}; MSE: squared error summed over the pixels of a frame"
        )

    @property
    def length(self) -> int:
        return self.seen + self.ahead

    def batch(self, index: Int64[Tensor, "b"], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """As many fresh clips as there are in the index: frames seen, and frames to come, [B, T, 1, H, W]."""
        return self.made("train", len(index), rng)

    def made(self, part: str, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clips of the digits of a part, cut in two."""
        clips = self.whole(part, count, rng)
        return clips[:, : self.seen], clips[:, self.seen :]

    def maker(self, model: str) -> Makes:
        if model in PLANS:
            return partial(_predformer, PLANS[model])
        makers: dict[str, Makes] = {"convlstm": _convlstm, "convspace": _convspace, "causal": _causal}
        return makers[model]

    def loss(self, model: Any, batch: Any) -> Float[Tensor, ""]:
        return model.loss(*batch)

    def measure(self, model: Any, part: str) -> Numbers:
        """As `errors` says, over all clips of a part."""
        return self._errors(part, model)

    def _errors(self, part: str, forecast: Callable[[Tensor], Tensor]) -> Numbers:
        return errors((forecast(seen), came) for seen, came in self._asked(part, self.count(part)))

    def _asked(self, part: str, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = torch.Generator().manual_seed(SEEDS[part])
        for some in chunks(count, 1, AT_ONCE):
            yield self.made(part, some.stop - some.start, rng)

    def schedule(self, model: str) -> Schedule:
        return Schedule(steps=1000, batch=8, rate=6e-3, decay=0.01, warmup=0.05, falls=True, clip=1.0, every=250)

    def floors(self) -> dict[str, Numbers]:
        """No ink; the last frame again; the mean of the frames seen; the mean frame of clips to learn from."""
        known = torch.cat([torch.cat(pair, 1) for pair in self._asked("train", self.clips)]).mean((0, 1))
        return {
            "black": self._errors(TEST, lambda seen: torch.zeros(len(seen), *self._frames)),
            "last frame": self._errors(TEST, lambda seen: seen[:, -1:].expand(-1, self.ahead, -1, -1, -1)),
            "mean of the frames seen": self._errors(
                TEST, lambda seen: seen.mean(1, keepdim=True).expand(-1, self.ahead, -1, -1, -1)
            ),
            "mean frame": self._errors(TEST, lambda seen: known.expand(len(seen), *self._frames)),
        }

    @property
    def _frames(self) -> tuple[int, ...]:
        return self.ahead, 1, self.canvas, self.canvas

    @property
    def published(self) -> tuple[Published, ...]:
        if (self.canvas, self.shrink, self.digits, self.seen, self.ahead) != (64, 1, 2, 10, 10):
            return ()
        known = {"ConvLSTM": 103.3, "PredRNN": 56.8, "PredRNN++": 46.5, "E3D-LSTM": 41.3, "SimVP": 23.8}
        return tuple(Published(name, {"MSE": value}, REMEMBERED) for name, value in known.items())


def errors(pairs: Iterator[tuple[Tensor, Tensor]]) -> Numbers:
    """MSE: of a frame, summed over its pixels; the same of one pixel, and of the last frame; SSIM, `similarity`."""
    total, last, alike, count = 0.0, 0.0, 0.0, 0
    pixels = 1
    for told, came in pairs:
        off = (told.double() - came.double()).square().sum((2, 3, 4))
        total, last = total + float(off.mean(1).sum()), last + float(off[:, -1].sum())
        alike += float(similarity(told.flatten(0, 1), came.flatten(0, 1)).sum()) / came.shape[1]
        count, pixels = count + len(came), came[0, 0].numel()
    return {
        "MSE": total / count,
        "MSE per pixel": total / count / pixels,
        "MSE, last frame": last / count,
        "SSIM": alike / count,
    }


def similarity(x: Float[Tensor, "b 1 h w"], y: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b"]:
    """Structural similarity of images in 0..1: the mean over all windows of 7 x 7.

    (2 m_x m_y + c)(2 s_xy + d) / ((m_x^2 + m_y^2 + c)(s_x^2 + s_y^2 + d)), c = 0.01^2, d = 0.03^2, m: means, s: sample
    covariances. Source: Wang et al. 2004, "Image Quality Assessment"; windows of equal weights.
    """
    x, y = x.double(), y.double()
    mean = partial(F.avg_pool2d, kernel_size=SIDE, stride=1)
    sample = SIDE**2 / (SIDE**2 - 1)
    mx, my = mean(x), mean(y)
    vx, vy, both = (
        sample * (mean(a * b) - ma * mb) for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my))
    )
    c, d = 0.01**2, 0.03**2
    out = (2 * mx * my + c) * (2 * both + d) / ((mx**2 + my**2 + c) * (vx + vy + d))
    return out.mean((1, 2, 3))


def _predformer(
    plan: str,
    patch: int = 4,
    dim: int = 64,
    heads: int = 4,
    blocks: int = 4,
    ratio: float = 2.0,
    post_norm: bool = False,
    drop_path: float = 0.0,
) -> nn.Module:
    return PredFormer(plan, blocks, patch, 1, dim, heads, ratio, post_norm, drop_path)


def _convlstm(patch: int = 4, dim: int = 24, layers: int = 2, kernel: int = 3) -> nn.Module:
    return EncoderForecaster(patch, 1, dim, layers, kernel)


def _convspace(
    patch: int = 4,
    dim: int = 64,
    layers: int = 2,
    ratio: float = 2.0,
    states: int = 24,
    slowest: float = 0.01,
    fastest: float = 0.5,
) -> nn.Module:
    return Continuation("space", patch, 1, dim, layers, ratio, states, slowest, fastest)


def _causal(patch: int = 4, dim: int = 64, heads: int = 4, layers: int = 2, ratio: float = 6.0) -> nn.Module:
    return Continuation("attention", patch, 1, dim, layers, ratio, heads=heads)
