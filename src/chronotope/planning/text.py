"""What a plan says of itself: one line, a map, and the reasons."""

from __future__ import annotations

import torch

from chronotope.planning.costs import Costs
from chronotope.planning.planner import Plan

SHADES = " ░▒▓█"
MAP_SIZE = 24


def summary(plan: Plan) -> str:
    """The line and the map that `repr` shows."""
    gain = f"at most {plan.bound:.1f}x faster than dense" if plan.tile_density else "nothing to compute"
    keys = "" if plan.key_grid == plan.grid else f" -> {plan.key_grid!r}"
    return (
        f"Plan({plan.where!r} on {plan.grid!r}{keys})\n"
        f"  density {plan.density:.4f}, in tiles {plan.tile_density:.4f}, {gain}\n"
        + "\n".join("  " + line for line in tile_map(plan))
    )


def explain(plan: Plan) -> str:
    """The summary, and for each group of heads its tiles and why they were chosen."""
    lines = [summary(plan)]
    for part in plan.parts:
        tiles, found = part.tiles, part.tiles.found
        names = "all heads" if len(part.heads) == plan.heads else f"heads {', '.join(map(str, part.heads))}"
        lines.append(f"{names}: {tiles.pattern!r}")
        total = len(tiles.q.sizes) * len(tiles.k.sizes)
        full = int(found.full.sum())
        lines.append(
            f"  query tiles {_shape(plan.grid.axes, tiles.q.tile)}, "
            f"key tiles {_shape(plan.key_grid.axes, tiles.k.tile)}: "
            f"{total - len(found.rows):,} pairs of tiles empty, {full:,} full, {len(found.rows) - full:,} partial"
        )
        if len(part.choices) == 1:
            lines.append("  the only shape considered: the pattern leaves no choice, or is slow to look into")
        elif part.choices:
            best = part.choices[0].cost
            lines.append("  chosen for the least estimated time; others, relative to it:")
            for choice in part.choices[1:4]:
                tile = _shape(plan.grid.axes, choice.q_tile)
                lines.append(
                    f"    {tile} with keys {_shape(plan.key_grid.axes, choice.k_tile)}: {choice.cost / best:.2f}"
                )
            if part.costs is not None:
                lines.append(f"  {_costs(part.costs)}")
        else:
            lines.append("  as given by the caller")
    return "\n".join(lines)


def tile_map(plan: Plan) -> list[str]:
    """Queries downwards, keys to the right, in layout order; darker where more pairs of tokens are computed."""
    part = plan.parts[0]
    q, k, found = part.tiles.q, part.tiles.k, part.tiles.found
    rows, cols = min(MAP_SIZE, len(q.sizes)), min(2 * MAP_SIZE, len(k.sizes))
    cells = torch.zeros(rows, cols, dtype=torch.float64)
    at = (found.rows * rows // len(q.sizes), found.cols * cols // len(k.sizes))
    cells.index_put_(at, (q.sizes[found.rows] * k.sizes[found.cols]).double(), accumulate=True)
    area = torch.zeros(rows, dtype=torch.float64).index_add_(
        0, torch.arange(len(q.sizes)) * rows // len(q.sizes), q.sizes.double()
    )[:, None] * torch.zeros(cols, dtype=torch.float64).index_add_(
        0, torch.arange(len(k.sizes)) * cols // len(k.sizes), k.sizes.double()
    )
    share = cells / area
    level = torch.where(share > 0, (share * (len(SHADES) - 1)).ceil(), 0).long().clamp(max=len(SHADES) - 1)
    return ["".join(SHADES[i] for i in row) for row in level.tolist()]


def _shape(axes: tuple[str, ...], tile: tuple[int, ...]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in zip(axes, tile, strict=True))


def _costs(costs: Costs) -> str:
    source = "measured on this machine" if costs.measured else "built in"
    return (
        f"costs of the {costs.kernel} kernel, {source}, in thread-ns: pair {costs.pair:.2f}, look {costs.look:.1f}, "
        f"pair of tiles {costs.tile_pair:.0f}, tile {costs.tile:.0f}, token {costs.token:.0f}"
    )
