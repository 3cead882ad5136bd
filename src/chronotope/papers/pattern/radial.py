"""Radial Attention: near frames see wide windows of each other, far frames narrow ones, and some pairs none.

Query token a of frame i sees key token b of frame j (places 0 .. n - 1 in a frame, row-major), with r = |i - j|, where

    |a - b| <= max(w(r), block),   w(r) = decay * 2^bitlength(n) / 2^bitlength(r)
    and, once w(r) < block,        r mod floor(block / w(r)) == 0

w(0) is the whole frame; w(1) is half a frame, times decay above 1 (profile "wan"), or the whole frame ("hunyuan").
Everybody sees frame 0 (`sink`). Text tokens are the grid's prefix: they see and are seen by everything.

Sizes: f frames of n tokens; `block` is the kernel's block. Keys per query grow by an almost constant number with each
doubling of f, so work is O(N log N) at a fixed n.

    >>> grid = ct.Grid(t=8, h=8, w=8)
    >>> q = k = v = torch.randn(1, 2, grid.size, 16)
    >>> ct.attention(q, k, v, grid=grid, where=radial(block=4)).shape
    torch.Size([1, 2, 512, 16])

Left out: the speed-ups of 1.9x and 3.7x and the quality of long videos are not shown. Rounding to kernel blocks
(`rounded`) is optional here, since kernels run the element mask exactly. Where decay is not 1, the authors' code takes
floor(block / w(r)) without it; here it is one and the same w(r).

Paper: Li et al. 2025, "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
arXiv 2506.19852.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import Boxes, identify
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, full, predicate
from chronotope.patterns.base import Verdict
from chronotope.patterns.separable import require_positive
from chronotope.planning.parse import word

PROFILES = ("wan", "hunyuan")


@dataclass(frozen=True, repr=False)
class Radial(Pattern):
    """The relation of the module's formula. `frames`: the axis that counts frames; the others make up the frame."""

    block: int
    decay: float
    profile: str
    sink: bool
    frames: str

    def widths(self, frames: int, tokens: int) -> Int64[Tensor, "f"]:
        """Largest |a - b| that is visible at frame distances 0 .. f - 1; -1 where the pair of frames is dropped."""
        return _widths(self, frames, tokens)

    def check(self, grid: Grid, key_grid: Grid) -> None:
        grid.require((self.frames,), repr(self))
        if grid.replace(prefix=0) != key_grid.replace(prefix=0):
            raise ChronotopeError(
                f"{self!r}: queries on {grid!r} and keys on {key_grid!r}; both need the same axes and sizes."
            )

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        tokens, n = _strides(k.grid, self.frames)
        apart = torch.zeros((), dtype=torch.int64, device=q.place.device)
        for axis, stride in tokens.items():
            apart = apart + stride * (k.axes[axis] - q.axes[axis])
        widths = self.widths(k.grid.sizes[self.frames], n).to(q.place.device)
        seen = apart.abs() <= widths[(k.axes[self.frames] - q.axes[self.frames]).abs()]
        return seen | (k.axes[self.frames] == 0) if self.sink else seen

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        nearest, farthest, n = self._apart(q, k)
        widths = self.widths(k.grid.sizes[self.frames], n)
        first, last = k.lo[self.frames], k.hi[self.frames]
        first = first.clamp(min=1) if self.sink else first  # frame 0 is seen anyway
        low, high = first - q.hi[self.frames], last.maximum(first) - q.lo[self.frames]
        least = torch.where((low <= 0) & (high >= 0), 0, torch.minimum(low.abs(), high.abs()))
        most = torch.maximum(low.abs(), high.abs()).clamp(max=len(widths) - 1)
        least = least.minimum(most)
        # Widths never grow with the distance, so the nearest pair of frames that is kept has the widest window.
        kept = torch.cat([(widths >= 0).nonzero()[:, 0], torch.tensor([len(widths)])])
        near = kept[torch.searchsorted(kept, least)]
        dropped = torch.cat([torch.zeros(1, dtype=torch.int64), (widths < 0).cumsum(0)])
        some = (near <= most) & (widths[near.clamp(max=len(widths) - 1)] >= nearest)
        every = (dropped[most + 1] == dropped[least]) & (widths[most] >= farthest)
        if self.sink:
            only = last == 0
            some, every = (some & ~only) | (k.lo[self.frames] == 0), every | only
        return some, every

    def _apart(self, q: Boxes, k: Boxes) -> tuple[Int64[Tensor, "p"], Int64[Tensor, "p"], int]:
        """Least and largest |a - b| over each pair of boxes, and the tokens in a frame.

        a - b is built up axis by axis, as value * size + difference. What matters of the values reached so far is
        whether 0 is one, the least above 0 and the largest below 0: a later difference is smaller than one step.
        """
        strides, n = _strides(k.grid, self.frames)
        never = 4 * n
        zero = torch.ones(len(q), dtype=torch.bool)
        above, below = (torch.full((len(q),), sign * never) for sign in (1, -1))
        low = high = torch.zeros(len(q), dtype=torch.int64)
        for axis in strides:
            size = k.grid.sizes[axis]
            a, b = k.lo[axis] - q.hi[axis], k.hi[axis] - q.lo[axis]
            low, high = low * size + a, high * size + b
            up = torch.where(zero & (b >= 1), a.clamp(min=1), never)
            down = torch.where(zero & (a <= -1), b.clamp(max=-1), -never)
            above = up.minimum(torch.where(above < never, above * size + a, never))
            below = down.maximum(torch.where(below > -never, below * size + b, -never))
            zero = zero & (a <= 0) & (b >= 0)
        return torch.where(zero, 0, above.minimum(-below)), torch.maximum(low.abs(), high.abs()), n

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        strides, _ = _strides(k.grid, self.frames)
        apart = [k.lo[axis] - q.lo[axis] for axis in (self.frames, *strides)]
        return identify(*apart, (k.lo[self.frames] == 0).long())

    def prefix_sees(self) -> tuple[bool, bool]:
        return True, True

    def __repr__(self) -> str:
        sizes = f"block={self.block}, decay={self.decay}, profile={self.profile!r}"
        return f"radial({sizes}, sink={self.sink}, frames={self.frames!r})"


@lru_cache(maxsize=64)
def _widths(radial: Radial, frames: int, tokens: int) -> Int64[Tensor, "f"]:
    out = []
    for r in range(frames):
        w = radial.decay * 2 ** tokens.bit_length() / 2 ** r.bit_length()
        half = tokens / 2 * max(1.0, radial.decay)
        wide = tokens if r == 0 or (r == 1 and radial.profile == "hunyuan") else half if r == 1 else w
        dropped = w < radial.block and r % math.floor(radial.block / w) != 0
        out.append(-1 if dropped else math.floor(min(tokens, max(wide, radial.block))))
    return torch.tensor(out)


@lru_cache(maxsize=64)
def _strides(grid: Grid, frames: str) -> tuple[dict[str, int], int]:
    """How far one step on each axis of a frame moves in row-major order, and the tokens in a frame."""
    out, n = {}, 1
    for axis in reversed([axis for axis in grid.axes if axis != frames]):
        out[axis] = n
        n *= grid.sizes[axis]
    return dict(reversed(out.items())), n


def menu(grid: Grid) -> Pattern:
    """The pattern at its defaults; the block is 1/16 of a frame where 128 would be more."""
    return radial(block=max(1, min(128, grid.places // grid.sizes["t"] // 16)))


@paper(
    system=15,
    name="Radial Attention",
    family="pattern",
    claim="O(n log n) mask: windows within a frame halve each time the distance in frames doubles",
    evidence=["tests/papers/pattern/test_radial.py"],
    menu=menu,
)
@word
def radial(block: int = 128, decay: float = 1.0, profile: str = "wan", sink: bool = True, frames: str = "t") -> Pattern:
    """The pattern of Radial Attention, for `ct.attention(where=...)`.

    Args:
        block: narrowest window; below it, whole pairs of frames are dropped instead.
        decay: factor on the windows; large enough, everything is visible.
        profile: "wan" (neighbouring frames see half a frame) or "hunyuan" (they see the whole frame).
        sink: whether everybody sees frame 0.
        frames: the axis that counts frames.
    """
    require_positive(f"radial(block={block!r})", "block", block)
    if not (math.isfinite(decay) and decay > 0):
        raise ChronotopeError(f"radial(decay={decay!r}): expected a positive number.")
    if profile not in PROFILES:
        raise ChronotopeError(f"radial(profile={profile!r}): expected one of {', '.join(PROFILES)}.")
    return Radial(block, float(decay), profile, sink, frames)


def scheduled(pattern: Pattern, step: int, layer: int, dense_steps: int = 12, dense_layers: int = 1) -> Pattern:
    """`full()` in the first denoising steps and the first layers, else the pattern. Defaults: of a run of 50 steps."""
    return full() if step < dense_steps or layer < dense_layers else pattern


def rounded(pattern: Radial, grid: Grid) -> Pattern:
    """The mask rounded to block x block squares of consecutive tokens, as a block-sparse kernel would run it.

    Each pair of frames by itself: a square is kept where more than 60% of its non-empty columns are more than a third
    full. Slow to plan. Raises ChronotopeError where the frames are not the first axis.
    """
    kept = block_mask(pattern, grid)
    return predicate(lambda q, k: kept.to(q.place.device)[q.place // pattern.block, k.place // pattern.block])


def block_mask(pattern: Radial, grid: Grid) -> Bool[Tensor, "blocks blocks"]:
    """Which squares `rounded` keeps, of the tokens that have a place."""
    pattern.check(grid, grid)
    if grid.axes[0] != pattern.frames:
        raise ChronotopeError(
            f"rounded: {pattern.frames!r} must be the first axis of {grid!r}, so that frames are runs."
        )
    f, n, size = grid.shape[0], grid.places // grid.shape[0], pattern.block
    count = -(-grid.places // size)
    out = torch.zeros(count, count, dtype=torch.bool)
    places, widths = torch.arange(n), pattern.widths(f, n)
    apart = (places[:, None] - places[None, :]).abs()
    for i in range(f):
        for j in range(f):
            row, col = i * n // size, j * n // size
            rows, cols = ((x * n + n - 1) // size + 1 - start for x, start in ((i, row), (j, col)))
            local = torch.zeros(rows * size, cols * size)
            top, left = i * n - row * size, j * n - col * size
            local[top : top + n, left : left + n] = (
                1.0 if pattern.sink and j == 0 else (apart <= widths[abs(i - j)]).float()
            )
            columns = local.view(rows, size, cols, size).mean(1)
            share = (columns > 1 / 3).sum(-1) / (columns > 0).sum(-1).clamp(min=1)
            out[row : row + rows, col : col + cols] |= share > 0.6
    return out
