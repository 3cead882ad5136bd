"""Selective S4: a state space over long videos that reads only the tokens which a generator of masks lets through.

For tokens x of all frames, in the order of the grid, with a first layer theta and its slow copy theta' (momentum):

    f_i    = LayerNorm(x + S4_theta'(x))_i             no gradient; linear cost, and it knows what came before i
    s_i    = MLP(f_i)
    p_i    = sigmoid((s_i + logistic noise) / T)        training: keep or drop by Gumbel-softmax; test: sigmoid(s_i)
    mask_i = 1 for the M = keep N tokens of highest p, else 0; its gradient is that of p (straight through)
    y      = layers on the M tokens mask_i x_i, in their order:  GELU(W mean_2(LayerNorm(x + S4(x))))
    theta' = m theta' + (1 - m) theta                   after each step

A layer halves tokens and channels, as in ViS4mer. `lsmcl` trains the layers beforehand: of one video a short clip,
masked at random, is encoded by the layers, and a long one, masked too, by their slow copy; InfoNCE draws the two
together, against the long clips of other videos.

Sizes: x [B, N, C], N = t h w -> tokens [B, M / 2^L, C / 2^L], indices [B, M], mask and scores [B, N]; M = keep N,
rounded up. The layers cost what they cost on M tokens; the generator's copy sees all N, without a gradient.

    >>> grid, model = Grid(t=8, h=4, w=4), SelectiveS4(32, layers=2, keep=0.25)
    >>> seen = model(torch.randn(2, grid.size, 32), grid)
    >>> seen.tokens.shape, seen.indices.shape, seen.mask.shape
    (torch.Size([2, 8, 8]), torch.Size([2, 32]), torch.Size([2, 128]))

Measured: clips of 64 frames of 16 tokens, two of which carry the label, the others those of any class; a quarter kept,
300 steps, three seeds: accuracy 1.00, 1.00, 0.94, of the plain layers 0.78, 0.77, 0.60 (0.99 after 900 steps), with a
quarter kept by chance 0.49, 0.45, 0.40; of the tokens that tell, 0.94, 0.94, 0.91 are kept. With m = 0.99 in place of
0.999 they are 0.86 and 0.91. Half the tokens are half the operations of the layers and half the memory for their
gradient; with the generator, 0.84 of what three plain layers hold. Time was 0.39 to 0.50 on a busy machine, where half
the tokens fit a cache better, and 0.6 for small clips. After `lsmcl` a short clip finds its long one among 256 in 0.32
of cases, before in 0.04.

Left out: backbones, LVU, COIN and Breakfast. It cannot stream: the highest share is known when all tokens are. S4 is
`ct.nn.S4D`, its diagonal form. No code of the paper was at hand, and these are choices of this page: what share is
kept, and that training keeps exactly that share too; one layer copied; selection before the first layer; rates,
temperatures and clips.

Paper: Wang et al. 2023, "Selective Structured State-Spaces for Long-Form Video Understanding", arXiv 2303.14526. The
layers: Islam and Bertasius 2022, "Long Movie Clip Classification with State-Space Video Models", arXiv 2204.01692.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn.mixer import require_tokens
from chronotope.nn.spaces import S4D
from chronotope.papers.registry import paper

MODES = ("gumbel_st", "topk")


class Kept(NamedTuple):
    """The tokens kept in their order, their numbers, and which of all were kept: 0 or 1, with the gradient of p."""

    tokens: Float[Tensor, "b m c"]
    indices: Int64[Tensor, "b m"]
    mask: Float[Tensor, "b n"]


class Seen(NamedTuple):
    """What the layers make of the tokens kept, the numbers of these, the mask and the scores of all tokens."""

    tokens: Float[Tensor, "b m2 c2"]
    indices: Int64[Tensor, "b m"]
    mask: Float[Tensor, "b n"]
    scores: Float[Tensor, "b n"]


def select(
    x: Float[Tensor, "b n c"],
    scores: Float[Tensor, "b n"],
    keep: float | int,
    mode: str = "topk",
    *,
    temperature: float | int = 1.0,
    generator: torch.Generator | None = None,
) -> Kept:
    """The share `keep` of the tokens, rounded up: those of the highest scores ("topk"), or of a sample ("gumbel_st").

    With "gumbel_st" the mask and the tokens have the gradient of the sampled probability. Random scores mask at random.
    """
    if mode not in MODES or not 0 < keep <= 1 or temperature <= 0:
        raise ChronotopeError(
            f"select(keep={keep}, mode={mode!r}, temperature={temperature}): expected a share above 0 up to 1, one of "
            f"{', '.join(MODES)}, and a temperature above 0."
        )
    if mode == "gumbel_st":
        # The difference of two Gumbel variables, of keeping and of dropping, is logistic.
        uniform = torch.rand(scores.shape, generator=generator, dtype=scores.dtype, device=scores.device)
        scores = (scores + uniform.logit(torch.finfo(scores.dtype).tiny)) / temperature
    index = scores.topk(math.ceil(keep * x.shape[1] - 1e-9), dim=1).indices.sort(dim=1).values
    mask = torch.zeros_like(scores).scatter(1, index, 1.0)
    if mode == "gumbel_st":
        soft = scores.sigmoid()
        mask = mask + (soft - soft.detach())
    tokens = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return Kept(tokens * mask.gather(1, index)[..., None], index, mask)


class S4Layer(nn.Module):
    """GELU(W mean_2(LayerNorm(x + S4(x)))), mean_2 of every two tokens: half the tokens and half the channels."""

    def __init__(self, dim: int, states: int):
        super().__init__()
        self.s4, self.norm, self.narrow = S4D(dim, states), nn.LayerNorm(dim), nn.Linear(dim, dim // 2)

    def mix(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """LayerNorm(x + S4(x))."""
        return self.norm(x + self.s4(x, Grid(n=x.shape[1])))  # type: ignore[no-any-return]

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n2 c2"]:
        """All of it; a last token without a partner stands for itself."""
        pairs = F.avg_pool1d(self.mix(x).transpose(1, 2), 2, ceil_mode=True).transpose(1, 2)
        return F.gelu(self.narrow(pairs))


class Momentum(nn.Module):
    """A copy of a model that follows it slowly and has no gradient."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """The copy's output."""
        return self.model(*inputs)

    @torch.no_grad()
    def update(self, model: nn.Module, rate: float | int) -> None:
        """Each parameter p' becomes rate p' + (1 - rate) p."""
        for own, other in zip(self.model.parameters(), model.parameters(), strict=True):
            own.lerp_(other, 1 - rate)


@paper(
    system=53,
    name="Selective S4",
    family="stream",
    claim="a state space reads only the tokens of a long video that a slow copy of it finds worth reading",
    evidence=["tests/papers/stream/test_selective_s4.py"],
)
class SelectiveS4(nn.Module):
    """Layers of S4 over the tokens kept. While training the choice is a sample, else it is the highest share.

    Args:
        dim: channels of x, a multiple of 2^layers.
        layers: how many.
        keep: the share of tokens kept.
        states: real size of the state of each channel.
        temperature: T.
        rate: m, for `ema_update`, which is to be called after each step of the optimizer.
    """

    def __init__(
        self,
        dim: int,
        layers: int = 3,
        *,
        keep: float | int = 0.5,
        states: int = 64,
        temperature: float | int = 1.0,
        rate: float | int = 0.999,
    ):
        super().__init__()
        if layers < 1 or dim % 2**layers:
            raise ChronotopeError(
                f"SelectiveS4({dim}, layers={layers}): expected at least 1, and 2^layers to divide dim."
            )
        self.dim, self.keep, self.temperature, self.rate = dim, keep, temperature, rate
        self.space = nn.Sequential(*(S4Layer(dim // 2**i, states) for i in range(layers)))
        self.guide = Momentum(self.space[0])
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))

    def scores(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
        """s, of all tokens. No gradient goes into x or the slow copy."""
        with torch.no_grad():
            found = self.guide.model.mix(x)  # type: ignore[operator]
        return self.score(found)[..., 0]  # type: ignore[no-any-return]

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, generator: torch.Generator | None = None) -> Seen:
        """All frames at once. `self.space(x)` is the plain model. generator: of the noise while training."""
        require_tokens(x, grid, self.dim, "x")
        scores = self.scores(x)
        mode = "gumbel_st" if self.training else "topk"
        kept = select(x, scores, self.keep, mode, temperature=self.temperature, generator=generator)
        return Seen(self.space(kept.tokens), kept.indices, kept.mask, scores)

    def ema_update(self, m: float | int | None = None) -> None:
        """Moves the slow copy; m: default `rate`."""
        self.guide.update(self.space[0], self.rate if m is None else m)


def lsmcl(
    z_long: Float[Tensor, "b d"],
    z_short: Float[Tensor, "b d"],
    queue: Float[Tensor, "n d"] | None = None,
    temperature: float | int = 0.1,
) -> Float[Tensor, ""]:
    """-log exp(a_ii) / (exp(a_ii) + sum of exp of the others), a = cos(short, long) / temperature; mean over videos.

    The others: the long clips in `queue`, or without one those of the other videos of the batch. Gradients go into
    z_short only: long clips are encoded by the slow copy.
    """
    short, long = F.normalize(z_short, dim=1), F.normalize(z_long.detach(), dim=1)
    if queue is None:
        return F.cross_entropy(short @ long.T / temperature, torch.arange(len(short), device=short.device))
    same = (short * long).sum(1, keepdim=True)
    logits = torch.cat((same, short @ F.normalize(queue.detach(), dim=1).T), 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(short), dtype=torch.int64, device=short.device))


def enqueue(queue: Float[Tensor, "n d"], z_long: Float[Tensor, "b d"]) -> Float[Tensor, "n d"]:
    """The queue with the newest in front, and the oldest gone."""
    return torch.cat((z_long.detach(), queue))[: len(queue)]
