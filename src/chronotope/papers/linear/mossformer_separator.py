"""Separation of sources by masks on a learned filter bank, around MossFormer blocks, and its measure.

>>> model = Separator(filters=64, blocks=2, chunk=64)
>>> model(torch.randn(3, 4000)).shape
torch.Size([3, 2, 4000])
"""

from __future__ import annotations

from itertools import permutations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.grid import Grid
from chronotope.papers.linear.mossformer import GatedSingleHead


class Separator(nn.Module):
    """Sources [B, sources, samples] of mixtures [B, samples]: filters relu(conv(x)), a mask for each source, and back.

    Args:
        filters: number of filters, and width of the blocks; 512 as published.
        blocks: number of blocks; 24 as published.
        chunk, qk_dim: as for `GatedSingleHead`.
        sources: how many.
        kernel: samples of a filter, whose stride is half of them.
    """

    def __init__(
        self, filters: int = 512, blocks: int = 24, chunk: int = 256, qk_dim: int = 128, sources: int = 2,
        kernel: int = 16,
    ):  # fmt: skip
        super().__init__()
        self.sources = sources
        self.encode = nn.Conv1d(1, filters, kernel, kernel // 2, bias=False)
        self.decode = nn.ConvTranspose1d(filters, 1, kernel, kernel // 2, bias=False)
        self.norm, self.enter = nn.GroupNorm(1, filters), nn.Linear(filters, filters, bias=False)
        self.place = nn.Parameter(torch.ones(1))
        self.blocks = nn.ModuleList(GatedSingleHead(filters, qk_dim, chunk=chunk) for _ in range(blocks))
        self.last, self.activate = nn.LayerNorm(filters), nn.PReLU()
        self.spread, self.leave = nn.Linear(filters, sources * filters), nn.Linear(filters, filters, bias=False)
        self.content, self.gate = nn.Linear(filters, filters), nn.Linear(filters, filters)

    def forward(self, mixture: Float[Tensor, "b samples"]) -> Float[Tensor, "b sources samples"]:
        """The sources. Samples after the last whole frame are 0."""
        coded = F.relu(self.encode(mixture[:, None]))
        x = self.enter(self.norm(coded).transpose(1, 2))
        skip = x = x + self.place * _sinusoids(x.shape[1], x)
        for block in self.blocks:
            x = block(x, Grid(n=x.shape[1]))
        x = self.spread(self.activate(self.last(x) + skip)).unflatten(2, (self.sources, -1))
        masks = F.relu(self.leave(self.content(x).tanh() * self.gate(x).sigmoid()))
        masked = (masks * coded.transpose(1, 2)[:, :, None]).permute(0, 2, 3, 1)
        out = self.decode(masked.flatten(0, 1))[:, 0].unflatten(0, (len(mixture), self.sources))
        return F.pad(out, (0, mixture.shape[1] - out.shape[2]))


def _sinusoids(n: int, like: Tensor) -> Float[Tensor, "n c"]:
    dim = like.shape[2]
    speed = 10000.0 ** (-torch.arange(0, dim, 2, device=like.device) / dim)
    angle = torch.arange(n, device=like.device)[:, None] * speed
    return torch.cat((angle.sin(), angle.cos()), -1)[:, :dim].to(like.dtype)


def si_sdr(estimate: Float[Tensor, "*b samples"], source: Float[Tensor, "*b samples"]) -> Float[Tensor, "*b"]:
    """10 log10(|a s|^2 / |a s - e|^2) in dB, a = e . s / |s|^2, both without their means."""
    estimate, source = (x - x.mean(-1, keepdim=True) for x in (estimate, source))
    share = (estimate * source).sum(-1, keepdim=True) / (source.square().sum(-1, keepdim=True) + 1e-8)
    target = share * source
    rest = (target - estimate).square().sum(-1)
    return 10 * ((target.square().sum(-1) + 1e-8) / (rest + 1e-8)).log10()


def best_order(
    estimates: Float[Tensor, "b sources samples"], sources: Float[Tensor, "b sources samples"]
) -> Float[Tensor, "b"]:
    """Mean SI-SDR under the order of estimates that suits the sources best (permutation-invariant training)."""
    orders = permutations(range(sources.shape[1]))
    return torch.stack([si_sdr(estimates[:, list(order)], sources).mean(1) for order in orders]).amax(0)
