r"""Attention whose queries also meet learned vectors of relative places, in memory linear in the number of tokens.

$$
y_i = \sum_j \mathrm{softmax}_j\Big(\tfrac{1}{\sqrt d}\, q_i \cdot \big(k_j + \sum_a e^a_{x^a_j - x^a_i}\big)\Big) v_j
$$

x^a: the place on axis a. Offsets beyond the table meet its outermost vector. A chunk of queries meets the vectors once
each, Q E^T [C, offsets]; read with a stride one number shorter along the axis, entry (i, j - i) stands at (i, j), so
that nothing of N x N x d, nor of N x N, is ever held: the backward pass computes each chunk again.

Source: Shaw et al. 2018 (arXiv 1803.02155), relative keys; Huang et al. 2018 (arXiv 1809.04281), the skew.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import AUTOCAST
from chronotope.boxes import Boxes, chunks
from chronotope.checks import check_tensors
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.nn.attention import Attention, AttentionState
from chronotope.nn.mixer import Context, Mixer
from chronotope.patterns import Pattern

SCORED = 1 << 19
"""Scores held at once; one slice of the first axis against the keys it sees is the least."""


@dataclass(frozen=True, eq=False)
class Offsets:
    """Vectors of the offsets key - query on one axis: vectors[:, i] is that of i - before; one head is for all."""

    vectors: Float[Tensor, "h_or_1 offsets d"]
    before: int

    def between(self, first: int, last: int) -> Float[Tensor, "h_or_1 n d"]:
        """The vectors of the offsets from first to last; the outermost ones reach on."""
        offsets = torch.arange(first, last + 1, device=self.vectors.device)
        return self.vectors.index_select(1, (offsets + self.before).clamp(0, self.vectors.shape[1] - 1))


def relative_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n dv"],
    offsets: Mapping[str, Offsets],
    *,
    grid: Grid,
    where: Pattern | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n dv"]:
    """softmax(scale * q_i . (k_j + sum over axes of e[x_j - x_i]), over the keys that `where` lets a query see) v.

    Args:
        offsets: vectors by name of the axis.
        grid: without a prefix, whose tokens have no place.
        where: who may look at whom: one pattern of coordinates for all heads; None: everybody.
        scale: default 1 / sqrt(D).

    A query that sees no key gets 0. Slices of the first axis that no query of a chunk sees are not computed.

    Example:
        >>> grid, x = Grid(t=50, v=4), torch.randn(1, 2, 200, 16)
        >>> offsets = {"t": Offsets(torch.randn(2, 33, 16), before=32), "v": Offsets(torch.randn(1, 7, 16), before=3)}
        >>> relative_attention(x, x, x, offsets, grid=grid, where=causal()).shape
        torch.Size([1, 2, 200, 16])

    Raises ChronotopeError: sizes that do not fit, or a pattern of another kind.
    """
    check_tensors(q, k, v, grid, grid)
    _check(offsets, q, k, grid, where)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    each = q.shape[0] * q.shape[1] * grid.size // grid.shape[0] * grid.size
    parts = [
        Part(grid, where, (steps.start, steps.stop), _seen_steps(where, grid, steps.start, steps.stop))
        for steps in chunks(grid.shape[0], each, SCORED)
    ]
    before = {axis: one.before for axis, one in offsets.items()}
    vectors = [one.vectors for one in offsets.values()]
    with torch.autocast(q.device.type, enabled=False) if q.device.type in AUTOCAST else nullcontext():
        return _Parts.apply(parts, before, scale, q, k, v, *vectors)  # type: ignore[no-any-return]


class _Parts(torch.autograd.Function):
    """Part after part, into memory that is there; the backward pass computes each again, and adds to gradients."""

    @staticmethod
    def forward(ctx: Any, parts: list[Part], before: dict[str, int], scale: float, *given: Tensor) -> Tensor:
        ctx.rest = parts, before, scale
        ctx.save_for_backward(*given)
        q, _, v = given[:3]
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for part in parts:
            out[:, :, part.rows] = _attend(*part.of(given), before=before, part=part, scale=scale)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parts, before, scale = ctx.rest
        again = torch.is_grad_enabled()  # gradients of these gradients are asked for
        given = [x if again else x.detach().requires_grad_() for x in ctx.saved_tensors]
        total = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in given]
        for part in parts:
            with torch.enable_grad():
                own = part.of(given)
                out = _attend(*own, before=before, part=part, scale=scale)
            found = torch.autograd.grad(out, own, dout[:, :, part.rows], create_graph=again)
            total = [_plus(x, new, rows) for x, new, rows in zip(total, found, part.cuts(len(own)), strict=True)]
        return (None, None, None, *(x.to(y.dtype) for x, y in zip(total, given, strict=True)))


def _plus(total: Tensor, new: Tensor, rows: slice | None) -> Tensor:
    """The sum; in place where no gradient passes through it."""
    if new.requires_grad:
        return total + (new if rows is None else F.pad(new, (0, 0, rows.start, total.shape[2] - rows.stop)))
    (total if rows is None else total[:, :, rows]).add_(new)
    return total


def _check(offsets: Mapping[str, Offsets], q: Tensor, k: Tensor, grid: Grid, where: Pattern | None) -> None:
    if not offsets:
        raise ChronotopeError("relative attention: give vectors of at least one axis, or use ct.attention.")
    grid.require(tuple(offsets), "relative attention")
    if grid.prefix or q.shape[1] != k.shape[1]:
        raise ChronotopeError(
            f"relative attention on {grid!r} with {q.shape[1]} heads of queries and {k.shape[1]} of keys: expected no "
            "prefix, whose tokens have no place, and as many of both."
        )
    if where is not None and (where.heads is not None or where.routes):
        raise ChronotopeError(f"relative attention with {where!r}: expected one pattern of coordinates for all heads.")
    for axis, one in offsets.items():
        if one.vectors.ndim != 3 or one.vectors.shape[0] not in (1, q.shape[1]) or one.vectors.shape[2] != q.shape[3]:
            raise ChronotopeError(
                f"vectors of {axis!r} have shape {list(one.vectors.shape)}; expected [{q.shape[1]} or 1, offsets, "
                f"{q.shape[3]}]."
            )


@functools.lru_cache(maxsize=4096)
def _seen_steps(where: Pattern | None, grid: Grid, start: int, stop: int) -> tuple[int, int]:
    """The first slice that some query of these slices may see, and the one after the last."""
    if where is None:
        return 0, grid.shape[0]
    every = torch.arange(grid.shape[0])
    queries = Boxes.slices(grid, grid.axes[0], torch.full_like(every, start), torch.full_like(every, stop - 1))
    found = where.over(queries, Boxes.slices(grid, grid.axes[0], every, every))[0].nonzero()
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 1)


@dataclass(frozen=True)
class Part:
    """Some slices of queries on a grid, and the slices of keys that they meet: first, and the one after the last."""

    grid: Grid
    where: Pattern | None
    queries: tuple[int, int]
    keys: tuple[int, int]

    @property
    def step(self) -> int:
        """Tokens of a slice."""
        return self.grid.size // self.grid.shape[0]

    @property
    def rows(self) -> slice:
        """The queries."""
        return slice(self.queries[0] * self.step, self.queries[1] * self.step)

    def cuts(self, count: int) -> list[slice | None]:
        """The rows of q, k, v, and, of all that comes after these, None: the whole."""
        keys = slice(self.keys[0] * self.step, self.keys[1] * self.step)
        return [self.rows, keys, keys, *[None] * (count - 3)]

    def of(self, given: Sequence[Tensor]) -> list[Tensor]:
        """q, k, v cut to this part, and what comes after them."""
        return [x if rows is None else x[:, :, rows] for x, rows in zip(given, self.cuts(len(given)), strict=True)]

    def span(self, axis: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """The first place on an axis, and how many, of queries and of keys."""
        if axis != self.grid.axes[0]:
            return (0, self.grid.sizes[axis]), (0, self.grid.sizes[axis])
        (a, b), (c, d) = self.queries, self.keys
        return (a, b - a), (c, d - c)

    @property
    def key_axes(self) -> list[str]:
        """The axes in the order of the keys here: the longest comes last, so that sums over pairs run along it."""
        return sorted(self.grid.axes, key=lambda axis: self.span(axis)[1][1])

    def ordered(self, x: Shaped[Tensor, "b h nk d"]) -> Shaped[Tensor, "b h nk d"]:
        """Keys in that order."""
        x = x.unflatten(2, [self.span(axis)[1][1] for axis in self.grid.axes])
        order = [2 + self.grid.axes.index(axis) for axis in self.key_axes]
        return x.permute(0, 1, *order, x.ndim - 1).flatten(2, -2)

    def hidden(self, like: Tensor) -> Hidden:
        """Who does not see whom, keys in their order here."""
        if self.where is None:
            return Hidden(None, None, None)
        q, k = (torch.arange(a * self.step, b * self.step, device=like.device) for a, b in (self.queries, self.keys))
        k = self.ordered(k[None, None, :, None]).flatten()
        seen = self.where.sees(Coords.of(self.grid, q[:, None]), Coords.of(self.grid, k[None]))
        seen = seen.expand(len(q), len(k))
        blind, unseen = ~seen.any(1)[:, None], ~seen.any(0)[:, None]
        zeros = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
        return Hidden(
            zeros.masked_fill_(~(seen | blind), -torch.inf),
            blind if bool(blind.any()) else None,
            unseen if bool(unseen.any()) else None,
        )


class Hidden(NamedTuple):
    """-inf where a query does not see a key, else 0; queries that see none, keys that none sees. None: no such pair.

    The rows of queries that see none are 0: a softmax over nothing is NaN, and so its gradient.
    """

    added: Float[Tensor, "nq nk"] | None
    blind: Bool[Tensor, "nq 1"] | None
    unseen: Bool[Tensor, "nk 1"] | None


def _attend(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b h nk d"],
    v: Float[Tensor, "b h nk dv"],
    *vectors: Tensor,
    before: Mapping[str, int],
    part: Part,
    scale: float,
) -> Float[Tensor, "b h nq dv"]:
    """The queries of a part over its keys; the vectors are of the axes of `before`, in order."""
    exact = torch.promote_types(q.dtype, torch.float32)
    x, y, z = q.to(exact) * scale, part.ordered(k.to(exact)), part.ordered(v.to(exact))
    hidden, blind, unseen = part.hidden(x)
    # Zeros in place of what no one looks at: a masked NaN would still spread through 0 * NaN.
    x = x if blind is None else torch.where(blind, 0.0, x)
    y, z = (w if unseen is None else torch.where(unseen, 0.0, w) for w in (y, z))
    offsets = {axis: Offsets(one.to(exact), n) for (axis, n), one in zip(before.items(), vectors, strict=True)}
    added = functools.reduce(operator.add, (_skewed(x, one, axis, part) for axis, one in offsets.items()))
    pairs = [part.span(axis)[0][1] for axis in part.grid.axes], [part.span(axis)[1][1] for axis in part.key_axes]
    added = added.expand(*x.shape[:2], *pairs[0], *pairs[1]).reshape(-1, x.shape[2], y.shape[2])
    if hidden is not None:
        added = added + hidden
    weights = torch.baddbmm(added, x.flatten(0, 1), y.flatten(0, 1).transpose(1, 2)).softmax(-1)
    out = (weights @ z.flatten(0, 1)).unflatten(0, x.shape[:2])
    return (out if blind is None else torch.where(blind, 0.0, out)).to(q.dtype)


def _skewed(
    q: Float[Tensor, "b h nq d"], offsets: Offsets, axis: str, part: Part
) -> Float[Tensor, "b h *axes_of_queries_and_keys"]:
    """q_i . e[x_j - x_i] on one axis; the other axes of the keys have size 1."""
    (first, count), (key_first, key_count) = part.span(axis)
    vectors = offsets.between(key_first - first - count + 1, key_first + key_count - 1 - first)
    products = (q @ vectors.transpose(1, 2)).unflatten(2, [part.span(other)[0][1] for other in part.grid.axes])
    # Entry x_j - x_i + count - 1 of row x_i, read as row x_i and column x_j.
    stride = list(products.stride())
    stride[2 + part.grid.axes.index(axis)] -= 1
    begin = products.storage_offset() + count - 1
    out = products.as_strided((*products.shape[:-1], key_count), stride, begin)
    return out.unflatten(-1, [key_count if other == axis else 1 for other in part.key_axes])


class RelativeAttention(Mixer):
    """y = W_o relative_attention(W_q x, W_k x, W_v x), with vectors e[x_j - x_i] learned for each of some axes.

    Args:
        dim: channels of x.
        heads: of queries, keys and values.
        extent: how far offsets have vectors of their own, by axis: key - query from -reach to reach, or, given
            (before, after), from -before to after; `{"t": (128, 0), "v": 3}`.
        where: who may look at whom; None: everybody.
        head_dim: default dim / heads.
        shared: one table for all heads.

    Raises ChronotopeError: sizes that do not divide, an extent below 0.

    Example:
        >>> layer = RelativeAttention(64, 4, {"t": (128, 0), "v": 3}, where=causal())
        >>> layer(torch.randn(1, 100 * 4, 64), Grid(t=100, v=4)).shape
        torch.Size([1, 400, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        extent: Mapping[str, int | tuple[int, int]],
        *,
        where: Pattern | None = None,
        head_dim: int | None = None,
        shared: bool = False,
    ):
        super().__init__()
        self.dim = dim
        self.attention = Attention(dim, heads, where=where, head_dim=head_dim)
        self.extent = {axis: (e, e) if isinstance(e, int) else e for axis, e in extent.items()}
        if not extent or min(min(e) for e in self.extent.values()) < 0:
            raise ChronotopeError(
                f"RelativeAttention(extent={dict(extent)!r}): give at least one axis, and offsets of 0 or more."
            )
        size = self.attention.head_dim
        # Products with queries of variance 1 begin with variance 1.
        self.vectors = nn.ParameterDict(
            {
                axis: nn.Parameter(torch.randn(1 if shared else heads, before + after + 1, size) / math.sqrt(size))
                for axis, (before, after) in self.extent.items()
            }
        )

    def offsets(self) -> dict[str, Offsets]:
        """The vectors of each axis."""
        return {axis: Offsets(self.vectors[axis], before) for axis, (before, _) in self.extent.items()}

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """Self-attention of x on the grid."""
        if context is not None:
            raise ChronotopeError("RelativeAttention takes no context: tokens of another grid have no relative place.")
        q, k, v = self.attention.project(x, grid)
        out = relative_attention(q, k, v, self.offsets(), grid=grid, where=self.attention.where)
        return self.attention.out(out.transpose(1, 2).flatten(2))

    def init_state(self, batch: int, grid: Grid) -> Any:
        """Keys and values of the slices that a coming one may still see.

        Raises ChronotopeError where `where` looks ahead on the first axis, or cannot be stepped.
        """
        grid.require(tuple(self.extent), "RelativeAttention")
        return self.attention.init_state(batch, grid)

    def step(self, x: Float[Tensor, "b s c"], state: AttentionState) -> tuple[Float[Tensor, "b s c"], AttentionState]:
        """The next slice over those kept."""
        q, k, v = self.attention.project(x, state.grid, time=state.time)
        k, v = torch.cat((state.k.to(k.dtype), k), 2), torch.cat((state.v.to(v.dtype), v), 2)
        axis, end, kept = state.grid.axes[0], state.time + 1, k.shape[2] // state.grid.size
        part = Part(state.grid.replace(**{axis: end}), state.where, (state.time, end), (end - kept, end))
        before = {axis: reach for axis, (reach, _) in self.extent.items()}
        out = _attend(q, k, v, *self.vectors.values(), before=before, part=part, scale=1 / math.sqrt(q.shape[3]))
        horizon = state.where.horizon(axis)
        if horizon is not None and kept > horizon:
            # A copy, so that the slices before it can be freed.
            spare = (kept - horizon) * state.grid.size
            k, v = k[:, :, spare:].clone(), v[:, :, spare:].clone()
        return self.attention.out(out.transpose(1, 2).flatten(2)), replace(state, k=k, v=v, time=end)

    def extra_repr(self) -> str:
        return f"extent={self.extent!r}"
