"""One stage of HPNet: what a token looks at, and the layers in which it does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chronotope.grid import Grid
from chronotope.nn.edges import EdgeAttention, neighbours
from chronotope.nn.feedforward import FeedForward
from chronotope.papers.spacetime.hpnet_poses import Poses, relative

Edges = tuple[Tensor, Tensor, Tensor]
"""Lists [N, E], features [B, N, E, C], and which there are [B, N, E]."""


@dataclass(frozen=True)
class Lanes:
    """Tokens [B, L, D] of pieces of road, and where they lie."""

    tokens: Float[Tensor, "b l d"]
    poses: Poses


class EdgeBlock(nn.Module):
    """x + A(LN x, LN source), then x + MLP(LN x); A sees edges of `features` numbers, after an MLP and LN."""

    def __init__(self, dim: int, heads: int, features: int, itself: bool = True):
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.source_norm = None if itself else nn.LayerNorm(dim)
        self.edge = nn.Sequential(mlp(features, dim, dim), nn.LayerNorm(dim)) if features else None
        self.attention = EdgeAttention(dim, heads, dim if features else None)
        self.mlp = FeedForward(dim, "gelu", 4)

    def forward(
        self, x: Tensor, source: Tensor, lists: Tensor, edges: Tensor | None, seen: Bool[Tensor, "b n e"]
    ) -> Float[Tensor, "b n c"]:
        """source: the tokens looked at. edges: features [B, N, E, features]."""
        source = (self.norm if self.source_norm is None else self.source_norm)(source)
        edges = None if self.edge is None or edges is None else self.edge(edges)
        x = x + self.attention(self.norm(x), source, lists, edges, seen)
        return x + self.mlp(self.mlp_norm(x))


class Stage(nn.Module):
    """Tokens from what the agents did and from lanes, then the three attentions, `layers` times."""

    def __init__(self, dim: int, heads: int, layers: int, span: int, radius: float, anchored: bool, history: bool):
        super().__init__()
        self.span, self.radius = span, radius
        self.own, self.lanes = (EdgeBlock(dim, heads, features, itself=False) for features in (6, 5))
        self.agents = nn.ModuleList(EdgeBlock(dim, heads, 5) for _ in range(layers))
        self.history = nn.ModuleList(EdgeBlock(dim, heads, 6) for _ in range(layers if history else 0))
        self.modes = nn.ModuleList(EdgeBlock(dim, heads, 5 if anchored else 0) for _ in range(layers))

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        grid: Grid,
        places: Poses,
        states: Poses,
        moved: Float[Tensor, "b s a c"],
        kept: tuple[Float[Tensor, "b p a k c"], ...],
        road: Lanes | None,
    ) -> tuple[Float[Tensor, "b n c"], tuple[Float[Tensor, "b s a k c"], ...]]:
        """Tokens of the new steps, and of each layer what later steps look at.

        grid: of the new tokens. places [B, S, A, K]: of all tokens, old and new; states [B, S, A] and moved: of the
        agents. kept: the old tokens of each layer.
        """
        x, mode = self.own(x, moved.flatten(1, 2), *self.own_edges(grid, places, states)), x
        if road is not None:
            x = x + self.lanes(mode, road.tokens, *self.lane_edges(grid, places, road.poses))
        edges, after = self.token_edges(grid, places), []
        for number, (agents, modes) in enumerate(zip(self.agents, self.modes, strict=True)):
            x = agents(x, x, *edges["v"])
            if self.history:
                history: EdgeBlock = self.history[number]  # type: ignore[assignment]
                after.append(torch.cat((kept[number], x.unflatten(1, grid.shape)), 1))
                x = history(x, after[-1].flatten(1, 3), *edges["t"])
            x = modes(x, x, *edges["k"])
        return x, tuple(after)

    def own_edges(self, grid: Grid, places: Poses, states: Poses) -> Edges:
        """To the states of the agent itself, up to now."""
        since = _since(grid, places)
        steps, people = states.heading.shape[1:]
        lists = neighbours(Grid(t=steps, v=people), "t").repeat_interleave(grid.sizes["k"], 0)[-grid.size :]
        seen, features = _look(grid, places, states.flat(1, 2), lists, -since)
        return lists, features, seen & (since >= 0) & (since <= self.span)

    def lane_edges(self, grid: Grid, places: Poses, road: Poses) -> Edges:
        """To the lanes that are near."""
        lists = torch.arange(road.heading.shape[1]).expand(grid.size, -1)
        seen, features = _look(grid, places, road, lists)
        return lists, features, seen & (features[..., 0] < self.radius)

    def token_edges(self, grid: Grid, places: Poses) -> dict[str, Edges]:
        """To the tokens that differ in one axis alone. Lists along v and k count new tokens, those along t all."""
        since, whole = _since(grid, places), grid.replace(t=places.heading.shape[1])
        start, out = whole.size - grid.size, {}
        itself = torch.arange(start, whole.size, device=since.device)[:, None]
        for axis in grid.axes:
            lists = neighbours(whole, axis)[start:]
            seen, features = _look(grid, places, places.flat(1, 3), lists, -since if axis == "t" else None)
            if axis == "t":
                out[axis] = lists, features, seen & (since > 0) & (since <= self.span)
                continue
            seen = seen & (lists.to(itself.device) != itself)
            out[axis] = lists - start, features, seen & (features[..., 0] < self.radius) if axis == "v" else seen
        return out


def mlp(enter: int, hidden: int, leave: int) -> nn.Sequential:
    """Two matrices, the first with a norm behind it."""
    return nn.Sequential(nn.Linear(enter, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, leave))


def _since(grid: Grid, places: Poses) -> Tensor:
    """Steps from each step to the step of each new token, [N, S]."""
    steps = torch.arange(places.heading.shape[1], device=places.heading.device)
    own = steps[-grid.shape[0] :].repeat_interleave(grid.size // grid.shape[0])
    return own[:, None] - steps


def _look(
    grid: Grid, places: Poses, to: Poses, lists: Tensor, interval: Tensor | None = None
) -> tuple[Bool[Tensor, "b n e"], Float[Tensor, "b n e c"]]:
    """Whether both ends of the edges from the new tokens are there, and what these see."""
    at, to = places.flat(1, 3).take(slice(-grid.size, None)).spread(1), to.take(lists)
    return at.seen & to.seen, relative(at, to, interval)
