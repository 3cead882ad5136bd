"""Blended Latent Diffusion under Attention Control (system 2): latents outside a mask, masks, joined frames."""

import pytest
import torch
import toys
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.adapt import control
from chronotope.errors import ChronotopeError
from chronotope.models.diffusion import ddim_sample, linear_alphas
from chronotope.papers.control.blended import CrossFrame, blended_sample, cross_frame_attention, word_mask
from chronotope.papers.control.latents import ddim, ddim_invert, ladder, views
from chronotope.papers.control.maps import MeanMap, mask_of, normalised, pixel_maps, resized, sides

ALPHAS, STEPS, FRAMES = linear_alphas(200), 8, 3


def tensor(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def small(form="cross", seed=0):
    """The toy with random weights, all of them: fresh ones have zeros behind which attention cannot be seen."""
    torch.manual_seed(seed)
    model = toys.Toy(form, dim=16, layers=2, heads=2).requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def denoise():
    return toys.as_ddpm(toys.told(small(), toys.prompt("a red square")), ALPHAS)


@pytest.fixture
def source(denoise):
    return ddim_invert(denoise, tensor(FRAMES, 3, 8, 8), ALPHAS, STEPS)


def test_plain_sampling_is_that_of_the_project(denoise):
    noise = tensor(FRAMES, 3, 8, 8)
    assert torch.equal(ddim(denoise, noise, ALPHAS, STEPS), ddim_sample(denoise, noise, ALPHAS, STEPS))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_of_nothing_gives_the_source_and_one_of_all_gives_plain_sampling(denoise, source, kind):
    mask = torch.zeros(FRAMES, 1, 8, 8, dtype=kind)
    assert (blended_sample(denoise, source, ALPHAS, mask) - source[-1]).abs().max() < 1e-5
    plain = ddim_sample(denoise, source[0], ALPHAS, STEPS)
    assert torch.equal(blended_sample(denoise, source, ALPHAS, torch.ones_like(mask)), plain)
    assert (plain - source[-1]).abs().max() > 1e-3


def test_outside_the_mask_the_latent_is_that_of_the_source_at_every_step(denoise, source):
    mask = torch.zeros(FRAMES, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 2:6, 1:5] = True
    other = toys.as_ddpm(toys.told(small(seed=1), toys.prompt("a blue cross")), ALPHAS)
    seen = []

    def watched(x, t):
        seen.append(x)
        return other(x, t)

    seen.append(blended_sample(watched, source, ALPHAS, mask))
    outside = ~mask.expand_as(source[0])
    assert len(seen) == STEPS + 1
    for x, kept in zip(seen, source, strict=True):
        assert torch.equal(x[outside], kept[outside])
    assert all((x - kept)[~outside].abs().min() > 0 for x, kept in zip(seen[1:], source[1:], strict=True))


def test_blending_stops_where_it_is_told_to(denoise, source):
    mask = torch.zeros(FRAMES, 1, 8, 8, dtype=torch.bool)
    assert torch.equal(blended_sample(denoise, source, ALPHAS, mask, until=STEPS), source[-1])
    assert not torch.equal(blended_sample(denoise, source, ALPHAS, mask, until=STEPS - 3), source[-1])


def test_inversion_leads_back_nearer_with_more_steps():
    smooth = toys.as_ddpm(lambda x, t: -0.3 * x, ALPHAS)
    x = tensor(2, 3, 8, 8)
    errors = []
    for steps in (10, 40, 160):
        start = ddim_invert(smooth, x, ALPHAS, steps)[0]
        errors.append(float((ddim_sample(smooth, start, ALPHAS, steps) - x).abs().max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.05


def explicit(q, k, v, keys):
    """Frame by frame, the keys of each frame listed."""
    out = []
    for i in range(q.shape[1]):
        seen = range(q.shape[1]) if keys == "all" else sorted({0, max(i - 1, 0), i})
        ks, vs = (torch.cat([x[:, j] for j in seen], 2) for x in (k, v))
        out.append(sdpa(q[:, i], ks, vs))
    return torch.stack(out, 1)


@pytest.mark.parametrize("keys", ["all", "first+prev"])
def test_cross_frame_attention(keys):
    q, k, v = (tensor(2, 4, 2, 9, 8, seed=i) for i in range(3))
    assert (cross_frame_attention(q, k, v, keys) - explicit(q, k, v, keys)).abs().max() < 1e-6
    one = [x[:, :1] for x in (q, k, v)]
    assert (cross_frame_attention(*one, keys) - sdpa(*one)).abs().max() < 1e-6
    same = [x[:, :1].expand_as(x) for x in (q, k, v)]
    out = cross_frame_attention(*same, keys)
    assert (out - out[:, :1]).abs().max() < 1e-6
    assert (out[:, 0] - sdpa(*(x[:, 0] for x in same))).abs().max() < 1e-6


@pytest.mark.parametrize("keys", ["all", "first+prev"])
def test_frames_are_joined_in_a_model_by_control(keys):
    model, words = small(), toys.prompt("a red square")
    x, t = tensor(2 * FRAMES, 3, 8, 8), torch.full((2 * FRAMES,), 0.5)
    denoise = toys.told(model, words)
    alone = denoise(x, t)
    with control(model, CrossFrame(FRAMES, keys), layers="*self_attention"):
        joined = denoise(x, t)
        first = denoise(x[:FRAMES], t[:FRAMES])
        same = denoise(x[:1].expand(FRAMES, 3, 8, 8), t[:FRAMES])
    with control(model, CrossFrame(1, keys), layers="*self_attention"):
        assert (denoise(x, t) - alone).abs().max() < 1e-6
    assert (joined - alone).abs().max() > 1e-2
    assert (joined[:FRAMES] - first).abs().max() < 1e-5, "videos of a batch do not see each other"
    assert (same - alone[:1]).abs().max() < 1e-5
    assert torch.equal(denoise(x, t), alone)
    with control(model, CrossFrame(4), layers="*self_attention"), pytest.raises(ChronotopeError, match="batch of 6"):
        denoise(x, t)


def test_no_weights_are_held_for_the_frames():
    layer = toys.SelfAttention(16, 2)
    x = tensor(4, 64, 16)
    held = []

    class Shapes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                held.append(out.numel())
            return out

    with control(layer, CrossFrame(4)), Shapes():
        layer(x)
    assert max(held) <= 4 * 64 * 16 * 3


def distance(x):
    """Mean over pixels of how far the features of a frame are from those of the next."""
    return x.diff(dim=0).norm(dim=-1).mean()


@pytest.mark.parametrize("keys", ["all", "first+prev"])
@pytest.mark.parametrize("seed", range(5))
def test_noisy_copies_of_a_frame_are_nearer_with_keys_of_other_frames(keys, seed):
    torch.manual_seed(seed)
    layer = toys.SelfAttention(16, 2).requires_grad_(False)
    x = torch.randn(1, 64, 16) + 0.5 * torch.randn(8, 64, 16)
    alone = distance(layer(x))
    with control(layer, CrossFrame(8, keys)):
        joined = distance(layer(x))
    assert joined <= 0.8 * alone


def planted(region, tokens=6, word=2, heads=2, layers=(8, 16), noise=0.1, seed=0):
    """Weights of layers of several resolutions in which a word is seen in a region [F, 16, 16] more than elsewhere."""
    rng = torch.Generator().manual_seed(seed)
    out = []
    for side in layers:
        hot = torch.nn.functional.interpolate(region[:, None].float(), (side, side), mode="area")[:, 0].flatten(1)
        scores = noise * torch.randn(len(region), heads, side * side, tokens, generator=rng)
        scores[..., word] += 4 * hot[:, None]
        out.append(scores.softmax(-1))
    return out


def iou(a, b):
    return float((a & b).sum() / (a | b).sum())


def test_the_mask_of_a_word_is_the_region_that_looks_at_it():
    region = torch.zeros(FRAMES, 16, 16, dtype=torch.bool)
    for i in range(FRAMES):
        region[i, 2 + 2 * i : 8 + 2 * i, 4 : 10 + 2 * i] = True
    for layers in ((16,), (8, 16)):
        for seed in range(5):
            maps = pixel_maps(planted(region, layers=layers, seed=seed), (16, 16))
            assert iou(mask_of(maps[..., 2], 0.3), region) >= 0.9
            assert iou(mask_of(maps[..., 1], 0.3), region) < 0.5
    grown = mask_of(maps[..., 2], 0.3, dilate=1)
    assert torch.equal(grown, torch.nn.functional.max_pool2d(mask_of(maps[..., 2], 0.3).float(), 3, 1, 1) > 0)
    assert not mask_of(torch.ones(1, 4, 4), 0.3).any()
    assert torch.equal(normalised(torch.tensor([[[1.0, 3.0]]])), torch.tensor([[[0.0, 1.0]]]))


def test_maps_are_collected_over_layers_and_steps_by_control(denoise, source):
    model = small()
    denoise = toys.as_ddpm(toys.told(model, toys.prompt("a red square")), ALPHAS)
    words = MeanMap([2, 3])
    with control(model, words, layers="*cross_attention"):
        got = blended_sample(denoise, source, ALPHAS, word_mask(words, (8, 8), 0.5))
    assert words.counts == {64: 2 * STEPS}
    held = ct.adapt.Capture(lambda w: w[..., [2, 3]].mean((1, 3)))
    with control(model, held, layers="*cross_attention"):
        denoise(source[0], torch.full((FRAMES,), 150.0))
    words.clear()
    assert set(held.kept) == {(f"blocks.{i}.cross_attention", 0) for i in range(2)}
    with control(model, words, layers="*cross_attention"):
        denoise(source[0], torch.full((FRAMES,), 150.0))
    mean = torch.stack([held.kept[key][0] for key in held.kept]).mean(0).unflatten(1, (8, 8))
    assert (words.mean((8, 8)) - mean).abs().max() < 1e-6
    assert got.shape == source[0].shape
    with pytest.raises(ChronotopeError, match="no weights were seen"):
        MeanMap([1]).mean((8, 8))


def test_a_unet_of_diffusers_has_its_frames_joined_and_its_words_mapped():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2}
    unet = diffusers.UNet2DConditionModel(sample_size=16, cross_attention_dim=12, **sizes, **blocks).eval()
    text = tensor(1, 7, 12)

    def denoise(x, t):
        return unet(x, t, text.expand(len(x), -1, -1)).sample

    words = MeanMap([2])
    with torch.no_grad():
        source = ddim_invert(denoise, tensor(FRAMES, 4, 16, 16), ALPHAS, 4)
        alone = denoise(source[0], torch.full((FRAMES,), 150.0))
        with control(unet, CrossFrame(FRAMES), layers="*attn1"), control(unet, words, layers="*attn2"):
            out = blended_sample(denoise, source, ALPHAS, word_mask(words, (16, 16)))
            mask = word_mask(words, (16, 16))(4).expand_as(out)
            joined = denoise(source[0], torch.full((FRAMES,), 150.0))
    assert set(words.counts) == {64, 256}
    assert torch.equal(out[~mask], source[-1][~mask])
    assert 0 < mask.float().mean() < 1
    assert (joined - alone).abs().max() > 1e-4


def test_what_the_shared_parts_refuse_and_how_they_measure():
    assert sides(128, aspect=0.5) == (8, 16)
    with pytest.raises(ChronotopeError, match="no picture"):
        sides(60)
    with pytest.raises(ChronotopeError, match="no weights were kept"):
        pixel_maps([], (8, 8))
    for steps in (0, 201):
        with pytest.raises(ChronotopeError, match="expected 1 to 200"):
            ladder(ALPHAS, steps)
    with pytest.raises(ChronotopeError, match="1 or more"):
        views(5, 0)
    even = torch.full((2, 16, 16), 0.3)
    assert (resized(even, (8, 8)) - 0.3).abs().max() < 1e-6
    assert resized(tensor(2, 3, 16, 16), (4, 8)).shape == (2, 3, 4, 8)
