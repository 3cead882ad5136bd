"""Labelled time series: the `.ts` files of the UCR and UEA archives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from chronotope.data.files import unpacked
from chronotope.errors import ChronotopeError

PARTS = ("TRAIN", "TEST")
ENDS = (".ts", ".ts.gz")
Head = dict[str, list[str]]


@dataclass(frozen=True)
class Series:
    """Cases of one file: values[i] [length, channels] is of the class classes[labels[i]]."""

    name: str
    classes: tuple[str, ...]
    values: list[Float[Tensor, "_ channels"]]
    labels: Int64[Tensor, "cases"]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def channels(self) -> int:
        """Channels of every case."""
        return self.values[0].shape[1]

    @property
    def lengths(self) -> Int64[Tensor, "cases"]:
        """Length of every case."""
        return torch.tensor([len(x) for x in self.values])


def read_pair(path: str | Path) -> tuple[Series, Series]:
    """The TRAIN and TEST files that lie side by side; `path` is either of them, or what comes before `_TRAIN.ts`.

    Raises ChronotopeError: one is not there, another format, or they differ in classes or channels.
    """
    path = Path(path)
    stem = path.name.removesuffix(".gz").removesuffix(".ts")
    for part in PARTS:
        stem = stem.removesuffix(f"_{part}")
    train, test = (read_series(_find(path, f"{stem}_{part}")) for part in PARTS)
    if (train.classes, train.channels) != (test.classes, test.channels):
        raise ChronotopeError(
            f"{path}: TRAIN has {train.channels} channels and the classes {', '.join(train.classes)}, TEST has "
            f"{test.channels} and {', '.join(test.classes)}; give two files of one set."
        )
    return train, test


def _find(path: Path, name: str) -> Path:
    for end in ENDS:
        if (there := path.parent / f"{name}{end}").is_file():
            return there
    raise ChronotopeError(
        f"{path}: no file {name}{ENDS[0]} or {name}{ENDS[1]} in {path.parent}; "
        "give a file such as GunPoint_TRAIN.ts, with its TEST file beside it, or the name before _TRAIN."
    )


def read_series(path: str | Path) -> Series:
    """One `.ts` or `.ts.gz` file: a head of `@key value`, then a case a line, dimensions between `:`, the class last.

    Cases may differ in length, the dimensions of one case may not. Raises ChronotopeError: no such file, another
    format, missing values, time stamps.
    """
    path = Path(path)
    if not path.is_file():
        raise ChronotopeError(f"series {path}: no such file; expected a .ts or .ts.gz file.")
    lines = enumerate(unpacked(path).decode().splitlines(), 1)
    head = _head(path, lines)
    classes = tuple(head["classlabel"][1:])
    values, labels = [], []
    for number, line in lines:
        if not line.strip():
            continue
        *dimensions, label = line.strip().split(":")
        if label.strip() not in classes:
            raise ChronotopeError(f"{path}:{number}: class {label.strip()!r}; @classLabel has {', '.join(classes)}.")
        labels.append(classes.index(label.strip()))
        values.append(_case(f"{path}:{number}", dimensions))
        _agrees(f"{path}:{number}", head, values[0], values[-1])
    if not values:
        raise ChronotopeError(f"{path}: no case after @data; expected one a line.")
    return Series(" ".join(head.get("problemname", [path.stem])), classes, values, torch.tensor(labels))


def _head(path: Path, lines: Iterator[tuple[int, str]]) -> Head:
    """The words of each key before `@data`, which is read."""
    head: Head = {}
    for _, line in lines:
        key, *words = line.split() or ["#"]
        if key.lower() == "@data":
            break
        if key.startswith("@"):
            head[key[1:].lower()] = words
    else:
        raise ChronotopeError(f"{path}: no line @data; expected a .ts file.")
    label = head.get("classlabel", [])
    if len(label) < 3 or label[0].lower() != "true":
        raise ChronotopeError(f"{path}: @classLabel {' '.join(label)}; expected `true` and two or more classes.")
    if head.get("timestamps", ["false"])[0].lower() != "false":
        raise ChronotopeError(f"{path}: @timeStamps {head['timestamps'][0]}; cases with time stamps are not read.")
    return head


def _case(where: str, dimensions: list[str]) -> Float[Tensor, "length channels"]:
    try:
        rows = [np.array(dimension.split(","), dtype=np.float32) for dimension in dimensions]
    except ValueError:
        raise ChronotopeError(f"{where}: a value that is no number; missing ones (?) are not read.") from None
    if not rows or len({len(row) for row in rows}) > 1:
        raise ChronotopeError(f"{where}: dimensions of {[len(row) for row in rows]} values; expected equal lengths.")
    out = torch.from_numpy(np.stack(rows, 1))
    if not bool(out.isfinite().all()):
        raise ChronotopeError(f"{where}: a value is not finite; missing ones are not read.")
    return out


def _agrees(where: str, head: Head, first: Tensor, case: Tensor) -> None:
    """Whether a case has the channels of the others, and the sizes that the head tells."""
    declared = head.get("dimensions", head.get("dimension"))
    channels = int(declared[0]) if declared else first.shape[1]
    length = int(head["serieslength"][0]) if "serieslength" in head else len(case)
    if case.shape != (length, channels):
        raise ChronotopeError(
            f"{where}: {case.shape[1]} dimensions of {len(case)} values; expected {channels} of {length}."
        )
