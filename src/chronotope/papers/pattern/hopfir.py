"""HopFIR: a joint weighs groups of joints at each distance on the skeleton; hands and feet are refined by their limb.

    G_k = A_k X W_k, k = 0..K             A_k: joints at shortest-path distance exactly k, rows divided by their sum
    HopAttention(X)_i = sum_k softmax_k(q_i . key(G_k)_i / sqrt(d)) value(G_k)_i
    GroupAttention(X)_i = softmax over the joints of i's limb, added for the refined joints only

The distance-k relation is a pattern, graph(hops=k) & ~graph(hops=k - 1); the limbs are segments; in HopAttention the
queries lie on Grid(v=J), the keys on Grid(v=J, k=K + 1), and along("k") lets a joint see its own groups.

Sizes: x [B, J, C], or [B, T, J, C], whose frames are independent; weights [B, heads, J, K + 1]. A group without joints
is no key of the softmax.

    model = HopFIR(SKELETON, LIMBS, refined=ENDS)
    model(torch.randn(8, 16, 2)).shape  # [8, 16, 3]

The paper's K, depth, width, and form of the attention could not be confirmed: here softmax is over hops for each joint
and head, K = 4, two layers of width 64, GroupAttention after HopAttention in each layer. Left out: Human3.6M.

Paper: Zhai et al., HopFIR: Hop-wise GraphFormer with Intragroup Joint Refinement, 2023 (arXiv 2302.14581).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper
from chronotope.patterns import Pattern, along, graph, segments
from chronotope.planning import plan

Joints = Float[Tensor, "*batch j c"]
Edges = Sequence[tuple[int, int]]

# 16 joints: 0 pelvis; 1-3 right leg; 4-6 left leg; 7 spine, 8 neck, 9 head; 10-12 left arm; 13-15 right arm.
SKELETON = (
    (0, 1), (1, 2), (2, 3), (0, 4), (4, 5), (5, 6), (0, 7), (7, 8), (8, 9),
    (8, 10), (10, 11), (11, 12), (8, 13), (13, 14), (14, 15),
)  # fmt: skip
LIMBS = ((0, 7, 8, 9), (1, 2, 3), (4, 5, 6), (10, 11, 12), (13, 14, 15))
ENDS = (3, 6, 12, 15)


def hop(edges: Edges, distance: int) -> Pattern:
    """The pattern "at shortest-path distance exactly `distance`" on the axis v; edges count in both directions."""
    both = [[a for a, _ in edges] + [b for _, b in edges], [b for _, b in edges] + [a for a, _ in edges]]
    itself = graph([[], []])
    within = [itself if k == 0 else graph(both, hops=k) for k in range(distance + 1)]
    return within[distance] & ~within[distance - 1] if distance else itself


def hops(edges: Edges, joints: int, distance: int) -> Float[Tensor, "{distance+1} {joints} {joints}"]:
    """A_0 .. A_K, rows divided by their sum; the row of a joint without anybody at that distance is 0."""
    grid = Grid(v=joints)
    masks = torch.stack([plan(hop(edges, k), grid).mask() for k in range(distance + 1)]).to(torch.get_default_dtype())
    return masks / masks.sum(-1, keepdim=True).clamp(min=1)


def limbs(groups: Sequence[Sequence[int]], joints: int) -> Pattern:
    """The pattern "same limb" over joints; a joint of no group sees itself alone."""
    ids = list(range(len(groups), len(groups) + joints))
    for name, group in enumerate(groups):
        for joint in group:
            if not 0 <= joint < joints or ids[joint] < len(groups):
                raise ChronotopeError(f"groups: joint {joint} is not one of 0 to {joints - 1}, or is in two groups.")
            ids[joint] = name
    return segments(ids)


class Attention(nn.Module):
    """What both attentions share: heads, projections, and one call of `ct.attention`."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ChronotopeError(f"{dim} channels do not split into {heads} heads; give a multiple of {heads}.")
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def _split(self, x: Joints) -> Float[Tensor, "b heads n d"]:
        return x.flatten(0, -3).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _join(self, x: Float[Tensor, "b heads n d"], like: Joints) -> Joints:
        return self.out(x.transpose(1, 2).reshape(like.shape))


class HopAttention(Attention):
    """Softmax over distances 0..K, for every joint and head. adjacency: A_0..A_K of `hops`, [K + 1, J, J]."""

    adjacency: Tensor
    absent: Tensor

    def __init__(self, dim: int, heads: int, adjacency: Float[Tensor, "k j j"]):
        super().__init__(dim, heads)
        self.register_buffer("adjacency", adjacency)
        # A key (v, k) without joints is hidden by -inf: as a zero vector it would still take weight.
        empty = adjacency.sum(-1).T.flatten() == 0
        self.register_buffer("absent", torch.zeros(empty.shape).masked_fill(empty, -torch.inf))
        self.mix = nn.Parameter(torch.randn(len(adjacency), dim, dim) / dim**0.5)

    def forward(self, x: Joints) -> Joints:
        """x [..., J, C] -> the same shape."""
        return self._join(self._attend(*self._queries_and_keys(x)), x)

    def weights(self, x: Joints) -> Float[Tensor, "b heads j k"]:
        """How much each joint takes from each distance, summing to 1 over k."""
        q, k, v = self._queries_and_keys(x)
        which = torch.eye(len(self.adjacency)).to(v).repeat(x.shape[-2], 1)
        return self._attend(q, k, which.expand(*v.shape[:2], *which.shape))

    def groups(self, x: Joints) -> Float[Tensor, "*batch j k c"]:
        """G_k = A_k X W_k."""
        if x.shape[-2] != self.adjacency.shape[1]:
            raise ChronotopeError(f"{x.shape[-2]} joints given, the skeleton has {self.adjacency.shape[1]}.")
        return torch.einsum("kij,...jc,kcd->...ikd", self.adjacency, x, self.mix)

    def _queries_and_keys(self, x: Joints) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv(self.groups(x).flatten(-3, -2)).chunk(2, -1)
        return self._split(self.q(x)), self._split(k), self._split(v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = Grid(v=q.shape[2])
        key_grid = Grid(v=q.shape[2], k=len(self.adjacency))
        return attention(q, k, v, grid=grid, key_grid=key_grid, where=along("k"), bias=self.absent)  # type: ignore[return-value]


class GroupAttention(Attention):
    """Attention inside limbs, for the refined joints; the other joints get 0."""

    refined: Tensor

    def __init__(self, dim: int, heads: int, joints: int, groups: Sequence[Sequence[int]], refined: Sequence[int]):
        super().__init__(dim, heads)
        self.where = limbs(groups, joints)
        self.register_buffer("refined", torch.zeros(joints, 1).index_fill(0, torch.tensor(refined), 1.0))

    def forward(self, x: Joints) -> Joints:
        """x [..., J, C] -> the same shape."""
        k, v = (self._split(y) for y in self.kv(x).chunk(2, -1))
        out = attention(self._split(self.q(x)), k, v, grid=Grid(v=x.shape[-2]), where=self.where)
        return self.refined * self._join(out, x)  # type: ignore[arg-type]


@paper(
    system=163,
    name="HopFIR",
    family="pattern",
    claim="each joint weighs groups of joints by distance on the skeleton; end joints are refined inside their limb",
    evidence=["tests/papers/pattern/test_hopfir.py"],
)
class HopFIR(nn.Module):
    """Lifts 2-D joints to 3-D: [..., J, 2] -> [..., J, 3]. Layers of HopAttention, MLP and GroupAttention, pre-norm.

    edges: the skeleton. groups: its limbs. refined: joints that GroupAttention changes. distance: K.
    """

    def __init__(
        self,
        edges: Edges,
        groups: Sequence[Sequence[int]],
        refined: Sequence[int],
        joints: int = 16,
        dim: int = 64,
        heads: int = 4,
        depth: int = 2,
        distance: int = 4,
    ):
        super().__init__()
        adjacency = hops(edges, joints, distance)
        self.embed, self.head = nn.Linear(2, dim), nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3))
        self.layers = nn.ModuleList()
        for _ in range(depth):
            mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            parts = (HopAttention(dim, heads, adjacency), mlp, GroupAttention(dim, heads, joints, groups, refined))
            self.layers.extend(nn.Sequential(nn.LayerNorm(dim), part) for part in parts)

    def forward(self, x: Float[Tensor, "*batch j 2"]) -> Float[Tensor, "*batch j 3"]:
        """2-D places -> 3-D places."""
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)
