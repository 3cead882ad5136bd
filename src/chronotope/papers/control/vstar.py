r"""VSTAR: longer, livelier videos from a trained model, by a band added to the scores of its attention over time.

$$
S'_{ij} = S_{ij} + c\, m_i\, G_{ij}, \qquad G_{ij} = \exp\left(-\frac{(i - j)^2}{2 \sigma^2}\right), \qquad
m_i = \max_j S_{ij}
$$

i and j are frames. Frames that look less at far ones differ more from them. c = 0 and sigma = inf change nothing: what
is the same for all keys of a query leaves the softmax as it was. G depends on |i - j| alone, so the number of frames is
free, also beyond what the model was trained on.

Sizes: scores [B, H, F, F], one row of the batch for each place and video; on a `Grid(t=..., h=..., w=...)` i and j are
the frames of the tokens, and tokens without a place get no band.

    >>> layer, x = torch.nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(3, 32, 16)
    >>> with ct.adapt.control(layer, temporal_bias(sigma=4.0), steps=range(14)):
    ...     out, weights = layer(x, x, x)
    >>> bool(diagonalness(weights.mean(0)) > 0.1)
    True
    >>> synopsis(torch.randn(3, 77, 64), frames=32).shape
    torch.Size([32, 77, 64])

`scale="rowmax"` is m_i as published. Where all scores of a query are negative, m_i is too, and the band pushes the
near frames away instead; "absmax" takes max_j |S_ij|, which cannot; "constant" takes 1: the band is then a mask
[F, F], and no layer holds its scores. `diagonalness` is the correlation of i and j under a map's weights.

`synopsis` spreads the texts of several stages over the frames, for models that give each frame its own text.

Settings of the released code (boschresearch/VSTAR, commit 2751a9a): c = 1, sigma = 1, 4 or 8, at the first 14 of 25
steps (`steps=range(14)`), at layers whose latents are 64 or, where named, 32 wide (`layers=`), never at the first
attention over time. Its band, softmax, diagonalness and spread of texts, copied to run beside these on random scores of
32 frames at sigma = 1, 4, 8, and on 2 to 5 stages: they differ by 3.6e-7 at most. It keeps the places of stages as
int8, which fails beyond 128 frames.

On scores drawn from a normal distribution, 32 frames, sigma = 8: diagonalness 0.53, 0.80, 0.94 at c = 1, 2, 4. At c = 1
it is greatest near sigma = 8 and falls on both sides: a narrow band lifts few entries, a wide one lifts all.

A small net trained on 16 frames of clips that mostly stand still, sampled at 32 with sigma = 4 at 14 of 25 steps: the
mean distance of the frames that are looked at falls from 10.6 to 8.8 and 7.2 at c = 1 and 2, the cosine of frames 16
apart from 0.90 to 0.81 and 0.68, and what changes from frame to frame rises from 0.052 to 0.091 and 0.138.

Left out: the language model that writes the stages; VideoCrafter's weights.

Paper: Yumeng Li, William Beluch, Margret Keuper, Dan Zhang, Anna Khoreva, "VSTAR: Generative Temporal Nursing for
Longer Dynamic Video Synthesis", 2024, arXiv 2403.13501.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.adapt.asked import Asked
from chronotope.adapt.control import At, Control
from chronotope.adapt.masks import read_mask
from chronotope.errors import ChronotopeError
from chronotope.papers.registry import paper


@paper(
    system=108,
    name="VSTAR",
    family="control",
    claim="a Gaussian band in the scores of attention over time: far frames copy less from each other",
    evidence=["tests/papers/control/test_vstar.py"],
)
def temporal_bias(sigma: float | int = 4.0, strength: float | int = 1.0, scale: str = "rowmax") -> Control:
    """The control, for layers that attend over time.

    Args:
        sigma: width of the band in frames.
        strength: c.
        scale: what the band is multiplied with: the greatest score of the query, the greatest magnitude, or 1.
    """
    if not sigma > 0:
        raise ChronotopeError(f"sigma={sigma}: expected a width above 0.")
    if scale not in ("rowmax", "absmax", "constant"):
        raise ChronotopeError(f"scale={scale!r}: expected 'rowmax', 'absmax' or 'constant'.")
    return ConstantBand(sigma, strength) if scale == "constant" else ScaledBand(sigma, strength, scale == "absmax")


class ConstantBand(Control):
    """S + c G, as a mask."""

    def __init__(self, sigma: float | int, strength: float | int):
        self.sigma, self.strength = sigma, strength

    def asks(self, at: At, asked: Asked) -> Asked:
        """The model's own mask, and the band."""
        mask = self.strength * band(at, asked.q, asked.k, self.sigma)
        return asked.but(mask=mask if asked.mask is None else mask + read_mask(asked.mask, asked.q.dtype).own)


class ScaledBand(Control):
    """S + c m G, m being the greatest score of each query, or the greatest magnitude of one."""

    def __init__(self, sigma: float | int, strength: float | int, magnitude: bool):
        self.sigma, self.strength, self.magnitude = sigma, strength, magnitude

    def scores(self, at: At, scores: Float[Tensor, "b h nq nk"]) -> Float[Tensor, "b h nq nk"]:
        """Where a query may not look, -inf stays."""
        seen = scores > -torch.inf
        height = scores.abs() if self.magnitude else scores
        most = height.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
        # A query that sees nothing has no greatest score.
        most = most.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        return scores + self.strength * most * band(at, scores[..., :1], scores[..., :1, :].mT, self.sigma)


def band(
    at: At, q: Float[Tensor, "b h nq _"], k: Float[Tensor, "b hk nk _"], sigma: float | int
) -> Float[Tensor, "nq nk"]:
    """G, in the order of the model; 0 beside tokens that have no place."""
    n = k.shape[2]
    if at.crossed or q.shape[2] != n:
        raise ChronotopeError(
            f"{at.layer}: {q.shape[2]} queries look at {n} keys that are not the same frames; name the layers that "
            "attend over time by layers=."
        )
    frame = torch.arange(n, device=q.device)
    placed = torch.ones(n, dtype=torch.bool, device=q.device)
    if at.grid is not None and len(at.grid.axes) > 1:
        at.grid.require(("t",), f"{at.layer}: a band over time")
    if at.grid is not None and at.grid.size == n:
        placed[at.text] = False
        axis = at.grid.axes.index("t") if "t" in at.grid.axes else 0
        frame[placed] = at.grid.coords(q.device)[at.grid.prefix :, axis]
    distance = (frame[:, None] - frame).to(torch.promote_types(q.dtype, torch.float32))
    near = torch.exp(-(distance / sigma).square() / 2) * (placed[:, None] & placed)
    return near.to(q.dtype)


def diagonalness(weights: Float[Tensor, "*b f f"]) -> Float[Tensor, "*b"]:
    """Correlation of row and column under weights: 1 on the diagonal alone, 0 where all are equal."""
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    place = torch.arange(weights.shape[-1], device=weights.device, dtype=weights.dtype)
    share = weights / weights.sum((-2, -1), keepdim=True)
    rows, columns = share.sum(-1), share.sum(-2)
    i = place - (rows @ place)[..., None]
    j = place - (columns @ place)[..., None]
    together = (share * i[..., :, None] * j[..., None, :]).sum((-2, -1))
    return together / ((rows * i.square()).sum(-1) * (columns * j.square()).sum(-1)).sqrt()


def synopsis(
    stages: Float[Tensor, "s m c"], frames: int, at: Sequence[int] | None = None
) -> Float[Tensor, "frames m c"]:
    """A text for each frame: those of the stages at their frames, linear between them.

    at: the frame of each stage, rising; default: spread evenly from the first frame to the last.
    """
    count = len(stages)
    places = torch.linspace(0, frames - 1, count, dtype=torch.float64).long() if at is None else torch.tensor(list(at))
    if count < 1 or len(places) != count or (count > 1 and not bool((places.diff() > 0).all())):
        raise ChronotopeError(
            f"{count} stages at frames {places.tolist()} of {frames}: expected one frame for each, rising."
        )
    after = torch.searchsorted(places, torch.arange(frames)).clamp(min=min(1, count - 1), max=count - 1)
    before = (after - 1).clamp(min=0)
    way = (torch.arange(frames) - places[before]) / (places[after] - places[before]).clamp(min=1)
    way = way.clamp(0, 1).to(stages.device, stages.dtype)[:, None, None]
    return (1 - way) * stages[before] + way * stages[after]
