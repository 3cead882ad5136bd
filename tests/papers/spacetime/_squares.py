"""Clips of a square that moves and bounces, for the trained evidence of several pages."""

import torch
from torch import Tensor


def bouncing(count: int, frames: int, side: int, generator: torch.Generator, square: int = 3) -> Tensor:
    """[count, frames, 1, side, side], 1 in the square and -1 elsewhere; it moves by 1 place a frame on each axis, and
    turns back at the border."""
    return draw(paths(count, frames, side, generator, square), side, square)


def paths(count: int, frames: int, side: int, generator: torch.Generator, square: int = 3) -> Tensor:
    """[count, frames, 2]: the upper left corners of such squares."""
    room = side - square
    place = torch.randint(room + 1, (count, 2), generator=generator)
    speed = 2 * torch.randint(2, (count, 2), generator=generator) - 1
    return follow(place, speed, frames, room)


def follow(place: Tensor, speed: Tensor, frames: int, room: int) -> Tensor:
    """[B, frames, 2]: places from the first one on, kept within 0 .. room by turning back."""
    places = []
    for _ in range(frames):
        places.append(place)
        speed = torch.where((place + speed < 0) | (place + speed > room), -speed, speed)
        place = place + speed
    return torch.stack(places, 1)


def draw(places: Tensor, side: int, square: int = 3) -> Tensor:
    """Clips of squares whose upper left corners are at places [B, T, 2]."""
    spread = torch.arange(side) - places[..., None]  # [B, T, 2, side]
    inside = (spread >= 0) & (spread < square)
    return 2 * (inside[:, :, 0, :, None] & inside[:, :, 1, None, :]).float()[:, :, None] - 1


def found(clips: Tensor, square: int = 3) -> tuple[Tensor, Tensor]:
    """The places [B, T, 2] of the squares nearest to frames, and the mean squared distance [B, T] of the frames."""
    side = clips.shape[-1]
    corners = torch.cartesian_prod(torch.arange(side - square + 1), torch.arange(side - square + 1))
    every = draw(corners[:, None], side, square).flatten(1)
    far = torch.cdist(clips.flatten(2).flatten(0, 1), every).square().div(side**2)
    least, which = far.min(1)
    return corners[which].unflatten(0, clips.shape[:2]), least.view(clips.shape[:2])
