"""Inputs and outputs of somebody else's model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from chronotope.adapt.tap import parameters
from chronotope.errors import ChronotopeError

Batch = Any
"""Inputs of a model: a dict of keyword arguments, a tuple or list of arguments, or the one argument."""

TIMES = ("timestep", "timesteps", "t", "time", "sigma")
"""What diffusion models call the noise level among their inputs."""


def call(model: nn.Module, batch: Batch) -> Any:
    """The model on one batch of inputs."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def noise_level(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """What a diffusion model is told of the noise in its input; None: it is told nothing."""
    given = dict(zip(parameters(type(model)), args, strict=False)) | kwargs
    for name in TIMES:
        value = given.get(name)
        if isinstance(value, Tensor) and value.numel() and not value.is_complex():
            return float(value.max())  # tokens that are given, as a first frame, are at level 0
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def output_of(result: Any) -> Tensor:
    """The first floating tensor of what a model returned."""
    if isinstance(result, Tensor) and result.is_floating_point():
        return result
    parts = result.values() if isinstance(result, Mapping) else result if isinstance(result, (tuple, list)) else ()
    for part in parts:
        if isinstance(part, (Tensor, Mapping, tuple, list)):
            try:
                return output_of(part)
            except ChronotopeError:
                continue
    raise ChronotopeError(f"the model returned {type(result).__name__}, in which there is no tensor of numbers.")


def relative(plain: list[Tensor], changed: list[Tensor]) -> float:
    """|y' - y| / |y| over all outputs."""
    lost = sum(float((new.double() - old.double()).square().sum()) for old, new in zip(plain, changed, strict=True))
    return math.sqrt(lost / max(1e-300, sum(float(old.double().square().sum()) for old in plain)))
