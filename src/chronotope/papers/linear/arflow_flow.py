"""The flow model of ARFlow: x_t = t x_1 + (1 - t) x_0 from noise x_0 to an image x_1, over a sequence of images.

>>> model = ARFlow(dim=64, depth=2, heads=4, classes=10)
>>> sample(model, torch.tensor([3, 7]), (4, 16, 16), steps=10).shape
torch.Size([2, 4, 16, 16])
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.grid import Grid
from chronotope.nn import FeedForward, PatchEmbed, States, Unpatch
from chronotope.nn.modulation import LabelEmbedding, Modulation, TimeEmbedding
from chronotope.papers.linear.arflow import HybridAttention, HybridState
from chronotope.papers.linear.conditioning import sincos


class FlowBlock(nn.Module):
    """The attention and a feed-forward, each steered by the condition of its image."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.mixer, self.mlp = HybridAttention(dim, heads), FeedForward(dim, "gelu")
        self.steer = nn.ModuleList([Modulation(dim), Modulation(dim)])

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, condition: Float[Tensor, "b s c"]) -> Tensor:
        """All images at once."""
        x = self.steer[0](x, condition, lambda y: self.mixer(y, grid, condition))
        return self.steer[1](x, condition, self.mlp)  # type: ignore[no-any-return]

    def step(
        self, x: Float[Tensor, "b n c"], state: HybridState, condition: Float[Tensor, "b one c"]
    ) -> tuple[Tensor, HybridState]:
        """The next image."""
        after = []

        def mix(y: Tensor) -> Tensor:
            y, new = self.mixer.step(y, state, condition)
            after.append(new)
            return y

        x = self.steer[0](x, condition, mix)
        return self.steer[1](x, condition, self.mlp), after[0]


class ARFlow(nn.Module):
    """Velocities of images [B, S, channels, H, W] at times t [B, S] and labels y [B]: the same shape.

    Args:
        dim, depth, heads: width, blocks, heads of each.
        classes: number of labels; `classes` itself is the label for none.
        patch, channels: pixels of a patch along each side, channels of an image.
    """

    def __init__(self, dim: int, depth: int, heads: int, classes: int, patch: int = 2, channels: int = 4):
        super().__init__()
        self.embed, self.unpatch = PatchEmbed(dim, patch, channels), Unpatch(dim, patch, channels)
        self.time, self.label = TimeEmbedding(dim), LabelEmbedding(dim, classes)
        self.blocks = nn.ModuleList(FlowBlock(dim, heads) for _ in range(depth))
        self.norm, self.modulation = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6), nn.Linear(dim, 2 * dim)
        for layer in (self.modulation, self.unpatch.project):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "b s c height width"], t: Float[Tensor, "b s"], y: Int[Tensor, "b"]
    ) -> Float[Tensor, "b s c height width"]:
        """The velocity of every image."""
        tokens, grid, condition = self._enter(x, t, y)
        for block in self.blocks:
            tokens = block(tokens, grid, condition)
        return self._leave(tokens, grid, condition)

    def init_state(self, batch: int, size: tuple[int, int]) -> States:
        """Before the first image, of height and width `size`."""
        grid = self.embed.grid(torch.empty(0, 1, self.embed.channels, *size))
        return States(tuple(block.mixer.init_state(batch, grid) for block in self.blocks))  # type: ignore[union-attr,operator]

    def step(
        self, x: Float[Tensor, "b c height width"], t: Float[Tensor, "b"], y: Int[Tensor, "b"], state: States
    ) -> tuple[Float[Tensor, "b c height width"], States]:
        """The velocity of the next image, and the state after it."""
        tokens, grid, condition = self._enter(x[:, None], t[:, None], y)
        after: list[Any] = []
        for block, before in zip(self.blocks, state.parts, strict=True):
            tokens, new = block.step(tokens, before, condition)  # type: ignore[operator]
            after.append(new)
        return self._leave(tokens, grid, condition)[:, 0], States(tuple(after))

    def _enter(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Grid, Tensor]:
        tokens, grid = self.embed(x)
        places = sincos(Grid(h=grid.sizes["h"], w=grid.sizes["w"]), tokens.shape[2], tokens.device)
        return tokens + places.repeat(x.shape[1], 1), grid, self.time(t) + self.label(y)[:, None]

    def _leave(self, tokens: Tensor, grid: Grid, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(condition))[:, :, None].chunk(2, -1)
        steered = self.norm(tokens).unflatten(1, (grid.shape[0], -1)) * (1 + scale) + shift
        return self.unpatch(steered.flatten(1, 2), grid)  # type: ignore[no-any-return]


def flow_loss(model: ARFlow, images: Float[Tensor, "b s c height width"], y: Int[Tensor, "b"]) -> Float[Tensor, ""]:
    """Mean squared error of the velocities of S images of one class, at S random times in rising order."""
    t = torch.rand(images.shape[:2], device=images.device, dtype=images.dtype).sort(1).values
    noise = torch.randn_like(images)
    at = t[:, :, None, None, None]
    return F.mse_loss(model(at * images + (1 - at) * noise, t, y), images - noise)


def sample(
    model: ARFlow, y: Int[Tensor, "b"], size: tuple[int, int, int], *, steps: int = 250, last: float = 0.04,
    carry: bool = True, generator: torch.Generator | None = None,
) -> Float[Tensor, "b c height width"]:  # fmt: skip
    """Images [B, *size] of the labels y; `carry=False` forgets the state at every step."""
    *_, x = trajectory(model, y, size, steps=steps, last=last, carry=carry, generator=generator)
    return x


def trajectory(
    model: ARFlow, y: Int[Tensor, "b"], size: tuple[int, int, int], *, steps: int = 250, last: float = 0.04,
    carry: bool = True, generator: torch.Generator | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The images after each step of dx = (v + (1 - t) score) dt + sqrt(2 (1 - t)) dw; the last one, without noise,
    goes from 1 - last to 1. The score is -(x - t v) / (1 - t)."""
    device = model.modulation.weight.device
    x = torch.randn(len(y), *size, generator=generator, device=device)
    state = first = model.init_state(len(y), size[1:]).to(device)
    times = torch.linspace(0, 1 - last, steps).tolist()
    for i, t in enumerate(times):
        # Not around the function: a generator's body runs between the calls of its caller.
        with torch.no_grad():
            v, state = model.step(x, x.new_full((len(y),), t), y, state if carry else first)
        ahead = times[i + 1] - t if i + 1 < steps else last
        x = x + (v - (x - t * v)) * ahead
        if i + 1 < steps:
            noise = torch.randn(x.shape, generator=generator, device=device)
            x = x + (2 * (1 - t) * ahead) ** 0.5 * noise
        yield x
