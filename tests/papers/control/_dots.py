"""A small video diffusion net with attention over time, and clips of a moving dot that it is trained on."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.models.diffusion import flow_loss

SIDE, FRAMES = 8, 16


def dots(count: int, generator: torch.Generator, frames: int = FRAMES, side: int = SIDE) -> Tensor:
    """[count, frames, 1, side, side]: a dot that moves by up to 1.5 places a frame and turns back at the border."""
    place, speed = (torch.rand(count, 1, 2, generator=generator) for _ in range(2))
    way = place * 2 * (side - 1) + (speed * 3 - 1.5) * torch.arange(frames)[:, None]
    centre = (side - 1) - (way % (2 * (side - 1)) - (side - 1)).abs()  # [count, frames, 2]
    near = torch.exp(-(torch.arange(side) - centre[..., None]).square() / 2)
    return 2 * (near[:, :, 0, :, None] * near[:, :, 1, None, :])[:, :, None] - 1


def rests(count: int, generator: torch.Generator) -> Tensor:
    """Such clips before scenes that stand still; in 7 of 10 the dot does too."""
    clips = dots(count, generator)
    still = torch.rand(count, 1, 1, 1, 1, generator=generator) < 0.7
    scene = F.interpolate(torch.randn(count, 1, 3, 3, generator=generator), (SIDE, SIDE), mode="bicubic")
    return 0.8 * torch.where(still, clips[:, :1], clips) + 0.7 * scene[:, None]


def waves(x: Tensor, dim: int) -> Tensor:
    """Sines and cosines of numbers [..], [.., dim]."""
    angle = x[..., None] * torch.exp(-math.log(1000) * torch.arange(dim // 2) / (dim // 2))
    return torch.cat((angle.sin(), angle.cos()), -1)


class TimeAttention(nn.Module):
    """x + attention over the frames of each place."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        rows = x.permute(0, 3, 4, 1, 2).reshape(-1, t, c)
        q, k, v = (
            self.qkv(self.norm(rows) + waves(torch.arange(t), c))
            .unflatten(2, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        out = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + out.view(b, h, w, t, c).permute(0, 3, 4, 1, 2)


class Block(nn.Module):
    """A convolution of each frame, then attention over time."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm, self.level = nn.GroupNorm(4, dim), nn.Linear(dim, dim)
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))
        self.time = TimeAttention(dim, heads)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        frames = x.flatten(0, 1)
        y = (
            self.convs[0](F.silu(self.norm(frames))).unflatten(0, x.shape[:2])
            + self.level(level)[:, None, :, None, None]
        )
        return self.time(x + self.convs[1](F.silu(y.flatten(0, 1))).view_as(x))


class DotsNet(nn.Module):
    """The flow x - noise of clips [B, T, 1, h, w]: up block 1 at half the size, then 2 and 3."""

    def __init__(self, dim: int = 32, heads: int = 4):
        super().__init__()
        self.dim = dim
        self.level = nn.Sequential(nn.Linear(dim, dim), nn.SiLU())
        self.enter, self.leave = nn.Conv2d(1, dim, 3, padding=1), nn.Conv2d(dim, 1, 3, padding=1)
        self.down, self.up = nn.Conv2d(dim, dim, 3, 2, 1), nn.Conv2d(2 * dim, dim, 1)
        self.up_blocks = nn.ModuleDict({str(i): Block(dim, heads) for i in (1, 2, 3)})

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = self.level(waves(1000 * t, self.dim))
        wide = self.enter(x.flatten(0, 1))
        half = self.up_blocks["1"](self.down(F.silu(wide)).unflatten(0, x.shape[:2]), level)
        large = F.interpolate(half.flatten(0, 1), wide.shape[-2:], mode="nearest")
        y = self.up(torch.cat((wide, large), 1)).unflatten(0, x.shape[:2])
        for name in ("2", "3"):
            y = self.up_blocks[name](y, level)
        return self.leave(F.silu(y.flatten(0, 1))).view_as(x)


@lru_cache
def trained(clips: Callable[[int, torch.Generator], Tensor], steps: int = 800, dim: int = 24, seed: int = 0) -> DotsNet:
    """The net after a training by flow matching."""
    torch.manual_seed(seed)
    model, rng = DotsNet(dim), torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    course = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps)
    for _ in range(steps):
        opt.zero_grad()
        flow_loss(model, clips(8, rng), generator=rng).backward()
        opt.step()
        course.step()
    return model.eval().requires_grad_(False)


def moving(clips: Tensor) -> float:
    """Mean square of the difference of frames that follow each other."""
    return float(clips.diff(dim=1).square().mean())
