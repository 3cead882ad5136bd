"""Motion capture: how the joints of somebody who walks, runs or plays turn in the next 400 ms (CMU)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from chronotope.boxes import chunks
from chronotope.data.mocap import Motions, euler, read_motions
from chronotope.models.motion import Motion
from chronotope.tasks.learning import VALID, Makes, Numbers, Published, Schedule, Task

EVERY = 2  # frames of a film from one that is looked at to the next: 25 a second are left
AHEAD = 10
TIMES = {"80 ms": 2, "160 ms": 4, "320 ms": 8, "400 ms": 10}
BODY = 2  # the first "joints" are place and rotation of the whole body, which are not measured
STILL = 1e-4  # standard deviation below which a number does not move
AT_ONCE = 128  # windows predicted at once

TABLES = {
    "Conv. Seq2Seq": {"walking": (0.35, 0.44, 0.45, 0.50)},
    "LearnTrajDep": {
        "basketball": (0.33, 0.52, 0.89, 1.06),
        "jumping": (0.31, 0.49, 1.23, 1.39),
        "running": (0.33, 0.55, 0.73, 0.74),
        "soccer": (0.18, 0.29, 0.61, 0.71),
        "walking": (0.33, 0.45, 0.49, 0.53),
    },
}
SOURCES = {
    "Conv. Seq2Seq": "CVPR 2018, as remembered; 8 windows of each test film",
    "LearnTrajDep": "ICCV 2019, as remembered; 8 windows of each test film",
}


@dataclass(frozen=True, kw_only=True)
class Mocap(Task):
    """Coming poses. `observed`: frames that are looked at, 40 ms apart."""

    name: ClassVar[str] = "mocap"
    about: ClassVar[str] = "how a body's joints turn in the next 400 ms"
    best: ClassVar[str] = "mean"
    models: ClassVar[Mapping[str, str]] = {
        "motion": "attention along time and among joints, on top of the last pose",
    }

    observed: int = 10

    @property
    def protocol(self) -> str:
        return (
            f"{self.observed} frames in, {AHEAD} out, 25 a second; mean norm of the error of Euler angles over all "
            f"windows of the test films of {', '.join(self.actions)}"
        )

    @cached_property
    def films(self) -> Motions:
        """All, at 25 frames a second."""
        return {key: [film[::EVERY] for film in films] for key, films in read_motions(self.data).items()}

    @cached_property
    def joints(self) -> list[int]:
        """Those that move in the films to train on, without the body as a whole."""
        spread = torch.cat([film for (part, _), films in self.films.items() if part == "train" for film in films])
        moves = (spread.std(0) > STILL).any(1)
        return [joint for joint in moves.nonzero()[:, 0].tolist() if joint >= BODY]

    @property
    def actions(self) -> list[str]:
        """Those that are tested: there are films to train on and to test."""
        return sorted({action for part, action in self.films if part == "test" and ("train", action) in self.films})

    @cached_property
    def _train(self) -> list[Float[Tensor, "t v 3"]]:
        kept = [film for (part, _), films in self.films.items() if part == "train" for film in films[:-1]]
        return [film[:, self.joints] for film in kept]

    def windows(self, part: str) -> dict[str, Float[Tensor, "n t v 3"]]:
        """Of each action: of the test film, or to validate of the last film to train on, which is not trained on."""
        size = self.observed + AHEAD
        found = {
            action: self.films["train", action][-1] if part == VALID else self.films["test", action][0]
            for action in self.actions
        }
        return {key: film[:, self.joints].unfold(0, size, 1).movedim(-1, 1) for key, film in found.items()}

    @property
    def examples(self) -> int:
        return len(self._train)

    def batch(self, index: Int64[Tensor, "b"], rng: torch.Generator) -> Float[Tensor, "b t v 3"]:
        """A window of each of these films, wherever it begins."""
        size, out = self.observed + AHEAD, []
        for film in (self._train[one] for one in index.tolist()):
            start = int(torch.randint(len(film) - size + 1, (1,), generator=rng))
            out.append(film[start : start + size])
        return torch.stack(out)

    def maker(self, model: str) -> Makes:
        return partial(_motion, self)

    def loss(self, model: Any, batch: Any) -> Float[Tensor, ""]:
        """Mean absolute error of rotation vectors."""
        return (model(batch[:, : self.observed]) - batch[:, self.observed :]).abs().mean()

    def measure(self, model: Any, part: str) -> Numbers:
        """Mean angle error after each time, of each action and of all."""
        return errors(self.windows(part), self.observed, model)

    def schedule(self, model: str) -> Schedule:
        # At a rate of 2e-3 the error on the films to validate is 18% higher after 300 steps.
        return Schedule(steps=600, batch=32, rate=8e-3, decay=0.01, warmup=0.05, falls=True, clip=1.0, every=150)

    def floors(self) -> dict[str, Numbers]:
        """The last pose, and the last step again and again."""
        windows, k = self.windows("test"), torch.arange(1, AHEAD + 1)[:, None, None]
        return {
            "zero velocity": errors(windows, self.observed, lambda x: x[:, -1:].expand(-1, AHEAD, -1, -1)),
            "constant velocity": errors(windows, self.observed, lambda x: x[:, -1:] + k * (x[:, -1:] - x[:, -2:-1])),
        }

    @property
    def published(self) -> tuple[Published, ...]:
        return tuple(
            Published(
                name,
                {f"{action} {at}": x for action, row in rows.items() for at, x in zip(TIMES, row, strict=True)},
                SOURCES[name],
            )
            for name, rows in TABLES.items()
        )


def _motion(task: Mocap, dim: int = 32, heads: int = 4, layers: int = 2, dropout: float = 0.0) -> nn.Module:
    return Motion(len(task.joints), AHEAD, 25.0, dim, heads, layers, dropout)


def errors(windows: Mapping[str, Tensor], observed: int, predict: Callable[[Tensor], Tensor]) -> Numbers:
    """Mean over windows of the norm of the Euler angles' error over all joints; then over actions, then over times."""
    out: Numbers = {}
    for action, x in windows.items():
        parts = [x[part] for part in chunks(len(x), 1, AT_ONCE)]
        off = torch.cat([euler(predict(one[:, :observed])) - euler(one[:, observed:]) for one in parts])
        norms = off.flatten(2).norm(dim=2).double().mean(0)
        out |= {f"{action} {at}": float(norms[frame - 1]) for at, frame in TIMES.items()}
    for at in TIMES:
        out[at] = sum(out[f"{action} {at}"] for action in windows) / len(windows)
    return out | {"mean": sum(out[at] for at in TIMES) / len(TIMES)}
