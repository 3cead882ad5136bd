"""ConvS5: a linear recurrence over feature maps whose inputs and outputs are convolutions.

    x_t = a x_{t-1} + B * u_t,   y_t = 2 Re(C * x_t) + D * u_t

a holds one complex number for each of P state channels (a 1 x 1 state kernel, diagonalised), * is a convolution with
zeros around the map. Since a is diagonal, all states come from one scan over time. It is S5 with the maps as its
inputs: rates lambda and B, C start from the diagonal part of HiPPO-LegS, one of each conjugate pair is kept, and every
state channel is held over a step of its own, a = exp(lambda dt), B = (a - 1) / lambda B'. Real parts are at most -1e-4.

A layer is LayerNorm(u + block(y)), with block(y) = gelu(y + conv(gelu(norm(conv(gelu(norm(y)))))))  over each map.

Sizes: u [B, T, C, H, W], states [B, T, P, H, W] complex; kernels 3 x 3; work O(T H W C P), depth O(log T); the state
between frames [B, P, H, W]. Published for Moving MNIST: 8 layers, C = 256, P = 128 pairs, maps of 16 x 16.

    >>> layer = ConvS5(32, states=16)
    >>> layer(torch.randn(2, 5 * 8 * 6, 32), Grid(t=5, h=8, w=6)).shape
    torch.Size([2, 240, 32])

Found here, on two dots bouncing on an 8 x 8 board, 64 frames rolled out after 32: the squared error of the last frame
is 6e-5 after 150 training steps, that of a ConvLSTM of equal parameters 2e-2. The ConvLSTM learns it too, with 750
steps (below 3e-4): the lead is in training. Step sizes of 0.1 to 0.5 fit such short clips; with the published 0.001 to
0.1 the slow states grow beyond what was trained, and the error of the last frame was 5e-3 or more.

Left out: encoder and decoder, vector quantisation, actions, the long benchmarks. The released code (NVlabs/ConvSSM) has
either D or the block after C, the page has both, as the paper's formula does.

Paper: Smith et al. 2023, "Convolutional State Space Models for Long-Range Spatiotemporal Modeling", arXiv 2310.19694.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.conv_space import ConvSpace, ConvSpaceState
from chronotope.nn.mixer import Context, Mixer
from chronotope.papers.registry import paper


@paper(
    system=44,
    name="ConvS5",
    family="linear",
    claim="a state space over feature maps: convolutions in and out, one scan over time, a state of constant size",
    evidence=["tests/papers/linear/test_convs5.py", "tests/nn/test_conv_space.py"],
)
class ConvS5(Mixer):
    """LayerNorm(u + block(2 Re(C * x) + D * u)) on a grid of time and two axes of space.

    Args:
        dim, states, kernels, blocks, steps, chunk: as for `ct.nn.ConvSpace`.
    """

    def __init__(
        self,
        dim: int,
        states: int = 64,
        kernels: tuple[int, int, int] = (3, 3, 3),
        *,
        blocks: int = 1,
        steps: tuple[float, float] = (1e-3, 1e-1),
        chunk: int | None = None,
    ):
        super().__init__()
        self.dim = dim
        self.space = ConvSpace(dim, states, kernels, blocks=blocks, steps=steps, chunk=chunk)
        groups = math.gcd(32, dim)
        self.block = nn.Sequential(
            nn.GroupNorm(groups, dim), nn.GELU(), nn.Conv2d(dim, dim, 3, padding="same"),
            nn.GroupNorm(groups, dim), nn.GELU(), nn.Conv2d(dim, dim, 3, padding="same"),
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All frames at once. Takes no context."""
        if context is not None:
            raise ChronotopeError("ConvS5 takes no context: its state is written in the order of the frames.")
        return self._layer(x, self.space(x, grid), grid)

    def init_state(self, batch: int, grid: Grid) -> ConvSpaceState:
        """Zeros."""
        return self.space.init_state(batch, grid)

    def step(self, x: Float[Tensor, "b s c"], state: ConvSpaceState) -> tuple[Float[Tensor, "b s c"], ConvSpaceState]:
        """The next frame."""
        y, after = self.space.step(x, state)
        return self._layer(x, y, state.grid), after

    def _layer(self, x: Tensor, y: Tensor, grid: Grid) -> Tensor:
        y = y.reshape(-1, *grid.shape[1:], self.dim).movedim(-1, 1)
        y = F.gelu(y + self.block(y)).movedim(1, -1).reshape(x.shape)
        return self.norm(x + y)
