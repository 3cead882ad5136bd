"""What is timed: patterns on grids, and how many heads of which size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import chronotope as ct
from chronotope.papers.pattern.radial import radial

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""visible(batch, head, query, key), as a user of FlexAttention writes it."""


@dataclass(frozen=True)
class Case:
    """A row: one pattern, or several that are computed one after the other (divided attention) and added.

    rule: the pattern written by hand for FlexAttention; compiling takes long, so few cases have it. backends: those
    that are timed, None for all. trains: whether the backward pass is timed.
    """

    name: str
    patterns: tuple[ct.Pattern, ...]
    grid: ct.Grid
    heads: int = 4
    head_size: int = 64
    rule: Rule | None = None
    backends: tuple[str, ...] | None = None
    trains: bool = True

    @property
    def pattern(self) -> str:
        """As an expression."""
        return " then ".join(repr(pattern) for pattern in self.patterns)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(tokens, heads, head size): cases of one shape share a dense run."""
        return self.grid.size, self.heads, self.head_size


def window_rule(grid: ct.Grid, **sizes: int) -> Rule:
    """A window by hand: coordinates from the index by division, one comparison for each axis."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        stride = grid.size
        seen = torch.ones_like(q, dtype=torch.bool)
        for axis, n in grid.sizes.items():
            stride //= n
            seen = seen & ((q // stride % n - k // stride % n).abs() <= sizes[axis] // 2)
        return seen

    return visible


def _patterns(t: int, h: int, w: int, block: tuple[int, int, int]) -> list[tuple[str, tuple[ct.Pattern, ...]]]:
    bt, bh, bw = block
    size, blocks = f"{t}x{h}x{w}", f"{bt}x{bh}x{bw}"
    shift = {"t": bt // 2, "h": bh // 2, "w": bw // 2}
    return [
        (f"window {size}", (ct.window(t=t, h=h, w=w),)),
        ("divided", (ct.along("t"), ct.along("h", "w"))),
        ("radial", (radial(),)),
        ("radial, 32 frames", (radial(),)),
        ("spatial", (ct.along("h", "w"),)),
        ("temporal", (ct.along("t"),)),
        ("axial", (ct.along("t"), ct.along("h"), ct.along("w"))),
        (f"blocks {blocks}", (ct.blocks(t=bt, h=bh, w=bw),)),
        (f"shifted blocks {blocks}", (ct.blocks(t=bt, h=bh, w=bw, shift=shift),)),
        (f"neighborhood {size}", (ct.window(t=t, h=h, w=w, edge="shift"),)),
        (f"dilated {size}", (ct.window(t=t, h=h, w=w, dilation={"h": 2, "w": 2}),)),
        ("strided t4 h4 w4", (ct.strided(t=4, h=4, w=4),)),
        ("window & causal t", (ct.window(t=t, h=h, w=w) & ct.causal("t"),)),
        ("causal t", (ct.causal("t"),)),
        ("causal", (ct.causal(),)),
        ("full", (ct.full(),)),
    ]


def attention(quick: bool) -> list[Case]:
    """Every kind of pattern on 8 frames of 32 x 32 tokens."""
    grid, long = ct.Grid(t=8, h=32, w=32), ct.Grid(t=32, h=16, w=16)
    size, block, heads = (5, 9, 9), (2, 8, 8), 4
    if quick:
        grid, long = ct.Grid(t=4, h=8, w=16), ct.Grid(t=32, h=4, w=4)
        size, block, heads = (3, 3, 5), (2, 4, 4), 2
    rule = window_rule(grid, **dict(zip("thw", size, strict=True)))
    return [
        Case(name, patterns, long if "32 frames" in name else grid, heads, rule=None if i else rule)
        for i, (name, patterns) in enumerate(_patterns(*size, block))
    ]


def windows(quick: bool, device: str) -> list[Case]:
    """Windows of three sizes, heads of 64 and 128, on longer clips."""
    grids = [ct.Grid(t=8, h=32, w=32), ct.Grid(t=16, h=32, w=32)]
    if device == "cuda":
        grids.append(ct.Grid(t=30, h=48, w=80))
    sizes = [(3, 5, 5), (5, 9, 9), (7, 13, 13)]
    if quick:
        grids, sizes = [ct.Grid(t=4, h=8, w=16)], sizes[:1]
    return [_window(grid, head_size, size, device) for grid in grids for head_size in (64, 128) for size in sizes]


def _window(grid: ct.Grid, head_size: int, size: tuple[int, int, int], device: str) -> Case:
    frames, name = "x".join(map(str, grid.shape)), "x".join(map(str, size))
    large = grid.size > 8192
    t, h, w = size
    return Case(
        f"{frames} d{head_size}: {name}",
        (ct.window(t=t, h=h, w=w),),
        grid,
        # torch's backward pass on CPUs has a thread for each head: one head would make dense slow.
        heads=4 if device == "cuda" or (not large and head_size == 64) else 2,
        head_size=head_size,
        rule=window_rule(grid, t=t, h=h, w=w) if device == "cuda" else None,
        backends=("native",) if device == "cpu" and large else None,
    )


def sequences(quick: bool, device: str) -> list[Case]:
    """Plain sequences: the last 1,024 keys, and all keys up to the own one."""
    sizes = (512, 1024) if quick else (4096, 8192, 16384, 32768, 65536)
    return [case for n in sizes for case in _sequence(n, device)]


def _sequence(n: int, device: str) -> Iterator[Case]:
    grid, width = ct.Grid(n=n), f"{n // 1024}k" if n >= 1024 else str(n)
    past = min(1024, n // 4)
    heads, backends, trains = 8, None, True
    if device == "cpu":
        # Dense attention takes 7 s at 64k for one head, and four times as long to train. Of one head torch's causal
        # kernel gives the second thread three quarters of the work.
        heads = 4 if n <= 8192 else 2 if n <= 32768 else 1
        backends = None if n <= 4096 else ("native", "sdpa is_causal") if heads > 1 else ("native",)
        trains = n <= 16384
    for name, pattern in (
        (f"{width}: window {past}, causal", ct.window(n=(past - 1, 0))),
        (f"{width}: causal", ct.causal()),
    ):
        yield Case(name, (pattern,), grid, heads, backends=backends, trains=trains)


def temporal(quick: bool) -> list[Case]:
    """Attention along time: few frames of many places, and many frames."""
    grids = [ct.Grid(t=8, h=64, w=64), ct.Grid(t=32, h=32, w=32)]
    if quick:
        grids = [ct.Grid(t=8, h=16, w=16)]
    return [Case("x".join(str(n) for n in grid.shape), (ct.along("t"),), grid) for grid in grids]
