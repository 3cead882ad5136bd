"""BASED: global linear attention with Taylor features, small sliding windows, and short gated convolutions.

Layers of three kinds, each in a pre-norm block with a gated feed-forward:

    linear   y_i = phi(q_i) sum_{j <= i} phi(k_j)^T v_j / (phi(q_i) . sum_{j <= i} phi(k_j))
             phi(x) = [1, x / d^(1/4), vec(x x^T) / sqrt(2 d)]: phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(d)
    window   softmax attention over the own token and the width - 1 before it, with rotary positions
    conv     y = W_o (silu(conv(W_1 x)) * W_2 x), conv a causal depth-wise convolution of 3 tokens

What a linear layer can recall grows with its state, F = 1 + d + d^2 features by the size of a head; `feature_dim` = d
and `width` are the two dials of state against recall. The series is no drop-in for trained softmax: its output is
about 1% off where logits have a standard deviation of 0.3, and about a quarter at 1.

Sizes: x [B, N, C] -> [B, N, C]. State of a linear layer H F (C / H + 1) numbers, of a window 2 (width - 1) C, of a
convolution 2 C, whatever N.

    >>> model = based(64, heads=4, layers=("conv", "linear", "window"), feature_dim=8, width=16)
    >>> model(torch.randn(2, 100, 64), Grid(n=100)).shape
    torch.Size([2, 100, 64])

Left out: RMSNorm (blocks have LayerNorm), the 1.3B models and the 24 times of generation throughput, which needs a
fused GPU kernel. The released code says window_size=256 and keeps 128 tokens before the own one; here `width` counts
the own token, and the default is the 128 of the paper's range of 64 to 128. The released divisor has 1e-12 added;
it is at least half the number of tokens seen, so nothing is added here.

Paper: Arora, Eyuboglu, Zhang, Timalsina, Alberti, Zinsley, Zou, Rudra and Ré 2024, "Simple linear attention language
models balance the recall-throughput tradeoff", arXiv 2402.18668.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.attention import Attention
from chronotope.nn.block import Block, Stack
from chronotope.nn.convolution import ConvState, ShortConv
from chronotope.nn.mixer import Context, Mixer, require_tokens
from chronotope.nn.recurrence import Recurrence
from chronotope.papers.registry import paper
from chronotope.patterns import window
from chronotope.position import Rope
from chronotope.recurrences.features import Taylor

RELEASED = ("conv", "linear", "window", "conv", "conv") * 5 + ("conv", "conv")
"""Kinds of the 27 layers of the released model with 360M parameters."""


class GatedConv(Mixer):
    """y = W_o (silu(conv(W_1 x)) * W_2 x)."""

    def __init__(self, dim: int, kernel: int = 3):
        super().__init__()
        self.dim = dim
        self.enter, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.conv = ShortConv(dim, kernel)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens at once, in the order of the grid. Takes no context."""
        require_tokens(x, grid, self.dim, "x")
        value, gate = self.enter(x).chunk(2, -1)
        return self.out(F.silu(self.conv(value, grid, context)) * gate)

    def init_state(self, batch: int, grid: Grid) -> ConvState:
        """The tokens that the convolution sees: none yet."""
        return self.conv.init_state(batch, grid)

    def step(self, x: Float[Tensor, "b s c"], state: ConvState) -> tuple[Float[Tensor, "b s c"], ConvState]:
        """The next slice."""
        value, gate = self.enter(x).chunk(2, -1)
        mixed, state = self.conv.step(value, state)
        return self.out(F.silu(mixed) * gate), state


def taylor_attention(dim: int, heads: int, feature_dim: int = 16) -> Recurrence:
    """Causal linear attention whose weights are 1 + s + s^2 / 2."""
    if heads < 1 or dim % heads:
        raise ChronotopeError(f"taylor_attention: dim={dim} is not a multiple of heads={heads}.")
    return Recurrence(
        dim, heads, features=Taylor(), normalize=True, head_dim=feature_dim, value_dim=dim // heads, gate=False
    )


def sliding_window(dim: int, heads: int, width: int = 128, axis: str = "n") -> Attention:
    """Softmax attention over the own place on the axis and the width - 1 before it."""
    if width < 1:
        raise ChronotopeError(f"sliding_window(width={width}): expected at least 1 place.")
    return Attention(dim, heads, where=window(dilation=1, edge="clip", **{axis: (width - 1, 0)}), position=Rope(axis))


@paper(
    system=130,
    name="BASED",
    family="linear",
    claim="second-order Taylor linear attention beside small windows: recall against a state of fixed size",
    evidence=["tests/papers/linear/test_based.py"],
)
def based(
    dim: int,
    heads: int = 16,
    layers: Sequence[str] = RELEASED,
    feature_dim: int = 16,
    width: int = 128,
    kernel: int = 3,
    axis: str = "n",
) -> Stack:
    """A stack of layers of the kinds "linear", "window" and "conv", to be stepped along the grid's first axis.

    Args:
        dim, heads: channels, and heads of the attention layers.
        layers: the kind of each layer.
        feature_dim: size of queries and keys of linear layers.
        width: places that a window holds, the own one included.
        kernel: tokens that a convolution sees, the own one included.
        axis: the axis of windows and their rotary positions.
    """
    kinds: dict[str, Callable[[], Mixer]] = {
        "linear": lambda: taylor_attention(dim, heads, feature_dim),
        "window": lambda: sliding_window(dim, heads, width, axis),
        "conv": lambda: GatedConv(dim, kernel),
    }
    unknown = sorted(set(layers) - set(kinds))
    if unknown or not layers:
        raise ChronotopeError(f"based: layers={tuple(layers)!r}; give one or more of {', '.join(kinds)}.")
    # A feed-forward with 2 dim hidden channels.
    return Stack([Block([kinds[kind]()], mlp="swiglu", mlp_ratio=3.0) for kind in layers])
