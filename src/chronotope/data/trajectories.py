"""Who was where when: the files of ETH and UCY, and windows cut out of them."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.data.files import unpacked
from chronotope.errors import ChronotopeError

COLUMNS = "frame person x y"


def read_tracks(path: str | Path) -> Float[Tensor, "t v 2"]:
    """Rows `frame person x y`, as text (.txt, .txt.gz): places by frame and person, NaN where somebody was not seen.

    Only frames in which somebody was seen are there: t counts them, whatever lies between two.

    Raises ChronotopeError: no such file, another format, somebody twice in a frame.
    """
    path = Path(path)
    if not path.is_file():
        raise ChronotopeError(f"tracks {path}: no such file; expected rows `{COLUMNS}` (.txt, .txt.gz).")
    data = unpacked(path)
    try:
        rows = torch.tensor([[float(x) for x in line.split()] for line in data.decode().splitlines()]).double()
    except ValueError as cause:
        raise ChronotopeError(f"{path}: {cause}; expected rows `{COLUMNS}`.") from None
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise ChronotopeError(f"{path}: numbers of shape {list(rows.shape)}; expected rows `{COLUMNS}`.")
    (frames, frame), (people, person) = (rows[:, column].unique(return_inverse=True) for column in (0, 1))
    if len(torch.stack([frame, person]).unique(dim=1).T) < len(rows):
        raise ChronotopeError(f"{path}: somebody has two rows of one frame; expected one place at a time.")
    out = torch.full((len(frames), len(people), 2), torch.nan)
    out[frame, person] = rows[:, 2:].float()
    return out


def windows(tracks: Float[Tensor, "t v 2"], steps: int, people: int = 2) -> list[Float[Tensor, "steps seen 2"]]:
    """Every run of `steps` frames in which so many people or more were seen throughout, and these people."""
    out = []
    for start in range(len(tracks) - steps + 1):
        part = tracks[start : start + steps]
        part = part[:, ~part.isnan().any(2).any(0)]
        if part.shape[1] >= people:
            out.append(part)
    return out
