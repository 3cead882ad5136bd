"""Who took what, in order of time: the files of sequential recommendation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from chronotope.data.files import unpacked
from chronotope.errors import ChronotopeError


@dataclass(frozen=True)
class Sequences:
    """Sequences of items side by side: that of user i is items[first[i] : first[i + 1]]. Items count from 1."""

    items: Int64[Tensor, "n"]
    first: Int64[Tensor, "users_and_one"]

    @classmethod
    def of(cls, rows: list[Tensor]) -> Sequences:
        """From one tensor for each user."""
        sizes = torch.tensor([0, *map(len, rows)])
        return cls(torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64), sizes.cumsum(0))

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, user: int) -> Int64[Tensor, "m"]:
        return self.items[self.first[user] : self.first[user + 1]]


@dataclass(frozen=True)
class Questions:
    """What came before, and what was taken then."""

    before: Sequences
    taken: Int64[Tensor, "users"]


@dataclass(frozen=True)
class Interactions:
    """Sequences to learn from, and what to be judged by."""

    count: int
    """Of items."""
    train: Sequences
    valid: Questions
    test: Questions
    last: Int64[Tensor, "users"]
    """What each user took at the end; between it and `train` one item may be unknown."""
    skipping: Questions | None = None
    """That of all users, the item before it left out, which is unknown for most."""
    asked: Int64[Tensor, "tested"] | None = None
    """The users that `test` asks of; None: all."""


def read_interactions(path: str | Path) -> Interactions:
    """A packed split (.npz), or sequences as text (.txt, .txt.gz): `user item item ...` in order of time, a line each.

    Of text, the last item of each user is to test, the last but one to validate. A split holds `train_items` and
    `train_offset`; `val_users`, `val_extra_input` and `val_target`: for some users one more item, and what comes then;
    `test_target`: what comes after that. Only those users are tested, whose items are all there.

    Raises ChronotopeError: no such file, or another format.
    """
    path = Path(path)
    if not path.is_file():
        raise ChronotopeError(
            f"interactions {path}: no such file; expected a split (.npz) or sequences (.txt, .txt.gz)."
        )
    if path.suffix == ".npz":
        return _packed(path)
    rows = _rows(path)
    return Interactions(
        max(int(row.max()) for row in rows),
        Sequences.of([row[:-2] for row in rows]),
        Questions(Sequences.of([row[:-2] for row in rows]), torch.stack([row[-2] for row in rows])),
        Questions(Sequences.of([row[:-1] for row in rows]), torch.stack([row[-1] for row in rows])),
        torch.stack([row[-1] for row in rows]),
    )


def _rows(path: Path) -> list[Tensor]:
    """The items of each user, who comes first in a line."""
    try:
        data = unpacked(path)
        lines = [[int(item) for item in line.split()[1:]] for line in data.decode().splitlines()]
    except (ValueError, OSError, EOFError) as error:  # no numbers, no text; no gzip, or cut short
        raise ChronotopeError(f"{path}: {error}; expected `user item item ...` in each line.") from None
    short = [number for number, line in enumerate(lines, 1) if len(line) < 3 or min(line) < 1]
    if short or not lines:
        where = f"line {short[0]} has" if short else "there are"
        raise ChronotopeError(
            f"{path}: {where} fewer than 3 items, or one below 1; expected one to learn from, one to validate, one to "
            "test, numbered from 1."
        )
    return [torch.tensor(line) for line in lines]


def _packed(path: Path) -> Interactions:
    names = ("train_items", "train_offset", "val_users", "val_extra_input", "val_target", "test_target")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name].astype(np.int64)) for name in names if name in file}
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise ChronotopeError(f"{path}: {error}; expected a split in NumPy's .npz.") from None
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ChronotopeError(f"{path}: has no {', '.join(missing)}; expected {', '.join(names)}.")
    items, first, users, extra, target, last = arrays.values()
    _check(path, items, first, users, extra, target, last)
    train = Sequences(items, first)
    before = [torch.cat([train[user], one[None]]) for user, one in zip(users.tolist(), extra, strict=True)]
    longer = [torch.cat([row, one[None]]) for row, one in zip(before, target, strict=True)]
    known = {user: train[user] for user in range(len(train))} | dict(zip(users.tolist(), before, strict=True))
    return Interactions(
        max(int(x.max()) for x in (items, extra, target, last)),
        train,
        Questions(Sequences.of(before), target),
        Questions(Sequences.of(longer), last[users]),
        last,
        Questions(Sequences.of(list(known.values())), last),
        users,
    )


def _check(
    path: Path, items: Tensor, first: Tensor, users: Tensor, extra: Tensor, target: Tensor, last: Tensor
) -> None:
    """Raises ChronotopeError where the parts of a split do not fit each other."""
    if any(x.ndim != 1 or not len(x) for x in (items, users, extra, target, last)) or first.shape != (len(last) + 1,):
        raise ChronotopeError(f"{path}: expected arrays of one axis, and one offset more than the {len(last)} users.")
    if first[0] != 0 or first[-1] != len(items) or (first.diff() < 0).any():
        raise ChronotopeError(f"{path}: expected train_offset to rise from 0 to the {len(items)} items.")
    if not len(users) == len(extra) == len(target) or users.min() < 0 or users.max() >= len(last):
        raise ChronotopeError(
            f"{path}: expected val_users below {len(last)}, as many as val_extra_input and val_target; there are "
            f"{len(users)}, {len(extra)}, {len(target)}, up to {int(users.max())}."
        )
    if min(int(x.min()) for x in (items, extra, target, last)) < 1:
        raise ChronotopeError(f"{path}: has an item below 1; expected items numbered from 1.")
