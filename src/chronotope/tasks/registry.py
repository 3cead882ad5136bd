"""The learning problems that there are, by name."""

from __future__ import annotations

from importlib import import_module

from chronotope.planning.parse import unknown_name
from chronotope.tasks.learning import Task

TASKS = {
    "chorales": "chronotope.tasks.chorales:ChoraleNotes",
    "classify": "chronotope.tasks.classify:Classify",
    "forecast": "chronotope.tasks.forecast:Forecast",
    "mocap": "chronotope.tasks.mocap:Mocap",
    "motion": "chronotope.tasks.motion_order:Motion",
    "moving-digits": "chronotope.tasks.moving_digits:MovingDigits",
    "pedestrians": "chronotope.tasks.trajectories:Pedestrians",
    "recommend": "chronotope.tasks.recommend:Recommend",
    "traffic": "chronotope.tasks.traffic:TrafficSpeed",
    "video-diffusion": "chronotope.tasks.video_diffusion:VideoDiffusion",
}
"""Where each is; imported when asked for."""


def task(name: str) -> type[Task]:
    """The task of this name. Raises ChronotopeError where there is none."""
    if name not in TASKS:
        raise unknown_name("task", name, list(TASKS))
    module, _, kind = TASKS[name].partition(":")
    return getattr(import_module(module), kind)  # type: ignore[no-any-return]
