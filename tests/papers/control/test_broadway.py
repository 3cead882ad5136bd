"""BroadWay (system 9): identities, energies in bands, the closed form, the least factor, drawing near, a video toy."""

import re

import pytest
import torch
from _dots import FRAMES, SIDE, DotsNet, moving, rests, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.adapt import Capture, control
from chronotope.models.diffusion import flow_sample
from chronotope.papers.control.broadway import BroadWay, bands, energy, enhance


def maps(rows=6, frames=16, seed=0, sharp=1.5):
    rng = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(rows, 2, frames, frames, generator=rng)).softmax(-1)


class OwnAttention(nn.Module):
    """Attention by scores whose softmax is what it is given."""

    def forward(self, weights):
        frames = weights.shape[-1]
        q = weights.log() * frames**0.5
        eye = torch.eye(frames).expand_as(q)
        return F.scaled_dot_product_attention(q, eye, eye)


class Layers(nn.Module):
    """Layers one after the other, each with weights of its own; what it returns are the weights."""

    def __init__(self, count=2):
        super().__init__()
        self.layers = nn.ModuleList(OwnAttention() for _ in range(count))

    def forward(self, *weights):
        return [layer(own) for layer, own in zip(self.layers, weights, strict=True)]


def first(name):
    return "layers.0"


def test_nothing_is_changed_without_strength():
    weights = maps()
    model = Layers(1)
    with control(model, BroadWay(alpha=0.0, beta=1.0)):
        (got,) = model(weights)
    assert (got - weights).abs().max() < 1e-6
    with control(model, BroadWay(alpha=0.0, beta=2.0)):
        (more,) = model(weights)
    assert (more - weights).abs().max() > 0.1


@settings(deadline=None, max_examples=50)
@given(
    frames=st.integers(2, 24),
    beta=st.floats(0, 10),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_rows_sum_to_one_and_the_bands_hold_all_energy(frames, beta, seed, data):
    tau = data.draw(st.integers(0, (frames - 1) // 2))
    weights = maps(3, frames, seed)
    assert (enhance(weights, tau, beta).sum(-1) - 1).abs().max() < 2e-6
    low, high = bands(weights, tau)
    assert abs(energy(low) + energy(high) - energy(weights)) < 1e-6
    spectrum = torch.fft.fft(weights, dim=-1)
    upper = (torch.arange(frames) - frames / 2).abs() <= tau
    assert upper.sum() == 2 * tau + 1 - frames % 2
    expected = torch.fft.ifft(torch.where(upper, beta * spectrum, spectrum), dim=-1)
    assert expected.imag.abs().max() < 1e-5
    assert (enhance(weights, tau, beta) - expected.real).abs().max() < 1e-5


def test_closed_form_of_sixteen_frames():
    # Sharpness at which the energy is that of the row's example, 0.1314.
    low, high = 0.1, 3.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if energy(maps(64, sharp=middle)) < 0.1314 else (low, middle)
    weights = maps(64, sharp=low)
    before = float(energy(weights))
    assert before == pytest.approx(0.1314, abs=1e-4)
    for beta, published in ((1.5, 0.2175), (2.0, 0.3380)):
        got = enhance(weights, 7, beta)
        assert (got - (1 / 16 + beta * (weights - 1 / 16))).abs().max() < 1e-6
        assert float(energy(got)) == pytest.approx(1 / 16 + beta**2 * (before - 1 / 16), abs=1e-4)
        assert float(energy(got)) == pytest.approx(published, abs=2e-4)
    # Weights below 0 occur, and go through attention as they are.
    model, control_ = Layers(1), BroadWay(alpha=0, beta=1.5)
    with control(model, control_):
        (got,) = model(weights)
    assert got.min() < -0.02
    assert (got - enhance(weights, 7, 1.5)).abs().max() < 1e-6


@pytest.mark.parametrize("tau", [2, 7])
@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0])
def test_energy_never_falls_below_that_of_the_layer(alpha, tau):
    grown = 0
    for seed in range(5):
        model, other, own = Layers(), maps(seed=seed, sharp=0.3), maps(seed=seed + 100, sharp=2.0)
        with control(model, BroadWay(alpha, 0.0, tau, like=first)):
            _, got = model(other, own)
        drawn = torch.lerp(own, other, alpha)
        assert energy(got) >= energy(own) * (1 - 1e-5)
        grown += bool(energy(drawn) < 0.9 * energy(own))
        # Where beta asks for more, it is beta.
        with control(model, BroadWay(alpha, 50.0, tau, like=first)):
            _, more = model(other, own)
        assert (more - enhance(drawn, tau, 50.0)).abs().max() < 1e-4
    assert grown > 0


def test_disparity_shrinks_by_one_minus_alpha():
    model, other, own = Layers(), maps(seed=1), maps(seed=2)
    with control(model, BroadWay(0.6, 1.0, 0, like=first)):
        # Half-width 0 leaves one frequency to the factor: the others show the drawing alone.
        _, got = model(other, own)
    wanted, found = (torch.fft.fft(x - other, dim=-1)[..., :8].abs() for x in (own, got))
    assert (found - 0.4 * wanted).abs().max() < 1e-5


def test_the_earlier_weights_are_resized_over_places():
    b, h, w = 2, 3, 4
    other, own = maps(b * 2 * 2, seed=3), maps(b * h * w, seed=4)
    # Weights that are the same at all places are so at any size.
    flat = other[:1].expand_as(other)
    for reference in (flat, other):
        model = Layers()
        with control(model, BroadWay(1.0, 0.0, 0, like=first, batch=b, space=(h, w))):
            _, got = model(reference, own)
        assert got.shape == own.shape
        assert (got.sum(-1) - 1).abs().max() < 1e-5
        if reference is flat:
            high = bands(got, 0)[1]
            assert (got - high - (flat[:1] - bands(flat[:1], 0)[1])).abs().max() < 1e-5
    # Members of the batch do not mix.
    changed = other.clone()
    changed[4:] = maps(4, seed=9)
    results = []
    for reference in (other, changed):
        with control(model, BroadWay(0.6, 50.0, 7, like=first, batch=b, space=(h, w))):
            results.append(model(reference, own)[1].view(b, h, w, 2, 16, 16))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])


def test_energies_are_those_of_the_told_half():
    other, own = maps(seed=1, sharp=0.3), maps(seed=2, sharp=2.0)
    model = Layers()
    with control(model, BroadWay(0.6, 0.0, like=first, batch=2, guided=True)):
        told = model(other, own)[1]
    with control(model, BroadWay(0.6, 0.0, like=first)):
        alone = model(other[3:], own[3:])[1]
    assert (told[3:] - alone).abs().max() < 1e-6


def test_wrong_numbers_are_refused():
    model, weights = Layers(), maps()
    with pytest.raises(ct.ChronotopeError, match="below F / 2"), control(model, BroadWay(tau=8)):
        model(weights, weights)
    with pytest.raises(ct.ChronotopeError, match="did not come before"):  # noqa: SIM117
        with control(model, BroadWay(like=first), layers="layers.1"):
            model(weights, weights)
    with pytest.raises(ct.ChronotopeError, match="no level"), control(model, BroadWay(like=first)):
        model(maps(3), weights)
    with pytest.raises(ct.ChronotopeError, match="drawn to"), control(model, BroadWay(tau=3, like=first)):
        model(maps(frames=8), weights)
    with pytest.raises(ct.ChronotopeError, match="even if guided"):
        BroadWay(guided=True)


def test_layers_and_steps_of_a_video_net():
    torch.manual_seed(0)
    model = DotsNet(8, 2)
    x, kept = torch.randn(2, 16, 1, 6, 10), Capture()
    plain = [model(x, torch.full((2,), t)) for t in (999.0, 900.0)]
    bigger = BroadWay(0.6, 1.5, like=lambda name: "up_blocks.1.time", batch=2, space=(6, 10))
    with control(model, bigger, layers="up_blocks.*", steps=range(1)):
        first_step, second = (model(x, torch.full((2,), t)) for t in (999.0, 900.0))
    assert (first_step - plain[0]).abs().max() > 1e-5
    assert torch.equal(second, plain[1])
    with control(model, bigger, layers="up_blocks.*"), control(model, kept):
        assert (model(x, torch.full((2,), 999.0)) - first_step).abs().max() < 1e-5
    rows = [kept.kept[f"up_blocks.{i}.time", 0][0] for i in (1, 2, 3)]
    assert [len(one) for one in rows] == [2 * 3 * 5, 2 * 6 * 10, 2 * 6 * 10]
    assert all((one.sum(-1) - 1).abs().max() < 1e-5 for one in rows)
    assert torch.equal(model(x, torch.full((2,), 999.0)), plain[0])


@pytest.mark.slow
def test_a_small_video_model_moves_more(one_thread):
    model, steps = trained(rests), 25
    noise = torch.randn(16, FRAMES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    found = {}
    for alpha in (0.0, 0.6):
        for beta in (1.0, 1.5, 3.0, 5.0):
            changed = BroadWay(alpha, beta, like=lambda name: "up_blocks.1.time", batch=16, space=(SIDE, SIDE))
            with control(model, changed, layers="up_blocks.*", steps=range(steps // 5)):
                found[alpha, beta] = moving(flow_sample(model, noise, steps))
    print({key: round(value, 4) for key, value in found.items()})
    for alpha in (0.0, 0.6):
        rising = [value for (one, _), value in found.items() if one == alpha]
        assert rising == sorted(rising)
        assert rising[-1] > 1.2 * rising[0]


@pytest.mark.slow
def test_on_the_unet_of_animatediff():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNetMotionModel(
        sample_size=8, block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=2, motion_num_attention_heads=2,
    ).eval()  # fmt: skip
    x, text = torch.randn(2, 4, 16, 8, 12), torch.randn(2, 5, 8).repeat_interleave(16, 0)
    changed = BroadWay(
        like=lambda name: re.sub("up_blocks.2", "up_blocks.1", name), batch=2, space=(8, 12), guided=True
    )
    kept = Capture()
    layers = ["up_blocks.1.motion*", "up_blocks.2.motion*"]
    with torch.no_grad():
        plain = [model(x, t, text).sample for t in (999, 900)]
        with control(model, changed, layers=layers, steps=range(1)):
            got = [model(x, t, text).sample for t in (999, 900)]
        assert (got[0] - plain[0]).abs().max() > 1e-3
        assert torch.equal(got[1], plain[1])
        with control(model, changed, kept, layers=layers):
            model(x, 999, text)
    assert {len(one[0]) for one in kept.kept.values()} == {2 * 4 * 6, 2 * 8 * 12}
    assert all((one[0].sum(-1) - 1).abs().max() < 1e-5 for one in kept.kept.values())
