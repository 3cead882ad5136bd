r"""I2XTraj: what all vehicles at a crossing with lights will do, as the roadside unit sees it: K forecasts of them all.

    lanes      l = W_l (role) * (1 + g(s)) + b(s)        s: colour of the light now, seconds until it changes
    tokens     h[a, t] = MLP(own motion) + W_z z_a;  h + A(h over lanes), edges: where a lane lies for the vehicle
    strategy   log p(c_1 .. c_A) = sum_a log softmax_c(W h[a, T], over the c in reach: z_a[c] = 1)
    proposals  the K likeliest (c_1 .. c_A) start the modes: x[a, t, m] = h[a, t] + E[c_a of the m-th]
    refine     in the order given, layer by layer:  time    same a and m       (causal where asked)
                                                    agents  same t and m       (edges: relative poses, mask [A, A])
                                                    modes   same a and t
    out        places = constant velocity + R offsets(x[a, T, m]),   p = softmax_m of a map of the mean over agents

Taught by the winner: the joint forecast nearest to what happened is drawn to it (Huber), its probability and that of
the strategies that were taken grow (cross-entropy).

Sizes: places [B, A, T, 2], lanes [B, L] -> forecasts [B, K, A, F, 2], probabilities [B, K]. Attention costs
O(A T K (T + A + K)) pairs, on Grid(t=T, v=A, m=K).

    >>> from chronotope.papers.spacetime.hpnet_poses import headings
    >>> model = I2XTraj(ahead=10, modes=6, dim=32)
    >>> places = torch.randn(2, 3, 6, 2).cumsum(2)
    >>> road = Road(torch.randn(2, 4, 2), torch.zeros(2, 4), torch.tensor([[0, 1, 1, 2]] * 2), torch.rand(2, 4, 4))
    >>> out = model(places, headings(places.transpose(1, 2)).transpose(1, 2), road)
    >>> out.places.shape, out.probability.shape, out.strategy.shape
    (torch.Size([2, 6, 3, 10, 2]), torch.Size([2, 6]), torch.Size([2, 3, 4]))

The K likeliest of a product are found agent by agent, keeping K: exact. Agents that are not `real` are seen by nobody.
Poses are those that somebody sees from where they are: moving and turning the world moves and turns the forecasts.

Not confirmed, and ours: all widths, the coding of the signal (three colours and seconds), the order (time, agents,
modes), independent strategies of the agents. There is no released code. Streaming: a window over T is run again.

Measured, two vehicles at a crossing of four arms, 600 steps of training, one seed: stopping and going are mistaken for
each other at the line in 0.076 of the cases, without the lights in 0.274; joint minADE of 4 forecasts 1.75 m, 2.77 m
where modes start from learned tokens of their own.

Left out: V2X-Seq, SinD, and the message to the vehicles.

Paper: Huilin Yin, Yangwenhui Xu, Jiaxiang Li, Hao Zhang, Gerhard Rigoll, "Knowledge-Informed Multi-Agent Trajectory
Prediction at Signalized Intersections for Infrastructure-to-Everything", 2025, arXiv 2501.13461.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, FeedForward
from chronotope.nn.edges import EdgeAttention, neighbours
from chronotope.papers.registry import paper
from chronotope.papers.spacetime.hpnet_poses import Poses, outwards, relative
from chronotope.patterns import along, causal

ROLES, COLOURS, STRATEGIES = 3, 3, 4
"""Approach, inside, exit; red, yellow, green; left, straight, right, stop."""


@dataclass(frozen=True)
class Road:
    """Lanes: place [B, L, 2], heading [B, L], role [B, L], signal [B, L, 4]: colour one-hot, seconds to the change."""

    place: Float[Tensor, "b l 2"]
    heading: Float[Tensor, "b l"]
    role: Int64[Tensor, "b l"]
    signal: Float[Tensor, "b l 4"]


@dataclass(frozen=True)
class Crossing:
    """Forecasts: places [B, K, A, F, 2], probability [B, K], strategy: log-probabilities [B, A, C]."""

    places: Float[Tensor, "b m a f 2"]
    probability: Float[Tensor, "b m"]
    strategy: Float[Tensor, "b a c"]


class AxialBlock(nn.Module):
    """x + A(LN x), then x + MLP(LN x): A along one axis; along v with edges of relative poses.

    Args:
        axis: "t", "v" or "m".
        causal_time: whether t looks back only.
        posed: whether v gets relative poses.
    """

    def __init__(self, dim: int, heads: int, axis: str, causal_time: bool = False, posed: bool = True):
        super().__init__()
        where = along(axis) & causal("t") if axis == "t" and causal_time else along(axis)
        self.axis, self.posed = axis, posed and axis == "v"
        self.along = None if axis == "v" else Attention(dim, heads, where=where)
        self.among = EdgeAttention(dim, heads, dim if posed else None) if axis == "v" else None
        self.edge = nn.Sequential(nn.Linear(5, dim), nn.GELU(), nn.Linear(dim, dim)) if self.posed else None
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mlp = FeedForward(dim, "gelu", 2)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, poses: Poses, seen: Bool[Tensor, "b a a"]
    ) -> Float[Tensor, "b n c"]:
        """All tokens. poses: of each token, [B, N]. seen: which agent sees which."""
        y = self.norms[0](x)
        if self.along is not None:
            x = x + self.along(y, grid)
        elif self.among is not None:
            lists = neighbours(grid, "v")
            own = (grid.coords()[:, grid.axes.index("v")]).to(x.device)
            edges = None if self.edge is None else self.edge(relative(poses.spread(1), poses.take(lists)))
            x = x + self.among(y, y, lists, edges, seen[:, own])
        return x + self.mlp(self.norms[1](x))


@paper(
    system=172,
    name="I2XTraj",
    family="model",
    claim="lights modulate what lanes tell, likely manoeuvres seed joint forecasts, time, agents and modes refine them",
    evidence=["tests/papers/model/test_i2xtraj.py", "tests/nn/test_edge_attention.py"],
)
class I2XTraj(nn.Module):
    """The model.

    Args:
        ahead, modes: F and K.
        dim, heads, layers: of the refinement.
        order: axes of one layer.
        seeded: whether modes start from strategies; else from learned tokens of their own.
        causal_time: whether time looks back only.
    """

    def __init__(
        self,
        ahead: int = 10,
        modes: int = 6,
        dim: int = 32,
        heads: int = 4,
        layers: int = 2,
        order: Sequence[str] = ("t", "v", "m"),
        seeded: bool = True,
        causal_time: bool = False,
    ):
        super().__init__()
        if not set(order) <= {"t", "v", "m"} or not 1 <= modes <= STRATEGIES**2 or ahead < 1:
            raise ChronotopeError(
                f"I2XTraj(ahead={ahead}, modes={modes}, order={tuple(order)}): expected ahead from 1 on, 1 to "
                f"{STRATEGIES**2} modes, and an order of 't', 'v', 'm'."
            )
        self.ahead, self.modes, self.seeded = ahead, modes, seeded
        self.motion = nn.Sequential(nn.Linear(6, dim), nn.GELU(), nn.Linear(dim, dim))
        self.role, self.light = nn.Embedding(ROLES, dim), nn.Linear(COLOURS + 1, 2 * dim)
        self.lane_edge = nn.Sequential(nn.Linear(5, dim), nn.GELU(), nn.Linear(dim, dim))
        self.lanes, self.lane_norm = EdgeAttention(dim, heads, dim), nn.LayerNorm(dim)
        self.zone = nn.Linear(STRATEGIES, dim, bias=False)
        self.strategy, self.seed = nn.Linear(dim, STRATEGIES), nn.Embedding(STRATEGIES if seeded else modes, dim)
        self.blocks = nn.ModuleList(AxialBlock(dim, heads, axis, causal_time) for _ in range(layers) for axis in order)
        self.norm, self.offsets, self.choose = nn.LayerNorm(dim), nn.Linear(dim, 2 * ahead), nn.Linear(dim, 1)

    def forward(
        self,
        places: Float[Tensor, "b a t 2"],
        ways: Float[Tensor, "b a t"],
        road: Road,
        zone: Bool[Tensor, "b a c"] | None = None,
        real: Bool[Tensor, "b a"] | None = None,
    ) -> Crossing:
        """The forecasts. ways: headings. zone: strategies in reach of each agent; real: who is there; None: all."""
        batch, agents, steps = ways.shape
        real = torch.ones_like(ways[..., 0], dtype=torch.bool) if real is None else real
        places, ways = torch.where(real[..., None, None], places, 0.0), torch.where(real[..., None], ways, 0.0)
        # Time first: the axis along which a window streams.
        states = Poses(places.transpose(1, 2), ways.mT, real[:, None].expand(-1, steps, -1))
        zone = torch.ones(batch, agents, STRATEGIES, dtype=torch.bool, device=ways.device) if zone is None else zone
        h = self._encode(states, zone, road)
        strategy = self.strategy(h[:, -1]).masked_fill(~zone, -torch.inf).log_softmax(-1)
        x = h[:, :, :, None] + self._seeds(strategy, real)[:, None]
        grid = Grid(t=steps, v=agents, m=self.modes)
        poses, x = states.spread(self.modes).flat(1, 3), x.flatten(1, 3)
        for block in self.blocks:
            x = block(x, grid, poses, real[:, None].expand(-1, agents, -1))
        last = self.norm(x).unflatten(1, grid.shape)[:, -1].transpose(1, 2)  # [B, K, A, C]
        share = real[:, None, :, None] / real.sum(1).clamp(min=1)[:, None, None, None]
        probability = self.choose((last * share).sum(2))[..., 0].softmax(-1)
        return Crossing(self._places(last, states), probability, strategy)

    def loss(
        self,
        out: Crossing,
        future: Float[Tensor, "b a f 2"],
        taken: Int64[Tensor, "b a"],
        real: Bool[Tensor, "b a"] | None = None,
    ) -> Float[Tensor, ""]:
        """Huber of the nearest joint forecast, and cross-entropies of its number and of the strategies `taken`."""
        real = torch.ones_like(taken, dtype=torch.bool) if real is None else real
        future = torch.where(real[..., None, None], future, 0.0)
        miss = ((out.places - future[:, None]).norm(dim=-1).mean(-1) * real[:, None]).sum(-1)
        best = miss.argmin(1)
        rows = torch.arange(len(best), device=best.device)
        error = F.smooth_l1_loss(out.places[rows, best], future, reduction="none").sum(-1)[real].mean()
        strategy = -out.strategy.gather(2, taken[..., None])[..., 0][real].mean()
        return error - out.probability[rows, best].clamp(min=1e-9).log().mean() + strategy

    def _encode(self, states: Poses, zone: Bool[Tensor, "b a s"], road: Road) -> Float[Tensor, "b t a c"]:
        """What each agent did at each step, in its last frame, what is in its reach, and what lanes tell it."""
        now = Poses(states.place[:, -1:], states.heading[:, -1:], states.seen[:, -1:])
        pace = states.place.diff(dim=1, prepend=states.place[:, :1]).norm(dim=-1, keepdim=True)
        back = relative(now, states)
        h = self.motion(torch.cat((back, pace), -1)) + self.zone(zone.to(pace.dtype))[:, None]
        gain, shift = self.light(road.signal).chunk(2, -1)
        lanes = self.role(road.role) * (1 + gain) + shift
        rows = torch.arange(lanes.shape[1], device=lanes.device).expand(h[0, ..., 0].numel(), -1)
        lane = Poses(road.place, road.heading, torch.ones_like(road.heading, dtype=torch.bool))
        edges = self.lane_edge(relative(states.flat(1, 2).spread(1), lane.take(rows)))
        told = self.lanes(self.lane_norm(h.flatten(1, 2)), lanes, rows, edges)
        return h + told.unflatten(1, h.shape[1:3])

    def _seeds(self, strategy: Float[Tensor, "b a s"], real: Bool[Tensor, "b a"]) -> Float[Tensor, "b a m c"]:
        if not self.seeded:
            return self.seed.weight.expand(*real.shape, -1, -1)
        return self.seed(likeliest(strategy.detach(), real, self.modes))

    def _places(self, x: Float[Tensor, "b m a c"], states: Poses) -> Float[Tensor, "b m a f 2"]:
        now = Poses(states.place[:, -1:], states.heading[:, -1:], states.seen[:, -1:])
        step = states.place[:, -1] - states.place[:, -2]
        count = torch.arange(1, self.ahead + 1, device=x.device, dtype=x.dtype)[:, None]
        turned = outwards(self.offsets(x).unflatten(-1, (self.ahead, 2)), now)
        return turned + (count * step[:, :, None])[:, None]


def likeliest(strategy: Float[Tensor, "b a c"], real: Bool[Tensor, "b a"], count: int) -> Int64[Tensor, "b a m"]:
    """The `count` likeliest choices of all agents together, the best first; where there are fewer, again from the best.

    strategy: log-probabilities, of agents that choose for themselves. Agents that are not real choose the first.
    """
    batch, agents, choices = strategy.shape
    first = strategy.new_full((choices,), -torch.inf)
    first[0] = 0.0
    strategy = torch.where(real[..., None], strategy, first)
    total, taken = strategy.new_zeros(batch, 1), torch.zeros(batch, 0, 1, dtype=torch.int64, device=strategy.device)
    for agent in range(agents):
        joint = (total[:, :, None] + strategy[:, agent, None]).flatten(1)
        total, best = joint.topk(min(count, joint.shape[1]), dim=1)
        before = taken.gather(2, (best // choices)[:, None].expand(-1, agent, -1))
        taken = torch.cat((before, (best % choices)[:, None]), 1)
    possible = total.isfinite().sum(1, keepdim=True).clamp(min=1)
    again = torch.arange(count, device=strategy.device) % possible
    return taken.gather(2, again[:, None].expand(-1, agents, -1))
