"""Ouroboros-Diffusion (system 128): the queue, mixed frequencies, shared subjects, guidance, and fields that drift."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.adapt import control
from chronotope.models.diffusion import linear_alphas
from chronotope.papers.control.maps import MeanMap, mask_of
from chronotope.papers.control.ouroboros import CoherentTail, Fifo, frequency_mix, pass_band, start
from chronotope.papers.control.ouroboros_subject import (
    LayerFeatures,
    Recurrence,
    SubjectAttention,
    subject_features,
)

ALPHAS = linear_alphas(1000)
EVEN = 1 - torch.linspace(0.1, 0.999, 8).square()
"""Eight rungs, whose noise has deviations that are evenly spread."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def still(alphas):
    """A model that knows that all clean latents are 0: the latents are the noise, to scale."""
    return lambda x, t: x / (1 - alphas[t.long()])[..., None, None, None].sqrt()


class Spread(nn.Module):
    """Attention of tokens [R, N, C] to themselves, or to `context`."""

    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads, self.q, self.kv, self.out = heads, nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x, context=None):
        k, v = self.kv(x if context is None else context).chunk(2, -1)
        q, k, v = (one.unflatten(2, (self.heads, -1)).transpose(1, 2) for one in (2 * self.q(x), k, v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SpreadAttention(Spread):
    """One that is found by its name."""


class VideoNet(nn.Module):
    """Noise in latents [B, T, C, h, w] told 5 words: within frames, to the words, over time; at two sizes."""

    def __init__(self, channels=3, dim=16):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(channels, dim, 3, padding=1), nn.Conv2d(dim, channels, 3, padding=1)
        self.level, self.words = nn.Linear(1, dim), nn.Parameter(torch.randn(1, 5, dim))
        kinds = ("within", "text", "time")
        self.wide, self.narrow = (nn.ModuleDict({kind: SpreadAttention(dim) for kind in kinds}) for _ in range(2))

    def forward(self, x, t):
        y = self.enter(x.flatten(0, 1)) + self.level(t.reshape(-1, 1) / 1000)[..., None, None]
        y = self.blocks(self.wide, y, x.shape)
        small = self.blocks(self.narrow, F.avg_pool2d(y, 2), x.shape)
        return self.leave(y + F.interpolate(small, y.shape[-2:])).view(x.shape)

    def blocks(self, layers, y, shape):
        size, tokens = y.shape[-2:], y.flatten(2).mT
        tokens = layers["text"](layers["within"](tokens), context=self.words.expand(len(tokens), -1, -1))
        rows = tokens.unflatten(0, shape[:2]).transpose(1, 2).flatten(0, 1)
        back = layers["time"](rows).unflatten(0, (shape[0], -1)).transpose(1, 2).flatten(0, 1)
        return back.mT.unflatten(2, size)


def test_the_queue_keeps_its_rungs_and_its_size():
    # Clean latents are 0 and noise has deviation 1: what is left in a latent says its rung.
    first = start(torch.zeros(64, 8, 2, 6, 6), EVEN, generator())
    queue = Fifo(still(EVEN), first, EVEN, tail=CoherentTail(0.25), generator=generator(1))
    wanted = torch.tensor([(1 - rung.left) ** 0.5 for rung in queue.rungs])
    assert (wanted.diff() > 0.1).all()
    for _, frame in zip(range(200), queue, strict=False):
        levels = queue.latents.std((0, 2, 3, 4))
        assert (levels.diff() > 0).all()
        assert (levels - wanted).abs().max() < 0.06
        assert queue.latents.shape == first.shape and frame.shape == first[:, 0].shape
        assert frame.abs().max() < 1e-5
    held = [value for value in vars(queue).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in held) == first.numel()


def test_each_frame_goes_down_all_rungs_in_turn():
    times, frames = [], 6

    def model(x, t):
        times.append(t.clone())
        return torch.zeros_like(x)

    marked = torch.arange(1.0, frames + 1).view(1, -1, 1, 1, 1).expand(1, frames, 1, 2, 2)
    queue = Fifo(model, marked, ALPHAS, generator=generator())
    # Without noise to take off a latent grows by sqrt(after / left) on each rung, 1 / sqrt(left) in all.
    for number, frame in zip(range(frames), queue, strict=False):
        rung = queue.rungs[number]
        assert (frame - (number + 1) / rung.left**0.5).abs().max() < 1e-3 * float(frame.max())
    assert all(torch.equal(t, times[0]) for t in times)
    assert (times[0].diff(dim=1) > 0).all() and times[0][0, 0] == 0 and times[0][0, -1] == 999


@settings(deadline=None, max_examples=40)
@given(h=st.integers(1, 12), w=st.integers(1, 12), cutoff=st.floats(0, 1.5), seed=st.integers(0, 99))
def test_mixed_frequencies_are_those_of_both_sides(h, w, cutoff, seed):
    low, high = torch.randn(2, 3, 2, h, w, generator=generator(seed))
    band = pass_band(h, w, cutoff)
    mixed = torch.fft.fft2(frequency_mix(low, high, cutoff))
    assert (mixed - torch.fft.fft2(low))[..., band].abs().max() < 1e-5
    if not band.all():
        assert (mixed - torch.fft.fft2(high))[..., ~band].abs().max() < 1e-5


@pytest.mark.parametrize("cutoff", [0.1, 0.25, 0.5, 1.0])
def test_mixed_noise_stays_of_deviation_one(cutoff):
    low, high = torch.randn(2, 500, 4, 16, 20, generator=generator())
    mixed = frequency_mix(low, high, cutoff)
    assert float(mixed.var()) == pytest.approx(1, abs=0.05)
    assert float(mixed.var(0).min()) > 0.6 and float(mixed.var(0).max()) < 1.5
    # Tail after tail, too.
    queue = Fifo(still(ALPHAS), mixed[:, None].expand(-1, 3, -1, -1, -1), ALPHAS, tail=CoherentTail(cutoff))
    for _ in range(10):
        queue.step()
    assert float(queue.latents[:, -1].var()) == pytest.approx(1, abs=0.05)


def test_a_tail_comes_back_up_to_the_noisiest_rung():
    queue = Fifo(still(EVEN), torch.zeros(1, 8, 1, 2, 2), EVEN)
    last = queue.rungs[-1]
    assert last.left < 0.1 * last.after
    # Of signal 3 sqrt(after) without noise, everything is kept: 3 sqrt(left) is left of it, and noise for the rest.
    previous = torch.full((500, 1, 8, 8), 3 * last.after**0.5)
    tail = CoherentTail(2.0)(previous, last, generator())
    assert float(tail.mean()) == pytest.approx(3 * last.left**0.5, abs=0.02)
    assert float(tail.var()) == pytest.approx(1 - last.left / last.after, abs=0.02)


def call(masks, segment, x, model):
    with control(model, SubjectAttention(masks, segment)), torch.no_grad():
        return model(x)


def dense(model, x, masks, segment):
    """Reference: all tokens of all frames, and who sees whom."""
    b, t = masks.shape[:2]
    n = x.shape[1]
    frame = torch.arange(t).repeat_interleave(n)
    same = frame[:, None] == frame
    near = frame[:, None] // segment == frame // segment
    sees = same | (near & masks.view(b, 1, t * n))
    q = 2 * model.q(x)
    k, v = model.kv(x).chunk(2, -1)
    q, k, v = (one.reshape(b, t * n, model.heads, -1).transpose(1, 2) for one in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, sees[:, None]).transpose(1, 2).flatten(2)
    return x + model.out(out).view(b * t, n, -1)


@pytest.mark.parametrize(("frames", "segment"), [(6, 6), (6, 2), (7, 3), (5, 1), (4, 9)])
def test_frames_see_the_subject_of_their_segment(frames, segment):
    torch.manual_seed(0)
    model, x = SpreadAttention(8), torch.randn(2 * frames, 12, 8)
    empty, whole = torch.zeros(2, frames, 3, 4, dtype=torch.bool), torch.ones(2, frames, 3, 4, dtype=torch.bool)
    some = torch.rand(2, frames, 3, 4, generator=generator()) < 0.3
    with torch.no_grad():
        assert (call(empty, segment, x, model) - model(x)).abs().max() < 1e-6
        for masks in (whole, some):
            assert (call(masks, segment, x, model) - dense(model, x, masks, segment)).abs().max() < 1e-5
        if segment >= frames:
            video = model(x.view(2, -1, 8)).view_as(x)
            assert (call(whole, segment, x, model) - video).abs().max() < 1e-5


def test_masks_of_the_layer_and_of_other_sizes():
    torch.manual_seed(0)
    model, x = SpreadAttention(8), torch.randn(4, 6, 8)
    masks = torch.zeros(1, 4, 4, 6, dtype=torch.bool)
    masks[0, 1, 3, 5] = True  # at half the size the last token of frame 1
    small = torch.zeros(1, 4, 2, 3, dtype=torch.bool)
    small[0, 1, 1, 2] = True
    with torch.no_grad():
        got = call(masks, 2, x, model)
        assert torch.equal(got, call(small, 2, x, model))
        changed = (got - model(x)).abs().amax((1, 2)) > 1e-6
    assert changed.tolist() == [True, False, False, False]
    q = torch.randn(4, 2, 6, 4)
    hidden = torch.zeros(4, 1, 6, 6, dtype=torch.bool)
    hidden[..., :3] = True

    class Raw(nn.Module):
        def forward(self, q, mask):
            return F.scaled_dot_product_attention(q, q, q, mask)

    with control(raw := Raw(), SubjectAttention(small, 2)):
        got = raw(q, hidden)
    seen = torch.cat((q[:, :, :3], q[1:2, :, 5:].expand(4, -1, -1, -1)), 2)
    assert (got[0] - F.scaled_dot_product_attention(q[:1], seen[:1], seen[:1])[0]).abs().max() < 1e-6
    assert (got[1:] - F.scaled_dot_product_attention(q, q, q, hidden)[1:]).abs().max() < 1e-6


def test_wrong_layers_and_numbers_are_refused():
    masks = torch.ones(1, 4, 2, 3, dtype=torch.bool)
    with pytest.raises(ct.ChronotopeError, match="1 x 4 frames"):
        call(masks, 2, torch.randn(5, 6, 8), SpreadAttention(8))
    with pytest.raises(ct.ChronotopeError, match="1 frame or more"):
        SubjectAttention(masks, 0)
    with pytest.raises(ct.ChronotopeError, match="the mean alone"):
        frequency_mix(torch.zeros(4, 4), torch.zeros(4, 4), -1.0)


def test_features_are_means_over_the_subject():
    tokens = torch.randn(2, 3, 5, 4)
    mask = torch.rand(2, 3, 5, generator=generator()) < 0.5
    mask[1, 2] = False
    found, real = subject_features(tokens, mask)
    assert real.tolist() == [[True] * 3, [True, True, False]]
    assert (found[0, 1] - tokens[0, 1][mask[0, 1]].mean(0)).abs().max() < 1e-6
    assert (found[1, 2] == 0).all()


def test_guidance_lowers_the_loss():
    lowered, count = 0, 20
    for seed in range(count):
        torch.manual_seed(seed)
        model = VideoNet()
        features = LayerFeatures(model, "wide.within")
        x, t = torch.randn(1, 8, 3, 4, 4), torch.linspace(0, 999, 8)[None]
        mask = torch.rand(1, 8, 16) < 0.4
        guide = Recurrence(features, mask, scale=0.05, clean=2, noisy=4)
        moved = guide(x, t)
        with torch.no_grad():
            before, after = (float(guide.loss(*subject_features(features(one, t), mask))) for one in (x, moved))
        lowered += after < before
        assert torch.equal(moved[:, :4], x[:, :4])  # these features are those of each frame alone
        assert not torch.equal(moved[:, 4:], x[:, 4:])
    assert lowered >= 0.95 * count


def test_the_bank_is_a_running_mean_of_clean_frames():
    found = iter(torch.randn(3, 2, 4, 1, 5))
    guide = Recurrence(lambda x, t: x.sum() * 0 + next(values), torch.ones(2, 4, 1, dtype=torch.bool), 0.1, 0.75, 2, 1)
    seen = []

    def record():
        for one in found:
            seen.append(one[:, :2, 0].mean(1))
            yield one

    values, bank = record(), None
    for _ in range(3):
        x = torch.randn(2, 4, 1, 2, 2)
        assert torch.equal(guide(x, torch.zeros(2, 4)), x)  # features that do not depend on the latents
        bank = seen[-1] if bank is None else 0.75 * bank + 0.25 * seen[-1]
        assert (guide.bank - bank).abs().max() < 1e-6
    kept = guide.bank.clone()
    guide.mask[0] = False  # no subject anywhere in the first video
    values = iter(torch.randn(1, 2, 4, 1, 5))
    guide(x, torch.zeros(2, 4))
    assert torch.equal(guide.bank[0], kept[0]) and not torch.equal(guide.bank[1], kept[1])


def test_all_three_parts_in_a_video_net():
    torch.manual_seed(0)
    model, words = VideoNet(), MeanMap([1])
    latents = start(torch.randn(1, 6, 3, 4, 6), ALPHAS, generator())
    with torch.no_grad(), control(model, words, layers="*.text"):
        model(latents, torch.zeros(1, 6))
    masks = mask_of(words.mean((4, 6)), 0.5)[None]
    assert masks.shape == (1, 6, 4, 6) and masks.any() and not masks.all()
    frames = {}
    for name, scale in (("guided", 0.5), ("free", 0.0)):
        guide = Recurrence(LayerFeatures(model, "wide.within"), masks.flatten(2), scale)
        queue = Fifo(model, latents, ALPHAS, tail=CoherentTail(), guidance=guide, generator=generator(1))
        with control(model, SubjectAttention(masks, 3), layers="*.within"):
            frames[name] = torch.stack([queue.step() for _ in range(3)])
    assert frames["guided"].isfinite().all() and frames["guided"].shape == (3, 1, 3, 4, 6)
    assert not torch.equal(frames["guided"], frames["free"])
    alone = Fifo(model, latents, ALPHAS, tail=CoherentTail(), generator=generator(1))
    assert not torch.equal(torch.stack([alone.step() for _ in range(3)]), frames["free"])


def drifting(keep=0.9, side=8):
    """Power [side, side] of the frequencies of fields that drift by x' = keep x + noise: that of natural images."""
    rows = torch.fft.fftfreq(side) * side
    power = 1 / (1 + rows[:, None].square() + rows.square())
    return power / power.mean(), keep


def best(power, keep, window):
    """The best linear denoiser of such fields, which sees `window` frames at a time."""
    order = torch.arange(window)
    cov = keep ** (order[:, None] - order).abs().double()

    def model(x, t):
        noise = torch.empty_like(x)
        for at in range(0, x.shape[1], window):
            part, left = x[:, at : at + window], ALPHAS.double()[t[0, at : at + window].long()]
            # Seen in frequencies: x = sqrt(a) z + sqrt(1 - a) e with cov(z) = power * cov.
            signal = power.double()[..., None, None] * cov * left.sqrt()
            seen = signal * left.sqrt()[:, None] + torch.diag(1 - left)
            gain = (signal @ torch.linalg.inv(seen)).to(torch.complex128)
            clean = torch.einsum("hwij,bjchw->bichw", gain, torch.fft.fft2(part.double(), norm="ortho"))
            clean = torch.fft.ifft2(clean, norm="ortho").real
            a = left[:, None, None, None]
            noise[:, at : at + window] = ((part - a.sqrt() * clean) / (1 - a).sqrt()).to(x.dtype)
        return noise

    return model


@pytest.mark.parametrize("seed", range(3))
def test_frames_at_borders_differ_less_than_after_white_tails(seed):
    power, keep = drifting()
    length, window, count, rng = 16, 4, 64, generator(seed)
    clip = [torch.fft.ifft2(torch.fft.fft2(torch.randn(8, 1, 8, 8, generator=rng)) * power.sqrt()).real]
    for _ in range(length - 1):
        fresh = torch.fft.ifft2(torch.fft.fft2(torch.randn(8, 1, 8, 8, generator=rng)) * power.sqrt()).real
        clip.append(keep * clip[-1] + (1 - keep**2) ** 0.5 * fresh)
    first = start(torch.stack(clip, 1), ALPHAS, rng)
    model, found = best(power, keep, window), {}
    for name, tail in (("white", None), ("coherent", CoherentTail(0.25))):
        queue = Fifo(model, first, ALPHAS, tail=tail, generator=generator(seed + 10))
        video = torch.stack([queue.step() for _ in range(length + count)], 1)[:, length:]
        change = video.diff(dim=1).square().mean((0, 2, 3, 4))
        found[name] = float(change[window - 1 :: window].mean()), float(change.mean()), float(video.var())
    print({name: [round(x, 4) for x in numbers] for name, numbers in found.items()})
    for border in (0, 1):
        assert found["coherent"][border] < found["white"][border]
        # Videos from white tails are also fainter, which makes their differences small.
        assert found["coherent"][border] / found["coherent"][2] < 0.8 * found["white"][border] / found["white"][2]
