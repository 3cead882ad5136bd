"""Sampling by DDIM with a hand on the latents: inverted, blended with a source, denoised in overlapping pieces.

A model is a function (x, t) -> noise, as in `chronotope.models.diffusion`, and the ladder of noise is the one of
`ddim_sample` there. Gradients pass, unlike there.

    x' = sqrt(a') x_0 + sqrt(1 - a') e          e = model(x, t),   x_0 = (x - sqrt(1 - a) e) / sqrt(a)

A trajectory lists the latents of a sampling, the noisiest first; the last one is clean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError

Model = Callable[[Tensor, Tensor], Tensor]
Edit = Callable[[Tensor, int], Tensor]
"""Of a latent, and the number of its rung: 0 is the noisiest."""


class Rung(NamedTuple):
    """A step of the sampler: the time that the model is told, and how much signal is left before and after."""

    time: float
    left: float
    after: float


def ladder(alphas: Float[Tensor, "n"], steps: int) -> list[Rung]:
    """The steps of `ddim_sample`, evenly spread, the noisiest first."""
    if not 1 <= steps <= len(alphas):
        raise ChronotopeError(f"steps={steps}: expected 1 to {len(alphas)}, the rungs of the ladder.")
    times = torch.linspace(len(alphas) - 1, 0, steps, dtype=torch.float64).round().long()
    left = [*alphas.double()[times.to(alphas.device)].tolist(), 1.0]
    return [Rung(float(t), left[i], left[i + 1]) for i, t in enumerate(times.tolist())]


def ddim_step(
    x: Float[Tensor, "b *s"], noise: Float[Tensor, "b *s"], left: float, after: float
) -> Float[Tensor, "b *s"]:
    """From one share of signal to another, up or down, along the noise that the model says."""
    clean = (x - (1 - left) ** 0.5 * noise) / left**0.5
    return after**0.5 * clean + (1 - after) ** 0.5 * noise


def ddim(
    model: Model,
    noise: Float[Tensor, "b *s"],
    alphas: Float[Tensor, "n"],
    steps: int = 50,
    *,
    before: Edit | None = None,
    after: Edit | None = None,
) -> Float[Tensor, "b *s"]:
    """`ddim_sample` with gradients. before: changes what enters step i; after: what leaves it, on rung i + 1."""
    x = noise
    for i, rung in enumerate(ladder(alphas, steps)):
        x = x if before is None else before(x, i)
        x = ddim_step(x, model(x, time_of(rung, x)), rung.left, rung.after)
        x = x if after is None else after(x, i + 1)
    return x


@torch.no_grad()
def ddim_invert(
    model: Model, x: Float[Tensor, "b *s"], alphas: Float[Tensor, "n"], steps: int = 50
) -> Float[Tensor, "steps_and_one b *s"]:
    """The trajectory whose end is x: the sampler run upwards, with the noise that the model says one step too early.

    Sampling from its start therefore does not quite lead back to x; more steps lead nearer.
    """
    found = [x]
    for rung in reversed(ladder(alphas, steps)):
        x = ddim_step(x, model(x, time_of(rung, x)), rung.after, rung.left)
        found.append(x)
    return torch.stack(found[::-1])


def noised(x: Float[Tensor, "b *s"], left: float, generator: torch.Generator | None = None) -> Float[Tensor, "b *s"]:
    """sqrt(a) x + sqrt(1 - a) noise, freshly drawn."""
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return left**0.5 * x + (1 - left) ** 0.5 * noise


def blend(edited: Float[Tensor, "*s"], source: Float[Tensor, "*s"], mask: Tensor) -> Float[Tensor, "*s"]:
    """M edited + (1 - M) source; a bool mask, which broadcasts, takes each number from one of both, unchanged."""
    if mask.dtype == torch.bool:
        return torch.where(mask, edited, source)
    return mask * edited + (1 - mask) * source


def views(size: int, window: int, stride: int = 1) -> list[slice]:
    """Overlapping windows over an axis, the last one at its end; one of all, where the axis is no longer than that."""
    if window < 1 or stride < 1:
        raise ChronotopeError(f"window={window}, stride={stride}: expected 1 or more.")
    last = max(size - window, 0)
    starts = [*range(0, last, stride), last]
    return [slice(start, min(start + window, size)) for start in starts]


def averaged(
    act: Callable[[Tensor, slice], Tensor], x: Float[Tensor, "*s"], windows: Sequence[slice], dim: int
) -> Float[Tensor, "*s"]:
    """act(piece, window) of every window along a dimension; where they overlap, their mean."""
    total, count = torch.zeros_like(x), x.new_zeros(x.shape[dim])
    for window in windows:
        size = window.stop - window.start
        total.narrow(dim, window.start, size).add_(act(x.narrow(dim, window.start, size), window))
        count[window] += 1
    return total / count.view(-1, *[1] * (x.ndim - 1 - dim % x.ndim))


def time_of(rung: Rung, x: Float[Tensor, "b *s"]) -> Float[Tensor, "b"]:
    """The time of a step for every member of the batch."""
    return x.new_full((len(x),), rung.time)
