"""One axis of a separable pattern: for each query place an arithmetic progression of key places.

Windows (clipped, shifted, dilated), blocks, strides, equality and order on one axis all have this form:
query x sees the keys first[x], first[x] + step, ..., last[x]. What planning asks of intervals is then a
search in sorted arrays, exact also where query and key axes differ in size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reach:
    """The visible keys of each query place on one axis: first, first + step, ..., last; none where first > last.

    Within the queries whose `first` has the same residue modulo `step`, both bounds do not decrease.
    """

    first: Int64[Tensor, "n_query"]
    last: Int64[Tensor, "n_query"]
    step: int

    def counts(self) -> Int64[Tensor, "n_query"]:
        """Number of visible keys of each query place."""
        return ((self.last - self.first).div(self.step, rounding_mode="floor") + 1).clamp(min=0)

    @cached_property
    def _classes(self) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """Per residue: the query places, and their bounds counted in steps."""
        residue = self.first % self.step
        out = []
        for r in residue.unique().tolist():
            x = (residue == r).nonzero()[:, 0]
            bounds = ((b[x] - r).div(self.step, rounding_mode="floor").contiguous() for b in (self.first, self.last))
            out.append((r, x, *bounds))
        return out  # type: ignore[return-value]

    def over(
        self, q_lo: Int64[Tensor, "p"], q_hi: Int64[Tensor, "p"], k_lo: Int64[Tensor, "p"], k_hi: Int64[Tensor, "p"]
    ) -> tuple[Bool[Tensor, "p"], Bool[Tensor, "p"]]:
        """(some, all) for P pairs of intervals, inclusive; exact as long as no query place sees nothing."""
        q_lo, q_hi, k_lo, k_hi = (bound.contiguous() for bound in (q_lo, q_hi, k_lo, k_hi))
        some = torch.zeros_like(q_lo, dtype=torch.bool)
        every = torch.ones_like(some)
        for residue, x, first, last in self._classes:
            begin = torch.searchsorted(x, q_lo)
            end = torch.searchsorted(x, q_hi, right=True) - 1
            here = begin <= end
            low = (k_lo - residue + self.step - 1).div(self.step, rounding_mode="floor")
            high = (k_hi - residue).div(self.step, rounding_mode="floor")
            reach_low = torch.searchsorted(last, low)  # the first query whose last key is not before the interval
            reach_high = torch.searchsorted(first, high, right=True) - 1
            some |= (low <= high) & (torch.maximum(begin, reach_low) <= torch.minimum(end, reach_high)) & here
            covers = (first[end.clamp(min=0)] <= low) & (last[begin.clamp(max=len(x) - 1)] >= high)
            whole = (k_hi - k_lo == high - low) if self.step > 1 else True
            every &= ~here | (covers & whole & (low <= high))
        return some, every

    def alike(
        self, q_lo: Int64[Tensor, "p"], q_hi: Int64[Tensor, "p"], k_lo: Int64[Tensor, "p"], k_hi: Int64[Tensor, "p"]
    ) -> Int64[Tensor, "p"]:
        """A number per interval pair of a tiling; equal numbers and equal sizes mean equal masks."""
        n_key = int(k_hi.max()) + 1
        code, index = torch.unique(q_lo * n_key + k_lo, return_inverse=True)
        where = torch.zeros_like(code).scatter_(0, index, torch.arange(len(index)))  # one member of each
        q_lo, q_hi, k_lo, k_hi = (value[where] for value in (q_lo, q_hi, k_lo, k_hi))
        x = (q_lo[:, None] + torch.arange(int((q_hi - q_lo).max()) + 1)).minimum(q_hi[:, None])
        size = (k_hi - k_lo + 1)[:, None]
        first, last = self.first[x] - k_lo[:, None], self.last[x] - k_lo[:, None]
        first = torch.where(first < 0, first % self.step, first)
        empty = (first > last) | (first >= size)
        last = torch.minimum(last, size - 1)
        last = torch.where(empty, -1, last - (last - first) % self.step)
        rows = torch.cat([torch.where(empty, 0, first), last], dim=1)
        return torch.unique(rows, dim=0, return_inverse=True)[1][index]

    def meet(self, other: Reach) -> Reach | None:
        """The progression of keys in both, where it is one whose residues agree; else None."""
        a, b = (self, other) if self.step >= other.step else (other, self)
        if a.step % b.step or (b.step > 1 and bool(((a.first - b.first) % b.step).any())):
            return None
        first = torch.maximum(a.first, b.first)
        first = first + (a.first - first) % a.step
        return Reach(first, torch.minimum(a.last, b.last), a.step)
