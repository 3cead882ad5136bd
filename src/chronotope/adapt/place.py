"""Where the tokens of one call of a model lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chronotope.grid import Grid

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where the tokens of one call of a model lie.

    `grid` has the axes t, h, w (video) or h, w (image), no prefix, and the order in which the model lays its tokens
    out. In a joint attention of N tokens, N - grid.size have no place (text, registers, padding): they come `text`
    = "before" or "after" those of the grid. Where some come after it, `ahead` of them (frames of the past, other text)
    come before it all the same.

    Names of submodules, with `*` for any part of one, stand for all in them. The attention of those in `elsewhere`
    looks at no token of the grid, or at each several times, however many it looks at; `parts` have grids of their own.
    """

    grid: Grid
    text: str = "before"
    elsewhere: tuple[str, ...] = ()
    ahead: int = 0
    parts: Mapping[str, Grid] = field(default_factory=dict)
