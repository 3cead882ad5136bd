"""Draws docs/planning.svg: verdicts on boxes of (queries, keys), cut until they are settled."""

from pathlib import Path

import torch

import chronotope as ct
from chronotope.boxes import Boxes

N, TILE, CELL = 64, 4, 5
COLOURS = {"empty": "#eef1f4", "full": "#2f6f8f", "partial": "#f0b254"}
Rect = tuple[int, int, int, int]


def verdicts(where: ct.Pattern, grid: ct.Grid, rects: list[Rect]) -> list[str]:
    """Empty, full or partial, for each rectangle (first query, first key, queries, keys)."""
    q, k = (torch.tensor([[r[i], r[i] + r[i + 2] - 1] for r in rects]) for i in (0, 1))
    some, every = where.over(Boxes(grid, {"n": q[:, 0]}, {"n": q[:, 1]}), Boxes(grid, {"n": k[:, 0]}, {"n": k[:, 1]}))
    names = zip(some.tolist(), every.tolist(), strict=True)
    return ["full" if e else "partial" if s else "empty" for s, e in names]


def levels(where: ct.Pattern, grid: ct.Grid) -> list[list[tuple[Rect, str]]]:
    """After each round of cutting: every rectangle there is, with its verdict."""
    settled: list[tuple[Rect, str]] = []
    pending: list[Rect] = [(0, 0, N, N)]
    out = []
    while pending:
        named = list(zip(pending, verdicts(where, grid, pending), strict=True))
        out.append(settled + named)
        settled += [item for item in named if item[1] != "partial"]
        pending = [
            (q + a * size // 2, k + b * size // 2, size // 2, size // 2)
            for (q, k, size, _), name in named
            if name == "partial" and size > TILE
            for a in (0, 1)
            for b in (0, 1)
        ]
    return out


def main() -> None:
    """Writes the picture beside this file."""
    grid, where = ct.Grid(n=N), (ct.window(n=17) | ct.sinks(4)) & ct.causal()
    shown = [level for i, level in enumerate(levels(where, grid)) if i in (1, 2, 3, 4)]
    side = N * CELL
    parts = []
    for i, level in enumerate(shown):
        x0 = i * (side + 24)
        for (q, k, height, width), name in level:
            parts.append(
                f'<rect x="{x0 + k * CELL}" y="{q * CELL}" width="{width * CELL}" height="{height * CELL}" '
                f'fill="{COLOURS[name]}" stroke="white" stroke-width="1"/>'
            )
        undecided = sum(name == "partial" for _, name in level)
        caption = f"{len(level)} boxes, {undecided} {'partial' if i == len(shown) - 1 else 'undecided'}"
        parts.append(f'<text x="{x0}" y="{side + 22}" font-family="sans-serif" font-size="15">{caption}</text>')
    width = len(shown) * (side + 24)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {side + 32}">{"".join(parts)}</svg>\n'
    Path(__file__).with_name("planning.svg").write_text(svg)
    print(f"docs/planning.svg: {where!r} on {grid!r}")


if __name__ == "__main__":
    main()
