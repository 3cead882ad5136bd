r"""3D deformable attention: keys are sampled where the clip says that something is, between tokens in space and time.

For each head, a small network n of convolutions over the grid gives every token z_p a score and an offset,

$$
(\Delta_p, a_p) = n(Z)_p, \qquad
P = \text{the } K \text{ tokens of largest } a_p, \qquad
s_p = \mathrm{trilinear}\big(Z,\; p + r \tanh \Delta_p\big)\,\frac{\sigma(a_p)}{\mathrm{sg}\,\sigma(a_p)}
$$

$$
\mathrm{out} = \mathrm{softmax}\!\Big(\frac{(W_q [Z, M]) (W_k [s_P, M])^T}{\sqrt d}\Big) W_v [s_P, M]
$$

M are cross-modal tokens, which have no place; r is the largest offset on each axis, in tokens. The last factor of s_p
is 1 and lets gradients reach the scores (sg: no gradient). Between tokens features are mixed linearly on all three
axes; beyond the border they are those of the border.

Beside it in a block: joints of a pose attend inside spatial groups of a frame, M among the keys, and every stride-th
joint goes on (`JointStride`); and keys of every s-th frame, s growing with depth (`TemporalStride`). The last token of
M is classified.

Sizes: x [B, N, C] on Grid(t, h, w), M [B, m, C]. (N + m) (K + m) scores for N^2.

    >>> layer = DeformableAttention3d(16, 2, points=8)
    >>> z, m = layer(torch.randn(1, 4 * 5 * 6, 16), torch.randn(1, 2, 16), Grid(t=4, h=5, w=6))
    >>> z.shape, m.shape, layer.points_of(z, Grid(t=4, h=5, w=6)).shape
    (torch.Size([1, 120, 16]), torch.Size([1, 2, 16]), torch.Size([1, 2, 8, 3]))

Left out: the network over RGB frames, NTU60/120, FineGYM, PennAction. Unconfirmed: how many points, the range of
offsets, strides, and whether heads have offsets of their own; here they have. Streaming: points are chosen in all
frames.

Paper: Sangwon Kim, Dasom Ahn, Byoung Chul Ko, "Cross-Modal Learning with 3D Deformable Attention for Action
Recognition", 2022, arXiv 2212.05638.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, FeedForward, GridConv, sample
from chronotope.papers.registry import paper
from chronotope.patterns import along, blocks

AXES = ("t", "h", "w")


@paper(
    system=142,
    name="3D Deformable Transformer (cross-modal action recognition)",
    family="spacetime",
    claim="keys are sampled at learned places of space and time: N (K + m) scores, K points that find what moves",
    evidence=["tests/papers/spacetime/test_deformable.py"],
)
class DeformableAttention3d(nn.Module):
    """Tokens on Grid(t, h, w) and others without a place, over keys sampled among the first and over the second.

    Args:
        dim, heads: channels and heads.
        points: K, sampled for each head; all tokens where there are fewer.
        reach: r, the largest offset on t, h, w.
        hidden: channels of the network of offsets; default dim.
        learned: whether points are searched; else they are K fixed random tokens, drawn anew for each size of grid from
            the seed, and the same for all clips.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        points: int = 16,
        reach: Sequence[float | int] = (2.0, 2.0, 2.0),
        hidden: int | None = None,
        learned: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        if points < 1 or len(reach) != 3:
            raise ChronotopeError(f"points={points}, reach={list(reach)}: expected 1 point or more, and three reaches.")
        hidden = dim if hidden is None else hidden
        self.dim, self.points, self.reach, self.learned, self.seed = (
            dim,
            points,
            tuple(map(float, reach)),
            learned,
            seed,
        )
        self.inner = Attention(dim, heads, biases=True)
        self.enter, self.look = nn.Linear(dim, hidden), GridConv(hidden, {"t": 3, "h": 3, "w": 3})
        self.say = nn.Linear(hidden, heads * 4)  # t, h, w and score of each head
        for values in self.say.parameters():
            nn.init.normal_(values, std=0.01)

    def forward(
        self, z: Float[Tensor, "b n c"], m: Float[Tensor, "b m c"], grid: Grid
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b m c"]]:
        """Both, after one attention."""
        inner, (places, weight) = self.inner, self._search(z, grid)
        sampled = sample(z, grid, places) * weight[..., None]  # [B, H, K, C]
        keys = torch.cat((sampled, m[:, None].expand(-1, inner.heads, -1, -1)), 2)
        size = inner.heads * inner.head_dim
        w, b = inner.qkv.weight, inner.qkv.bias
        q = F.linear(torch.cat((z, m), 1), w[:size], b[:size]).unflatten(2, (inner.heads, -1)).transpose(1, 2)
        # Each head has keys of its own: it projects them by its own rows.
        k, v = (
            torch.einsum("bhkc,hdc->bhkd", keys, w[part].unflatten(0, (inner.heads, -1)))
            + b[part].view(inner.heads, 1, -1)
            for part in (slice(size, 2 * size), slice(2 * size, 3 * size))
        )
        out = attention(q, k, v, grid=Grid(n=q.shape[2]), key_grid=Grid(n=k.shape[2]))
        assert isinstance(out, Tensor)
        both = inner.out(out.transpose(1, 2).flatten(2))
        return both[:, : grid.size], both[:, grid.size :]

    def points_of(self, z: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b h k 3"]:
        """Where each head samples: (t, h, w) in tokens."""
        return self._search(z, grid)[0]

    def _search(self, z: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        grid.require(AXES, "DeformableAttention3d")
        count, heads = min(self.points, grid.size), self.inner.heads
        coords = grid.coords(z.device).to(z.dtype)
        if not self.learned:
            order = torch.randperm(grid.size, generator=torch.Generator().manual_seed(self.seed))[:count].to(z.device)
            return coords[order].expand(len(z), heads, -1, -1), z.new_ones(len(z), heads, count)
        said = self.say(F.gelu(self.look(self.enter(z), grid))).unflatten(2, (heads, 4)).transpose(1, 2)
        best = said[..., 3].topk(count, dim=2).indices  # [B, H, K]
        offset, score = said.gather(2, best[..., None].expand(-1, -1, -1, 4)).split((3, 1), 3)
        weight = score[..., 0].sigmoid()
        places = coords[best] + z.new_tensor(self.reach) * offset.tanh()
        return places, weight / weight.detach()


class TemporalStride(nn.Module):
    """Attention of all tokens over those of every `stride`-th frame, from the first on."""

    def __init__(self, dim: int, heads: int, stride: int):
        super().__init__()
        if stride < 1:
            raise ChronotopeError(f"TemporalStride(stride={stride}): expected 1 or more.")
        self.stride, self.inner = stride, Attention(dim, heads, biases=True)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """N N / stride scores."""
        kept = x.unflatten(1, grid.shape)[:, :: self.stride]
        key_grid = grid.replace(t=kept.shape[1])
        # Axes of different lengths are aligned by centres, which full attention does not ask for.
        return self.inner(x, grid, (kept.flatten(1, -2), key_grid))


class JointStride(nn.Module):
    """Joints attend inside groups of `group` joints of their frame and over M; then every `stride`-th joint goes on."""

    def __init__(self, dim: int, heads: int, group: int, stride: int = 1):
        super().__init__()
        self.stride, self.inner = stride, Attention(dim, heads, where=along("v") & blocks(v=group), biases=True)

    def forward(
        self, x: Float[Tensor, "b n c"], m: Float[Tensor, "b m c"], grid: Grid
    ) -> tuple[Float[Tensor, "b kept c"], Float[Tensor, "b m c"], Grid]:
        """Joints that go on, M, and the grid of the joints, over t and v."""
        both = self.inner(torch.cat((m, x), 1), grid.replace(prefix=m.shape[1]))
        m, x = both.split((m.shape[1], grid.size), 1)
        kept = x.unflatten(1, grid.shape)[:, :, :: self.stride]
        return kept.flatten(1, 2), m, grid.replace(v=kept.shape[2])


class DeformableBlock(nn.Module):
    """The three attentions with norms and residuals, then a feed-forward; without joints the second is left out."""

    def __init__(self, dim: int, heads: int, points: int, stride: int, group: int = 0, learned: bool = True):
        super().__init__()
        self.search = DeformableAttention3d(dim, heads, points, learned=learned)
        self.joints = JointStride(dim, heads, group) if group else None
        self.time = TemporalStride(dim, heads, stride)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(6))
        self.mlp = FeedForward(dim, "gelu")

    def forward(
        self,
        z: Float[Tensor, "b n c"],
        m: Float[Tensor, "b m c"],
        grid: Grid,
        joints: tuple[Float[Tensor, "b j c"], Grid] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b m c"], tuple[Float[Tensor, "b j c"], Grid] | None]:
        """Clip, cross-modal tokens, joints."""
        new_z, new_m = self.search(self.norms[0](z), self.norms[1](m), grid)
        z, m = z + new_z, m + new_m
        if self.joints is not None and joints is not None:
            x, on = joints
            new_x, new_m, after = self.joints(self.norms[2](x), self.norms[3](m), on)
            joints, m = (x + new_x, after), m + new_m
        z = z + self.time(self.norms[4](z), grid)
        z, m = (x + self.mlp(self.norms[5](x)) for x in (z, m))
        return z, m, joints
