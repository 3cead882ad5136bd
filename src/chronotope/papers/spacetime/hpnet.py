r"""HPNet: what was predicted a moment ago is a token too, and a prediction looks at the predictions before it.

A token m[h, a, k] for each past step h, agent a and mode k, on Grid(t=H, v=A, k=K). It starts as the learned token of
its mode, which looks at the agent's own states of the last `span` steps and at lanes. Then, layer by layer,

    agents    over the other agents within `radius`:    same h and k
    history   over the earlier steps h - span <= h' < h:  same a and k
    modes     over the other modes:                      same h and a

each x + A(LN x), then x + MLP(LN x), where A is `EdgeAttention`: keys and values get W e, e = MLP of the distance, the
bearing and the difference of headings as the receiver sees them (in history also h' - h).

    stage 1   proposal[h, a, k] = MLP(m), F places in the frame of the agent at h
    stage 2   m = MLP(proposal), a token that lies in the middle of its proposal and heads where that heads; the same
              again, where modes have edges too; proposal + MLP(m), and the probabilities softmax_k MLP(m)

$$
L = \mathrm{Huber}(\mathrm{proposal}_{k^*}) + \mathrm{Huber}(\mathrm{refined}_{k^*}) - \log p_{k^*}, \qquad
k^* = \arg\min_k \sum_f |\mathrm{proposal}_k[f] - g[f]|
$$

over all h. The places of stage 2 and the m from which the probabilities are made are cut off from gradients.

Sizes: places [B, H, A, 2], headings [B, H, A] -> proposals and refined [B, H, A, K, F, 2], probabilities [B, H, A, K].
O(H A K (A + span + K)) pairs.

    >>> from chronotope.papers.spacetime.hpnet_poses import headings
    >>> model = HPNet(ahead=12, modes=6, dim=32, heads=4, radius=10.0)
    >>> places = torch.randn(2, 8, 3, 2).cumsum(1)
    >>> out = model(places, headings(places))
    >>> out.refined.shape, out.probability.shape
    (torch.Size([2, 8, 3, 6, 12, 2]), torch.Size([2, 8, 3, 6]))
    >>> state = model.init_state(2, agents=3)
    >>> now, state = model.step(places[:, 0], headings(places)[:, 0], state)
    >>> bool((now.refined - out.refined[:, :1]).abs().max() < 1e-4)
    True

Streaming: the state keeps poses, tokens and anchors of the last `span` steps; a step computes its own tokens alone, and
equals `forward` on all steps so far. A window of the last steps, run again, does not: a token that is kept has seen
further back. Moving and turning the world moves and turns the forecasts.

Measured, agents on circles and lines seen with noise, dim 16, one seed, with history and without: after 500, 800, 1200
steps of training minFDE is 1.67 and 1.81 m, 1.49 and 1.59 m, 1.41 and 1.43 m; the likeliest forecast of one moment
moves from step to step by 1.83 and 2.30 m, 1.71 and 1.32 m, 1.52 and 1.45 m: nearer, and no steadier.

Here and not in the paper: angles enter as cosine and sine, since those of straight motion lie where an angle jumps;
the MLPs of tokens have gelu for ReLU.
The released code (XiaolongTang23/HPNet at e26eef9) adds attention to LN x where this page adds it to x; its attention
with the weights of this page, on the same edges: largest difference 2.4e-7, of values up to 1.7. It shares the MLPs of
edges between the stages.

Left out: the encoder of lanes, which come as tokens; Argoverse and INTERACTION (released: validation minFDE 0.8708).

Paper: Xiaolong Tang, Meina Kan, Shiguang Shan, Zhilong Ji, Jinfeng Bai, Xilin Chen, "HPNet: Dynamic Trajectory
Forecasting with Historical Prediction Attention", 2024, arXiv 2404.06351.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper
from chronotope.papers.spacetime.hpnet_poses import Poses, inwards, outwards
from chronotope.papers.spacetime.hpnet_stage import Lanes, Stage, mlp


@dataclass(frozen=True)
class Forecasts:
    """For each step, agent and mode: proposal and refined [B, H, A, K, F, 2], probability [B, H, A, K]."""

    proposal: Float[Tensor, "b h a k f 2"]
    refined: Float[Tensor, "b h a k f 2"]
    probability: Float[Tensor, "b h a k"]


@dataclass(frozen=True)
class Past(Carried):
    """What a step needs of the steps before it.

    poses: of the agents, [B, P, A]. moved: embedded lengths of their steps [B, P, A, D]. tokens: what the history
    attention of each layer looks at, [B, P, A, K, D]. anchors: of the second stage, [B, P, A, K].
    """

    poses: Poses
    moved: Float[Tensor, "b p a d"]
    tokens: tuple[Float[Tensor, "b p a k d"], ...]
    anchors: Poses


@paper(
    system=78,
    name="HPNet",
    family="spacetime",
    claim="predictions of past steps are tokens: attention over agents, over earlier predictions, over modes",
    evidence=["tests/papers/spacetime/test_hpnet.py", "tests/nn/test_edge_attention.py"],
    missing="forecasts 20% steadier with history than without at equal minFDE: on circles and lines they move 5% more "
    "(1.52 against 1.45 m, minFDE 1.41 against 1.43 m, one seed); Argoverse and INTERACTION",
)
class HPNet(nn.Module):
    """The model.

    Args:
        ahead, modes: F and K.
        dim, heads, layers: of both stages.
        span: steps that a token looks back.
        radius: how far agents and lanes are seen.
        history: whether predictions look at earlier ones.
    """

    def __init__(
        self,
        ahead: int = 30,
        modes: int = 6,
        dim: int = 128,
        heads: int = 8,
        layers: int = 2,
        span: int = 20,
        radius: float = 50.0,
        history: bool = True,
    ):
        super().__init__()
        if ahead < 2 or span < 1:
            raise ChronotopeError(
                f"HPNet(ahead={ahead}, span={span}): expected ahead from 2 on, since anchors head from one place to "
                "the next, and span from 1 on."
            )
        self.ahead, self.modes, self.span = ahead, modes, span
        self.mode = nn.Parameter(torch.randn(modes, dim) * 0.02)
        self.moved = mlp(1, dim, dim)
        sizes = (dim, heads, layers, span, radius)
        self.first, self.second = (Stage(*sizes, anchored, history) for anchored in (False, True))
        self.propose, self.refine = (mlp(dim, dim, 2 * ahead) for _ in range(2))
        self.anchor, self.choose = mlp(2 * ahead, dim, dim), mlp(dim, dim, 1)

    def forward(
        self,
        places: Float[Tensor, "b h a 2"],
        headings: Float[Tensor, "b h a"],
        seen: Bool[Tensor, "b h a"] | None = None,
        road: Lanes | None = None,
    ) -> Forecasts:
        """The forecasts of every step. `seen`: who was there when; None: all. Others must have finite places."""
        past = self.init_state(len(places), places.shape[2])
        return self._run(Poses(places, headings, _all(headings, seen)), past, road)[0]

    def init_state(self, batch: int, agents: int) -> Past:
        """No step yet."""
        dim, none = self.mode.shape[1], self.mode.new_empty(batch, 0, agents)
        poses = Poses(none[..., None].expand(-1, -1, -1, 2), none, none.bool())
        row = self.mode.new_empty(batch, 0, agents, self.modes, dim)
        tokens = tuple(row for stage in (self.first, self.second) for _ in stage.history)
        return Past(poses, none[..., None].expand(-1, -1, -1, dim), tokens, poses.spread(self.modes))

    def step(
        self,
        places: Float[Tensor, "b a 2"],
        headings: Float[Tensor, "b a"],
        state: Past,
        seen: Bool[Tensor, "b a"] | None = None,
        road: Lanes | None = None,
    ) -> tuple[Forecasts, Past]:
        """The next step: its forecasts [B, 1, A, K, ...], and what the steps after it need."""
        now = Poses(places[:, None], headings[:, None], _all(headings, seen)[:, None])
        return self._run(now, state, road)

    def loss(
        self, out: Forecasts, future: Float[Tensor, "b h a f 2"], real: Bool[Tensor, "b h a f"] | None = None
    ) -> Float[Tensor, ""]:
        """L, the mean over the places that are real. future[:, h]: the F places after step h."""
        real = torch.ones_like(future[..., 0], dtype=torch.bool) if real is None else real
        future = torch.where(real[..., None], future, 0.0)
        miss = ((out.proposal - future[:, :, :, None]).norm(dim=-1) * real[:, :, :, None]).sum(-1)
        best = miss.argmin(-1, keepdim=True)
        chosen = best[..., None, None].expand(-1, -1, -1, -1, *future.shape[-2:])
        total = out.probability.new_zeros(())
        for made in (out.proposal, out.refined):
            error = F.smooth_l1_loss(made.gather(3, chosen)[:, :, :, 0], future, reduction="none").sum(-1)
            total = total + error[real].mean()
        known = real.any(-1)
        return total - out.probability.gather(3, best)[..., 0][known].clamp(min=1e-9).log().mean()

    def _run(self, now: Poses, past: Past, road: Lanes | None) -> tuple[Forecasts, Past]:
        grid = Grid(t=now.place.shape[1], v=now.place.shape[2], k=self.modes)
        poses = past.poses.join(now)
        moved = torch.cat((past.moved, self.moved(_steps(poses)[:, -grid.shape[0] :, :, None])), 1)
        here = poses.spread(self.modes)
        half = len(past.tokens) // 2
        start = self.mode.expand(len(now.place), *grid.shape[:2], -1, -1).flatten(1, 3)
        x, kept = self.first(start, grid, here, poses, moved, past.tokens[:half], road)
        at = here.take(slice(-grid.shape[0], None))
        proposal = outwards(self._places(self.propose(x), grid), at)
        goal = proposal.detach()
        anchor = self._anchor(goal, at.seen)
        anchors = past.anchors.join(anchor)
        local = inwards(goal, anchor)
        start = self.anchor(local.flatten(4)).flatten(1, 3)
        x, more = self.second(start, grid, anchors, poses, moved, past.tokens[half:], road)
        refined = outwards(local + self._places(self.refine(x), grid), anchor)
        probability = self.choose(x.detach())[..., 0].unflatten(1, grid.shape).softmax(-1)
        held = slice(-self.span, None)
        tokens = tuple(part[:, held] for part in (*kept, *more))
        state = Past(poses.take(held), moved[:, held], tokens, anchors.take(held))
        return Forecasts(proposal, refined, probability), state

    def _anchor(self, goal: Float[Tensor, "b h a k f 2"], seen: Bool[Tensor, "b h a k"]) -> Poses:
        place, before = goal[..., self.ahead // 2, :], goal[..., self.ahead // 2 - 1, :]
        way = place - before
        return Poses(place, torch.atan2(way[..., 1], way[..., 0]), seen)

    def _places(self, x: Tensor, grid: Grid) -> Float[Tensor, "b h a k f 2"]:
        return x.unflatten(2, (self.ahead, 2)).unflatten(1, grid.shape)


def _steps(poses: Poses) -> Float[Tensor, "b s a"]:
    """How far each agent came since the step before; 0 where that is not known."""
    length = poses.place.diff(dim=1, prepend=poses.place[:, :1]).norm(dim=-1)
    known = poses.seen & torch.cat((poses.seen[:, :1], poses.seen[:, :-1]), 1)
    return torch.where(known, length, 0.0)


def _all(like: Tensor, seen: Tensor | None) -> Bool[Tensor, "..."]:
    return torch.ones_like(like, dtype=torch.bool) if seen is None else seen
