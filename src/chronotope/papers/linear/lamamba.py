"""LaMamba-Diff: a selective scan along snake paths for the whole image, window attention for what is near.

    x = x + gate_1 * scan2d(mod_1(norm(x)))
    x = x + gate_2 * window_attention(mod_2(norm(x)))
    x = x + gate_3 * mlp(mod_3(norm(x)))

each mod_i and gate_i a linear map of the condition (time and class) that is 0 at first, so that a block begins as the
identity. scan2d: (u, z) = W x; u = silu(depth-wise 3 x 3 convolution of u); for each of four paths p, with steps,
writes and reads of its own, y_p = selective_scan(u along p) + D_p u; then W_o (norm(sum_p y_p) * silu(z)). The paths
are snakes, whose successive tokens are always neighbours on the grid: by rows from the top left and from the bottom
left, by columns from the bottom left and from the bottom right. The windows are blocks of 8 x 8 with a bias for each
relative place, moved by half a block in every second layer.

Sizes: x [B, H W, C] on Grid(h, w), any H and W; work O(H W (C^2 + C S + 64 C)), S the states of a channel. Published:
four levels of depth 2 from width 320 on latents of 32 x 32 x 4, S = 1, expansion 2; `lamamba_unet.py` has the U-Net.

    >>> block = LaMambaBlock(64, heads=4, shift=True)
    >>> block(torch.randn(2, 16 * 12, 64), Grid(h=16, w=12), torch.randn(2, 1, 64)).shape
    torch.Size([2, 192, 64])

Left out: ImageNet training, the latent autoencoder. That the scan comes before the attention, and which corners the
paths leave from, are as in the released code (yunxiangfu2001/LaMamba-Diff).

Paper: Fu, Chen and Yu 2024, "LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and
Mamba", arXiv 2408.02615.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.bias import RelativeBias
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, FeedForward, Whole
from chronotope.nn.mixer import Context, require_tokens
from chronotope.nn.modulation import Modulation
from chronotope.papers.registry import paper
from chronotope.patterns import blocks
from chronotope.recurrences.orders import Order, scan_order
from chronotope.recurrences.spaces import selective_scan


def snakes(grid: Grid, device: torch.device | str = "cpu") -> tuple[Order, Order, Order, Order]:
    """The four paths over Grid(h, w): two by rows, two by columns, from different corners."""
    rows, columns = grid.axes, grid.axes[::-1]
    return (
        scan_order(grid, rows, snake=True, device=device),
        scan_order(grid, rows, snake=True, flip=rows[:1], device=device),
        scan_order(grid, columns, snake=True, flip=rows[:1], device=device),
        scan_order(grid, columns, snake=True, flip=rows, device=device),
    )


class Selective(nn.Module):
    """y = selective_scan(u, steps, rates, writes, reads) + D u along the tokens; all but rates and D come from u."""

    def __init__(self, dim: int, states: int, rank: int):
        super().__init__()
        self.sizes = (rank, states, states)
        self.choose, self.step = nn.Linear(dim, sum(self.sizes), bias=False), nn.Linear(rank, dim)
        nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)
        # Steps begin between 0.001 and 0.1.
        start = torch.exp(torch.rand(dim) * math.log(100) + math.log(1e-3))
        self.step.bias.data = start + (-(-start).expm1()).log()
        self.log_rate = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(dim, 1))
        self.skip = nn.Parameter(torch.ones(dim))

    def forward(
        self, u: Float[Tensor, "b n c"], state: Float[Tensor, "b c s"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b c s"]]:
        """All tokens, or the next ones after a state; and the state after them."""
        low, write, read = self.choose(u).split(self.sizes, -1)
        dtype = torch.promote_types(u.dtype, torch.float32)
        step, rate = F.softplus(self.step(low).to(dtype)), -self.log_rate.to(dtype).exp()
        y, after = selective_scan(u.to(dtype), step, rate, write.to(dtype), read.to(dtype), state)
        return y.to(u.dtype) + self.skip * u, after


class Scan2d(Whole):
    """The scan along four snakes, in a gated layer. It sees the whole image: it cannot be stepped."""

    why = "its paths go through the image in all directions"

    def __init__(self, dim: int, states: int = 1, expand: int = 2):
        super().__init__()
        inner = expand * dim
        self.dim = dim
        self.enter, self.out = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.scans = nn.ModuleList(Selective(inner, states, -(-dim // 16)) for _ in range(4))
        self.norm = nn.LayerNorm(inner)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens of an image. Takes no context."""
        require_tokens(x, grid, self.dim, "x")
        if len(grid.axes) != 2 or grid.prefix or context is not None:
            raise ChronotopeError(f"Scan2d on {grid!r}: expected two axes, no prefix and no context.")
        u, z = self.enter(x).chunk(2, -1)
        image = u.transpose(1, 2).unflatten(2, grid.shape)
        u = F.silu(self.conv(image)).flatten(2).transpose(1, 2)
        paths = zip(snakes(grid, x.device), self.scans, strict=True)
        y = torch.stack([order.undo(scan(order(u))[0]) for order, scan in paths]).sum(0)
        return self.out(self.norm(y) * F.silu(z))


@paper(
    system=26,
    name="LaMamba-Diff",
    family="linear",
    claim="selective scans along four snake paths and shifted window attention, in a block of linear cost",
    evidence=["tests/papers/linear/test_lamamba.py"],
    missing="the ablation on textures (scan and windows 10% below either alone) is not trained here; ImageNet",
)
class LaMambaBlock(Whole):
    """Scan, window attention and feed-forward on Grid(h, w), each steered by the condition, which is the context.

    Args:
        dim, heads: channels, and heads of the attention.
        shift: whether the windows are moved by half of their size.
        window: tokens along each side of a window.
        states, expand: states of a channel, and inner channels over dim, of the scan.
        parts: what the block has of "scan" and "window"; for ablation.
    """

    why = "every token sees the whole image"

    def __init__(
        self, dim: int, heads: int, *, shift: bool = False, window: int = 8, states: int = 1, expand: int = 2,
        parts: tuple[str, ...] = ("scan", "window"),
    ):  # fmt: skip
        super().__init__()
        if not parts or not set(parts) <= {"scan", "window"}:
            raise ChronotopeError(f"LaMambaBlock(parts={parts!r}): one or both of 'scan' and 'window'.")
        self.dim = dim
        half = {"h": window // 2, "w": window // 2} if shift else None
        where, bias = blocks(h=window, w=window, shift=half), RelativeBias(heads, h=window - 1, w=window - 1)
        made = {
            "scan": lambda: Scan2d(dim, states, expand),
            "window": lambda: Attention(dim, heads, where=where, bias=bias),
        }
        self.mixers = nn.ModuleList(made[part]() for part in made if part in parts)
        self.mlp = FeedForward(dim, "gelu")
        self.steer = nn.ModuleList(Modulation(dim) for _ in range(len(self.mixers) + 1))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens of an image; context: the condition [B, 1, C]."""
        if not isinstance(context, Tensor):
            raise ChronotopeError("LaMambaBlock needs its condition as context, a tensor [B, 1, C].")
        for mixer, steer in zip(self.mixers, self.steer, strict=False):
            x = steer(x, context, lambda y, mixer=mixer: mixer(y, grid))
        return self.steer[-1](x, context, self.mlp)  # type: ignore[no-any-return]
