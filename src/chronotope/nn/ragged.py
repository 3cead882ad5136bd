"""Sequences of different lengths, end to end: what is done token by token needs no padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

ALIKE = 32
"""Lengths that are equal when rounded up to multiples of this are padded to each other."""


@dataclass(frozen=True)
class Ragged:
    """Where tokens are: those of sequence 0, then those of sequence 1, ...; M = the sum of `lengths` [B].

    For what mixes tokens, `apart` gives sequences of similar length side by side, and `together` undoes it: attention
    costs the square of each length, not B times the square of the largest.

        >>> ragged = Ragged(torch.tensor([3, 40, 5]))
        >>> [tuple(x.shape) for x in ragged.apart(torch.randn(48, 8))]
        [(2, 32, 8), (1, 40, 8)]
    """

    lengths: Int64[Tensor, "b"]

    @cached_property
    def first(self) -> Int64[Tensor, "b"]:
        """The first token of each sequence."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def row(self) -> Int64[Tensor, "m"]:
        """The sequence of each token."""
        return torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(self.lengths)

    @cached_property
    def place(self) -> Int64[Tensor, "m"]:
        """The place of each token in its sequence."""
        return torch.arange(len(self.row), device=self.row.device) - self.first[self.row]

    @cached_property
    def _groups(self) -> tuple[Int64[Tensor, "t"], list[tuple[int, int]], Int64[Tensor, "m"]]:
        """Tokens group by group, after the end of a sequence its last; each group's shape; where each token is then."""
        size, longest = (self.lengths + ALIKE - 1) // ALIKE, int(self.lengths.max())
        tokens, shapes, back, count = [], [], torch.empty_like(self.row), 0
        for one in size[size > 0].unique().tolist():
            rows = (size == one).nonzero()[:, 0]
            own = self.lengths[rows, None]
            places = torch.arange(min(one * ALIKE, longest), device=own.device)  # few widths: plans are made for each
            at, real = self.first[rows, None] + places.minimum(own - 1), places < own
            back[at[real]] = count + real.flatten().nonzero()[:, 0]
            count += at.numel()
            tokens.append(at.flatten())
            shapes.append((len(rows), len(places)))
        return torch.cat(tokens), shapes, back

    def apart(self, x: Float[Tensor, "m c"]) -> list[Float[Tensor, "_ _ c"]]:
        """Sequences of similar length side by side; each ends with copies of its last token."""
        tokens, shapes, _ = self._groups
        groups = F.embedding(tokens, x).split([rows * width for rows, width in shapes])  # its gradient adds up rows
        return [group.unflatten(0, shape) for group, shape in zip(groups, shapes, strict=True)]

    def together(self, groups: list[Float[Tensor, "_ _ c"]]) -> Float[Tensor, "m c"]:
        """End to end again; what comes after the end is dropped."""
        return F.embedding(self._groups[2], torch.cat([x.flatten(0, 1) for x in groups]))

    def padded(self, x: Float[Tensor, "m c"], width: int) -> Float[Tensor, "b {width} c"]:
        """All side by side, 0 after the end."""
        out = x.new_zeros(len(self.lengths) * width, x.shape[1])
        return out.index_copy(0, self.row * width + self.place, x).unflatten(0, (-1, width))
