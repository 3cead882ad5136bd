"""How good the choice of tiles is: `python -m chronotope.bench.tiles`, about two minutes.

For some patterns, tile shapes that the cost model looks at are timed with the kernel whose costs decide. Printed: how
far estimate and time are apart, and how much slower the chosen shape is than the fastest of those timed.
"""

from __future__ import annotations

import math
import statistics
import time

import torch

import chronotope as ct
from chronotope.bench.referee import machine
from chronotope.kernels import BACKENDS, Scores
from chronotope.planning import Layout, Tiles
from chronotope.planning.cost import Choice, choose
from chronotope.planning.costs import costs

THREADS, SHAPES, ROUNDS = 2, 12, 3
VIDEO, PICTURE, TEXT = ct.Grid(t=8, h=32, w=32), ct.Grid(h=96, w=96), ct.Grid(n=8192)
CASES = [
    (ct.window(t=5, h=9, w=9), VIDEO),
    (ct.window(t=3, h=5, w=5) & ct.causal("t"), VIDEO),
    (ct.along("t") | ct.along("h") | ct.along("w"), VIDEO),
    (ct.window(h=3, w=3), PICTURE),
    (ct.window(h=9, w=9), PICTURE),
    (ct.window(n=257) & ct.causal(), TEXT),
]


def seconds(pattern: ct.Pattern, grid: ct.Grid, choice: Choice) -> float:
    """Median time of one forward pass of 4 heads of size 64, after one to warm up."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, grid.size, 64, generator=generator) for _ in range(3))
    tiles = Tiles(pattern, Layout(grid, choice.q_tile), Layout(grid, choice.k_tile))
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        BACKENDS[costs().kernel].forward(q, k, v, tiles, Scores(0.125, None, None, False, (), (0, 1, 2, 3)))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Times and prints."""
    torch.set_num_threads(THREADS)
    print(machine(THREADS))
    apart = []
    for pattern, grid in CASES:
        choices = choose(pattern, grid, grid, costs())
        shown = choices[:: max(1, len(choices) // SHAPES)]
        times = [seconds(pattern, grid, choice) for choice in shown]
        apart += [math.log(spent / (choice.cost * grid.size)) for spent, choice in zip(times, shown, strict=True)]
        print(f"  {pattern!r} on {grid!r}: chosen takes {times[0] / min(times):.2f} of the fastest of {len(times)}")
    middle = statistics.median(apart)
    error = math.sqrt(statistics.fmean((value - middle) ** 2 for value in apart))
    print(f"  estimate against time, {len(apart)} shapes: root mean square {100 * math.expm1(error):.0f} %")


if __name__ == "__main__":
    main()
