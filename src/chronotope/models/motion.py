"""How a body moves on, from how its joints turned."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.grid import Grid
from chronotope.models.trajectory import divided
from chronotope.saving import Saved


class Motion(Saved):
    r"""out_k = x_T + change_k: the last pose, and what a transformer adds to it.

    $$
    h = \mathrm{Stack}\big([\mathrm{Block}(A_t, A_v)] \cdot L\big)\big(W (x, \Delta x) + e_v\big), \qquad
    \mathrm{change} = W_o h_T
    $$

    A_t: attention along time, rotary; A_v: attention among joints, which e_v tells apart. W_o starts at 0: an untrained
    model keeps the pose.

    Sizes: rotation vectors [B, T, joints, 3] -> [B, ahead, joints, 3].

    Args:
        joints: how many there are.
        ahead: frames to predict.
        rate: frames a second, by which velocities are scaled.
        dim, heads, layers, dropout: of the transformer.

    Example:
        >>> model = Motion(joints=24)
        >>> model(torch.randn(2, 10, 24, 3)).shape
        torch.Size([2, 10, 24, 3])
    """

    def __init__(
        self,
        joints: int,
        ahead: int = 10,
        rate: float = 25.0,
        dim: int = 32,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.ahead, self.rate = ahead, rate
        self.embed, self.dropout = nn.Linear(6, dim), nn.Dropout(dropout)
        self.joint = nn.Parameter(torch.randn(joints, dim))
        self.stack = divided(dim, heads, layers)
        self.head = nn.Linear(dim, 3 * ahead)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Float[Tensor, "b t v 3"]) -> Float[Tensor, "b ahead v 3"]:
        """The coming poses."""
        pace = torch.diff(x, dim=1, prepend=x[:, :1]) * self.rate
        tokens = self.dropout(self.embed(torch.cat([x, pace], -1)) + self.joint)
        h = self.stack(tokens.flatten(1, 2), Grid(t=x.shape[1], v=x.shape[2])).unflatten(1, x.shape[1:3])
        return x[:, -1:] + self.head(h[:, -1]).unflatten(2, (self.ahead, 3)).transpose(1, 2)
