r"""The latents of OmniTokenizer: the nearest of unit codes, or a Gaussian.

$$
i = \arg\max_j\, \hat z \cdot e_j, \qquad \hat z = z / |z|, \qquad
\mathcal L = \| \hat z - \mathrm{sg}[e_i] \|^2 / D, \qquad \partial e_i / \partial \hat z := 1
$$

Sizes: z [..., D] -> latents of the same shape, indices [...], a loss. O(D J) a token for J codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F


class Latents(NamedTuple):
    """latents [..., D]; indices [...] of codes, or None; the loss to add, or 0."""

    latents: Tensor
    indices: Tensor | None
    loss: Tensor


class Codebook(nn.Module):
    """The nearest unit code by cosine, with gradients straight through.

    In training a code is the direction of the running mean of what chose it; the first batch gives the first codes. One
    that is chosen less than `least` times a batch, by the running mean, is put on a random member of the batch.

    Args:
        codes: how many.
        dim: channels of a code.
        decay: of the running means. least: 0, as published, for no restarts.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor

    def __init__(self, codes: int, dim: int, decay: float = 0.99, least: float = 0.0):
        super().__init__()
        self.decay, self.least = decay, least
        first = F.normalize(torch.randn(codes, dim), dim=1)
        self.register_buffer("codes", first)
        self.register_buffer("sums", first.clone())
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, z: Float[Tensor, "*b dim"]) -> Latents:
        """Codes, their numbers and the commitment loss."""
        unit = F.normalize(z, dim=-1)
        if self.training and not self.started:
            self._restart(unit.detach().flatten(0, -2), torch.ones_like(self.counts, dtype=torch.bool))
            self.started.fill_(True)
        index = (unit.detach() @ self.codes.T).argmax(-1)
        code = self.codes[index]
        if self.training:
            self._follow(unit.detach().flatten(0, -2), index.flatten())
        return Latents(code + (unit - unit.detach()), index, F.mse_loss(unit, code))

    @torch.no_grad()
    def _follow(self, unit: Float[Tensor, "n dim"], index: Int64[Tensor, "n"]) -> None:
        """The running means, and the codes that they give."""
        count = torch.bincount(index, minlength=len(self.codes)).to(self.counts)
        total = torch.zeros_like(self.sums).index_add_(0, index, unit)
        self.counts.lerp_(count, 1 - self.decay)
        self.sums.lerp_(total, 1 - self.decay)
        # New memory: the old codes are held by the graph of the step that chose among them. What nobody chooses for
        # long has a sum of almost nothing, and stays where it is.
        alive = self.sums.norm(dim=1, keepdim=True) > 1e-6
        self.codes = torch.where(alive, F.normalize(self.sums, dim=1), self.codes)
        if self.least > 0:
            self._restart(unit, self.counts < self.least)

    @torch.no_grad()
    def _restart(self, unit: Float[Tensor, "n dim"], rare: Tensor) -> None:
        drawn = unit[torch.randint(len(unit), (len(rare),), device=unit.device)]
        self.codes = torch.where(rare[:, None], drawn, self.codes)
        # As if chosen `least` times or once: a new code has its running mean ahead of it.
        count = self.counts.new_tensor(max(self.least, 1.0))
        self.counts = torch.where(rare, count, self.counts)
        self.sums = torch.where(rare[:, None], drawn * count, self.sums)


class Gaussian(nn.Module):
    """Latents drawn from N(mean, exp(log variance)) in training, the mean otherwise; KL from N(0, 1) times `weight`.

    z [..., 2 D]: mean, then log variance. KL: summed over channels, the mean over tokens.
    """

    def __init__(self, weight: float = 1e-6):
        super().__init__()
        self.weight = weight

    def forward(self, z: Float[Tensor, "*b double"]) -> Latents:
        """A draw or the mean, and the weighted divergence."""
        mean, spread = z.chunk(2, -1)
        spread = spread.clamp(-30, 20)
        loss = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(-1).mean()
        drawn = mean + (spread / 2).exp() * torch.randn_like(mean) if self.training else mean
        return Latents(drawn, None, self.weight * loss)


class Plain(nn.Module):
    """Latents as they are."""

    def forward(self, z: Float[Tensor, "*b dim"]) -> Latents:
        """z, and no loss."""
        return Latents(z, None, z.new_zeros(()))
