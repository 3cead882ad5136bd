"""Places and headings, and what they look like to each other: of HPNet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from chronotope.carried import Carried


@dataclass(frozen=True)
class Poses(Carried):
    """Where somebody is and heads, and whether they were seen: place [..., 2], heading [...], seen [...]."""

    place: Float[Tensor, "*n 2"]
    heading: Float[Tensor, "*n"]
    seen: Bool[Tensor, "*n"]

    def flat(self, start: int, end: int) -> Poses:
        """Some axes as one."""
        return Poses(*(part.flatten(start, end) for part in vars(self).values()))

    def take(self, index: Tensor | slice) -> Poses:
        """Some of the second axis."""
        return Poses(*(part[:, index] for part in vars(self).values()))

    def join(self, later: Poses) -> Poses:
        """These and those, along the second axis."""
        return Poses(*(torch.cat(parts, 1) for parts in zip(vars(self).values(), vars(later).values(), strict=True)))

    def spread(self, count: int) -> Poses:
        """Each so many times, along a new last axis of agents: [..., count]."""
        place = self.place[..., None, :].expand(*self.place.shape[:-1], count, -1)
        heading, seen = (part[..., None].expand(*part.shape, count) for part in (self.heading, self.seen))
        return Poses(place, heading, seen)


def relative(at: Poses, to: Poses, interval: Int64[Tensor, "..."] | None = None) -> Float[Tensor, "*n c"]:
    """Where `to` is, as seen from `at`: distance, cosine and sine of the bearing and of the turn; the interval."""
    way = to.place - at.place
    bearing, turn = torch.atan2(way[..., 1], way[..., 0]) - at.heading, to.heading - at.heading
    distance = way.norm(dim=-1)
    # Who stands at the same place has no bearing: whatever the angle of nothing is, it would not turn with the world.
    far = distance > 1e-6
    parts = [distance, bearing.cos() * far, bearing.sin() * far, turn.cos(), turn.sin()]
    parts = [part.expand(distance.shape) for part in parts]
    return torch.stack(parts if interval is None else [*parts, interval.to(distance).expand(distance.shape)], -1)


def headings(places: Float[Tensor, "b h a 2"]) -> Float[Tensor, "b h a"]:
    """Where agents came from a step ago, turned around; of the first step, where they go."""
    way = places.diff(dim=1)
    way = torch.cat((way[:, :1], way), 1)
    return torch.atan2(way[..., 1], way[..., 0])


def frame(heading: Tensor) -> Float[Tensor, "*n 2 2"]:
    """Rows: ahead, and to the left."""
    cos, sin = heading.cos(), heading.sin()
    return torch.stack((torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)), -2)


def outwards(x: Float[Tensor, "*n f 2"], at: Poses) -> Float[Tensor, "*n f 2"]:
    """Places in the frame of a pose -> in the world."""
    return x @ frame(at.heading) + at.place[..., None, :]


def inwards(x: Float[Tensor, "*n f 2"], at: Poses) -> Float[Tensor, "*n f 2"]:
    """Places in the world -> in the frame of a pose."""
    return (x - at.place[..., None, :]) @ frame(at.heading).mT
