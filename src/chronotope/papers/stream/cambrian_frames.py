"""Cambrian-S: frames in pieces of equal size, so that whole and pooled ones share one tensor.

A frame of n tokens is `compress` pieces of m = n / compress tokens: piece j has the tokens j, j + compress, and so on.
The mean of its pieces is then the frame with neighbouring tokens pooled, one piece of m tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from chronotope.carried import Carried


@dataclass(frozen=True)
class Frames(Carried):
    """Pieces in order of time. time: of the frame, -1 where a member of the batch has fewer pieces; weight: how many
    frames a piece stands for, so that the pieces of a whole frame add up to 1."""

    k: Float[Tensor, "b hk p m d"]
    v: Float[Tensor, "b hk p m dv"]
    time: Int64[Tensor, "b p"]
    surprise: Float[Tensor, "b p"]
    weight: Float[Tensor, "b p"]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, surprise: Float[Tensor, "b"], time: int, compress: int) -> Frames:
        """One frame, k [B, Hk, n, D], v [B, Hk, n, Dv], in its pieces."""
        k, v = (x.unflatten(2, (-1, compress)).transpose(2, 3) for x in (k, v))
        surprise = surprise[:, None].expand(-1, compress)
        return cls(k, v, torch.full_like(surprise, time, dtype=torch.int64), surprise,
                   torch.full_like(surprise, 1 / compress))  # fmt: skip

    def first(self, count: int) -> Frames:
        """The first pieces."""
        return Frames(*(x[:, :, :count] for x in (self.k, self.v)), *(x[:, :count] for x in self._rows))

    def rest(self, count: int) -> Frames:
        """All but the first pieces."""
        return Frames(*(x[:, :, count:] for x in (self.k, self.v)), *(x[:, count:] for x in self._rows))

    def joined(self, later: Frames) -> Frames:
        """These and later ones, without gaps between."""
        wide = [torch.cat(pair, 2) for pair in ((self.k, later.k), (self.v, later.v))]
        out = Frames(*wide, *(torch.cat(pair, 1) for pair in zip(self._rows, later._rows, strict=True)))
        return out.only(out.time >= 0)

    def only(self, keep: Bool[Tensor, "b p"]) -> Frames:
        """The pieces kept, in order; as many as the member with most of them has."""
        if bool(keep.all()):
            return self
        order = (~keep).to(torch.uint8).argsort(stable=True, dim=1)[:, : int(keep.sum(1).max())]
        time, *rows = (x.gather(1, order) for x in self._rows)
        none = ~keep.gather(1, order)

        def one(x: Tensor) -> Tensor:
            x = x.gather(2, order[:, None, :, None, None].expand(*x.shape[:2], -1, *x.shape[3:]))
            return x.masked_fill(none[:, None, :, None, None], 0.0)  # it may be NaN

        return Frames(one(self.k), one(self.v), time.masked_fill(none, -1), *rows)

    def pooled(self, which: Bool[Tensor, "b"]) -> Frames:
        """Of one whole frame: the mean of its pieces in the first one, for these members."""
        if not bool(which.any()):
            return self
        return self._gathered(which[:, None].expand_as(self.time), torch.zeros_like(self.time[:, :1]))

    def without_least(self, which: Bool[Tensor, "b"]) -> Frames:
        """The frame of least surprise is forgotten by these members; of several, the oldest."""
        least = self.surprise.masked_fill(self.time < 0, torch.inf).argmin(1, keepdim=True)
        return self.only((self.time >= 0) & ~((self.time == self.time.gather(1, least)) & which[:, None]))

    def merged(self, which: Bool[Tensor, "b"]) -> Frames:
        """The two neighbours in time whose larger surprise is least become one piece, for these members."""
        now, after = self.time[:, :-1], self.time[:, 1:]
        larger = torch.maximum(self.surprise[:, :-1], self.surprise[:, 1:])
        place = larger.masked_fill((after < 0) | (now == after), torch.inf).argmin(1, keepdim=True)
        both = (self.time == now.gather(1, place)) | (self.time == after.gather(1, place))
        return self._gathered(both & which[:, None], place)

    def tokens(self) -> tuple[Float[Tensor, "b hk n d"], Float[Tensor, "b hk n dv"], Bool[Tensor, "b n"]]:
        """Keys, values, and which are real."""
        return self.k.flatten(2, 3), self.v.flatten(2, 3), (self.time >= 0).repeat_interleave(self.k.shape[3], 1)

    def numbers(self) -> Int64[Tensor, "b p"]:
        """The number of each piece's frame among these; what is not real comes after all."""
        return (torch.diff(self.time, dim=1, prepend=self.time[:, :1]) != 0).cumsum(1)

    def means(self, number: Int64[Tensor, "b p"]) -> Float[Tensor, "b frames c"]:
        """The mean key of each frame, all heads side by side; NaN where there is none."""
        count = int(number.max()) + 1 if number.numel() else 0
        keys = self.k.mean(3).transpose(1, 2).flatten(2)
        real = (self.time >= 0).to(keys)
        total = keys.new_zeros(len(keys), count, keys.shape[2])
        total = total.scatter_add(1, number[..., None].expand_as(keys), keys)
        return total / keys.new_zeros(len(keys), count).scatter_add(1, number, real)[..., None]

    @property
    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.time, self.surprise, self.weight

    def _gathered(self, which: Bool[Tensor, "b p"], place: Int64[Tensor, "b 1"]) -> Frames:
        """The weighted mean of some pieces, of each member, at the place of one of them; the others are gone."""
        share = torch.where(which, self.weight, 0.0)
        total = share.sum(1, keepdim=True)
        target = which & (torch.arange(which.shape[1], device=which.device) == place)
        share = share / torch.where(total > 0, total, 1.0)

        def one(x: Tensor) -> Tensor:
            mine = torch.where(which[:, None, :, None, None], x, 0.0)  # what is not may be NaN
            mean = torch.einsum("bp,bhpmd->bhmd", share.to(x), mine)[:, :, None]
            return torch.where(target[:, None, :, None, None], mean, x)

        most = self.surprise.masked_fill(~which, -torch.inf).amax(1, keepdim=True)
        out = replace(
            self, k=one(self.k), v=one(self.v), surprise=torch.where(target, most, self.surprise),
            weight=torch.where(target, total, self.weight),
        )  # fmt: skip
        return out.only((self.time >= 0) & (target | ~which))


@dataclass(frozen=True)
class MemoryState(Carried):
    """The memory, the window after it, and how many frames have come."""

    memory: Frames
    window: Frames
    length: int

    @property
    def tokens(self) -> Int64[Tensor, "b"]:
        """Tokens that each member of the batch stores."""
        return sum((x.time >= 0).sum(1) * x.k.shape[3] for x in (self.memory, self.window))  # type: ignore[return-value]
