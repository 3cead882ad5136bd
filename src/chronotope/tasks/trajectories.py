"""Pedestrians: where people of one scene go, learned on other scenes (ETH and UCY, leave one out)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from chronotope.boxes import chunks
from chronotope.data.trajectories import read_tracks, windows
from chronotope.errors import ChronotopeError
from chronotope.models.trajectory import Trajectory, constant_velocity
from chronotope.tasks.learning import VALID, Makes, Numbers, Published, Schedule, Task

OBSERVED, AHEAD = 8, 12  # steps of 0.4 s
AT_ONCE = 1024  # people predicted at once

SCENES = {
    "eth": ("biwi_eth",),
    "hotel": ("biwi_hotel",),
    "univ": ("students001", "students003"),
    "zara1": ("crowds_zara01",),
    "zara2": ("crowds_zara02",),
}
FILES = (*(name for names in SCENES.values() for name in names), "crowds_zara03", "uni_examples")

TABLES = {
    "Linear": ((1.33, 2.94), (0.39, 0.72), (0.82, 1.59), (0.62, 1.21), (0.77, 1.48)),
    "Social-LSTM": ((1.09, 2.35), (0.79, 1.76), (0.67, 1.40), (0.47, 1.00), (0.56, 1.17)),
    "Transformer TF": ((1.03, 2.10), (0.36, 0.71), (0.53, 1.32), (0.44, 1.00), (0.34, 0.76)),
    "Social-GAN, best of 20": ((0.81, 1.52), (0.72, 1.61), (0.60, 1.26), (0.34, 0.69), (0.42, 0.84)),
    "Social-STGCNN, best of 20": ((0.64, 1.11), (0.49, 0.85), (0.44, 0.79), (0.34, 0.53), (0.30, 0.48)),
    "STAR, best of 20": ((0.36, 0.65), (0.17, 0.36), (0.31, 0.62), (0.26, 0.55), (0.22, 0.46)),
}
"""ADE and FDE by scene. One prediction is not to be compared with the best of 20."""
SOURCES = {
    "Linear": "arXiv 1803.10892, as remembered",
    "Social-LSTM": "arXiv 1803.10892, as remembered",
    "Transformer TF": "arXiv 2003.08111, as remembered",
    "Social-GAN, best of 20": "arXiv 1803.10892, as remembered",
    "Social-STGCNN, best of 20": "arXiv 2002.11927, as remembered",
    "STAR, best of 20": "arXiv 2005.08514, as remembered",
}


@dataclass(frozen=True, kw_only=True)
class Pedestrians(Task):
    """Coming places. `scene` is left out of training and tested on.

    `others`: how many people around somebody are looked at. `jitter`: the largest standard deviation, in metres, of the
    noise on what is observed in training: scenes are annotated more and less exactly, which only validation on a scene
    that is left out as well shows, not the later part of scenes that are trained on. `stretch`: windows are made
    larger by up to exp(stretch), or as much smaller: scenes differ in speed.
    """

    name: ClassVar[str] = "pedestrians"
    about: ClassVar[str] = "where people of an unknown scene go in the next 4.8 s"
    best: ClassVar[str] = "ADE"
    models: ClassVar[Mapping[str, str]] = {
        "trajectory": "attention along time and among people, on top of constant velocity",
        "alone": "the same that sees nobody else",
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"alone": {"others": 0}}

    scene: Literal["eth", "hotel", "univ", "zara1", "zara2"] = "eth"
    others: int = 3
    jitter: float = 0.04
    stretch: float = 0.5

    @property
    def protocol(self) -> str:
        return (
            f"{self.scene} left out: {OBSERVED} steps in, {AHEAD} out, metres, one prediction; "
            f"{len(self._test):,} people in windows of two or more"
        )

    @cached_property
    def _train(self) -> list[Float[Tensor, "v t people 2"]]:
        return self._of("train", [name for name in FILES if name not in SCENES[self.scene]])

    @cached_property
    def _valid(self) -> Float[Tensor, "n t people 2"]:
        return torch.cat(self._of("val", [name for name in FILES if name not in SCENES[self.scene]]))

    @cached_property
    def _test(self) -> Float[Tensor, "n t people 2"]:
        return torch.cat(self._of("all_data", SCENES[self.scene]))

    def _of(self, part: str, names: Sequence[str]) -> list[Float[Tensor, "v t people 2"]]:
        end = "" if part == "all_data" else f"_{part}"
        tracks = [read_tracks(_file(self.data / part, name + end)) for name in names]
        return [around(window, self.others) for x in tracks for window in windows(x, OBSERVED + AHEAD)]

    @property
    def examples(self) -> int:
        return len(self._train)

    def batch(self, index: Int64[Tensor, "b"], rng: torch.Generator) -> Float[Tensor, "b t v 2"]:
        """One person of each of these windows and those around them.

        One, so that a window with many people, who are much alike, counts no more than another. Half of them are
        mirrored, all are made larger or smaller, and what is observed of another half is jittered.
        """
        found = [self._train[window] for window in index.tolist()]
        x = torch.stack([one[int(torch.randint(len(one), (1,), generator=rng))] for one in found])
        mirrored, jittered = torch.rand(2, len(x), 1, 1, 1, generator=rng) < 0.5
        x = torch.where(mirrored, x * torch.tensor([1.0, -1.0]), x)
        x = x * torch.exp(self.stretch * (2 * torch.rand(len(x), 1, 1, 1, generator=rng) - 1))
        spread = self.jitter * jittered * torch.rand(len(x), 1, 1, 1, generator=rng)
        noise = spread * torch.randn(x[:, :OBSERVED].shape, generator=rng)
        return torch.cat([x[:, :OBSERVED] + noise, x[:, OBSERVED:]], 1)

    def maker(self, model: str) -> Makes:
        return partial(_trajectory, self)

    def loss(self, model: Any, batch: Any) -> Float[Tensor, ""]:
        """The mean distance, which is what is measured."""
        return distances(model(batch[:, :OBSERVED]), batch).mean()

    def measure(self, model: Any, part: str) -> Numbers:
        """ADE and FDE: mean distance from the truth over all steps, and at the last, over all people."""
        return errors(self._valid if part == VALID else self._test, model)

    def schedule(self, model: str) -> Schedule:
        return Schedule(steps=800, batch=128, rate=2e-3, decay=0.01, warmup=0.05, falls=True, clip=1.0, every=200)

    def floors(self) -> dict[str, Numbers]:
        """What needs no learning."""
        return {
            "constant velocity": errors(self._test, lambda x: constant_velocity(x[:, :, 0], AHEAD)),
            "fitted line": errors(self._test, lambda x: fitted_line(x[:, :, 0], AHEAD)),
        }

    @property
    def published(self) -> tuple[Published, ...]:
        at = list(SCENES).index(self.scene)
        return tuple(
            Published(name, dict(zip(("ADE", "FDE"), row[at], strict=True)), SOURCES[name])
            for name, row in TABLES.items()
        )


def _trajectory(task: Pedestrians, dim: int = 32, heads: int = 4, layers: int = 2, dropout: float = 0.1) -> nn.Module:
    return Trajectory(AHEAD, dim, heads, layers, dropout)


def _file(folder: Path, name: str) -> Path:
    for end in (".txt.gz", ".txt"):
        if (folder / f"{name}{end}").is_file():
            return folder / f"{name}{end}"
    raise ChronotopeError(f"{folder} has no {name}.txt or {name}.txt.gz; expected all_data, train and val of ETH/UCY.")


def around(window: Float[Tensor, "t v 2"], others: int) -> Float[Tensor, "v t people 2"]:
    """For each person of a window they themselves, then who is nearest at the last step that is observed.

    Where there are fewer than `others`, they come again in the same order.
    """
    last, count = window[OBSERVED - 1], window.shape[1]
    far = torch.cdist(last, last, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(-1)
    order = far.argsort(dim=1, stable=True)
    again = 1 + torch.arange(others) % (count - 1)
    chosen = order[:, torch.cat([torch.zeros(1, dtype=torch.int64), again])]
    return window[:, chosen].transpose(0, 1)


def errors(people: Float[Tensor, "n t v 2"], predict: Callable[[Tensor], Tensor]) -> Numbers:
    """ADE and FDE in metres of the person that each example asks for."""
    off = torch.cat(
        [distances(predict(people[part, :OBSERVED]), people[part]) for part in chunks(len(people), 1, AT_ONCE)]
    ).double()
    return {"ADE": float(off.mean()), "FDE": float(off[:, -1].mean())}


def distances(guess: Float[Tensor, "n ahead 2"], people: Float[Tensor, "n t v 2"]) -> Float[Tensor, "n ahead"]:
    """How far a prediction is from the truth, step by step."""
    return (guess - people[:, OBSERVED:, 0]).norm(dim=2)


def fitted_line(x: Float[Tensor, "b t 2"], ahead: int) -> Float[Tensor, "b ahead 2"]:
    """The straight line at constant speed with the least squares from what was observed."""
    t = torch.arange(x.shape[1] + ahead, dtype=x.dtype)
    t = t - t[: x.shape[1]].mean()
    past, coming = t[: x.shape[1]], t[x.shape[1] :]
    speed = (past[:, None] * x).sum(1, keepdim=True) / (past**2).sum()
    return x.mean(1, keepdim=True) + coming[:, None] * speed
