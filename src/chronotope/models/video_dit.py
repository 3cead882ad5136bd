"""A denoiser of clips: a transformer over all tokens of space and time, steered by how noisy they are."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.models.diffusion import flow_loss, flow_sample
from chronotope.nn import Attention, FeedForward, Modulation, PatchEmbed, Sinusoidal, TimeEmbedding, Unpatch
from chronotope.nn.mixer import Context, Whole
from chronotope.position import Rope
from chronotope.saving import Saved

AXES, BASE = ("t", "h", "w"), 100.0  # of the codes of places: axes of clips are short


class DiTBlock(Whole):
    r"""x += g_1 A((1 + s_1) \overline{x} + b_1), then x += g_2 MLP((1 + s_2) \overline{x} + b_2).

    A: attention over t, h and w at once, rotary on all three. (b, s, g) = W silu(context), 0 at first; the bar is a
    LayerNorm without weights. `context` [B, C]: what steers it.
    """

    why = "a token sees those of frames to come"

    def __init__(self, dim: int, heads: int, ratio: float | int = 4.0):
        super().__init__()
        self.dim = dim
        self.attention = Attention(dim, heads, position=Rope(AXES, BASE), qk_norm=True)
        self.mlp = FeedForward(dim, "gelu", ratio)
        self.steer = nn.ModuleList([Modulation(dim), Modulation(dim)])

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All frames at once."""
        if not isinstance(context, Tensor):
            raise ChronotopeError("DiTBlock: give context=condition, [B, C], without a grid.")
        x = self.steer[0](x, context, lambda y: self.attention(y, grid))
        return self.steer[1](x, context, self.mlp)  # type: ignore[no-any-return]


class VideoDiT(Saved):
    """The velocity of a flow from noise to clips: v(x_t, t) of x_t = t x + (1 - t) noise, trained to be x - noise.

    v = unpatch(block_L(... block_1(patches of x_t))), every block steered by the time; v = 0 at first. Who sees whom is
    `blocks[i].attention.where`, None at first: everybody. Any number of frames, any size that patches divide.

    Args:
        patch, channels: pixels of a patch on each side, channels of a frame.
        dim, layers, heads, ratio: of the blocks; heads of 6 channels or more.

    Example:
        >>> model = VideoDiT(patch=2, dim=48, layers=2)
        >>> model(torch.randn(3, 8, 1, 16, 16), torch.rand(3)).shape
        torch.Size([3, 8, 1, 16, 16])
        >>> model.sample(torch.randn(3, 4, 1, 8, 12), steps=2).shape
        torch.Size([3, 4, 1, 8, 12])

    Source: Peebles and Xie 2022 (arXiv 2212.09748), of images and with a fixed code of places; the flow is of Lipman et
    al. 2022 (arXiv 2210.02747).
    """

    def __init__(
        self,
        patch: int = 2,
        channels: int = 1,
        dim: int = 96,
        layers: int = 4,
        heads: int = 4,
        ratio: float = 4.0,
    ):
        super().__init__()
        if layers < 1:
            raise ChronotopeError(f"VideoDiT(layers={layers}): expected 1 or more.")
        self.embed, self.leave = PatchEmbed(dim, patch, channels), Unpatch(dim, patch, channels)
        self.place, self.time = Sinusoidal(dim, AXES, BASE), TimeEmbedding(dim, scale=1000)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads, ratio) for _ in range(layers))
        self.last = Modulation(dim, gate=False)
        nn.init.zeros_(self.leave.project.weight)
        nn.init.zeros_(self.leave.project.bias)

    def forward(self, x: Float[Tensor, "b t c h w"], t: Float[Tensor, "b"]) -> Float[Tensor, "b t c h w"]:
        """The velocity at x, t being 0 for noise and 1 for clips."""
        tokens, grid = self.embed(x)
        tokens, condition = self.place(tokens, grid), self.time(t)
        for block in self.blocks:
            tokens = block(tokens, grid, condition)
        return self.leave(self.last(tokens, condition, lambda y: y), grid)  # type: ignore[no-any-return]

    def loss(self, clips: Float[Tensor, "b t c h w"], generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """Mean squared error of the velocity, at random times."""
        return flow_loss(self, clips, generator=generator)

    def sample(self, noise: Float[Tensor, "b t c h w"], steps: int = 32) -> Float[Tensor, "b t c h w"]:
        """Clips, each of its noise, in Euler steps."""
        return flow_sample(self, noise, steps)
