"""Whether a competitor computes what it should, before it is timed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from chronotope.bench.cases import BACKWARD, BOTH, FORWARD, Case
from chronotope.bench.competitors import Attend, Competitor, sdpa
from chronotope.grid import Coords

SAMPLE = 257  # queries that are looked at, spread evenly
# Largest error that is rounding: a few steps of the dtype, of the largest number of a result.
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Inputs:
    """q, k, v [1, H, N, D] of a shape, and the gradient of out."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def random(cls, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Inputs:
        """Normal numbers, the same in every run."""
        tokens, heads, size = shape
        generator = torch.Generator().manual_seed(0)
        made = (torch.randn(1, heads, tokens, size, generator=generator) for _ in range(4))
        return cls(*(x.to(device, dtype) for x in made))

    def leaves(self, competitor: Competitor) -> tuple[Tensor, ...]:
        """q, k, v, dout in the layout of a competitor; q, k, v want gradients."""
        given = (self.q, self.k, self.v, self.dout)
        if competitor.heads_last:
            given = tuple(x.transpose(1, 2).contiguous() for x in given)  # type: ignore[assignment]
        return *(x.detach().requires_grad_() for x in given[:3]), given[3]


class Truth:
    """What a case gives in float64: some rows of out, and the gradients when dout is 0 in all other rows."""

    def __init__(self, case: Case, inputs: Inputs):
        self.case, self.inputs = case, inputs
        self.rows = torch.linspace(0, case.grid.size - 1, min(SAMPLE, case.grid.size)).long().unique()
        self.dout = torch.zeros_like(inputs.dout)
        self.dout[:, :, self.rows] = inputs.dout[:, :, self.rows]

    def mask(self, i: int) -> Tensor:
        """Who of the rows sees whom, under the i-th pattern."""
        q = Coords.of(self.case.grid, self.rows).view(-1, 1)
        k = Coords.of(self.case.grid, torch.arange(self.case.grid.size)).view(1, -1)
        return self.case.patterns[i].sees(q, k).expand(len(self.rows), self.case.grid.size).to(self.inputs.q.device)

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """out, dq of the rows; dk, dv of all tokens."""
        x = self.inputs
        q, k, v = (y.double().requires_grad_() for y in (x.q[:, :, self.rows], x.k, x.v))
        outs = [sdpa(q, k, v, attn_mask=self.mask(i)) for i in range(len(self.case.patterns))]
        out = sum(outs[1:], start=outs[0])
        grads = torch.autograd.grad(out, (q, k, v), self.dout[:, :, self.rows].double())
        return out.detach(), *grads

    def error(self, found: Tensor, exact: Tensor) -> float:
        """Largest difference, over the largest number that should be there; NaN counts as wrong."""
        return float((found.double() - exact).abs().max() / exact.abs().max())

    def errors(self, competitor: Competitor, trains: bool) -> dict[str, float]:
        """The error of each pass: of out, of the largest of dq, dk and dv, of all."""
        leaves = self.inputs.leaves(competitor)
        order = (1, 2) if competitor.heads_last else (1, 1)

        def back(x: Tensor) -> Tensor:
            return x.transpose(*order)

        if not trains:
            out = competitor.attend(*(x.detach() for x in leaves[:3]))
            return {FORWARD: self.error(back(out)[:, :, self.rows], self.exact[0])}
        out = competitor.attend(*leaves[:3])
        dq, dk, dv = (back(x) for x in torch.autograd.grad(out, leaves[:3], back(self.dout)))
        forward = self.error(back(out.detach())[:, :, self.rows], self.exact[0])
        pairs = zip((dq[:, :, self.rows], dk, dv), self.exact[1:], strict=True)
        backward = [self.error(found, exact) for found, exact in pairs]
        return {FORWARD: forward, BACKWARD: _largest(backward), BOTH: _largest([forward, *backward])}


def _largest(values: list[float]) -> float:
    return max(values, key=lambda x: float("inf") if x != x else x)  # NaN above all


def right(errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether every error is rounding."""
    return all(error < LIMIT[dtype] for error in errors.values())


__all__ = ["LIMIT", "Attend", "Inputs", "Truth", "right"]
