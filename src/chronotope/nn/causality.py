"""Whether a pattern can be stepped along the first axis: it never looks ahead, nor does it ask how long the axis is."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool
from torch import Tensor

from chronotope.boxes import Boxes
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.patterns import Pattern

FAR = 1025
"""Slices of the axis on which looking ahead is ruled out."""
STARTS = (*range(34), 64, 128, 256, 512, 1000)
"""Query slices that are held against all later ones."""
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 16, 17)
"""Lengths of the axis that are compared with the last of them."""
PLACES = 32
"""Tokens of a slice that stand for all of it where pairs are looked at."""
PAIRS = 1 << 21
"""Pairs of tokens looked at one by one, at most."""


@lru_cache(maxsize=256)
def require_streamable(where: Pattern, grid: Grid) -> None:
    """Raises ChronotopeError where stepping over slices of the first axis could differ from the whole.

    `grid`: one slice. Looking ahead is ruled out by `Pattern.over` on boxes of slices; what that leaves open
    (predicates, some composites), and whether the meaning depends on the length, is looked at on a sample of tokens.
    """
    axis = grid.axes[0]
    for head in range(where.heads or 1):
        pattern = where.head(head)
        _require_lengths(pattern, grid)
        ahead = _looks_ahead(pattern, grid)
        if ahead is not None:
            raise ChronotopeError(
                f"{pattern!r} cannot be stepped along {axis!r}: {axis}={ahead[0]} sees {axis}={ahead[1]}, "
                f"which comes after it. Join it with causal({axis!r})."
            )


def _looks_ahead(pattern: Pattern, grid: Grid) -> tuple[int, int] | None:
    """A pair (query slice, later key slice) of which something is visible, or None."""
    axis, start = grid.axes[0], torch.tensor(STARTS)
    far = grid.replace(**{axis: FAR})
    later = Boxes.slices(far, axis, start + 1, torch.full_like(start, FAR - 1))
    some, _ = pattern.over(Boxes.slices(far, axis, start, start), later)
    open_ = start[some].tolist()
    if not open_:
        return None
    for time in {open_[0], open_[len(open_) // 2], open_[-1]}:
        for place in _sample(grid.size, 4).tolist():
            seen = _seen_after(pattern, far, time, place)
            if seen is not None:
                return time, seen
    return (0, 1) if grid.size**2 <= PAIRS and bool(_mask(pattern, far, [0], [1], grid.size).any()) else None


def _seen_after(pattern: Pattern, far: Grid, time: int, place: int) -> int | None:
    """The first slice after `time` that the token at this place of that slice sees, or None."""
    size = far.size // far.shape[0]
    token = torch.tensor([time * size + place])
    q = Coords.of(far, token)
    later = torch.arange(time + 1, far.shape[0])
    one = {axis: value.expand(len(later)) for axis, value in q.axes.items()}
    later = later[pattern.over(Boxes(far, one, one), Boxes.slices(far, far.axes[0], later, later))[0]]
    later = later[_sample(len(later), max(1, PAIRS // 16 // size))]
    seen = pattern.sees(q.view(1, 1), Coords.of(far, later[:, None] * size + torch.arange(size))).any(1)
    return int(later[seen][0]) if bool(seen.any()) else None


def _sample(count: int, n: int) -> Tensor:
    """About n of the numbers 0 to count - 1: the first ones and some spread evenly; all, if there are fewer."""
    if count <= n:
        return torch.arange(count)
    return torch.unique(torch.cat((torch.arange((n + 1) // 2), torch.linspace(0, count - 1, n // 2).long())))


def _mask(
    pattern: Pattern, grid: Grid, queries: list[int], keys: list[int], places: int = PLACES
) -> Bool[Tensor, "nq nk"]:
    """Who sees whom among a sample of the tokens of some slices."""
    size = grid.size // grid.shape[0]
    sample = _sample(size, places)
    q, k = ((torch.tensor(times)[:, None] * size + sample).flatten() for times in (queries, keys))
    return pattern.sees(Coords.of(grid, q[:, None]), Coords.of(grid, k[None, :]))


def _require_lengths(pattern: Pattern, grid: Grid) -> None:
    axis, longest = grid.axes[0], LENGTHS[-1]
    refused = {}
    for length in LENGTHS:
        try:
            pattern.check(*[grid.replace(**{axis: length})] * 2)
        except ChronotopeError as error:
            refused[length] = error
    if len(refused) == len(LENGTHS):
        raise ChronotopeError(f"{pattern!r} cannot be stepped along {axis!r}: {refused[1]}")
    if refused:
        length, reason = next(iter(refused.items()))
        raise ChronotopeError(
            f"{pattern!r} cannot be stepped along {axis!r}: it means nothing on the first {length} alone. {reason}"
        )
    whole = _mask(pattern, grid.replace(**{axis: longest}), list(range(longest)), list(range(longest)))
    for length in LENGTHS:
        times = list(range(length))
        first = len(whole) // longest * length
        if not torch.equal(_mask(pattern, grid.replace(**{axis: length}), times, times), whole[:first, :first]):
            raise ChronotopeError(
                f"{pattern!r} cannot be stepped along {axis!r}: what it means depends on the length of that axis "
                f"({length} and {longest} slices differ). Use a pattern of differences, such as window({axis}=(4, 0))."
            )
