"""LinGen: a video denoiser of linear cost: a two-way state space over all tokens plus attention in small windows.

    MATE(x) = MA(x) + TE(x)
    MA: tokens in the order of the layer, after R review tokens (means over a coarse grid of the whole volume);
        Mamba-2 forwards, and another one backwards; their sum, back in grid order
    TE: softmax attention within blocks of t x h x w tokens, moved by half a block in every second layer

Rotary Major Scan: from layer to layer the order goes round (t, h, w), (t, w, h), (h, w, t), (w, h, t), the last axis
running fastest: neighbours along w, h or t follow each other in at least one of four layers. Each is a permutation of
the axes. With review tokens the state has seen the whole clip before its first token, in either direction.

Sizes: x [B, T H W, C] on Grid(t, h, w), any sizes; work O(N (C^2 + S C + m C)), S states of the scan, m tokens of a
window. A one-way scan without review tokens is a `MajorScan` that can be stepped, where time is the slowest axis.

    >>> layer = MATE(64, heads=4, layer=1)
    >>> layer(torch.randn(2, 4 * 6 * 5, 64), Grid(t=4, h=6, w=5)).shape
    torch.Size([2, 120, 64])

Left out: the text encoder, progressive training and the 4B model. Not known to us, and chosen here: windows of 4 x 4 x
4, review tokens of a 2 x 4 x 4 grid in front of both directions, 64 states, which of the orders comes first, and a
state space of its own for each direction.

Paper: Wang et al. 2024, "LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with Linear
Computational Complexity", arXiv 2412.09856.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.bias import RelativeBias
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, FeedForward, Mixer, Whole
from chronotope.nn.mixer import Context, require_slice, require_tokens
from chronotope.nn.modulation import Modulation
from chronotope.nn.spaces import Mamba2, SpaceState
from chronotope.papers.registry import paper
from chronotope.patterns import blocks
from chronotope.recurrences.orders import Order, scan_order

MAJORS = (("t", "h", "w"), ("t", "w", "h"), ("h", "w", "t"), ("w", "h", "t"))


def major(grid: Grid, layer: int, device: torch.device | str = "cpu") -> Order:
    """The order of a layer, on Grid(t, h, w)."""
    return scan_order(grid, MAJORS[layer % len(MAJORS)], device=device)


class MajorScan(Mixer):
    """The MA-branch.

    Args:
        dim, layer: channels; which layer this is, which says the order.
        review: sizes of the coarse grid of review tokens on t, h, w; None: no review tokens.
        both: whether there is a second scan, backwards.
        states, head_dim, backend: as for `Mamba2`.
    """

    def __init__(
        self, dim: int, layer: int = 0, *, review: tuple[int, int, int] | None = (2, 4, 4), both: bool = True,
        states: int = 64, head_dim: int = 32, backend: str = "auto",
    ):  # fmt: skip
        super().__init__()
        self.dim, self.layer, self.review = dim, layer, review
        self.ahead = Mamba2(dim, states, head_dim=head_dim, backend=backend)
        self.back = Mamba2(dim, states, head_dim=head_dim, backend=backend) if both else None

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens of a clip. Takes no context."""
        require_tokens(x, grid, self.dim, "x")
        if set(grid.axes) != {"t", "h", "w"} or grid.prefix or context is not None:
            raise ChronotopeError(f"MajorScan on {grid!r}: expected the axes t, h, w, no prefix and no context.")
        order = major(grid, self.layer, x.device)
        tokens, overview = order(x), self._overview(x, grid)
        y = self._after(self.ahead, overview, tokens)
        if self.back is not None:
            y = y + self._after(self.back, overview, tokens.flip(1)).flip(1)
        return order.undo(y)

    def init_state(self, batch: int, grid: Grid) -> SpaceState:
        """Raises ChronotopeError unless the scan goes one way through time."""
        require_slice(grid)
        if self.review is not None or self.back is not None or MAJORS[self.layer % len(MAJORS)][0] != grid.axes[0]:
            raise ChronotopeError(
                f"MajorScan(layer={self.layer}, review={self.review}, both={self.back is not None}) sees what comes "
                "later. To be stepped: layer 0 or 1, review=None, both=False, and t the first axis."
            )
        return self.ahead.init_state(batch, grid)

    def step(self, x: Float[Tensor, "b s c"], state: SpaceState) -> tuple[Float[Tensor, "b s c"], SpaceState]:
        """The next frame."""
        order = major(state.grid, self.layer, x.device)
        y, state = self.ahead.step(order(x), state)
        return order.undo(y), state

    def _overview(self, x: Tensor, grid: Grid) -> Float[Tensor, "b r c"]:
        """Means over a coarse grid, in the order of the layer; there are always as many."""
        if self.review is None:
            return x[:, :0]
        volume = x.transpose(1, 2).unflatten(2, grid.shape)
        volume = volume.permute(0, 1, *(2 + grid.axes.index(axis) for axis in ("t", "h", "w")))
        pooled = F.adaptive_avg_pool3d(volume, self.review).flatten(2).transpose(1, 2)
        coarse = Grid(**dict(zip(("t", "h", "w"), self.review, strict=True)))
        return major(coarse, self.layer, x.device)(pooled)

    def _after(self, space: Mamba2, overview: Tensor, tokens: Tensor) -> Tensor:
        sequence = torch.cat((overview, tokens), 1)
        return space(sequence, Grid(n=sequence.shape[1]))[:, overview.shape[1] :]  # type: ignore[no-any-return]


@paper(
    system=33,
    name="LinGen",
    family="linear",
    claim="two-way scans in rotating orders with review tokens, plus attention in shifted windows, at linear cost",
    evidence=["tests/papers/linear/test_lingen.py"],
    missing="denoising moving shapes: loss 0.277, full attention 0.422, the scan alone 0.279, not 10% above it",
)
class MATE(Whole):
    """MA + TE on Grid(t, h, w), in place of self-attention.

    Args:
        dim, heads, layer: channels; heads of the windows; which layer this is.
        window: sizes of a window on t, h, w.
        scan: further arguments of `MajorScan`.
    """

    why = "its windows and its scan look ahead; a MajorScan alone can be"

    def __init__(
        self, dim: int, heads: int, layer: int = 0, *, window: tuple[int, int, int] = (4, 4, 4),
        scan: Mapping[str, Any] | None = None, backend: str = "auto",
    ):  # fmt: skip
        super().__init__()
        self.dim = dim
        self.scan = MajorScan(dim, layer, **{"backend": backend, **(scan or {})})
        sizes = dict(zip(("t", "h", "w"), window, strict=True))
        half = {axis: size // 2 for axis, size in sizes.items()} if layer % 2 else None
        bias = RelativeBias(heads, **{axis: size - 1 for axis, size in sizes.items()})
        self.near = Attention(dim, heads, where=blocks(shift=half, **sizes), bias=bias, backend=backend)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, context: Context | None = None) -> Float[Tensor, "b n c"]:
        """All tokens of a clip. Takes no context."""
        return self.scan(x, grid, context) + self.near(x, grid)


class LinGenBlock(nn.Module):
    """MATE steered by a condition, attention over the text, a steered feed-forward."""

    def __init__(self, dim: int, heads: int, layer: int, **options: Any):
        super().__init__()
        self.mate, self.text = MATE(dim, heads, layer, **options), Attention(dim, heads)
        self.mlp, self.steer = FeedForward(dim, "gelu"), nn.ModuleList([Modulation(dim), Modulation(dim)])

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, condition: Float[Tensor, "b one c"], text: Float[Tensor, "b m c"]
    ) -> Float[Tensor, "b n c"]:
        """All tokens of a clip."""
        x = self.steer[0](x, condition, lambda y: self.mate(y, grid))
        x = x + self.text(x, grid, (text, Grid(n=text.shape[1])))
        return self.steer[1](x, condition, self.mlp)  # type: ignore[no-any-return]
