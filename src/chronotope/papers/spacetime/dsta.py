r"""DSTA: a joint looks at its neighbours in the frame asked for, and at itself in the frames around it; nowhere else.

    tokens    x[t, j] = (W f_t / |f_t| + b)_j                one token of width D for each joint of each frame, f_t [C]
    space     s = N(Block_4(... Block_1(x[key, g] + P_s)))   inside each group g of joints that lie side by side
    time      r = N(Block_4(... Block_1(x[:, j] + P_t)))     each joint over its own frames; of r the key frame is kept
    together  y = a r[key] + b s + c                         three learned numbers; a joint of no group has s = x[key]

Block: LN, attention, LN, MLP, with residuals; N: LN. P_s: a learned code of the place in the group, P_t: of the frame.
As patterns on Grid(t=T, v=J) these are segments (of the key frame) and along("t"): 5 * 9 + 17 * 9 = 198 pairs a layer
for T = 3 frames and 17 joints in 5 groups of 3, where all tokens to all tokens are 51^2 = 2601.

Heads: mu = W_mu LN(y), sigma = sigmoid(W_sigma LN(y)), confidence 1 - mean sigma. Taught by residual log-likelihood,

$$
\log \sigma - \log \phi\big((\mu - g) / \sigma\big) + \log (\sqrt{2 \pi}\, \sigma) + |\mu - g| / (\sqrt 2 \sigma)
$$

phi: the density that a flow of six affine couplings makes of a standard normal one (RealNVP).

Sizes: features [B, T, C] -> mu and sigma [B, J, 2]; the two attentions alone [B, T, J, D] -> [B, J, D].

    >>> model = DSTA(channels=2048, joints=17, groups=GROUPS, frames=3)
    >>> mu, sigma = model(torch.randn(2, 3, 2048))
    >>> mu.shape, model.confidence(sigma).shape, model.loss(mu, sigma, torch.rand(2, 17, 2)).shape
    (torch.Size([2, 17, 2]), torch.Size([2, 17]), torch.Size([]))

Streaming: the last T - 1 rows of tokens are the state [B, T - 1, J, D]; what comes out is of the frame that lies
T - 1 - key steps back. Before the first frame stands the first frame.

Against the released code (zgspose/DSTA at cb683c1), its blocks run with the weights of this page on the same tokens:
largest difference 7.2e-7, of values up to 4.1. It has biases on q, k and v, which this page has not; its flow starts
from a normal density around 0.5, where the method it takes (Li et al. 2021, arXiv 2107.11291) has 0.

Measured, 17 joints on smooth curves with noise, a tenth of the key frame hidden, 500 steps of training, one seed: error
0.243 with three frames, 0.471 with one; 0.482 where all 51 tokens see each other, at 1.02 times the parameters.

Left out: the backbone (ResNet-50 or HRNet, pooled: f_t), PoseTrack. The groups of the paper's order of joints are
{0, 1, 2}, {3, 4, 5} and so on; joints 15 and 16 are in none.

Paper: Jijie He, Wenwu Yang, "Video-Based Human Pose Regression via Decoupled Space-Time Aggregation", 2024,
arXiv 2403.19926.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, Block, Stack
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, along, segments

GROUPS = tuple((j, j + 1, j + 2) for j in range(0, 15, 3))
Groups = Sequence[Sequence[int]]


def edges(grid: Grid, groups: Groups, key: int) -> tuple[Pattern, Pattern]:
    """Who looks at whom on Grid(t, v), in space and in time: same group of the key frame, or oneself; same joint."""
    ids = torch.arange(grid.size)
    for group in groups:
        places = [grid.index(t=key, v=joint) for joint in group]
        ids[places] = places[0]
    return segments(ids), along("t")


class GroupedSpaceTime(nn.Module):
    """Both attentions, and the mean of what they give: [B, T, J, D] -> [B, J, D].

    Args:
        dim, heads, depth, ratio, drop_path: of the blocks of each side; drop_path grows from 0 to this with depth.
        frames, joints: T and J.
        groups: joints that look at each other; those in no group pass by.
        key: the frame asked for; default: the one in the middle.
    """

    def __init__(
        self,
        joints: int,
        groups: Groups,
        frames: int = 3,
        key: int | None = None,
        dim: int = 32,
        heads: int = 8,
        depth: int = 4,
        ratio: float | int = 2.0,
        drop_path: float | int = 0.1,
    ):
        super().__init__()
        self.key = frames // 2 if key is None else key
        members = [joint for group in groups for joint in group]
        if len(set(members)) < len(members) or not set(members) <= set(range(joints)) or not 0 <= self.key < frames:
            raise ChronotopeError(
                f"groups {[list(g) for g in groups]} of {joints} joints, key frame {self.key} of {frames}: expected "
                "each joint in one group at most, and a key frame among the frames."
            )
        self.frames, self.joints, self.members = frames, joints, members
        within = segments([number for number, group in enumerate(groups) for _ in group]) if members else None
        self.space = _stack(dim, heads, depth, ratio, drop_path, within)
        self.time = _stack(dim, heads, depth, ratio, drop_path, along("t"))
        self.slots = [slot for group in groups for slot in range(len(group))]
        self.slot_code = nn.Parameter(torch.zeros(max(self.slots, default=0) + 1, dim))
        self.frame_code = nn.Parameter(torch.zeros(frames, 1, dim))
        self.join = nn.Linear(2, 1)

    def forward(self, x: Float[Tensor, "b t j d"]) -> Float[Tensor, "b j d"]:
        """What the joints of the key frame get from both sides."""
        if x.shape[1:3] != (self.frames, self.joints):
            raise ChronotopeError(f"x has shape {list(x.shape)}; expected [B, {self.frames}, {self.joints}, D].")
        return self.join(torch.stack((self.over_time(x), self.over_space(x[:, self.key])), -1))[..., 0]

    def over_space(self, x: Float[Tensor, "b j d"]) -> Float[Tensor, "b j d"]:
        """The joints of one frame, each group for itself."""
        if not self.members:
            return x
        grouped = self.space(x[:, self.members] + self.slot_code[self.slots], Grid(v=len(self.members)))
        return x.index_copy(1, torch.tensor(self.members, device=x.device), grouped)

    def over_time(self, x: Float[Tensor, "b t j d"]) -> Float[Tensor, "b j d"]:
        """Each joint over its frames; of the key frame."""
        grid = Grid(t=self.frames, v=self.joints)
        return self.time((x + self.frame_code).flatten(1, 2), grid).unflatten(1, grid.shape)[:, self.key]

    def init_state(self, batch: int) -> Float[Tensor, "b none j d"]:
        """No row yet."""
        return self.slot_code.new_empty(batch, 0, self.joints, self.slot_code.shape[1])

    def step(
        self, x: Float[Tensor, "b j d"], state: Float[Tensor, "b kept j d"]
    ) -> tuple[Float[Tensor, "b j d"], Float[Tensor, "b after j d"]]:
        """The next frame: what comes out for the one T - 1 - key steps back, and the last T - 1 rows of tokens."""
        rows = state if state.shape[1] else x[:, None].expand(-1, self.frames - 1, -1, -1)
        rows = torch.cat((rows, x[:, None]), 1)
        return self(rows), rows[:, 1:].clone()


class JointTokens(nn.Module):
    """W f / |f| + b, cut into one token of width `dim` for each joint: [..., C] -> [..., J, D]."""

    def __init__(self, channels: int, joints: int, dim: int):
        super().__init__()
        self.joints, self.map = joints, nn.Linear(channels, joints * dim)
        nn.init.xavier_uniform_(self.map.weight, gain=0.01)
        nn.init.zeros_(self.map.bias)

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch j d"]:
        """Features of a frame -> its tokens."""
        return self.map(F.normalize(x, dim=-1)).unflatten(-1, (self.joints, -1))


class RealNVP(nn.Module):
    """The density of 2-D residuals: affine couplings, each of which moves one coordinate, and a standard normal."""

    def __init__(self, couplings: int = 6, hidden: int = 64):
        super().__init__()
        self.scales, self.shifts = (nn.ModuleList(_coupling(hidden) for _ in range(couplings)) for _ in range(2))

    def log_prob(self, x: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch"]:
        """log phi(x)."""
        determinant = torch.zeros_like(x[..., 0])
        for number in reversed(range(len(self.scales))):
            kept = x.new_tensor([number % 2, 1 - number % 2])
            scale = self.scales[number](x * kept).tanh() * (1 - kept)
            shift = self.shifts[number](x * kept) * (1 - kept)
            x = kept * x + (1 - kept) * (x - shift) * torch.exp(-scale)
            determinant = determinant - scale.sum(-1)
        return determinant - (x**2).sum(-1) / 2 - math.log(2 * math.pi)


@paper(
    system=170,
    name="DSTA",
    family="spacetime",
    claim="attention inside groups of joints of one frame, and along time for each joint alone: 198 pairs, not 2601",
    evidence=["tests/papers/spacetime/test_dsta.py"],
)
class DSTA(nn.Module):
    """Features of frames -> places of joints in the key frame, in [0, 1]^2, and how unsure they are.

    channels: of a feature. The other arguments are those of `GroupedSpaceTime`.
    """

    def __init__(
        self,
        channels: int = 2048,
        joints: int = 17,
        groups: Groups = GROUPS,
        frames: int = 3,
        dim: int = 32,
        **sizes: int,
    ):
        super().__init__()
        self.tokens = JointTokens(channels, joints, dim)
        self.decoupled = GroupedSpaceTime(joints, groups, frames, dim=dim, **sizes)
        self.place, self.spread = (nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2)) for _ in range(2))
        self.flow = RealNVP()

    def forward(self, features: Float[Tensor, "b t c"]) -> tuple[Float[Tensor, "b j 2"], Float[Tensor, "b j 2"]]:
        """mu and sigma."""
        y = self.decoupled(self.tokens(features))
        return self.place(y), self.spread(y).sigmoid()

    @staticmethod
    def confidence(sigma: Float[Tensor, "b j 2"]) -> Float[Tensor, "b j"]:
        """1 - mean sigma."""
        return 1 - sigma.mean(-1)

    def loss(
        self, mu: Float[Tensor, "b j 2"], sigma: Float[Tensor, "b j 2"], goal: Float[Tensor, "b j 2"]
    ) -> Float[Tensor, ""]:
        """Residual log-likelihood, summed over joints and coordinates, mean over the batch."""
        flow = sigma.log() - self.flow.log_prob((mu - goal) / sigma)[..., None]
        laplace = torch.log(sigma * math.sqrt(2 * math.pi)) + (mu - goal).abs() / (math.sqrt(2) * sigma)
        return (flow + laplace).sum((1, 2)).mean()


def _stack(dim: int, heads: int, depth: int, ratio: float | int, drop: float | int, where: Pattern | None) -> Stack:
    return Stack(
        [
            Block(
                [Attention(dim, heads, where=where)],
                mlp="gelu",
                mlp_ratio=ratio,
                drop_path=drop * layer / max(depth - 1, 1),
            )
            for layer in range(depth)
        ]
    )


def _coupling(hidden: int) -> nn.Sequential:
    between = nn.Linear(2, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU()
    return nn.Sequential(*between, nn.Linear(hidden, 2))
