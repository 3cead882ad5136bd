"""Place memories filled by walks through 16 rooms, for the tests of the Spatially-Aware Transformer."""

import torch

from chronotope.papers.memory.spatially_aware import PlaceMemory


def plain(capacity, places, **options):
    """A memory without a reader, whose tokens are one number wide."""
    return PlaceMemory(2, capacity, places, layers=0, **options)


def filled(memory, places, policy=None):
    """The state after tokens in these places, [B, T], at times 0, 1, ..."""
    state = memory.init_state(len(places))
    for time, place in enumerate(places.T):
        x = torch.zeros(len(places), memory.dim)
        state = memory.write(state, x, torch.full_like(place, time), place, policy)
    return state


ROOMS, STEPS, CAPACITY = 16, 512, 32


def walk(batch, generator, steps=STEPS):
    """A random walk on a 4 x 4 grid of rooms whose visits follow Zipf's law, [B, steps].

    A Metropolis walk: a neighbour is proposed and taken with probability min(1, share of it / share of here).
    """
    popularity = 1.0 / (1 + torch.rand(batch, ROOMS, generator=generator).argsort(1))
    moves = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])
    at = torch.randint(4, (batch, 2), generator=generator)
    out = []
    for _ in range(steps):
        room = at[:, 0] * 4 + at[:, 1]
        out.append(room)
        there = at + moves[torch.randint(4, (batch,), generator=generator)]
        inside = ((there >= 0) & (there < 4)).all(1)
        next_room = (there.clamp(0, 3) * torch.tensor([4, 1])).sum(1)
        ratio = (popularity.gather(1, next_room[:, None]) / popularity.gather(1, room[:, None]))[:, 0]
        taken = inside & (torch.rand(batch, generator=generator) < ratio)
        at = torch.where(taken[:, None], there, at)
    return torch.stack(out, 1)


def last_visits(rooms):
    """The time of the last visit of every room, -1 where it was never visited, [B, ROOMS]."""
    steps = torch.arange(rooms.shape[1]).expand_as(rooms)
    return torch.full((len(rooms), ROOMS), -1).scatter_reduce(1, rooms, steps, "amax")
