"""Recordings as sets of channels, with labels of several scales, and masks of units of one scale (BaRISTA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from chronotope.errors import ChronotopeError

Scale = Literal["channel", "parcel", "lobe"]


@dataclass(frozen=True)
class SpaceTimeSet:
    """Signals x [B, C, T], of each scale the labels [B, C, K] of its channels, and which channels are `real` [B, C].

    The order of channels means nothing. K is 1 for parcels and lobes, 3 for coordinates counted in steps.
    """

    x: Float[Tensor, "b c t"]
    labels: Mapping[str, Int64[Tensor, "b c _"]]
    real: Bool[Tensor, "b c"] | None = None

    def at(self, scale: str) -> Int64[Tensor, "b c _k"]:
        """The labels of a scale."""
        if scale not in self.labels:
            raise ChronotopeError(f"no labels for the scale {scale!r}; given are those of {', '.join(self.labels)}.")
        return self.labels[scale]

    @property
    def there(self) -> Bool[Tensor, "b c"]:
        """Which channels there are."""
        shape, device = self.x.shape[:2], self.x.device
        return torch.ones(shape, dtype=torch.bool, device=device) if self.real is None else self.real


def scale_mask(
    data: SpaceTimeSet, patches: int, ratio: float, scale: Scale, span: int | None = None
) -> Bool[Tensor, "b c p"]:
    """Which tokens are masked: units in random order, while they fit into ratio * channels.

    The first that does not fit is taken with the probability that makes the mean share of masked channels the ratio.

    Args:
        data: whose labels say which channels are one unit; at the scale "channel" each is one.
        patches: P.
        ratio, scale: the share of channels, and of what.
        span: patches after which units are drawn anew; default: a unit is masked in all patches.
    """
    span = patches if span is None else span
    if not 0 <= ratio <= 1 or span < 1:
        raise ChronotopeError(f"scale_mask(ratio={ratio}, span={span}): expected a ratio of 0 to 1, a span from 1 on.")
    there, (batch, channels) = data.there, data.x.shape[:2]
    if scale == "channel":
        same = torch.eye(channels, dtype=torch.bool, device=there.device).expand(batch, -1, -1)
    else:
        labels = data.at(scale)
        same = (labels[:, :, None] == labels[:, None]).all(-1)
    draws = -(-patches // span)
    rank = torch.rand(batch, draws, channels, device=there.device)
    rank = rank.gather(2, same.int().argmax(2)[:, None].expand_as(rank))  # of the first channel of its unit
    before = ((rank[..., None, :] < rank[..., None]) & there[:, None, None]).sum(3)
    size = (same & there[:, None]).sum(2)[:, None]
    wanted = ratio * there.sum(1)[:, None, None]
    chance = torch.rand(batch, draws, 1, device=there.device)
    taken = (before + chance * size < wanted) & there[:, None]
    return taken.repeat_interleave(span, 1)[:, :patches].mT
