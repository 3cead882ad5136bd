"""Generation by denoising: losses and samplers of flow matching, DDPM and EDM, as functions of a model.

A model is a function (x, t) -> tensor of x's shape, t [B] saying how noisy each x is; whatever else it is told (text,
labels) it brings along: `flow_loss(lambda x, t: model(x, t, label), clips)`.

    flow (Lipman et al. 2022, arXiv 2210.02747): x_t = t x + (1 - t) noise, 0 <= t <= 1; the model says x - noise
    DDPM (Ho et al. 2020, arXiv 2006.11239): x_t = sqrt(a_t) x + sqrt(1 - a_t) noise, t = 0 .. S - 1; it says noise
    EDM (Karras et al. 2022, arXiv 2206.00364): x_s = x + s noise; it is F in the denoiser of `edm_denoise`

`mask`, which broadcasts to x, is 1 where something is to be made and 0 where x is known: known parts enter the model
as they are, clean, at every step, the loss is taken over the others alone, and a sample has them unchanged.

    >>> loss = flow_loss(lambda x, t: -x, torch.randn(8, 2))
    >>> flow_sample(lambda x, t: -x, torch.randn(8, 2), steps=10).shape
    torch.Size([8, 2])
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError

Model = Callable[[Tensor, Tensor], Tensor]


def flow_loss(
    model: Model,
    x: Float[Tensor, "b *s"],
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Mean of (model(x_t, t) - (x - noise))^2 at times that are uniform on [0, 1]."""
    t = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
    noise, at = _noise(x, generator), _beside(t, x)
    return _error(model(_joined(at * x + (1 - at) * noise, x, mask), t), x - noise, mask)


@torch.no_grad()
def flow_sample(
    model: Model,
    noise: Float[Tensor, "b *s"],
    steps: int = 50,
    *,
    known: Tensor | None = None,
    mask: Tensor | None = None,
) -> Float[Tensor, "b *s"]:
    """dx = model(x, t) dt from t = 0 to 1 in Euler steps of equal size."""
    _require_steps(steps)
    x = noise
    for i in range(steps):
        x = x + model(_joined(x, known, mask), noise.new_full((len(noise),), i / steps)) / steps
    return _joined(x, known, mask)


def linear_alphas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Float[Tensor, "steps"]:
    """a_t = product of 1 - beta up to t, betas rising linearly: the share of the signal's variance that is left."""
    _require_steps(steps)
    return (1 - torch.linspace(first, last, steps, dtype=torch.float64)).cumprod(0).float()


def ddpm_loss(
    model: Model,
    x: Float[Tensor, "b *s"],
    alphas: Float[Tensor, "steps"],
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Mean of (model(x_t, t) - noise)^2 at steps that are equally likely; t comes to the model in x's dtype."""
    t = torch.randint(len(alphas), (len(x),), generator=generator, device=x.device)
    a = _beside(alphas.to(x.device, x.dtype)[t], x)
    noise = _noise(x, generator)
    return _error(model(_joined(a.sqrt() * x + (1 - a).sqrt() * noise, x, mask), t.to(x.dtype)), noise, mask)


@torch.no_grad()
def ddim_sample(
    model: Model,
    noise: Float[Tensor, "b *s"],
    alphas: Float[Tensor, "steps"],
    steps: int = 50,
    *,
    clip: float | int | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
) -> Float[Tensor, "b *s"]:
    """The deterministic sampler of DDIM (Song et al. 2020, arXiv 2010.02502) over evenly spread steps of the ladder.

    x' = sqrt(a') x_0 + sqrt(1 - a') e, where e = model(x, t) and x_0 = (x - sqrt(1 - a) e) / sqrt(a), kept within
    +-`clip` if that is given.
    """
    _require_steps(steps, len(alphas))
    times = torch.linspace(len(alphas) - 1, 0, steps, dtype=torch.float64).round().long()
    left = [*alphas.double()[times.to(alphas.device)].tolist(), 1.0]
    x = noise
    for i, t in enumerate(times.tolist()):
        a, after = left[i], left[i + 1]
        e = model(_joined(x, known, mask), noise.new_full((len(noise),), float(t)))
        clean = (x - (1 - a) ** 0.5 * e) / a**0.5
        if clip is not None:
            clean = clean.clamp(-clip, clip)
            e = (x - a**0.5 * clean) / (1 - a) ** 0.5
        x = after**0.5 * clean + (1 - after) ** 0.5 * e
    return _joined(x, known, mask)


def edm_denoise(
    model: Model,
    x: Float[Tensor, "b *s"],
    sigma: Float[Tensor, "b"],
    *,
    scale: float | int = 0.5,
    known: Tensor | None = None,
    mask: Tensor | None = None,
) -> Float[Tensor, "b *s"]:
    """D(x, s) = (d^2 x + d s r F(x / r, ln(s) / 4)) / r^2, r^2 = s^2 + d^2, d = `scale`, the deviation of the data.

    Known parts come to F as they are, not divided by r.
    """
    s = _beside(sigma, x)
    square = s.square() + scale**2
    said = model(_joined(x / square.sqrt(), known, mask), sigma.log() / 4)
    return scale**2 / square * x + scale * s / square.sqrt() * said


def edm_loss(
    model: Model,
    x: Float[Tensor, "b *s"],
    *,
    scale: float | int = 0.5,
    mean: float | int = -1.2,
    deviation: float | int = 1.2,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Mean of (D(x + s noise, s) - x)^2 (s^2 + d^2) / (s d)^2, ln s being normal: 1 for a model that says nothing."""
    drawn = torch.randn(len(x), generator=generator, device=x.device, dtype=x.dtype)
    sigma = (mean + deviation * drawn).exp()
    s = _beside(sigma, x)
    noisy = x + s * _noise(x, generator)
    weight = (s.square() + scale**2).sqrt() / (s * scale)
    denoised = edm_denoise(model, noisy, sigma, scale=scale, known=x, mask=mask)
    return _error(weight * denoised, weight * x, mask)


@torch.no_grad()
def heun_sample(
    model: Model,
    noise: Float[Tensor, "b *s"],
    steps: int = 18,
    *,
    scale: float | int = 0.5,
    low: float | int = 0.002,
    high: float | int = 80.0,
    bend: float | int = 7.0,
    known: Tensor | None = None,
    mask: Tensor | None = None,
) -> Float[Tensor, "b *s"]:
    """dx = (x - D(x, s)) / s ds from s = `high` to 0 in Heun steps, the last one, to 0, an Euler step.

    The steps are even in s^(1 / bend) from `high` to `low`. noise: of deviation 1.
    """
    _require_steps(steps, least=2)
    ends = torch.tensor([high, low], dtype=torch.float64) ** (1 / bend)
    way = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = [*((ends[0] + way * (ends[1] - ends[0])) ** bend).tolist(), 0.0]

    def slope(x: Tensor, s: float) -> Tensor:
        sigma = noise.new_full((len(noise),), s)
        return (x - edm_denoise(model, x, sigma, scale=scale, known=known, mask=mask)) / s

    x = noise * high
    for s, after in pairwise(levels):
        first = slope(x, s)
        ahead = x + (after - s) * first
        x = x + (after - s) * (first + slope(ahead, after)) / 2 if after > 0 else ahead
    return _joined(x, known, mask)


def guided(told: Model, untold: Model, weight: float | int) -> Model:
    """Classifier-free guidance: u + weight * (c - u), of a model that is told a condition and one that is not.

    Source: Ho and Salimans 2022 (arXiv 2207.12598).
    """

    def model(x: Tensor, t: Tensor) -> Tensor:
        without = untold(x, t)
        return without + weight * (told(x, t) - without)

    return model


def _noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """A number for each member of the batch, to multiply x with."""
    return t.view(-1, *[1] * (x.ndim - 1))


def _joined(made: Tensor, known: Tensor | None, mask: Tensor | None) -> Tensor:
    if mask is None:
        return made
    if known is None:
        raise ChronotopeError("a mask says that something is known: give known= too, of the shape of x.")
    return torch.where(mask.to(torch.bool), made, known)


def _error(found: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    if found.shape != wanted.shape:
        raise ChronotopeError(f"the model returned shape {list(found.shape)}; expected {list(wanted.shape)}.")
    square = (found - wanted).square()
    if mask is None:
        return square.mean()
    made = mask.to(torch.bool).expand_as(square)
    return torch.where(made, square, 0.0).sum() / made.sum().clamp(min=1)


def _require_steps(steps: int, most: int | None = None, least: int = 1) -> None:
    if steps < least or (most is not None and steps > most):
        raise ChronotopeError(f"steps={steps}: expected {least} or more" + (f", {most} at most." if most else "."))
