"""Attention by torch's own operators: gather the keys that a batch of query tiles lists, attend, join.

The forward pass keeps (out, lse) only. The backward pass computes the probabilities of each batch again from lse,
so that memory grows with N. Where gradients of gradients are asked for, the same formulas run under autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.kernels import dense
from chronotope.kernels.call import Backend, Gradients, Known, Scores, blank
from chronotope.kernels.dense import Additive, Piece
from chronotope.planning import Group, Tiling

GATHERED = 1 << 21  # numbers of k and v copied at once: they should stay in the cache
SCORED = 1 << 21  # scores held at once where they are written out


def forward(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk dv"],
    tiles: Tiling,
    scores: Scores,
) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"]]:
    """Attention over the tiles of a plan: (out, lse). The meaning is `kernels.reference`."""
    q, k, v = _without_unseen(q, k, v, tiles)
    exact = torch.promote_types(q.dtype, torch.float32)
    out = blank(q, v.shape[3], exact).zero_()
    lse = torch.full(q.shape[:3], -torch.inf, dtype=exact, device=q.device)
    for group in tiles.groups:
        fused = dense.fused(group, q, v, scores)
        mask = Additive.of(group, q, k) if fused else None
        for piece in pieces(group, q, k, v, fused):
            x, y, z = piece.queries(q, k), piece.keys(k), piece.keys(v)
            if mask is not None:
                part, part_lse = dense.flash(x, y, z, scores, mask)
            else:
                part, part_lse = dense.written(x, y, z, scores, piece.bias(scores, tiles, k), piece.mask(q, k))
            part, part_lse = piece.tokens(part, q), piece.tokens(part_lse[..., None], q)[..., 0]
            if group.again:
                part, part_lse = _join(part, part_lse, piece.take(out), piece.take(lse))
            piece.put(out, part)
            piece.put(lse, part_lse)
    return out.to(q.dtype), lse


def _without_unseen(q: Tensor, k: Tensor, v: Tensor, tiles: Tiling) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros in place of what no one looks at: a masked NaN would still spread through 0 * NaN."""
    sees, seen = (None if bool(some.all()) else some[:, None].to(q.device) for some in tiles.sighted)
    q = q if sees is None else torch.where(sees, q, 0.0)
    k, v = (x if seen is None else torch.where(seen, x, 0.0) for x in (k, v))
    return q, k, v


def gradients(known: Known, tiles: Tiling, scores: Scores, differentiable: bool = False) -> Gradients:
    """Gradients of one call. With P the probabilities, D = sum(dout * out) - dlse per query:

    dV = P^T dout,  dS = P * (dout V^T - D),  dQ = scale * dS' K,  dK = scale * dS'^T Q,  dbias = dS

    where dS' is dS through the softcap. Source: Dao et al. 2022 (arXiv 2205.14135), appendix B. `differentiable`: run
    under autograd, for gradients of gradients.
    """
    q, k, v = _without_unseen(known.q, known.k, known.v, tiles)
    out, lse, dlse = known.out, known.lse, known.dlse
    exact = lse.dtype
    dout = torch.zeros_like(out) if known.dout is None else known.dout
    blind = 0 if dlse is None else torch.where(lse == -torch.inf, 0.0, dlse)
    shift = (dout.to(exact) * out.to(exact)).sum(-1) - blind
    dq, dk, dv = (torch.zeros_like(x, dtype=exact) for x in (q, k, v))
    dtypes = [x.dtype for x in scores.tensors]
    scores = scores.exact(exact)
    learned = Learned(scores, known.wanted, differentiable)
    for group in tiles.groups:
        fused = dense.fused(group, q, v, scores) and dlse is None and not differentiable
        mask = Additive.of(group, q, k) if fused else None
        for piece in pieces(group, q, k, v, fused):
            x, g, y, z = piece.queries(q, k), piece.queries(dout, k), piece.keys(k), piece.keys(v)
            lse_ = piece.queries(lse[..., None], k)[..., 0]
            if mask is not None:
                dx, dy, dz = dense.flash_backward(x, y, z, piece.queries(out, k), lse_, g, scores, mask)
            else:
                bias, pull = learned.bias(piece, tiles, k)
                shift_ = piece.queries(shift[..., None], k)[..., 0]
                dx, dy, dz, ds = dense.written_backward(x, y, z, lse_, g, shift_, scores, bias, piece.mask(q, k))
                learned.add(pull, ds)
            add = torch.Tensor.index_add if differentiable else torch.Tensor.index_add_
            dq = add(dq, 2, piece.q_index, piece.tokens(dx, q).to(exact))
            dk, dv = (add(d, 2, piece.k_index, new.flatten(2, 3).to(exact)) for d, new in ((dk, dy), (dv, dz)))
    dtensors = [d if d is None else d.to(dtype) for d, dtype in zip(learned.total, dtypes, strict=True)]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dtensors


Pull = Callable[[Tensor], Sequence[Tensor | None]]


class Learned:
    """The gradients of the tensors behind a bias, added up over the pieces."""

    def __init__(self, scores: Scores, wanted: tuple[bool, ...], differentiable: bool):
        self.scores, self.differentiable = scores, differentiable
        self.chosen = [i for i, want in enumerate(wanted) if want]
        self.total: list[Tensor | None] = [None] * len(scores.tensors)

    def bias(self, piece: Piece, tiles: Tiling, k: Tensor) -> tuple[Tensor | None, Pull | None]:
        """The bias of a piece, and the function that takes its gradient to the chosen tensors."""
        scores = self.scores
        if not scores.biased or not self.chosen:
            return piece.bias(scores, tiles, k), None
        chosen = [scores.tensors[i] for i in self.chosen]
        if self.differentiable:
            bias = piece.bias(scores, tiles, k)
            assert bias is not None
            return bias, lambda ds: torch.autograd.grad(bias, chosen, ds, create_graph=True, allow_unused=True)

        def values(*given: Tensor) -> Tensor:
            every = list(scores.tensors)
            for i, x in zip(self.chosen, given, strict=True):
                every[i] = x
            found = piece.bias(scores.given(tuple(every)), tiles, k)
            assert found is not None
            return found

        return torch.func.vjp(values, *chosen)  # type: ignore[return-value]

    def add(self, pull: Pull | None, ds: Tensor) -> None:
        """Adds the gradient of one piece, given that of its bias."""
        for i, new in zip(self.chosen, pull(ds) if pull else (), strict=False):
            if new is not None:
                old = self.total[i]
                self.total[i] = new if old is None else old + new


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
    forward=forward,
    backward=gradients,
    devices=("cpu", "cuda"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    priority=10,
)
