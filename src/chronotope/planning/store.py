"""Plans as small JSON files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.patterns import Pattern
from chronotope.planning.parse import parse_pattern
from chronotope.planning.planner import Plan, plan

SCHEMA = 1
ENTRIES = {"where": str, "grid": dict, "key_grid": dict, "heads": int, "tile": dict | None, "digest": str}


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes a plan as JSON: its expression, grids, heads and tile, and a digest of its tile lists.

    Raises ChronotopeError where the pattern has no expression that can be read back (`predicate`).
    """
    _readable(plan.where)
    tiles = {part.tiles.q.tile for part in plan.parts}
    given = not any(part.choices for part in plan.parts)
    data = {
        "chronotope_plan": SCHEMA,
        "where": repr(plan.where),
        "grid": plan.grid.to_dict(),
        "key_grid": plan.key_grid.to_dict(),
        "heads": plan.heads,
        "tile": dict(zip(plan.grid.axes, next(iter(tiles)), strict=True)) if given else None,
        "density": plan.density,
        "tile_density": plan.tile_density,
        "digest": digest(plan),
    }
    Path(path).write_text(json.dumps(data, indent=1) + "\n")


def load_plan(path: str | Path, grid: Grid | None = None) -> Plan:
    """Reads what `Plan.save` wrote, and plans again; the visible pairs must be the same.

    `grid`: the grid that the plan must be for. Raises ChronotopeError for a file that is missing, truncated, of a
    newer version, of another grid, or that does not describe the plan that it says.
    """
    data = _read(Path(path))
    saved, keys = _grid(path, data["grid"]), _grid(path, data["key_grid"])
    if grid is not None and grid != saved:
        raise ChronotopeError(f"plan file {path} is for {saved!r}, not for {grid!r}; make a plan for this grid.")
    out = plan(parse_pattern(data["where"]), saved, keys, heads=data["heads"], tile=data["tile"])
    if digest(out) != data["digest"]:
        raise ChronotopeError(
            f"plan file {path}: its pattern does not give the pairs it was saved with; save it again."
        )
    return out


def digest(plan: Plan) -> str:
    """A short hash of what is visible, whatever the tiles."""
    visible = [[list(part.heads), part.tiles.pattern.__repr__()] for part in plan.parts]
    text = json.dumps([visible, plan.grid.to_dict(), plan.key_grid.to_dict(), f"{plan.density:.12g}"])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ChronotopeError(f"plan file {path} does not exist; write one with Plan.save.")
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ChronotopeError(f"plan file {path} is truncated or not JSON ({error}); save it again.") from None
    if not isinstance(data, dict) or not isinstance(data.get("chronotope_plan"), int):
        raise ChronotopeError(f"{path} is not a plan file: expected JSON with the key 'chronotope_plan'.")
    if data["chronotope_plan"] > SCHEMA:
        raise ChronotopeError(
            f"plan file {path} has schema {data['chronotope_plan']}, newer than {SCHEMA}, the newest that this "
            "version of chronotope reads; upgrade chronotope or save the plan again."
        )
    missing = [key for key in ENTRIES if key not in data]
    if missing:
        raise ChronotopeError(f"plan file {path} is truncated: {', '.join(missing)} missing; save it again.")
    wrong = [f"{key}={data[key]!r}" for key, kind in ENTRIES.items() if not isinstance(data[key], kind)]
    if wrong:
        raise ChronotopeError(f"plan file {path} does not describe a plan: {', '.join(wrong)}; save it again.")
    return data


def _grid(path: str | Path, data: dict[str, Any]) -> Grid:
    try:
        return Grid.from_dict(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ChronotopeError(f"plan file {path}: {data!r} is no grid ({error}); save it again.") from None


def _readable(where: Pattern) -> None:
    try:
        same = parse_pattern(repr(where)) == where
    except ChronotopeError as error:
        raise ChronotopeError(f"a plan of {where!r} cannot be saved: {error}") from None
    if not same:
        raise ChronotopeError(f"a plan of {where!r} cannot be saved: its expression does not name it completely.")
