"""Gradients of a bias: of relative tables, and of a tensor."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from chronotope.kernels.call import Known, Scores
from chronotope.kernels.relative import pull, relative
from chronotope.kernels.triton.device import step
from chronotope.planning import Tiling

SUM_BITS = 60  # of a sum in 64 bits: one for the sign, and three for what the bound leaves out


class Totals(NamedTuple):
    """Sums of dS for each entry of the relative tables [H, entries], as whole numbers of 1 / `unit`.

    Whole numbers add up to the same in any order, so that atomic additions are deterministic.
    """

    total: Tensor
    unit: Tensor


@triton.jit
@no_type_check
def add_to_tables(totals, ds, scores, head, q_at, k_at, inside, TERMS: tl.constexpr):
    """Adds dS of pairs to the entries that their scores came from."""
    amount = (ds * tl.load(totals.unit)).to(tl.int64)
    real = inside & (q_at >= scores.q_prefix) & (k_at >= scores.k_prefix) & (amount != 0)
    index = tl.zeros(inside.shape, tl.int32)
    for t in tl.static_range(len(TERMS)):
        index += step(scores, q_at, k_at, TERMS[t][0], TERMS[t][1], TERMS[t][2], TERMS[t][3])
        if TERMS[t][4]:
            tl.atomic_add(totals.total + head * scores.entries + index, amount, mask=real, sem="relaxed")
            index = tl.zeros(inside.shape, tl.int32)


def totals(known: Known, dout: Tensor, tiles: Tiling, heads: int, entries: int) -> Totals:
    """Zeros, and a unit with which no sum leaves 64 bits; it is NaN where a gradient is.

    A query's |dS| add up to 2 * |dout| * (largest |v|) + |dlse| at most, for its probabilities add up to 1.
    """
    blind = known.lse == -torch.inf
    seen = tiles.sighted[1].to(known.v.device)
    largest = torch.where(seen, torch.linalg.vector_norm(known.v, dim=-1, dtype=torch.float32), 0.0).amax()
    bound = 2 * largest * torch.linalg.vector_norm(dout, dim=-1, dtype=torch.float32)
    if known.dlse is not None:
        bound = bound + known.dlse.abs()
    bound = torch.where(blind, 0.0, bound + 0.0 * known.lse).sum((0, 2)).amax()
    exponent = (SUM_BITS - torch.log2(bound)).floor().clamp(-120, 120)
    unit = torch.where(bound.isfinite(), torch.exp2(exponent), torch.nan)
    return Totals(torch.zeros(heads, entries, dtype=torch.int64, device=dout.device), unit.reshape(1))


def of_tables(sums: Totals, scores: Scores, tiles: Tiling) -> list[Tensor | None]:
    """The gradients of the tensors behind a bias object."""
    exact = (sums.total.double() / sums.unit.double()).float()
    sizes = [one.table.shape[1] for one in relative(scores, tiles)]
    return pull(scores, tiles, list(exact.split(sizes, 1)))


def of_tensor(given: Float[Tensor, "b h q k"], scores: Scores) -> list[Tensor | None]:
    """The gradient of a bias tensor as the caller has it, from sums of dS that broadcast to [B, H, Nq, Nk]."""

    def table(tensor: Tensor) -> Tensor:
        return scores.given((tensor,)).tensor

    value, back = torch.func.vjp(table, *scores.tensors)  # type: ignore[misc]
    return list(back(given.sum_to_size(value.shape).to(value.dtype)))
