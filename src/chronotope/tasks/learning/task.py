"""What is learned: data, models, a loss, metrics, floors, and what others published."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

Numbers = dict[str, float]
Makes = Callable[..., nn.Module]

VALID, TEST = "valid", "test"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model is taught, by AdamW.

    rate(x) = rate * min(1, x / warmup), and where it `falls` times (1 + cos(pi x)) / 2; x = share of the steps that are
    over. `clip`: largest norm of the gradient, 0 for none. Every `every` steps the model is validated; after `patience`
    of these without a better one the training ends, and the best model counts.
    """

    steps: int = 1000
    batch: int = 64
    rate: float = 1e-3
    decay: float = 0.0
    beta2: float = 0.98
    warmup: float = 0.0
    falls: bool = False
    clip: float = 0.0
    every: int = 200
    patience: int = 10


@dataclass(frozen=True)
class Published:
    """Numbers of somebody else, and where they stand."""

    name: str
    numbers: Mapping[str, float]
    source: str


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One learning problem. Fields are its settings; data are read from `data` when they are first needed.

    A batch is a function of examples and a generator alone, so that any step of a training can be the first.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    best: ClassVar[str]
    """The metric by which models are chosen."""
    larger: ClassVar[bool] = False
    """Whether more of it is better."""
    models: ClassVar[Mapping[str, str]]
    """What there is to train, each in a line."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings of the task that belong to a model, such as those of its loss."""

    data: Path

    @property
    @abstractmethod
    def protocol(self) -> str:
        """Split, metric and what else makes numbers comparable, in a line."""

    @property
    @abstractmethod
    def examples(self) -> int:
        """Number of examples to train on."""

    @abstractmethod
    def batch(self, index: Int64[Tensor, "b"], rng: torch.Generator) -> Any:
        """These examples; what is drawn, such as negatives, is drawn from `rng`."""

    @abstractmethod
    def maker(self, model: str) -> Makes:
        """The function that makes a model of `models`: its keyword arguments with defaults are settings."""

    @abstractmethod
    def loss(self, model: Any, batch: Any) -> Float[Tensor, ""]:
        """What is made small."""

    @abstractmethod
    def measure(self, model: Any, part: str) -> Numbers:
        """The metrics on "valid" or "test"."""

    def schedule(self, model: str) -> Schedule:
        """How a model is trained unless told otherwise."""
        return Schedule()

    def floors(self) -> dict[str, Numbers]:
        """What needs no learning, by the same measures, on the test part."""
        return {}

    @property
    def published(self) -> tuple[Published, ...]:
        """Numbers of others for this protocol."""
        return ()
