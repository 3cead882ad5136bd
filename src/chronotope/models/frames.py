"""Forecasters of frames that carry a state: any number of frames, each at the same cost, from any number seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.nn import Attention, Block, ConvLSTM, ConvSpace, Mixer, PatchEmbed, Stack, States, Unpatch
from chronotope.patterns import along, causal
from chronotope.position import Rope
from chronotope.saving import Saved

Over = Literal["space", "attention"]


class Continuation(Saved):
    """z = LN(block_L(... block_1(E x_1, ..., E x_T, e, e, ...))), frame T + i = unpatch(W z_{T + i}).

    Frames that have not come are one learned token e at every place. No block looks ahead, so that frames can be seen
    and told one by one: `tell` gives what `forward` gives.

    Args:
        over: what a block has before its feed-forward. "space": `ConvSpace`, whose state does not grow. "attention":
            over the frames so far at each place, then within the frame; rotary; its cache grows by a frame with each.
        patch, channels: pixels of a patch on each side, channels of a frame.
        dim, layers: width, blocks. ratio: of the feed-forward, as for `Block`.
        states, slowest, fastest: size and initial step sizes of a `ConvSpace`. heads: of attention.

    Example:
        >>> Continuation(patch=4, dim=16)(torch.rand(2, 5, 1, 16, 24), frames=7).shape
        torch.Size([2, 7, 1, 16, 24])
    """

    def __init__(
        self,
        over: Over = "space",
        patch: int = 4,
        channels: int = 1,
        dim: int = 64,
        layers: int = 4,
        ratio: float = 4.0,
        states: int = 32,
        slowest: float = 0.01,
        fastest: float = 0.5,
        heads: int = 4,
    ):
        super().__init__()
        if layers < 1 or over not in ("space", "attention"):
            raise ChronotopeError(
                f"Continuation(over={over!r}, layers={layers}): expected space or attention, 1 or more."
            )
        self.embed, self.head = PatchEmbed(dim, patch, channels), Unpatch(dim, patch, channels)
        self.coming = nn.Parameter(0.02 * torch.randn(dim))

        def mixers() -> list[Mixer]:
            if over == "space":
                return [ConvSpace(dim, states, steps=(slowest, fastest))]
            time, space = along("t") & causal("t"), along("h", "w")
            return [
                Attention(dim, heads, where=time, position=Rope(axes="t", base=100.0)),
                Attention(dim, heads, where=space, position=Rope(axes=("h", "w"), base=100.0)),
            ]

        self.stack = Stack([Block(mixers(), dim, "swiglu", ratio) for _ in range(layers)], dim)

    def forward(self, clips: Float[Tensor, "b t c h w"], frames: int | None = None) -> Float[Tensor, "b frames c h w"]:
        """The frames that follow, all at once; by default as many as are seen."""
        x, grid = self.embed(clips)
        seen, frames = grid.shape[0], grid.shape[0] if frames is None else frames
        blank = self.coming.expand(len(x), frames * (grid.size // seen), -1)
        whole = grid.replace(t=seen + frames)
        z = self.stack(torch.cat((x, blank.to(x)), 1), whole)
        return self.head(z[:, grid.size :], grid.replace(t=frames))

    def tell(self, clips: Float[Tensor, "b t c h w"]) -> Iterator[tuple[Float[Tensor, "b c h w"], States]]:
        """The frames that follow, one by one and without end, and the state after each."""
        x, grid = self.embed(clips)
        one = grid.replace(t=1)
        state = self.stack.init_state(len(x), one)
        for part in x.split(one.size, 1):
            _, state = self.stack.step(part, state)
        blank = self.coming.expand(len(x), one.size, -1).to(x)
        while True:
            z, state = self.stack.step(blank, state)
            yield self.head(z, one)[:, 0], state

    def loss(self, clips: Float[Tensor, "b t c h w"], future: Float[Tensor, "b f c h w"]) -> Float[Tensor, ""]:
        """Mean squared error."""
        return F.mse_loss(self(clips, future.shape[1]), future)


class EncoderForecaster(Saved):
    """ConvLSTMs read the frames; others go on from their states, with nothing to read, and tell those that follow.

    The forecasting layers take the states of the reading ones in reverse: the first that of the last. A frame is a
    matrix times the h of all of them side by side, laid out as patches.

    Args:
        patch, channels: pixels of a patch on each side, channels of a frame.
        dim, layers, kernel: of the ConvLSTMs, as many that read as tell.

    Source: Shi et al. 2015, arXiv 1506.04214; without peepholes here.

    Example:
        >>> EncoderForecaster(patch=4, dim=16)(torch.rand(2, 5, 1, 16, 24), frames=7).shape
        torch.Size([2, 7, 1, 16, 24])
    """

    def __init__(self, patch: int = 4, channels: int = 1, dim: int = 64, layers: int = 2, kernel: int = 3):
        super().__init__()
        if layers < 1:
            raise ChronotopeError(f"EncoderForecaster(layers={layers}): expected 1 or more.")
        self.embed, self.head = PatchEmbed(dim, patch, channels), Unpatch(layers * dim, patch, channels)
        self.reads = nn.ModuleList(ConvLSTM(dim, kernel=kernel) for _ in range(layers))
        self.tells = nn.ModuleList(ConvLSTM(dim, kernel=kernel) for _ in range(layers))

    def forward(self, clips: Float[Tensor, "b t c h w"], frames: int | None = None) -> Float[Tensor, "b frames c h w"]:
        """The frames that follow; by default as many as are seen."""
        x, grid = self.embed(clips)
        states = []
        for layer in self.reads:
            x, state = layer.run(x, grid)  # type: ignore[operator]
            states.append(state)
        coming = grid if frames is None else grid.replace(t=frames)
        x, said = x.new_zeros(len(x), coming.size, x.shape[2]), []
        for layer, state in zip(self.tells, reversed(states), strict=True):
            x, _ = layer.run(x, coming, state)  # type: ignore[operator]
            said.append(x)
        return self.head(torch.cat(said, 2), coming)

    def loss(self, clips: Float[Tensor, "b t c h w"], future: Float[Tensor, "b f c h w"]) -> Float[Tensor, ""]:
        """Mean squared error."""
        return F.mse_loss(self(clips, future.shape[1]), future)
