"""Speeds on a road network: a CSV of readings, a row for each time step, and a CSV of distances between sensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.data.files import unpacked
from chronotope.errors import ChronotopeError

SIGMA, LEAST = 1e4 * 0.1**0.5, 0.5  # of PeMSD7: exp(-(d / 10 km)^2 / 0.1), and 0 where that is below a half


@dataclass(frozen=True)
class Traffic:
    """Readings, and how far sensors are from each other."""

    speeds: Float[Tensor, "steps v"]
    distances: Float[Tensor, "v v"]


def read_traffic(path: str | Path) -> Traffic:
    """The readings `V_<name>.csv` or `.csv.gz`, and the distances `W_<name>.csv` or `.csv.gz` beside it; no headers.

    `path`: the file of the readings, or a folder with one.

    Raises ChronotopeError: no such file, text that is no number, readings or distances that are missing or negative, or
    files of different numbers of sensors.
    """
    path = Path(path)
    found = sorted(path.glob("V_*.csv*")) if path.is_dir() else [path]
    if len(found) != 1 or not found[0].is_file():
        raise ChronotopeError(
            f"traffic {path}: expected one file of readings, V_<name>.csv or V_<name>.csv.gz, or a folder with one; "
            f"found {[one.name for one in found if one.is_file()]}."
        )
    readings = found[0]
    if not readings.name.startswith("V_"):
        raise ChronotopeError(f"traffic {readings}: expected a name V_<name>.csv, with W_<name>.csv beside it.")
    name = "W_" + readings.name.removeprefix("V_").split(".csv")[0]
    beside = [one for one in (readings.with_name(f"{name}.csv"), readings.with_name(f"{name}.csv.gz")) if one.is_file()]
    if not beside:
        raise ChronotopeError(f"traffic {readings}: no {name}.csv beside it, which says how far sensors are apart.")
    speeds, distances = _table(readings), _table(beside[0])
    if distances.shape != (speeds.shape[1], speeds.shape[1]):
        raise ChronotopeError(
            f"{beside[0]} is {list(distances.shape)}, {readings} has {speeds.shape[1]} sensors; "
            "expected a row and a column for each."
        )
    return Traffic(speeds, distances)


def edges(distances: Float[Tensor, "v v"], sigma: float = SIGMA, least: float = LEAST) -> Float[Tensor, "v v"]:
    """exp(-d^2 / sigma^2) between different sensors; 0 where it is below `least`."""
    near = torch.exp(-((distances.double() / sigma) ** 2))
    return torch.where(near >= least, near, 0.0).fill_diagonal_(0).float()


def _table(path: Path) -> Float[Tensor, "rows columns"]:
    try:
        out = np.loadtxt(unpacked(path).decode().splitlines(), delimiter=",", ndmin=2)
    except ValueError as error:
        raise ChronotopeError(
            f"{path}: expected rows of as many numbers each, with commas between ({error})."
        ) from None
    if out.size == 0 or not (np.isfinite(out).all() and (out >= 0).all()):
        raise ChronotopeError(f"{path}: expected finite numbers of 0 or more in every place.")
    return torch.from_numpy(out).float()
