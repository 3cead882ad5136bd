r"""LaTtE-Flow: a flow model whose layers are experts for times: one step of sampling runs one group of them.

L layers are K groups of M = L / K; group k is for times k / K <= t < (k + 1) / K of x_t = t x_1 + (1 - t) x_0, and is
taught by those alone, to say x_1 - x_0. A step costs M layers in place of L. Within a group, maps of attention go on
from layer to layer, by a gate for each head that the time sets and that is 0 at first:

$$ A_l = \mathrm{softmax}(Q_l K_l^T / \sqrt d) + \tanh(W_l\, \mathrm{silu}(c_t))\, A_{l-1}, \qquad y_l = A_l V_l $$

Sizes: x [B, N, C], t [B] -> [B, N, C]; text [B, L, C] stands before the keys of every layer, and its keys and values
are made once for all steps (`read`). The map is N x (L + N), written out: no fused kernel gives it.

    >>> groups = LayerGroups(dim=64, heads=4, layers=8, groups=4)
    >>> read = groups.read(torch.randn(2, 7, 64))
    >>> groups(torch.randn(2, 16, 64), torch.tensor([0.1, 0.9]), read).shape
    torch.Size([2, 16, 64])

Members of a batch may have different times: each goes through its own group. Trained by `flow_loss` and sampled by
`flow_sample` of `chronotope.models.diffusion`, with whatever stands around the layers.

Left out: the language model. In the paper a layer shares keys and values with one of a frozen language model (Couple),
or its weights (Blend); here `read` projects the text with the layer's own matrices. Unconfirmed, since the official
repository has no code: that the gate is a tanh of a linear map, and that maps do not cross from group to group, which
they cannot where other groups are not run. Intervals of equal length are our choice too.

Paper: Ying Shen, Zhiyang Xu, Jiuhai Chen, Shizhe Diao, Jiaxin Zhang, Yuguang Yao, Joy Rimchala, Ismini Lourentzou,
Lifu Huang, "LaTtE-Flow: Layerwise Timestep-Expert Flow-based Transformer", 2025, arXiv 2506.06952.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, FeedForward, Modulation, TimeEmbedding
from chronotope.papers.registry import paper

Read = tuple[Tensor, Tensor]
"""Keys and values of the text, [B, H, L, D]."""


def residual_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    before: Float[Tensor, "b h n m"] | None = None,
    gate: Float[Tensor, "b h"] | None = None,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n m"]]:
    """A V and A of the formula; `before` is A of the layer before, None in the first."""
    weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1)
    if before is not None and gate is not None:
        weights = weights + gate[:, :, None, None] * before
    return weights @ v, weights


class ExpertLayer(nn.Module):
    """A layer: attention that goes on with the map before it, then a feed-forward, both steered by the time."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float | int = 4.0):
        super().__init__()
        self.attention, self.mlp = Attention(dim, heads), FeedForward(dim, "gelu", mlp_ratio)
        self.steer, self.gate = nn.ModuleList([Modulation(dim), Modulation(dim)]), nn.Linear(dim, heads)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def read(self, text: Float[Tensor, "b l c"]) -> Read:
        """Keys and values of the text."""
        return self.attention.project(text, Grid(n=text.shape[1]))[1:]

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        condition: Float[Tensor, "b c"],
        before: Float[Tensor, "b h n m"] | None = None,
        text: Read | None = None,
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b h n m"]]:
        """x after the layer, and its map."""
        maps = []

        def attend(y: Tensor) -> Tensor:
            q, k, v = self.attention.project(y, Grid(n=y.shape[1]))
            if text is not None:
                k, v = torch.cat((text[0], k), 2), torch.cat((text[1], v), 2)
            out, weights = residual_attention(q, k, v, before, torch.tanh(self.gate(F.silu(condition))))
            maps.append(weights)
            return self.attention.out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

        x = self.steer[0](x, condition, attend)
        return self.steer[1](x, condition, self.mlp), maps[0]


@paper(
    system=89,
    name="LaTtE-Flow",
    family="model",
    claim="layers in groups, each for an interval of the flow's time: a step runs one group; maps go on from layer to "
    "layer",
    evidence=["tests/papers/model/test_latte_flow.py"],
)
class LayerGroups(nn.Module):
    """The layers, and which of them run at a time.

    Args:
        dim, heads, mlp_ratio: of the layers.
        layers, groups: L and K; K = 1 is an ordinary transformer.
    """

    def __init__(self, dim: int, heads: int, layers: int, groups: int, mlp_ratio: float | int = 4.0):
        super().__init__()
        if groups < 1 or layers % groups:
            raise ChronotopeError(f"LayerGroups: layers={layers} are not a multiple of groups={groups}.")
        self.groups, self.each = groups, layers // groups
        self.time = TimeEmbedding(dim, scale=1000)
        self.layers = nn.ModuleList(ExpertLayer(dim, heads, mlp_ratio) for _ in range(layers))

    def group(self, t: Float[Tensor, "b"]) -> Int64[Tensor, "b"]:
        """The group of each time; t = 1 is of the last one."""
        return (t * self.groups).long().clamp(0, self.groups - 1)

    def read(self, text: Float[Tensor, "b l c"]) -> list[Read]:
        """Keys and values of the text for each layer."""
        return [layer.read(text) for layer in self.layers]  # type: ignore[operator]

    def forward(
        self, x: Float[Tensor, "b n c"], t: Float[Tensor, "b"], text: list[Read] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Each member of the batch through the layers of its group."""
        own, condition = self.group(t), self.time(t)
        present = own.unique().tolist()
        if len(present) == 1:
            return self._run(present[0], x, condition, text)
        out = torch.empty_like(x)
        for index in present:
            rows = (own == index).nonzero()[:, 0]
            told = None if text is None else [(k[rows], v[rows]) for k, v in text]
            out = out.index_copy(0, rows, self._run(index, x[rows], condition[rows], told))
        return out

    def _run(self, index: int, x: Tensor, condition: Tensor, text: list[Read] | None) -> Tensor:
        before = None
        for place in range(index * self.each, (index + 1) * self.each):
            x, before = self.layers[place](x, condition, before, None if text is None else text[place])
        return x
