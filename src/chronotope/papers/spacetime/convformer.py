r"""ConvFormer: 2-D joints of a window become the 3-D pose of its centre frame; queries, keys, values are convolutions.

$$
q = \sum_i \mathrm{softmax}_i(a^q)\, C^q_i x, \quad
k = \sum_i \mathrm{softmax}_i(a^k)\, C^k_i x, \quad
v = \sum_i \mathrm{softmax}_i(a^v)\, C^v_i x, \qquad
y = W_o\, \mathrm{softmax}(q k^T / \sqrt d)\, v
$$

C_i: a convolution over the tokens, of width `kernels[i]`, from all channels to all channels; a^q [heads, branches] is
learned, so that every head blends receptive fields of its own. One branch of width 1 is plain attention.

Space: the J joints of each frame are tokens of width d. Time: the frames of each joint are tokens of width d, and the
weights are the same for all joints. The mean of the frames with the learned weights w [T], of J d numbers, goes to
J times 3 by one matrix.

    space   x[t, j] = W (u, v) + P_j      layers of ConvAttention(axis="v") and an MLP, pre-norm
    time    x + P_t                       layers of ConvAttention(axis="t") and an MLP, pre-norm

A model whose frames are tokens of J d channels has J^2 times as many weights in each map over time; here "the temporal
joints profile", the convolution that reads neighbouring frames of joint features, is shared by the joints.

Sizes: x [B, T, J, 2] -> [B, J, 3]. O(T J^2 + J T^2) pairs.

    >>> model = ConvFormer(steps=9, joints=16, dim=32, depth=2, kernels=(1, 3))
    >>> model(torch.randn(4, 9, 16, 2)).shape
    torch.Size([4, 16, 3])
    >>> q, k, v = ConvQKV(32, 4, kernels=(1, 3, 5))(torch.randn(2, 20, 32))
    >>> q.shape
    torch.Size([2, 4, 20, 8])

`real` [B, T] says which frames there are; the others are seen by nobody, neither by attention nor by a convolution.
With `causal=True` convolutions and attention along the first axis look back only, and the layer can be stepped.

Not confirmed, and ours: the rule of the blend (weights that do not depend on the input), the widths, the layout of the
temporal stage, the head (a mean over frames, as in PoseFormer, arXiv 2103.10455). There is no released code.

Measured, lifting stick figures that swing and turn, from 7 frames, 3000 windows, one seed: MPJPE of the centre frame
0.023, with plain maps at as many parameters 0.055, by least squares from the frame alone 0.064.

Left out: Human3.6M, MPI-INF-3DHP, HumanEva.

Paper: Alec Diaz-Arias, Dmitriy Shin, "ConvFormer: Parameter Reduction in Transformer Models for 3D Human Pose
Estimation by Leveraging Dynamic Multi-Headed Convolutional Attention", 2023, arXiv 2304.02147.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.feedforward import FeedForward
from chronotope.nn.mixer import Context, Mixer, require_slice, require_tokens
from chronotope.nn.stepping import attend_slice
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, along, causal


class ConvQKV(nn.Module):
    """x [B, N, D] -> q, k, v [B, H, N, D / H]: convolutions along N, blended for each head.

    Args:
        dim, heads: D and H.
        kernels: widths of the branches, odd unless causal.
        causal: a convolution looks back only.
    """

    def __init__(self, dim: int, heads: int, kernels: Sequence[int] = (1, 3), causal: bool = False):
        super().__init__()
        if dim % heads or not kernels or min(kernels) < 1 or not (causal or all(k % 2 for k in kernels)):
            raise ChronotopeError(
                f"ConvQKV({dim}, {heads}, kernels={tuple(kernels)}, causal={causal}): expected a dim that heads "
                "divides, and widths from 1 on, odd where they look both ways."
            )
        self.heads, self.causal, self.kernels, self.reach = heads, causal, tuple(kernels), max(kernels) - 1
        self.branches = nn.ModuleList(nn.Conv1d(dim, 3 * dim, k, bias=False) for k in kernels)
        self.blend = nn.Parameter(torch.zeros(len(kernels), 3 * heads))

    def forward(
        self, x: Float[Tensor, "b n c"], before: Float[Tensor, "b p c"] | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        """q, k, v. `before`: the tokens before x, where it goes on; None: none, which are zeros."""
        known = 0 if before is None else before.shape[1]
        x = x if before is None else torch.cat((before, x), 1)
        out, share = torch.zeros(()), self.blend.softmax(0)
        for conv, part, kernel in zip(self.branches, share, self.kernels, strict=True):
            width = kernel - 1
            back = width if self.causal else width // 2
            y = conv(F.pad(x.mT, (back, width - back)))[..., known:].unflatten(1, (3 * self.heads, -1))
            out = out + part[:, None, None] * y
        q, k, v = out.mT.chunk(3, 1)
        return q, k, v


@dataclass(frozen=True)
class ConvAttentionState(Carried):
    """Keys and values of all slices before, and the last tokens that a convolution still reaches: [B, p, S, C]."""

    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n d"]
    tail: Float[Tensor, "b p s c"]
    time: int
    grid: Grid


class ConvAttention(Mixer):
    """Attention along one axis of the grid, with `ConvQKV` along the same axis.

    Args:
        axis: tokens that share all other axes are a sequence.
        causal: look back only; then it can be stepped, where the axis is the first one.
    """

    def __init__(self, dim: int, heads: int, axis: str, kernels: Sequence[int] = (1, 3), causal: bool = False):
        super().__init__()
        self.dim, self.axis = dim, axis
        self.qkv = ConvQKV(dim, heads, kernels, causal)
        self.out = nn.Linear(dim, dim, bias=False)

    @property
    def where(self) -> Pattern:
        """Who sees whom."""
        return along(self.axis) & causal(self.axis) if self.qkv.causal else along(self.axis)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None, real: Tensor | None = None
    ) -> Float[Tensor, "b n c"]:
        """All tokens; those that are not `real` [B, N] are seen by nobody. Takes no context."""
        if context is not None:
            raise ChronotopeError("ConvAttention takes no context.")
        require_tokens(x, grid, self.dim, "x")
        x = x if real is None else torch.where(real[..., None], x, 0.0)
        q, k, v = (self._back(part, grid, len(x)) for part in self.qkv(self._rows(x, grid)))
        hidden = None if real is None else x.new_zeros(real.shape).masked_fill(~real, -torch.inf)[:, None, None]
        return self.out(attention(q, k, v, grid=grid, where=self.where, bias=hidden).transpose(1, 2).flatten(2))

    def init_state(self, batch: int, grid: Grid) -> ConvAttentionState:
        """Nothing before. Raises ChronotopeError unless this is causal along the first axis."""
        require_slice(grid)
        if not self.qkv.causal or grid.axes[0] != self.axis:
            raise ChronotopeError(
                f"ConvAttention along {self.axis!r}, causal={self.qkv.causal}, cannot be stepped along "
                f"{grid.axes[0]!r}: make one with causal=True along the first axis."
            )
        weight = self.out.weight
        empty = weight.new_empty(batch, self.qkv.heads, 0, self.dim // self.qkv.heads)
        return ConvAttentionState(empty, empty, weight.new_zeros(batch, self.qkv.reach, grid.size, self.dim), 0, grid)

    def step(
        self, x: Float[Tensor, "b s c"], state: ConvAttentionState
    ) -> tuple[Float[Tensor, "b s c"], ConvAttentionState]:
        """The next slice."""
        seen = torch.cat((state.tail, x[:, None]), 1)
        rows = seen.transpose(1, 2).flatten(0, 1)
        q, k, v = (
            part.squeeze(2).unflatten(0, (len(x), -1)).transpose(1, 2) for part in self.qkv(rows[:, -1:], rows[:, :-1])
        )
        k, v = torch.cat((state.k, k), 2), torch.cat((state.v, v), 2)
        out = attend_slice(q, k, v, state.time, state.grid, self.where, None, None)
        return self.out(out.transpose(1, 2).flatten(2)), ConvAttentionState(
            k, v, seen[:, 1:].clone(), state.time + 1, state.grid
        )

    def _rows(self, x: Tensor, grid: Grid) -> Float[Tensor, "rows n c"]:
        grid.require((self.axis,), "ConvAttention")
        return x.unflatten(1, grid.shape).movedim(1 + grid.axes.index(self.axis), -2).flatten(0, -3)

    def _back(self, x: Float[Tensor, "rows h n d"], grid: Grid, batch: int) -> Float[Tensor, "b h all d"]:
        others = [size for axis, size in grid.sizes.items() if axis != self.axis]
        x = x.unflatten(0, (batch, *others)).movedim(-3, 1)  # [B, H, others, n, d]
        return x.movedim(-2, 2 + grid.axes.index(self.axis)).flatten(2, -2)


class ConvBlock(nn.Module):
    """x + A(LN(x)), then x + MLP(LN(x)); A keeps away from tokens that are not real."""

    def __init__(self, mixer: ConvAttention, ratio: float | int = 2.0):
        super().__init__()
        self.mixer, self.mlp = mixer, FeedForward(mixer.dim, "gelu", ratio)
        self.norms = nn.ModuleList(nn.LayerNorm(mixer.dim) for _ in range(2))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, real: Tensor | None = None) -> Float[Tensor, "b n c"]:
        """All tokens."""
        x = x + self.mixer(self.norms[0](x), grid, None, real)
        return x + self.mlp(self.norms[1](x))


@paper(
    system=169,
    name="ConvFormer",
    family="spacetime",
    claim="queries, keys and values are blended convolutions along joints, then along frames, shared by all joints",
    evidence=["tests/papers/spacetime/test_convformer.py"],
)
class ConvFormer(nn.Module):
    """2-D joints of a window -> 3-D joints of its centre frame.

    Args:
        steps, joints: T and J.
        dim, heads, depth: of both stages, each of `depth` blocks.
        kernels: widths of the convolutions, along joints and along frames.
    """

    def __init__(
        self,
        steps: int = 27,
        joints: int = 17,
        dim: int = 32,
        heads: int = 4,
        depth: int = 4,
        kernels: Sequence[int] = (1, 3),
    ):
        super().__init__()
        self.grid = Grid(t=steps, v=joints)
        self.embed = nn.Linear(2, dim)
        self.joint_code = nn.Parameter(torch.zeros(joints, dim))
        self.frame_code = nn.Parameter(torch.zeros(steps, 1, dim))
        self.space, self.time = (
            nn.ModuleList(ConvBlock(ConvAttention(dim, heads, axis, kernels)) for _ in range(depth)) for axis in "vt"
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.weights = nn.Parameter(torch.full((steps,), 1 / steps))
        self.head = nn.Linear(joints * dim, 3 * joints)

    def forward(self, x: Float[Tensor, "b t j 2"], real: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b j 3"]:
        """The pose. `real`: which frames there are; None: all."""
        if x.shape[1:3] != self.grid.shape:
            raise ChronotopeError(
                f"x has shape {list(x.shape)}; expected [B, {', '.join(map(str, self.grid.shape))}, 2]."
            )
        weights, seen = self.weights.expand(len(x), -1), None
        if real is not None:
            x, seen = torch.where(real[..., None, None], x, 0.0), real.repeat_interleave(x.shape[2], 1)
            weights = weights * real
        h = (self.embed(x) + self.joint_code).flatten(1, 2)
        for block in self.space:
            h = block(h, self.grid)
        h = (self.norms[0](h).unflatten(1, self.grid.shape) + self.frame_code).flatten(1, 2)
        for block in self.time:
            h = block(h, self.grid, seen)
        h = self.norms[1](h).unflatten(1, self.grid.shape)
        return self.head(torch.einsum("bt,btjc->bjc", weights, h).flatten(1)).unflatten(1, (-1, 3))
