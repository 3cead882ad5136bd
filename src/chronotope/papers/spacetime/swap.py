r"""Swapped cross-attention (VideoFactory): inside windows, features of space and of time ask each other by turns.

$$
Q = W_q\,\mathrm{LN}(x), \quad K, V = W_{k,v}\,\mathrm{LN}'(y), \quad
x \leftarrow x + W_o\,\mathrm{softmax}_{W(p)}\!\big(Q K^T / \sqrt d\big) V, \quad
x \leftarrow x + \mathrm{MLP}(\mathrm{LN}(x))
$$

x is the stream that asks and y the one that answers: what a layer over space made of a clip, and what one over time
made. W(p) are the tokens of y in p's window of (wt, wh, ww), cut at the borders. In the next block the roles are
swapped, so that each side is guided by the other; asking in one direction only is the ablation (`alternate=False`).

Sizes: space, time [B, N, C] on Grid(t, h, w). N wt wh ww pairs: linear in N.

    >>> layer = SwapCrossAttention(16, 2, window=(2, 4, 4))
    >>> space, time = torch.randn(2, 1, 4 * 5 * 6, 16)
    >>> layer(space, time, Grid(t=4, h=5, w=6), query="time").shape
    torch.Size([1, 120, 16])

`SwapStack` is some of these layers, with what each stream does on its own in between.

Left out: the latent U-Net around it, its convolutions over time, text, the second model that enlarges. Unconfirmed: the
size of windows, the levels of the network that have them, and whether a block asks once or both ways; here once.
Streaming: a window holds later frames.

Paper: Wenjing Wang, Huan Yang, Zixi Tuo, Huiguo He, Junchen Zhu, Jianlong Fu, Jiaying Liu, "Swap Attention in
Spatiotemporal Diffusions for Text-to-Video Generation" (VideoFactory), 2023, arXiv 2305.10874.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.attention import Attention
from chronotope.nn.feedforward import FeedForward
from chronotope.papers.registry import paper
from chronotope.patterns import blocks


@paper(
    system=7,
    name="VideoFactory (Swap-CA)",
    family="spacetime",
    claim="features of space and of time ask each other by turns, inside windows: each is guided by the other",
    evidence=["tests/papers/spacetime/test_swap.py"],
)
class SwapCrossAttention(nn.Module):
    """The stream that asks, after it has looked at the other one inside windows.

    Args:
        dim, heads: channels and heads.
        window: tokens on t, h, w.
        shift: moves the windows, by so many tokens on t, h, w.
        mlp_ratio: hidden channels of the feed-forward over dim.

    Raises ChronotopeError: `query` is neither stream.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Sequence[int] = (2, 8, 8),
        shift: Sequence[int] = (0, 0, 0),
        mlp_ratio: float | int = 4.0,
    ):
        super().__init__()
        axes = ("t", "h", "w")
        where = blocks(**dict(zip(axes, window, strict=True)), shift=dict(zip(axes, shift, strict=True)))
        self.attention = Attention(dim, heads, where=where, biases=True)
        self.asks, self.answers, self.mlp_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.mlp = FeedForward(dim, "gelu", mlp_ratio, biases=True)

    def forward(
        self, space: Float[Tensor, "b n c"], time: Float[Tensor, "b n c"], grid: Grid, query: str = "space"
    ) -> Float[Tensor, "b n c"]:
        """The updated stream of `query`."""
        if query not in ("space", "time"):
            raise ChronotopeError(f"SwapCrossAttention: query={query!r}; expected 'space' or 'time'.")
        x, y = (space, time) if query == "space" else (time, space)
        x = x + self.attention(self.asks(x), grid, (self.answers(y), grid))
        return x + self.mlp(self.mlp_norm(x))


class SwapStack(nn.Module):
    """Swapped layers one after the other, the roles changing from each to the next, or not (`alternate`).

    `own`: for each layer what the two streams do by themselves before it, (mixer of space, mixer of time), or None.
    """

    def __init__(
        self,
        layers: Sequence[SwapCrossAttention],
        alternate: bool = True,
        own: Sequence[tuple[nn.Module, nn.Module]] | None = None,
    ):
        super().__init__()
        if own is not None and len(own) != len(layers):
            raise ChronotopeError(f"SwapStack: {len(layers)} layers and {len(own)} pairs of mixers; give one for each.")
        self.layers, self.alternate = nn.ModuleList(layers), alternate
        self.own = None if own is None else nn.ModuleList(nn.ModuleList(pair) for pair in own)

    def forward(
        self, space: Float[Tensor, "b n c"], time: Float[Tensor, "b n c"], grid: Grid
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        """Both streams."""
        for index, layer in enumerate(self.layers):
            if self.own is not None:
                mixers = list(self.own[index])  # type: ignore[call-overload]
                space, time = space + mixers[0](space, grid), time + mixers[1](time, grid)
            if self.alternate and index % 2:
                time = layer(space, time, grid, "time")
            else:
                space = layer(space, time, grid, "space")
        return space, time
