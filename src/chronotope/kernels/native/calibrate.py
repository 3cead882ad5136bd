"""What work costs the native kernels on this machine: a few small runs, once, kept for the planner."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float64
from torch import Tensor

from chronotope.grid import Grid
from chronotope.kernels.call import Results, Scores
from chronotope.patterns import full, window
from chronotope.planning import Layout, Tiles
from chronotope.planning.costs import NATIVE, Costs, measured_path, save

ROUNDS = 2
HEADS, SIZE = 2, 64
GRID = Grid(h=48, w=48)
RUNS = [
    (full(), (48, 48), (48, 48)),
    (window(h=9, w=9), (8, 8), (8, 8)),
    (window(h=9, w=9), (2, 8), (2, 8)),
    (window(h=3, w=3), (4, 4), (4, 4)),
    (window(h=3, w=3), (16, 16), (4, 4)),
    (window(h=3, w=3), (48, 48), (48, 48)),
    (window(h=3, w=3), (1, 48), (1, 16)),
    (window(h=1, w=1), (1, 8), (1, 16)),
]
Run = Callable[[Tensor, Tensor, Tensor, Tiles, Scores], Results]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def calibrate(run: Run) -> None:
    """Measures the costs of each dtype, in well under a second, and keeps them, unless that has been done."""
    path = measured_path()
    if path is None or path.is_file():
        return
    plans = [Tiles(pattern, Layout(GRID, q_tile), Layout(GRID, k_tile)) for pattern, q_tile, k_tile in RUNS]
    save({name: measure(run, plans, dtype) for name, dtype in DTYPES.items()})


def measure(run: Run, plans: list[Tiles], dtype: torch.dtype) -> Costs:
    """The costs that explain the times of some plans best, each having the same weight."""
    each = torch.get_num_threads() / HEADS
    times = [1e9 * each * _seconds(run, tiles, dtype) for tiles in plans]
    work = torch.stack([counts(tiles) for tiles in plans])
    found = _fit(work / torch.tensor(times, dtype=torch.float64)[:, None])
    pair, look, tile_pair, tile, token = found.tolist()
    return replace(NATIVE, pair=pair, look=look, tile_pair=tile_pair, tile=tile, token=token, measured=True)


def counts(tiles: Tiles) -> Float64[Tensor, "5"]:
    """How much of each kind of work a forward pass does for one head: the fields of `Costs` in order."""
    strip, panel = NATIVE.strip, NATIVE.panel
    found = tiles.found
    cells = (-(-tiles.q.sizes // strip))[found.rows] * (-(-tiles.k.sizes // panel))[found.cols]
    seen = int(cells[found.full].sum())
    often = torch.bincount(tiles.partial_kinds[2])
    for part, mask in tiles.kind_masks():
        n, rows, columns = mask.shape
        padded = torch.nn.functional.pad(mask, (0, -columns % panel, 0, -rows % strip))
        some = padded.view(n, -(-rows // strip), strip, -(-columns // panel), panel).any(4).any(2)
        seen += int((some.flatten(1).sum(1) * often[part]).sum())
    whole = (seen * strip * panel, int(cells.sum()), len(cells), len(tiles.q.sizes), tiles.q.grid.size)
    return torch.tensor(whole, dtype=torch.float64)


def _seconds(run: Run, tiles: Tiles, dtype: torch.dtype) -> float:
    """The least of a few runs after one to warm up."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, GRID.size, SIZE, generator=generator).to(dtype) for _ in range(3))
    scores = Scores(SIZE**-0.5, None, None, False, (), tuple(range(HEADS)))
    best = float("inf")
    for i in range(ROUNDS + 1):
        start = time.perf_counter()
        run(q, k, v, tiles, scores)
        best = min(best, time.perf_counter() - start) if i else best
    return best


def _fit(rows: Float64[Tensor, "runs 5"]) -> Float64[Tensor, "5"]:
    """Least squares of rows @ x = 1 without negative numbers: what would be negative is left out, one by one."""
    active = list(range(rows.shape[1]))
    while True:
        some = torch.linalg.lstsq(rows[:, active], torch.ones(len(rows), 1, dtype=rows.dtype), driver="gelsd").solution
        least = int(some.argmin())
        if float(some[least]) >= 0:
            return torch.zeros(rows.shape[1], dtype=rows.dtype).index_copy_(0, torch.tensor(active), some[:, 0])
        del active[least]
