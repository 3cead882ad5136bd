"""What a run found, as a JSON file: the results page is made of these."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import chronotope
from chronotope.errors import ChronotopeError
from chronotope.machine import processor
from chronotope.tasks.learning.settings import Settled
from chronotope.tasks.learning.task import Numbers

RESULT = "result.json"


@dataclass(frozen=True)
class Result:
    """One run: what was trained on what, and what came of it."""

    task: str
    data: str
    protocol: str
    settings: Mapping[str, Any]
    model: str
    options: Mapping[str, Any]
    schedule: Mapping[str, Any]
    seed: int
    steps: int
    minutes: float
    parameters: int
    best: str
    larger: bool
    valid: Numbers
    test: Numbers
    floors: Mapping[str, Numbers]
    published: list[dict[str, Any]]
    machine: str
    threads: int
    torch: str
    version: str
    date: str

    @classmethod
    def of(
        cls, settled: Settled, seed: int, model: nn.Module, seconds: float, steps: int, valid: Numbers, test: Numbers
    ) -> Result:
        """What is known at the end of a run."""
        task = settled.task
        return cls(
            task=task.name,
            data=task.data.name,
            protocol=task.protocol,
            settings={key: value for key, value in asdict(task).items() if key != "data"},
            model=settled.model,
            options=dict(settled.options),
            schedule=asdict(settled.schedule),
            seed=seed,
            steps=steps,
            minutes=round(seconds / 60, 2),
            parameters=sum(x.numel() for x in model.parameters()),
            best=task.best,
            larger=task.larger,
            valid=valid,
            test=test,
            floors=task.floors(),
            published=[asdict(one) for one in task.published],
            machine=processor(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            version=chronotope.__version__,
            date=datetime.date.today().isoformat(),
        )

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        """What `write` wrote. Raises ChronotopeError where it is something else."""
        given = json.loads(path.read_text())
        names = {field.name for field in fields(cls)}
        if set(given) != names:
            raise ChronotopeError(f"{path}: expected the result of a run, with {', '.join(sorted(names))}.")
        return cls(**given)


def read_results(folder: Path) -> list[Result]:
    """All results below a folder, by name."""
    return [Result.read(path) for path in sorted(folder.glob(f"**/{RESULT}"))]
