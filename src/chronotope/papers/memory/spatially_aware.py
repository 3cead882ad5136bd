"""Spatially-Aware Transformer: an agent's memory that knows where each thing was seen, and is read place by place.

A token x seen at time t in place p is read as m = x + code(t) + code(p), sinusoidal codes. Memories are cut in chunks
C_1, C_2, ... of at most L, in order of writing or, place by place, so that no chunk has tokens of two places. A query q
reads, with s_i the mean of chunk i and T(q) the chunks of the largest scores a_i = (W_q q) . (W_k s_i) / sqrt(C),

    y = sum_{i in T(q)} softmax_{i in T(q)}(a)_i  attention(q, C_i, C_i)

and a chunk of masked tokens only has weight 0. A full memory forgets by one of four strategies: `fifo`, the oldest;
`lifo`, the newest, which is the one that comes; `mvfo` (`lvfo`), the oldest of the place that holds the most (fewest)
memories. Which one, a small network learns for each task from rewards r: Q(task)[strategy] -> r.

Sizes: x [B, C], queries [B, N, C] -> [B, N, C]. A write costs O(capacity); a read O(M C + top L C) for each of N
queries over M chunks. State: capacity tokens with time, place and number of the write; its size is fixed.

    >>> memory = PlaceMemory(64, capacity=32, places=16, per_place=2, layers=1)
    >>> state = memory.init_state(batch=1)
    >>> for time in range(3):
    ...     state = memory.write(state, torch.randn(1, 64), torch.tensor([time]), torch.tensor([time % 2]))
    >>> memory.read(torch.randn(1, 5, 64), state).shape
    torch.Size([1, 5, 64])

Left out: encoders, the clustering of coordinates into places, and the results on Room Ballet, FFHQ and Miniworld. Not
a `Mixer`: where a token belongs is not a coordinate of a grid but comes with the token. The released code counts times
down from the end of the clip, which a stream does not know, and lets padding be seen where it is given no mask; here
times count up and padding is never seen. As there, visits are counted among what is stored, and of equally visited
places the one of the lowest number goes.

Paper: Cho, Yoon and Ahn 2024, "Spatially-Aware Transformer for Embodied Agents", arXiv 2402.15160.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.papers.memory.spatially_aware_reader import ReaderLayer
from chronotope.papers.registry import paper

POLICIES = ("fifo", "lifo", "mvfo", "lvfo")


def code(x: Int[Tensor, "..."], dim: int) -> Float[Tensor, "... dim"]:
    """sin and cos of x at dim / 2 speeds from 1 down to 1 / 10000."""
    speed = 10000.0 ** (-torch.arange(0, dim, 2, device=x.device) / dim)
    angle = x[..., None] * speed
    return torch.cat((angle.sin(), angle.cos()), -1)


@dataclass(frozen=True)
class PlaceState(Carried):
    """What is remembered, in slots: x without codes, time, place (-1: the slot is free), and number of the write.

    `written [B]`: writes so far, those dropped at once among them.
    """

    x: Float[Tensor, "b m c"]
    time: Int[Tensor, "b m"]
    place: Int[Tensor, "b m"]
    order: Int[Tensor, "b m"]
    written: Int[Tensor, "b"]


@paper(
    system=28,
    name="Spatially-Aware Transformer",
    family="memory",
    claim="an agent's memory of fixed size, kept and read place by place, that learns which memories to drop",
    evidence=[
        "tests/papers/memory/test_spatially_aware.py",
        "tests/papers/memory/test_spatially_aware_learning.py",
    ],
)
class PlaceMemory(nn.Module):
    """A memory of `capacity` tokens, each with its time and place, and its reader.

    Args:
        dim: channels of tokens and queries.
        capacity: tokens held at most.
        places: number of places.
        per_place: tokens held of one place at most, its oldest going first; None: no limit.
        by: "place" (each chunk of one place) or "time" (chunks in order of writing).
        policy: what a full memory forgets, one of `POLICIES`; `write` may say another for each member of the batch.
        learned_places: whether the codes of places, sinusoidal at first, are weights; the sinusoidal ones of rooms
            next to each other are alike, and easily taken for times.
        layers: reader layers.
        heads, chunk: as for `HierarchicalChunkAttention`.
    """

    def __init__(
        self,
        dim: int,
        capacity: int,
        places: int,
        per_place: int | None = None,
        by: str = "place",
        policy: str = "fifo",
        learned_places: bool = False,
        layers: int = 4,
        heads: int = 2,
        chunk: int = 32,
    ):
        super().__init__()
        if dim % 2 or capacity < 1 or places < 1 or by not in ("place", "time") or policy not in POLICIES:
            raise ChronotopeError(
                f"PlaceMemory(dim={dim}, capacity={capacity}, places={places}, by={by!r}, policy={policy!r}): expected "
                f"an even dim, sizes of 1 or more, by='place' or 'time', and a policy of {', '.join(POLICIES)}."
            )
        self.dim, self.capacity, self.places = dim, capacity, places
        self.per_place = capacity if per_place is None else per_place
        self.by, self.policy, self.chunk = by, policy, chunk
        self.place = nn.Embedding(places, dim, _weight=code(torch.arange(places), dim))
        self.place.requires_grad_(learned_places)
        self.layers = nn.ModuleList(ReaderLayer(dim, heads, chunk) for _ in range(layers))

    def init_state(self, batch: int) -> PlaceState:
        """A memory of nothing."""
        weight = self.place.weight
        slots = torch.full((batch, self.capacity), -1, device=weight.device)
        x = weight.new_zeros(batch, self.capacity, self.dim)
        return PlaceState(x, slots, slots.clone(), slots.clone(), slots.new_zeros(batch))

    def write(
        self,
        state: PlaceState,
        x: Float[Tensor, "b c"],
        time: Int[Tensor, "b"],
        place: Int[Tensor, "b"],
        policy: str | Int[Tensor, "b"] | None = None,
    ) -> PlaceState:
        """The memory after one more token of each member. `policy`: a name, or numbers in `POLICIES`."""
        if bool(((place < 0) | (place >= self.places)).any()):
            raise ChronotopeError(f"place={place.tolist()}: expected numbers from 0 to {self.places - 1}.")
        if not isinstance(policy, Tensor):
            if policy is not None and policy not in POLICIES:
                raise ChronotopeError(
                    f"policy={policy!r}: expected one of {', '.join(POLICIES)}, or their numbers [B]."
                )
            policy = torch.full_like(place, POLICIES.index(policy or self.policy))
        slot, kept = self._slot(state, place, policy)
        here = (torch.arange(self.capacity, device=x.device) == slot[:, None]) & kept[:, None]
        return PlaceState(
            torch.where(here[..., None], x[:, None], state.x),
            torch.where(here, time[:, None], state.time),
            torch.where(here, place[:, None], state.place),
            torch.where(here, state.written[:, None], state.order),
            state.written + 1,
        )

    def _slot(self, state: PlaceState, place: Tensor, policy: Tensor) -> tuple[Int[Tensor, "b"], Bool[Tensor, "b"]]:
        """The slot to write to, and whether the token is kept at all."""
        held = state.place >= 0
        visits = place.new_zeros(len(place), self.places).scatter_add(1, state.place.clamp(min=0), held.long())
        most = visits.argmax(1)
        fewest = visits.masked_fill(visits == 0, self.capacity + 1).argmin(1)
        goes = torch.stack((held, held, state.place == most[:, None], state.place == fewest[:, None]), 1)
        goes = goes[torch.arange(len(place), device=place.device), policy]
        same = state.place == place[:, None]
        crowded, full = same.sum(1) >= self.per_place, held.all(1)
        goes = torch.where(crowded[:, None], same, torch.where(full[:, None], goes, ~held))
        oldest = state.order.masked_fill(~goes, torch.iinfo(torch.int64).max).argmin(1)
        return oldest, crowded | ~full | (policy != POLICIES.index("lifo"))

    def chunks(self, state: PlaceState) -> tuple[Float[Tensor, "b n c"], Bool[Tensor, "b n"]]:
        """The tokens with their codes, chunk after chunk, and which of them are there."""
        held = state.place >= 0
        # Codes are added here and not on writing, so that learned ones get gradients from every read.
        x = state.x + code(state.time, self.dim).to(state.x.dtype) + self.place(state.place.clamp(min=0))
        x = x * held[..., None]
        last = torch.iinfo(torch.int64).max
        if self.by == "time":
            ranks = state.order.masked_fill(~held, last).argsort(1)
            return x.gather(1, ranks[..., None].expand_as(x)), held.gather(1, ranks)
        same = (state.place[:, :, None] == state.place[:, None]) & held[:, None]
        rank = (same & (state.order[:, None] < state.order[:, :, None])).sum(2)
        visits = state.place.new_zeros(len(rank), self.places).scatter_add(1, state.place.clamp(min=0), held.long())
        needed = (visits + self.chunk - 1) // self.chunk
        start = (needed.cumsum(1) - needed).gather(1, state.place.clamp(min=0)) * self.chunk
        size = max(int(needed.sum(1).max()), 1) * self.chunk
        # Free slots all go to one place past the end, which is cut off.
        index = torch.where(held, start + rank, size)
        tokens = x.new_zeros(len(rank), size + 1, self.dim)
        tokens = tokens.scatter(1, index[..., None].expand_as(x), x)
        return tokens[:, :size], held.new_zeros(len(rank), size + 1).scatter(1, index, held)[:, :size]

    def read(self, q: Float[Tensor, "b n c"], state: PlaceState, topk_chunks: int = 4) -> Float[Tensor, "b n c"]:
        """The queries after all layers of the reader."""
        memory, there = self.chunks(state)
        for layer in self.layers:
            q = layer(q, memory, there, topk_chunks)
        return q


class AdaptiveAllocator(nn.Module):
    """Q(task) -> the value of each strategy of `POLICIES`, learned as a bandit with reward = minus the task's loss.

    loss = mean (Q(task)[choice] - reward)^2; the paper adds it to the task's loss with weight 0.1.
    """

    def __init__(self, tasks: int, hidden: int = 64):
        super().__init__()
        self.tasks = tasks
        self.q = nn.Sequential(nn.Linear(tasks, hidden), nn.ReLU(), nn.Linear(hidden, len(POLICIES)))

    def forward(self, task: Int[Tensor, "b"]) -> Float[Tensor, "b policies"]:
        """The values of the strategies."""
        return self.q(F.one_hot(task, self.tasks).float())  # type: ignore[no-any-return]

    @staticmethod
    def epsilon(step: int, start: float = 1.0, end: float = 0.2, steps: int = 200_000) -> float:
        """The share of random choices: from `start` to `end` in a line."""
        return max(end, start - (start - end) * step / steps)

    def choose(
        self, task: Int[Tensor, "b"], epsilon: float = 0.0, generator: torch.Generator | None = None
    ) -> Int[Tensor, "b"]:
        """The best strategy of each task, or with probability epsilon any: what `PlaceMemory.write` takes."""
        best = self(task).argmax(1)
        chance = torch.rand(best.shape, generator=generator, device=best.device)
        other = torch.randint(len(POLICIES), best.shape, generator=generator, device=best.device)
        return torch.where(chance < epsilon, other, best)

    def loss(self, task: Int[Tensor, "b"], choice: Int[Tensor, "b"], reward: Float[Tensor, "b"]) -> Float[Tensor, ""]:
        """The bandit loss of what was chosen."""
        return (self(task).gather(1, choice[:, None])[:, 0] - reward.detach()).square().mean()
