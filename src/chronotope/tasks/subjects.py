"""Models of the project that are adapted: trained here, with inputs to choose by and inputs to judge by."""

from __future__ import annotations

from pathlib import Path

import torch

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.tasks import show
from chronotope.tasks.adapting import Subject
from chronotope.tasks.clips import load
from chronotope.tasks.training import Recipe, train


def predictor(
    video: str | None = None,
    grid: tuple[int, int, int] = (8, 16, 16),
    patch: int = 4,
    steps: int = 300,
    seed: int = 0,
    inputs: int = 4,
    kept: str = "out/kept",
) -> Subject:
    """The predictor of `chronotope compare`, trained dense on a video (None: digits that move), or read from `kept`.

    It is profiled on `inputs` clips of the training part and judged by those of the last fifth of the video.
    """
    if inputs < 1:
        raise ChronotopeError(f"inputs={inputs}: expected 1 clip or more to choose by.")
    t, h, w = grid
    places = Grid(t=t, h=h, w=w)
    clips = load(video, places, patch=patch, channels=1, seed=seed)
    folder = Path(kept)
    folder.mkdir(parents=True, exist_ok=True)
    model = train(Recipe(places, patch, 1, steps=steps, seed=seed), clips, folder, show.console()).model
    chosen = torch.linspace(0, len(clips.train) - 1, inputs).long()
    return Subject(
        model,
        [clips.train[index : index + 1, :-1] for index in chosen.tolist()],
        [clips.valid[index : index + 1, :-1] for index in range(len(clips.valid))],
    )
