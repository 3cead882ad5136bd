"""Losses and samplers where the best model is known: data that are normal, of mean 1.5 and deviation 0.5.

For such data each model below is exact, and so is the line from the noise at the start to the sample.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.models.diffusion import (
    ddim_sample,
    ddpm_loss,
    edm_denoise,
    edm_loss,
    flow_loss,
    flow_sample,
    guided,
    heun_sample,
    linear_alphas,
)

MEAN, DEVIATION, SCALE = 1.5, 0.5, 0.7
ALPHAS = linear_alphas()


def beside(t, x):
    return t.view(-1, *[1] * (x.ndim - 1))


def flow(x, t):
    """E[x - noise | x_t]."""
    t = beside(t, x)
    variance = (t * DEVIATION) ** 2 + (1 - t) ** 2
    return MEAN + (t * DEVIATION**2 - (1 - t)) / variance * (x - t * MEAN)


def ddpm(x, t):
    """E[noise | x_t]."""
    a = beside(ALPHAS.to(x.dtype)[t.long()], x)
    return (1 - a).sqrt() / (a * DEVIATION**2 + 1 - a) * (x - a.sqrt() * MEAN)


def edm(x, t):
    """F for which the denoiser is E[x | x_s]."""
    s = beside((4 * t).exp(), x)
    r = (s**2 + SCALE**2).sqrt()
    best = (DEVIATION**2 * x * r + s**2 * MEAN) / (s**2 + DEVIATION**2)
    return (best - SCALE**2 / r * x) * r / (SCALE * s)


def data(count):
    return MEAN + DEVIATION * torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


LOSSES = {
    "flow": (flow, flow_loss),
    "ddpm": (ddpm, lambda model, x, **more: ddpm_loss(model, x, ALPHAS, **more)),
    "edm": (edm, lambda model, x, **more: edm_loss(model, x, scale=SCALE, **more)),
}
SAMPLERS = {
    "flow": (flow, flow_sample, 1),
    "ddpm": (ddpm, lambda model, noise, steps, **more: ddim_sample(model, noise, ALPHAS, steps, **more), 1),
    "edm": (edm, lambda model, noise, steps, **more: heun_sample(model, noise, steps, scale=SCALE, **more), 2),
}
# What the noise is multiplied with at the start; the share of the data and the variance of the noise there.
STARTS = {"flow": (1, 0, 1), "ddpm": (1, float(ALPHAS[-1]) ** 0.5, 1 - float(ALPHAS[-1])), "edm": (80, 1, 80**2)}


def residual(name):
    """What is left of the loss for the exact model: the conditional variance, averaged over times."""
    if name == "flow":
        t = torch.linspace(0, 1, 20001, dtype=torch.float64)
        both = t * DEVIATION**2 - (1 - t)
        return float((DEVIATION**2 + 1 - both**2 / ((t * DEVIATION) ** 2 + (1 - t) ** 2)).mean())
    if name == "ddpm":
        a = ALPHAS.double()
        return float((1 - (1 - a) / (a * DEVIATION**2 + 1 - a)).mean())
    s = (-1.2 + 1.2 * torch.special.ndtri((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)).exp()
    variance = s**2 * DEVIATION**2 / (s**2 + DEVIATION**2)
    return float((variance * (s**2 + SCALE**2) / (s * SCALE) ** 2).mean())


@pytest.mark.parametrize("name", LOSSES)
def test_the_exact_model_has_the_least_loss(name):
    model, loss = LOSSES[name]

    def found(model):
        return float(loss(model, data(100_000), generator=torch.Generator().manual_seed(1)))

    assert abs(found(model) / residual(name) - 1) < 0.02
    for change in (lambda y: 1.2 * y, lambda y: 0.8 * y, lambda y: y + 0.2, lambda y: y - 0.2):
        assert found(lambda x, t, change=change: change(model(x, t))) > found(model) + 0.003


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sampler_follows_the_exact_model_to_its_order(name):
    model, sample, order = SAMPLERS[name]
    noise = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    start, signal, variance = STARTS[name]
    exact = MEAN + DEVIATION * (start * noise - signal * MEAN) / ((signal * DEVIATION) ** 2 + variance) ** 0.5
    errors = {steps: float((sample(model, noise, steps) - exact).abs().max()) for steps in (25, 100)}
    assert errors[100] < (0.05 if order == 1 else 0.003), errors
    assert errors[25] / errors[100] > 0.8 * 4**order, errors


def test_a_model_that_says_nothing():
    x = data(50_000) - MEAN
    weights = edm_loss(lambda x, t: torch.zeros_like(x), x, scale=DEVIATION, generator=torch.Generator().manual_seed(1))
    assert abs(float(weights) - 1) < 0.02
    sigma = torch.full((5,), 1e-6, dtype=torch.float64)
    assert torch.allclose(edm_denoise(lambda x, t: torch.zeros_like(x), x[:5], sigma), x[:5])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(LOSSES)), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_known_parts(name, batch, width, seed):
    """They enter clean, have no gradient, are kept, and nothing of them is in the loss."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2, width, generator=rng, dtype=torch.float64)
    mask = torch.rand(batch, 2, width, generator=rng) < 0.5
    given_, said = [], []

    def model(x, t):
        given_.append(x)
        said.append(torch.randn(x.shape, generator=rng, dtype=x.dtype).requires_grad_())
        return said[-1]

    loss = LOSSES[name][1](model, x, mask=mask, generator=rng)
    assert torch.equal(given_[0][~mask], x[~mask])
    (slope,) = torch.autograd.grad(loss, said[0])
    assert torch.equal(slope != 0, mask)
    given_.clear()
    out = SAMPLERS[name][1](model, torch.randn(x.shape, generator=rng, dtype=x.dtype), 3, known=x, mask=mask)
    assert torch.equal(out[~mask], x[~mask])
    assert all(torch.equal(seen[~mask], x[~mask]) for seen in given_)
    assert (out[mask] != x[mask]).all()


def test_everything_unknown_is_no_mask():
    for name, (model, loss) in LOSSES.items():
        x, ones = data(7), torch.ones(7, 1)
        first, second = (loss(model, x, mask=mask, generator=torch.Generator().manual_seed(3)) for mask in (None, ones))
        assert torch.allclose(first, second), name


def test_guidance_and_clipping():
    model = guided(lambda x, t: x + 2, lambda x, t: x, 1.5)
    x = torch.zeros(2, 3)
    assert torch.equal(model(x, torch.zeros(2)), torch.full((2, 3), 3.0))
    noise = 3 * torch.randn(50, 2, dtype=torch.float64)
    clipped = ddim_sample(ddpm, noise, ALPHAS, 20, clip=1.75)
    assert clipped.abs().max() <= 1.75 + 1e-9
    assert torch.allclose(ddim_sample(ddpm, noise, ALPHAS, 20, clip=100), ddim_sample(ddpm, noise, ALPHAS, 20))


def test_the_ladder_of_ddpm():
    assert ALPHAS.shape == (1000,)
    assert torch.isclose(ALPHAS[0], torch.tensor(1 - 1e-4))
    assert torch.isclose(ALPHAS[1] / ALPHAS[0], 1 - torch.tensor(1e-4 + (0.02 - 1e-4) / 999))
    assert 4.0e-5 < ALPHAS[-1] < 4.1e-5


def test_refusals():
    noise = torch.randn(2, 3)
    with pytest.raises(ct.ChronotopeError, match="give known="):
        flow_sample(flow, noise, 2, mask=torch.ones(2, 3))
    with pytest.raises(ct.ChronotopeError, match="steps=0"):
        flow_sample(flow, noise, 0)
    with pytest.raises(ct.ChronotopeError, match="1000 at most"):
        ddim_sample(ddpm, noise, ALPHAS, 1001)
    with pytest.raises(ct.ChronotopeError, match="returned shape"):
        flow_loss(lambda x, t: x[:, :1], noise)
