"""HaloNet: the queries of a block share one window of keys, the block and a halo around it.

    query x sees key y  where  floor(x / b) b - before <= y <= floor(x / b) b + b - 1 + after   on each axis
    logits = q . k / sqrt(D) + sum over the axes of q . r[y - x]

Keys outside the picture are masked (`pad="mask"`), or are zero vectors that take part in the softmax (`pad="zeros"`).
With stride s only the queries at places 0, s, 2s, ... of each block are kept: attention that downsamples.

Sizes: q [B, H, N, D], k and v [B, Hk, N, D]; b + before + after = W keys on an axis, prod(W) for each query. A table of
relative places has 2 W - 1 vectors of D on each axis, shared by the heads. Published: b = 8, halo 3.

    >>> grid = ct.Grid(h=16, w=16)
    >>> q = k = v = torch.randn(1, 2, grid.size, 32)
    >>> halo_attention(q, k, v, grid=grid, block={"h": 8, "w": 8}, halo={"h": 3, "w": 3}).shape
    torch.Size([1, 2, 256, 32])

With "zeros" exactly N * prod(W) scores are computed, block by block; with "mask" the tiles of a plan, which hold more.

Left out: ImageNet results, and the HaloNet models. Causal in time: blocks of 1 frame with a halo (n, 0).

Paper: Vaswani et al. 2021, "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid, align
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern
from chronotope.patterns.reach import Reach
from chronotope.patterns.separable import Separable, conjunction, require_axes, require_positive
from chronotope.planning.parse import word

Sides = int | tuple[int, int]


@dataclass(frozen=True, repr=False)
class Halo(Separable):
    """The relation of the module's formula; `spans`: axis, block, halo before, halo after."""

    spans: tuple[tuple[str, int, int, int], ...]

    def constrained(self, grid: Grid, key_grid: Grid) -> tuple[str, ...]:
        return tuple(axis for axis, *_ in self.spans if axis in grid.axes and axis in key_grid.axes)

    def check(self, grid: Grid, key_grid: Grid) -> None:
        require_axes(repr(self), tuple(axis for axis, *_ in self.spans), grid, key_grid)

    def _bounds(self, axis: str, x: Tensor) -> tuple[Tensor, Tensor]:
        block, before, after = next(rest for name, *rest in self.spans if name == axis)
        start = x // block * block
        return start - before, start + block - 1 + after

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        seen = {}
        for axis in self.constrained(q.grid, k.grid):
            first, last = self._bounds(axis, q.axes[axis])
            seen[axis] = (k.axes[axis] >= first) & (k.axes[axis] <= last)
        return conjunction(q, k, seen)

    def reach(self, axis: str, n_query: int, n_key: int) -> Reach:
        first, last = self._bounds(axis, align(torch.arange(n_query), n_query, n_key))
        return Reach(first.clamp(min=0), last.clamp(max=n_key - 1), 1)

    def horizon(self, axis: str) -> int | None:
        return next((block - 1 + before for name, block, before, _ in self.spans if name == axis), None)

    def __repr__(self) -> str:
        block, sides = ({span[0]: part(span) for span in self.spans} for part in (lambda s: s[1], lambda s: s[2:]))
        return f"haloed({block}, {sides})"


@word
def haloed(block: dict[str, int], halo: dict[str, Sides]) -> Halo:
    """The pattern: blocks and halos by axis; a halo is one number, or (before, after), so (n, 0) looks back only."""
    spans = []
    for axis, size in block.items():
        require_positive(f"haloed(block={block})", f"block on {axis}", size)
        sides = halo.get(axis, 0)
        before, after = sides if isinstance(sides, tuple) else (sides, sides)
        if min(before, after) < 0:
            raise ChronotopeError(f"haloed({axis}={sides!r}): expected 0 or more places on each side.")
        spans.append((axis, size, before, after))
    if not spans or set(halo) - set(block):
        raise ChronotopeError(
            f"haloed(block={block}, halo={halo}): give a block for at least one axis, and each with a halo."
        )
    return Halo(tuple(spans))


def menu(grid: Grid) -> Pattern:
    """Blocks of 8 x 8 with a halo of 3 in space; blocks of 2 with a halo of 1 in time."""
    return haloed(
        {axis: 2 if axis == "t" else 8 for axis in grid.axes}, {axis: 1 if axis == "t" else 3 for axis in grid.axes}
    )


@paper(
    system=66,
    name="HaloNet",
    family="pattern",
    claim="blocks of queries share one window of keys, a block and its halo, with relative places and downsampling",
    evidence=["tests/papers/pattern/test_halonet.py"],
    menu=menu,
)
def halo_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n dv"],
    *,
    grid: Grid,
    block: dict[str, int],
    halo: dict[str, Sides],
    relative: dict[str, Tensor] | None = None,
    stride: int = 1,
    pad: str = "mask",
) -> Float[Tensor, "b h m dv"]:
    """HaloNet attention; out [B, H, M, Dv], M the places that the stride keeps (all without one), in row-major order.

    Args:
        block, halo: by axis, as for the pattern `haloed`; a whole axis is one block where none is named.
        relative: for each named axis a table [2 W - 1, D], row W - 1 being the offset 0.
        stride: divides the named axes and their blocks.
        pad: "mask" or "zeros", for keys outside the grid.
    """
    where = haloed(block, halo)
    where.check(grid, grid)
    if pad not in ("mask", "zeros") or grid.prefix:
        raise ChronotopeError(f"halo_attention(pad={pad!r}) on {grid!r}: expected 'mask' or 'zeros', and no prefix.")
    unfit = [axis for axis, size in block.items() if size % stride or (stride > 1 and grid.sizes[axis] % stride)]
    if unfit:
        raise ChronotopeError(
            f"halo_attention(stride={stride}): it does not divide block and size of {unfit} in {grid!r}."
        )
    steps = {axis: stride if axis in block else 1 for axis in grid.axes}
    spans = {axis: tuple(rest) for axis, *rest in where.spans}
    spans |= {axis: (n, 0, 0) for axis, n in grid.sizes.items() if axis not in spans}
    scale = 1 / math.sqrt(q.shape[-1])
    x, y, z = (tensor.unflatten(2, grid.shape) for tensor in (q, k, v))
    x = x[(slice(None), slice(None), *(slice(None, None, steps[axis]) for axis in grid.axes))]
    if pad == "zeros":
        y, z = (_padded(tensor, [_edges(n, *spans[axis]) for axis, n in grid.sizes.items()]) for tensor in (y, z))
    for i, axis in enumerate(grid.axes):
        if relative and axis in relative:
            x, y = _placed(x, y, q.shape[-1], i, spans[axis], steps[axis], relative[axis] / scale, pad)
    if pad == "zeros":
        return _blockwise(x, y, z, [spans[axis] for axis in grid.axes], list(steps.values()), scale)
    queries = Grid(**dict(zip(grid.axes, x.shape[2:-1], strict=True)))
    x, y = x.flatten(2, -2), y.flatten(2, -2)
    return attention(x, y, v, grid=queries, key_grid=grid, where=where, scale=scale)  # type: ignore[return-value]


def _edges(n: int, block: int, before: int, after: int) -> tuple[int, int]:
    """How many places to add on both sides of an axis, so that the window of every block is inside."""
    return before, -n % block + after


def _padded(x: Tensor, edges: list[tuple[int, int]]) -> Tensor:
    return F.pad(x, (0, 0, *(side for pair in reversed(edges) for side in pair)))


def _placed(
    x: Tensor, y: Tensor, dim: int, i: int, span: tuple[int, ...], step: int, table: Tensor, pad: str
) -> tuple[Tensor, Tensor]:
    """Queries and keys with W more channels, whose product is q . r[offset] on axis i.

    The W keys of a window have different places modulo W: the key says its own by a one-hot vector, and the query
    holds its score for each.
    """
    block, before, after = span
    width = block + before + after
    if table.shape != (2 * width - 1, dim):
        raise ChronotopeError(f"relative: expected a table [{2 * width - 1}, {dim}], got {list(table.shape)}.")
    place = torch.arange(x.shape[2 + i], device=x.device) * step
    start = place // block * block - before
    offset = start[:, None] + (torch.arange(width, device=x.device) - start[:, None]) % width - place[:, None]
    index = (offset + width - 1).view(-1, *[1] * (x.ndim - 4 - i), width)
    scores = (x[..., :dim] @ table.T).gather(-1, index.expand(*x.shape[:-1], width))
    own = torch.arange(y.shape[2 + i], device=y.device) - (before if pad == "zeros" else 0)
    named = F.one_hot(own % width, width).to(y.dtype).view(-1, *[1] * (y.ndim - 4 - i), width)
    return torch.cat([x, scores], -1), torch.cat([y, named.expand(*y.shape[:-1], width)], -1)


def _blockwise(x: Tensor, y: Tensor, z: Tensor, spans: list[tuple[int, ...]], steps: list[int], scale: float) -> Tensor:
    """Each block by itself over its window; y and z are padded already."""
    shape, rank = x.shape[2:-1], len(spans)
    rows = [block // step for (block, _, _), step in zip(spans, steps, strict=True)]
    x = _padded(x, [(0, -n % row) for n, row in zip(shape, rows, strict=True)])
    for i, ((block, before, after), row) in enumerate(zip(spans, rows, strict=True)):
        x = x.unfold(2 + i, row, row)
        y, z = (tensor.unfold(2 + i, block + before + after, block) for tensor in (y, z))
    counts = x.shape[2 : 2 + rank]
    # [B, H, blocks..., D, window...] -> [B blocks, H, window, D]
    order = [0, *range(2, 2 + rank), 1, *range(3 + rank, 3 + 2 * rank), 2 + rank]
    x, y, z = (t.permute(order).flatten(2 + rank, 1 + 2 * rank).flatten(0, rank) for t in (x, y, z))
    out = attention(x, y, z, grid=Grid(n=x.shape[2]), key_grid=Grid(n=y.shape[2]), scale=scale)
    out = out.view(-1, *counts, out.shape[1], *rows, out.shape[-1])  # type: ignore[union-attr]
    pairs = [axis for i in range(rank) for axis in (1 + i, 2 + rank + i)]
    out = out.permute(0, 1 + rank, *pairs, 2 + 2 * rank)
    out = out.reshape(*out.shape[:2], *(c * r for c, r in zip(counts, rows, strict=True)), out.shape[-1])
    return out[(slice(None), slice(None), *(slice(n) for n in shape))].flatten(2, -2)
