"""Attention by torch's own operators: gather the keys that a batch of query tiles lists, attend, join.

The forward pass keeps (out, lse) only. The backward pass computes the probabilities of each batch again from lse,
so that memory grows with N. Where gradients of gradients are asked for, the same formulas run under autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.kernels import dense
from chronotope.kernels.call import Backend, Scores
from chronotope.kernels.dense import Additive, Piece
from chronotope.planning import Group, Tiles

GATHERED = 1 << 21  # numbers of k and v copied at once: they should stay in the cache
SCORED = 1 << 21  # scores held at once where they are written out


def tiled(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk dv"],
    tiles: Tiles,
    scores: Scores,
) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"]]:
    """Attention over the tiles of a plan: (out, lse). The meaning is `kernels.reference`."""
    sees, seen = (None if bool(some.all()) else some[:, None].to(q.device) for some in tiles.sighted)
    # Zeros in place of what no one looks at: a masked NaN would still spread through 0 * NaN.
    q = q if sees is None else torch.where(sees, q, 0.0)
    k, v = (x if seen is None else torch.where(seen, x, 0.0) for x in (k, v))
    return Tiled.apply(q, k, v, tiles, scores, *scores.parameters())  # type: ignore[no-any-return]


class Tiled(torch.autograd.Function):
    """Forward and backward over the groups of a plan."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scores: Scores, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=exact, device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=exact, device=q.device)
        for group in tiles.groups:
            fused = dense.fused(group, q, v, scores)
            mask = Additive.of(group, q, k) if fused else None
            for piece in pieces(group, q, k, v, fused):
                x, y, z = piece.queries(q, k), piece.keys(k), piece.keys(v)
                bias = piece.bias(scores, parameters, tiles, k)
                if mask is not None:
                    part, part_lse = dense.flash(x, y, z, scores, mask)
                else:
                    part, part_lse = dense.written(x, y, z, scores, bias, piece.mask(q, k))
                part, part_lse = piece.tokens(part, q), piece.tokens(part_lse[..., None], q)[..., 0]
                if group.again:
                    part, part_lse = _join(part, part_lse, piece.take(out), piece.take(lse))
                piece.put(out, part)
                piece.put(lse, part_lse)
        out = out.to(q.dtype)
        ctx.set_materialize_grads(False)
        ctx.tiles, ctx.scores = tiles, scores
        ctx.save_for_backward(q, k, v, out, lse, *parameters)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *parameters = ctx.saved_tensors
        dout, dlse = grads
        if dout is None and dlse is None:
            return (None,) * (5 + len(parameters))
        wanted = ctx.needs_input_grad[5:]
        formula = Backward(ctx.tiles, ctx.scores, tuple(parameters), wanted, differentiable=torch.is_grad_enabled())
        dq, dk, dv, dparameters = formula(q, k, v, out, lse, dout, dlse)
        return dq, dk, dv, None, None, *dparameters


class Backward:
    """Gradients of one call. With P the probabilities, D = sum(dout * out) - dlse per query:

    dV = P^T dout,  dS = P * (dout V^T - D),  dQ = scale * dS' K,  dK = scale * dS'^T Q,  dbias = dS

    where dS' is dS through the softcap. Source: Dao et al. 2022 (arXiv 2205.14135), appendix B.
    """

    def __init__(
        self,
        tiles: Tiles,
        scores: Scores,
        parameters: tuple[Tensor, ...],
        wanted: tuple[bool, ...],
        differentiable: bool,
    ):
        self.tiles, self.scores, self.parameters = tiles, scores, parameters
        self.wanted, self.differentiable = wanted, differentiable

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        exact = lse.dtype
        dout = torch.zeros_like(out) if dout is None else dout
        shift = (dout.to(exact) * out.to(exact)).sum(-1) - (
            0 if dlse is None else torch.where(lse == -torch.inf, 0.0, dlse)
        )
        dq, dk, dv = (torch.zeros_like(x, dtype=exact) for x in (q, k, v))
        dparameters: list[Tensor | None] = [None] * len(self.parameters)
        for group in self.tiles.groups:
            fused = dense.fused(group, q, v, self.scores) and dlse is None and not self.differentiable
            mask = Additive.of(group, q, k) if fused else None
            for piece in pieces(group, q, k, v, fused):
                x, g, y, z = piece.queries(q, k), piece.queries(dout, k), piece.keys(k), piece.keys(v)
                lse_ = piece.queries(lse[..., None], k)[..., 0]
                if mask is not None:
                    dx, dy, dz = dense.flash_backward(x, y, z, piece.queries(out, k), lse_, g, self.scores, mask)
                else:
                    with torch.set_grad_enabled(self.differentiable or any(self.wanted)):
                        bias = piece.bias(self.scores, self.parameters, self.tiles, k)
                    shift_ = piece.queries(shift[..., None], k)[..., 0]
                    dx, dy, dz, ds = dense.written_backward(
                        x, y, z, lse_, g, shift_, self.scores, bias, piece.mask(q, k)
                    )
                    self._to_parameters(bias, ds, dparameters)
                add = torch.Tensor.index_add if self.differentiable else torch.Tensor.index_add_
                dq = add(dq, 2, piece.q_index, piece.tokens(dx, q).to(exact))
                dk, dv = (add(d, 2, piece.k_index, new.flatten(2, 3).to(exact)) for d, new in ((dk, dy), (dv, dz)))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dparameters

    def _to_parameters(self, bias: Tensor | None, ds: Tensor, dparameters: list[Tensor | None]) -> None:
        chosen = [i for i, want in enumerate(self.wanted) if want]
        if bias is None or not chosen:
            return
        with torch.enable_grad():
            new = torch.autograd.grad(
                bias, [self.parameters[i] for i in chosen], ds, create_graph=self.differentiable, allow_unused=True
            )
        for i, value in zip(chosen, new, strict=True):
            if value is not None:
                dparameters[i] = value if dparameters[i] is None else dparameters[i] + value  # type: ignore[operator]


def pieces(group: Group, q: Tensor, k: Tensor, v: Tensor, fused: bool) -> Iterator[Piece]:
    """Cuts a group into batches of query tiles, and tiles into rows, that fit in memory and cache."""
    count, rows, keys = group.shape
    batch, heads = q.shape[:2]
    step, height = count, rows
    if not fused:
        height = max(1, min(rows, SCORED // (batch * heads * keys)))
        step = max(1, SCORED // (batch * heads * keys * height))
    if count * keys > k.shape[2]:  # else no key is listed twice, and all are copied at most once
        step = min(step, max(1, GATHERED // (batch * k.shape[1] * keys * (k.shape[3] + v.shape[3]))))
    for start in range(0, count, step):
        for top in range(0, rows, height):
            yield Piece(group, slice(start, start + step), slice(top, top + height), q.device)


def _join(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """`ct.merge` of two parts in place of its allocations; a part that sees nothing has weight 0 and out 0."""
    lse = torch.logaddexp(a_lse, b_lse)
    safe = torch.where(lse == -torch.inf, 0.0, lse)
    out = a * torch.exp(a_lse - safe)[..., None] + b * torch.exp(b_lse - safe)[..., None]
    return out, lse


TORCH = Backend(
    name="torch",
    about="tiles through torch's own operators",
    run=tiled,
    devices=("cpu", "cuda"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    priority=10,
)
