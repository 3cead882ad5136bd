"""What the small models of diffusers' classes are made of: a subject, random inputs, sizes that many share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import chronotope as ct

# What diffusers itself warns of, for `pytest.mark.filterwarnings`.
WARNINGS = (
    "ignore:`FluxPosEmbed` is deprecated:FutureWarning",  # Chroma is made
    "ignore:In CPU autocast, but the target dtype is not supported:UserWarning",  # Mochi runs
)

B = 2  # samples of a batch
C = 4  # channels of latents
D = 16  # channels of text
STEPS = 3


@dataclass(frozen=True)
class Subject:
    """A model, and one call of it.

    In its joint attention `text` tokens without a place lie before those of `grid` (`after`: behind them); 0 where
    text comes in by cross-attention. The first `ahead` of them (frames of the past, or text) lie before the grid
    always. `parts` are the grids of layers that see some axes alone. `sample(model, noise)` is a short sampling loop;
    `noise` is shaped as what it returns.
    """

    model: nn.Module
    inputs: dict[str, Any]
    grid: ct.Grid
    text: int
    after: bool
    sample: Callable[[nn.Module, Tensor], Tensor] | None
    latents: Tensor  # [B, C, (T,) H, W]
    pack: Callable[[Tensor], Any]  # latents -> hidden_states
    hidden: int | None  # a token of encoder_hidden_states that its mask hides
    pooled: str | None  # the submodule through which text reaches all tokens outside attention
    ahead: int = 0
    parts: tuple[ct.Grid, ...] = ()
    into: str = "hidden_states"  # the input that the packed latents are

    @property
    def noise(self) -> Tensor:
        return whole(self.inputs[self.into])

    def with_latents(self, latents: Tensor) -> dict[str, Any]:
        """The inputs with other latents [B, C, (T,) H, W]."""
        return self.inputs | {self.into: self.pack(latents)}


def whole(samples: Tensor | list[Tensor]) -> Tensor:
    """What some models give sample by sample."""
    return samples if isinstance(samples, Tensor) else torch.stack(samples)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape)


def words(tokens: int, channels: int = D) -> Tensor:
    return torch.randn(B, tokens, channels)


def mask(tokens: int, *kept: int, dtype: torch.dtype = torch.long) -> Tensor:
    """For each sample of the batch, the first `kept` tokens."""
    return (torch.arange(tokens)[None] < torch.tensor(kept)[:, None]).to(dtype)


@torch.no_grad()
def awaken(model: nn.Module) -> None:
    """Weights of a size that makes attention matter: first ones are small, and those of gates are often zero."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim > 1:
            parameter *= 2


def sampler(
    inputs: dict[str, Any], time: str, scale: float, into: str = "hidden_states"
) -> Callable[[nn.Module, Tensor], Tensor]:
    @torch.no_grad()
    def sample(model: nn.Module, noise: Tensor) -> Tensor:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            given = noise if isinstance(inputs[into], Tensor) else list(noise)
            out = model(**inputs | {into: given, time: (t * scale).expand(inputs[time].shape)}).sample
            noise = scheduler.step(whole(out), t, noise).prev_sample
        return noise

    return sample


def subject(
    name: str,
    config: dict[str, Any],
    grid: ct.Grid,
    patch: tuple[int, ...],
    inputs: dict[str, Any],
    text: int = 0,
    after: bool = False,
    pack: Callable[[Tensor], Any] = lambda latents: latents,
    time: str = "timestep",
    scale: float = 1.0,
    hidden: int | None = None,
    pooled: str | None = None,
    ahead: int = 0,
    parts: tuple[ct.Grid, ...] = (),
    into: str = "hidden_states",
) -> Subject:
    model = getattr(diffusers, name)(**config).eval()
    awaken(model)
    latents = numbers(B, C, *(size * step for size, step in zip(grid.shape, patch, strict=True)))
    inputs = {into: pack(latents), time: torch.full((B,), 500.0 * scale)} | inputs
    sample = sampler(inputs, time, scale, into)
    return Subject(model, inputs, grid, text, after, sample, latents, pack, hidden, pooled, ahead, parts, into)


VIDEO = ct.Grid(t=3, h=4, w=5)
IMAGE = ct.Grid(h=5, w=7)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": C, "out_channels": C}
LAYERS = {"num_layers": 2, **HEADS}
BOTH = {"num_layers": 1, "num_single_layers": 1, **HEADS}  # a block of two streams, then one of one
