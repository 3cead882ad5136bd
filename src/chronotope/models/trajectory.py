"""Where somebody goes, from where they and those around them went."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, Block, Stack
from chronotope.patterns import along
from chronotope.position import Rope
from chronotope.saving import Saved

SECONDS = 0.4  # between two steps
FEATURES = 7  # of a token: place, velocity, acceleration, two numbers each; and whether it is of the person asked for


class Trajectory(Saved):
    r"""out_k = x_T + k (x_T - x_{T-1}) + (k / ahead) R change_k: constant velocity, and what a transformer adds to it.

    $$
    h = \mathrm{Stack}\big([\mathrm{Block}(A_t, A_v)] \cdot L\big)\big(W R^T (x - x_{T,0}, \dot x, \ddot x)\big), \qquad
    \mathrm{change} = W_o h_{T, 0}
    $$

    A_t: attention along time, rotary; A_v: attention among people, who have no order. Tokens hold place, velocity and
    acceleration. Person 0 is asked for. R turns the first axis to where person 0 went from first to last, so that
    moving or turning the world moves and turns the prediction. W_o starts at 0: an untrained model keeps the velocity.

    Sizes: places [B, T, V, 2], T >= 2 -> places of person 0 [B, ahead, 2].

    Args:
        ahead: steps to predict.
        dim, heads, layers, dropout: of the transformer.

    Example:
        >>> model = Trajectory(ahead=12)
        >>> model(torch.randn(2, 8, 4, 2)).shape
        torch.Size([2, 12, 2])
    """

    def __init__(self, ahead: int = 12, dim: int = 32, heads: int = 4, layers: int = 2, dropout: float = 0.0):
        super().__init__()
        self.ahead = ahead
        self.embed, self.dropout = nn.Linear(FEATURES, dim), nn.Dropout(dropout)
        self.stack = divided(dim, heads, layers)
        self.head = nn.Linear(dim, 2 * ahead)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Float[Tensor, "b t v 2"]) -> Float[Tensor, "b ahead 2"]:
        """The coming places of person 0."""
        if x.shape[1] < 2:
            raise ChronotopeError(f"places of shape {list(x.shape)}; expected 2 steps or more, which tell a velocity.")
        turn = heading(x[:, :, 0])
        own = (x - x[:, -1:, :1]) @ turn[:, None]
        pace = torch.diff(own, dim=1, prepend=own[:, :1]) / SECONDS
        rise = torch.diff(pace, dim=1, prepend=pace[:, :1]) / SECONDS
        asked = torch.zeros_like(own[..., :1])
        asked[:, :, 0] = 1
        tokens = self.dropout(self.embed(torch.cat([own, pace, rise, asked], -1)))
        h = self.stack(tokens.flatten(1, 2), Grid(t=x.shape[1], v=x.shape[2])).unflatten(1, x.shape[1:3])
        # What constant velocity gets wrong grows with time: a correction that does not would disturb the first steps.
        share = torch.arange(1, self.ahead + 1, device=x.device, dtype=x.dtype)[:, None] / self.ahead
        change = share * self.head(h[:, -1, 0]).unflatten(1, (self.ahead, 2))
        return constant_velocity(x[:, :, 0], self.ahead) + change @ turn.mT


def divided(dim: int, heads: int, layers: int) -> Stack:
    """Blocks of attention along t, rotary, and along v."""
    rope = Rope(axes=("t",))
    return Stack(
        [
            Block(
                [Attention(dim, heads, where=along("t"), position=rope), Attention(dim, heads, where=along("v"))],
                mlp_ratio=2,
            )
            for _ in range(layers)
        ]
    )


def heading(x: Float[Tensor, "b t 2"]) -> Float[Tensor, "b 2 2"]:
    """[direction from first to last, the one to its left] as columns; of somebody who stays, the axes."""
    way = x[:, -1] - x[:, 0]
    length = way.norm(dim=1, keepdim=True)
    way = torch.where(length > 0, way / length.clamp(min=torch.finfo(x.dtype).tiny), way.new_tensor([1.0, 0.0]))
    return torch.stack([way, torch.stack([-way[:, 1], way[:, 0]], 1)], 2)


def constant_velocity(x: Float[Tensor, "b t 2"], ahead: int) -> Float[Tensor, "b ahead 2"]:
    """The last step again and again."""
    k = torch.arange(1, ahead + 1, device=x.device, dtype=x.dtype)[:, None]
    return x[:, -1:] + k * (x[:, -1:] - x[:, -2:-1])
