r"""Diffusion-SpaceTime-Attn: each object's own description counts in its own disc, by weights learned for one picture.

$$
o = g + \sum_i c_i(t)\, m_i\, (g_i - g), \qquad
\min_c\; 1 - s(x(c), \text{prompt}) + 5 \sum_i \big( 1 - s(\mathrm{crop}_i\, x(c), \text{object}_i) \big)
$$

g: attention of a pixel to the whole prompt; g_i: to the description of object i alone; m_i: 1 in a disc around (x_i,
y_i) of radius 0.2 of the side, else 0; s: a cosine that says how well picture and text fit. c has one number for each
object and step, 5 / K at first, and is optimised through all of the sampler, 3 passes of Adam at 0.005; the model stays
as it is. The picture is cut to the square of 0.2 around a centre, as far as it reaches.

Sizes: pixels N look at T + T_1 + .. + T_K words, the prompt and the K descriptions one after the other; centres [K, 2]
from 0 to 1; c [K, S]. The weights of the layer are not held; masks are made for its own resolution.

    >>> local = LocalTexts([16, 5, 5], torch.tensor([[0.25, 0.5], [0.75, 0.5]]), steps=10)
    >>> local.coef.shape, disc(local.centres, (8, 8)).shape
    (torch.Size([2, 10]), torch.Size([2, 8, 8]))

With a model, the same texts encoded and joined, `words` [1, 26, C]:

    with control(model, local, layers="*cross*"):
        losses = optimise(local, lambda: ddim(told(model, words), noise, alphas, 10), loss)

Step s of c belongs to the s-th noise level of a sampling, whatever runs in between: `times`, where it is given, finds
the step by the noise level instead, as gradient checkpointing of the model, which runs its steps backwards, needs.

Measured on a small denoiser that paints two squares in the first of two colours that it is told (10 steps, 16 prompts,
the loss by a small classifier): the second colour is seen in its disc 0 times of 16 untouched, 16 times after 20 passes
from c = 0 at a rate of 0.1 (loss 5.50 -> 0.03), and 16 times at the published c and 3 passes (0.15).

Left out: the network that predicts centres, of the words of a prompt; parsing of prompts; CLIP (`loss` is the caller's,
`fit_loss` is its form); PLMS, of which the sampler is independent.

The released layer (UCSB-NLP-Chang/Diffusion-SpaceTime-Attn at 7641998) subtracts c_i m_i of the g that belongs to the
empty text of guidance; here, as in the paper, of the prompt's own. Where both texts are the same, that layer, copied to
run beside this one on 10 random inputs of width 32, differs by 1.4e-6 at most.

Paper: Qiucheng Wu, Yujian Liu, Handong Zhao, Trung Bui, Zhe Lin, Yang Zhang, Shiyu Chang, "Harnessing the
Spatial-Temporal Attention of Diffusion Models for High-Fidelity Text-to-Image Synthesis", 2023, arXiv 2304.03869.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.adapt.asked import Asked
from chronotope.adapt.control import At, Control
from chronotope.errors import ChronotopeError
from chronotope.papers.control.maps import sides
from chronotope.papers.registry import paper

Score = Callable[[Tensor, str], Float[Tensor, "b"]]
"""How well pictures [B, C, H, W] fit a text, -1 to 1."""


def disc(centres: Float[Tensor, "k two"], size: tuple[int, int], radius: float = 0.2) -> Bool[Tensor, "k h w"]:
    """Pixels whose upper left corner is nearer than a part of the side to (x, y), as the released code measures it."""
    rows, columns = (torch.arange(n, device=centres.device, dtype=centres.dtype) / n for n in size)
    x, y = centres[:, 0, None, None], centres[:, 1, None, None]
    return (columns - x).square() + (rows[:, None] - y).square() < radius**2


def crop(pictures: Float[Tensor, "b c h w"], centre: Float[Tensor, "two"], radius: float = 0.2) -> Tensor:
    """The square of a part of the side around (x, y), as far as it lies in the picture."""
    h, w = pictures.shape[-2:]
    x, y = centre.tolist()
    (left, right), (top, bottom) = ((max(at - radius, 0.0), min(at + radius, 1.0)) for at in (x, y))
    return pictures[..., int(h * top) : int(h * bottom), int(w * left) : int(w * right)]


@paper(
    system=14,
    name="Diffusion-SpaceTime-Attn",
    family="control",
    claim="objects' own descriptions count in their discs, by weights of each step that are learned for one picture",
    evidence=["tests/papers/control/test_spacetime_attn.py"],
)
class LocalTexts(Control):
    """Adds to the attention of pixels in each object's disc what the object's own description says.

    Attach it to layers that look at text, and give the model the texts one after the other. A call with as many words
    as the first one has, as guidance makes for the empty text, stays as it is.

    Args:
        lengths: words of the whole prompt, then of each description.
        centres: [K, 2], (x, y) of each object.
        steps: of the sampler.
        start: of c at first; None: 5 / K.
        times: noise levels of the steps, as the model is told; None: steps are counted.
        told: which members of the batch look at the texts; None: all.
        aspect: h / w of the picture.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        centres: Float[Tensor, "k two"],
        steps: int,
        *,
        radius: float = 0.2,
        start: float | int | None = None,
        times: Sequence[float] | None = None,
        told: slice | None = None,
        aspect: float | int = 1,
    ):
        if len(lengths) != len(centres) + 1:
            raise ChronotopeError(f"{len(lengths)} texts for {len(centres)} objects: expected the prompt and one each.")
        self.lengths, self.centres, self.radius = list(lengths), centres, radius
        self.times = None if times is None else torch.tensor(times, dtype=torch.float64)
        self.told, self.aspect = told, aspect
        first = 5 / max(len(centres), 1) if start is None else start
        self.coef = nn.Parameter(torch.full((len(centres), steps), float(first), dtype=centres.dtype))

    def asks(self, at: At, asked: Asked) -> Asked:
        words = asked.k.shape[2]
        if not at.crossed or words == self.lengths[0]:
            return asked
        if words != sum(self.lengths):
            raise ChronotopeError(f"{at.layer}: pixels look at {words} words; expected {self.lengths} in this order.")
        parts = [self._parts(x, 2) for x in (asked.k, asked.v)]
        masks = [asked.mask] * len(self.lengths) if asked.mask is None else self._parts(asked.mask, -1)
        texts = list(zip(*parts, masks, strict=True))
        at.memo[self, at.layer] = texts[1:]
        k, v, mask = texts[0]
        return asked.but(k=k, v=v, mask=mask)

    def out(self, at: At, asked: Asked, out: Float[Tensor, "b h n dv"]) -> Float[Tensor, "b h n dv"]:
        texts = at.memo.pop((self, at.layer), None)
        if texts is None:
            return out
        told = slice(None) if self.told is None else self.told
        q, whole, coef = asked.q[told], out[told], self.coef[:, self.step(at)]
        regions = disc(self.centres, sides(q.shape[2], self.aspect), self.radius).flatten(1)
        changed = whole
        for i, (region, (k, v, mask)) in enumerate(zip(regions, texts, strict=True)):
            inside = region.nonzero()[:, 0]
            own = _attend(asked, q[:, :, inside], k[told], v[told], _rows(mask, told, inside))
            changed = changed.index_add(2, inside, coef[i].to(out.dtype) * (own - whole[:, :, inside]))
        return changed if self.told is None else out.index_put((torch.arange(len(out))[told],), changed)

    def step(self, at: At) -> int:
        """Which column of c counts."""
        if self.times is None or at.time is None:
            return at.step
        return int((self.times - at.time).abs().argmin())

    def _parts(self, x: Tensor, dim: int) -> list[Tensor]:
        if x.shape[dim] == 1:  # a mask of one column is that of all words
            return [x] * len(self.lengths)
        return list(x.split(self.lengths, dim))


def _attend(asked: Asked, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=asked.scale, enable_gqa=q.shape[1] != k.shape[1])


def _rows(mask: Tensor | None, told: slice, inside: Tensor) -> Tensor | None:
    """Of a mask that broadcasts to [B, H, N, T]: the members that are told and the pixels inside."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask if len(mask) == 1 else mask[told]
    return mask if mask.shape[2] == 1 else mask[:, :, inside]


def fit_loss(
    pictures: Float[Tensor, "b c h w"],
    score: Score,
    prompt: str,
    objects: Sequence[str],
    centres: Float[Tensor, "k two"],
    weight: float | int = 5,
    radius: float = 0.2,
) -> Float[Tensor, ""]:
    """How badly a picture fits its prompt, and its crops their objects."""
    loss = (1 - score(pictures, prompt)).mean()
    for centre, name in zip(centres, objects, strict=True):
        loss = loss + weight * (1 - score(crop(pictures, centre, radius), name)).mean()
    return loss


def optimise(
    local: LocalTexts,
    sample: Callable[[], Tensor],
    loss: Callable[[Tensor], Float[Tensor, ""]],
    passes: int = 3,
    rate: float = 0.005,
) -> list[float]:
    """Fits c by Adam through the sampler, and returns the loss before each pass.

    sample: draws the picture, from the same noise each time, with gradients: `latents.ddim`, not `ddim_sample`. It may
    checkpoint the model (with `times`). Nothing but c is changed.
    """
    adam, losses = torch.optim.Adam([local.coef], lr=rate), []
    for _ in range(passes):
        now = loss(sample())
        (local.coef.grad,) = torch.autograd.grad(now, local.coef)
        adam.step()
        losses.append(float(now.detach()))
    return losses
