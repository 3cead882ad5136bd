"""VSTAR (system 108): no-ops, diagonalness, distance alone, signs of the greatest score, a transformer over time."""

import math

import pytest
import torch
from _dots import SIDE, moving, rests, trained
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.adapt import Capture, control
from chronotope.models.diffusion import flow_sample
from chronotope.papers.control.vstar import diagonalness, synopsis, temporal_bias


class RawAttention(nn.Module):
    """Attention of what it is given."""

    def forward(self, q, k, v, attn_mask=None, is_causal=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)


def mapped(scores, *controls, grid=None, **call):
    """The weights that come of scores [B, H, F, F]."""
    frames, kept, model = scores.shape[-1], Capture(), RawAttention()
    eye = torch.eye(frames, dtype=scores.dtype).expand_as(scores)
    with control(model, *controls, kept, grid=grid):
        model(scores * frames**0.5, eye, eye, **call)
    return kept.kept["", 0][0]


def random_scores(rows=4, frames=32, seed=0):
    return torch.randn(rows, 2, frames, frames, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", ["rowmax", "absmax", "constant"])
def test_no_strength_and_no_width_change_nothing(scale):
    scores = random_scores().double()
    plain = mapped(scores)
    for nothing in (temporal_bias(4.0, 0.0, scale), temporal_bias(math.inf, 2.0, scale)):
        got = mapped(scores, nothing)
        assert (got - plain).abs().max() <= 1e-7
    some = mapped(scores, temporal_bias(4.0, 1.0, scale))
    assert (some - plain).abs().max() > 0.01
    assert (some.sum(-1) - 1).abs().max() < 1e-6


def test_diagonalness_is_the_correlation_of_row_and_column():
    weights = random_scores(1, 12).softmax(-1)[0, 0]
    counts = (weights * 3e4).round().long()
    i, j = (
        torch.repeat_interleave(one.flatten(), counts.flatten())
        for one in torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    )
    assert float(diagonalness(weights)) == pytest.approx(float(torch.corrcoef(torch.stack((i, j)))[0, 1]), abs=2e-3)
    assert float(diagonalness(torch.eye(5))) == pytest.approx(1)
    assert float(diagonalness(torch.eye(5).flip(0))) == pytest.approx(-1)
    assert abs(float(diagonalness(torch.ones(5, 5)))) < 1e-6


def test_diagonalness_rises_with_strength_and_is_greatest_at_a_middle_width():
    scores = random_scores(500)

    def found(sigma, strength):
        return float(diagonalness(mapped(scores, temporal_bias(sigma, strength)).mean((0, 1))))

    assert abs(found(math.inf, 1.0)) < 0.01
    for strength, expected in ((1.0, 0.53), (2.0, 0.80), (4.0, 0.94)):
        assert found(8.0, strength) == pytest.approx(expected, abs=0.05)
    widths = {16.0: 0.35, 8.0: 0.53, 4.0: 0.50, 2.0: 0.38, 1.0: 0.25}
    by_width = [found(sigma, 1.0) for sigma in widths]
    assert by_width == pytest.approx(list(widths.values()), abs=0.05)
    assert max(by_width) == by_width[1]


@pytest.mark.parametrize("frames", [16, 48])
def test_the_band_depends_on_distance_alone(frames):
    bias = temporal_bias(3.0, 1.5)
    logs = mapped(torch.full((1, 2, frames, frames), 2.0), bias).double().log()
    # What remains of a row's scores when its own frame's is taken off.
    added = logs - logs.diagonal(dim1=-2, dim2=-1)[..., None]
    distance = (torch.arange(frames)[:, None] - torch.arange(frames)).double()
    expected = 1.5 * 2.0 * (torch.exp(-distance.square() / (2 * 9)) - 1)
    assert (added - expected).abs().max() < 1e-5


def test_negative_scores_turn_the_band_around():
    scores = -2.0 - torch.rand(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = diagonalness(mapped(scores).mean((0, 1)))
    turned = diagonalness(mapped(scores, temporal_bias(8.0, 1.0, "rowmax")).mean((0, 1)))
    assert turned < plain - 0.3
    for scale in ("absmax", "constant"):
        assert diagonalness(mapped(scores, temporal_bias(8.0, 1.0, scale)).mean((0, 1))) > plain + 0.1


@pytest.mark.parametrize("scale", ["rowmax", "absmax", "constant"])
def test_masks_of_the_model_stay(scale):
    scores, bias = random_scores(2, 8), temporal_bias(2.0, 1.0, scale)
    got = mapped(scores, bias, is_causal=True)
    assert (got.triu(1) == 0).all()
    assert (got.sum(-1) - 1).abs().max() < 1e-6
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 3] = False  # a frame that sees nothing
    mask[..., [3, 5]] = False
    got = mapped(scores, bias, attn_mask=mask)
    assert (got[:, :, 3] == 0).all() and (got[..., [3, 5]] == 0).all()
    assert got.isfinite().all()
    # The same as the band on the frames that are left.
    left = [0, 1, 2, 4, 6, 7]
    near = torch.exp(-(torch.tensor(left)[:, None] - torch.tensor(left)).float().square() / 8)
    kept = scores[:, :, left][..., left]
    most = {"rowmax": kept.amax(-1, keepdim=True), "absmax": kept.abs().amax(-1, keepdim=True), "constant": 1.0}[scale]
    assert (got[:, :, left][..., left] - (kept + most * near).softmax(-1)).abs().max() < 1e-6


@pytest.mark.parametrize("scale", ["rowmax", "constant"])
def test_on_a_grid_of_space_and_time_frames_count_and_text_gets_no_band(scale):
    grid = ct.Grid(2, t=3, h=2, w=2)
    scores = torch.full((1, 1, 14, 14), 1.0)
    logs = mapped(scores, temporal_bias(1.0, 1.0, scale), grid=grid)[0, 0].double().log()
    frame = torch.arange(3).repeat_interleave(4)
    expected = torch.zeros(14, 14, dtype=torch.float64)
    expected[2:, 2:] = torch.exp(-(frame[:, None] - frame).double().square() / 2)
    assert (logs - expected.log_softmax(-1)).abs().max() < 1e-5
    with pytest.raises(ct.ChronotopeError, match="axes"):
        mapped(torch.ones(1, 1, 4, 4), temporal_bias(), grid=ct.Grid(h=2, w=2))


def test_no_scores_are_held_for_a_constant_band():
    plain = []

    class Spy(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    from chronotope.adapt import solve

    before = solve.explicit
    solve.explicit = lambda asked: plain.append(asked) or before(asked)
    try:
        for scale, held in (("constant", 0), ("rowmax", 1)):
            with control(model := Spy(), temporal_bias(scale=scale)):
                model(torch.randn(2, 2, 9, 4))
            assert len(plain) == held
    finally:
        solve.explicit = before


def test_texts_of_stages_are_spread_over_the_frames():
    stages = torch.randn(3, 5, 4)
    got = synopsis(stages, 32)
    assert got.shape == (32, 5, 4)
    for frame, stage in ((0, 0), (15, 1), (31, 2)):
        assert torch.equal(got[frame], stages[stage])
    assert (got[3] - (0.8 * stages[0] + 0.2 * stages[1])).abs().max() < 1e-6
    assert torch.equal(synopsis(stages[:1], 7), stages[:1].expand(7, 5, 4))
    own = synopsis(stages, 300, at=[0, 200, 250])
    assert torch.equal(own[200], stages[1]) and torch.equal(own[299], stages[2])
    with pytest.raises(ct.ChronotopeError, match="rising"):
        synopsis(stages, 2)


def test_wrong_numbers_are_refused():
    with pytest.raises(ct.ChronotopeError, match="above 0"):
        temporal_bias(0.0)
    with pytest.raises(ct.ChronotopeError, match="expected 'rowmax'"):
        temporal_bias(scale="maximum")
    q, k = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 3, 4)
    with (
        pytest.raises(ct.ChronotopeError, match="not the same frames"),
        control(model := RawAttention(), temporal_bias()),
    ):
        model(q, k, k)


def far_cosine(x, apart=16):
    """Mean cosine of frames [B, T, C] that are so far apart."""
    return float(F.cosine_similarity(x[:, :-apart], x[:, apart:], dim=-1).mean())


@pytest.mark.parametrize("seed", range(5))
def test_far_frames_of_a_transformer_over_time_look_less_at_each_other_and_differ_more(seed):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name.endswith("in_proj_weight"):
                one.normal_(std=0.3)  # torch's own leaves all weights nearly equal
    x = torch.randn(8, 32, 32)
    distance = (torch.arange(32)[:, None] - torch.arange(32)).abs().float()
    found = []
    for strength in (0.0, 1.0, 2.0):
        kept = Capture()
        with control(model, temporal_bias(4.0, strength), kept), torch.no_grad():
            out = model(x)
        spread = [float((weights[0] * distance).sum(-1).mean()) for weights in kept.kept.values()]
        assert len(spread) == 3
        found.append((sum(spread) / 3, far_cosine(out)))
    assert found[0] > found[1] > found[2]
    assert found[0][1] > found[1][1] > found[2][1]


@pytest.mark.slow
def test_samples_of_twice_the_frames_that_were_trained_on(one_thread):
    model, frames, steps = trained(rests), 32, 25
    noise = torch.randn(16, frames, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    distance = (torch.arange(frames)[:, None] - torch.arange(frames)).abs().float()
    found = {}
    for strength in (0.0, 1.0, 2.0):
        kept = Capture(lambda weights: (weights * distance).sum(-1).mean())
        with control(model, temporal_bias(4.0, strength), kept, steps=range(14)):
            video = flow_sample(model, noise, steps)
        looked = [float(one[0]) for one in kept.kept.values()]
        assert len(looked) == 3 * 14
        pictures = video.flatten(2) - video.flatten(2).mean(-1, keepdim=True)
        found[strength] = sum(looked) / len(looked), far_cosine(pictures), moving(video)
    print({strength: [round(x, 3) for x in numbers] for strength, numbers in found.items()})
    distances, cosines, changes = zip(*found.values(), strict=True)
    assert distances[0] > distances[1] > distances[2]
    assert cosines[0] > cosines[1] > cosines[2]
    assert changes[0] < changes[1] < changes[2]
