"""ReAtCo (system 156): losses on maps and boxes, latents pulled by them, joint sampling, windows of frames."""

from itertools import pairwise

import pytest
import torch
import toys
import toys_video
from torch import nn
from torch.nn import functional as F

from chronotope.adapt import Capture, control
from chronotope.errors import ChronotopeError
from chronotope.models.diffusion import ddim_sample, linear_alphas
from chronotope.papers.control import layouts
from chronotope.papers.control.latents import averaged, ladder, views
from chronotope.papers.control.maps import pixel_maps, smoothed, top_mean
from chronotope.papers.control.reatco import Refocus, attention_loss, inside_and_outside, joint_sample, refocusing

ALPHAS, SIZE = linear_alphas(200), (8, 8)
BOX = torch.tensor([[0.25, 0.25, 0.75, 0.625]])
REGION = layouts.boxes(BOX, SIZE, rounded=True)[0]


def tensor(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def test_boxes_become_whole_places():
    assert REGION.nonzero().amin(0).tolist() == [2, 2]
    assert REGION.nonzero().amax(0).tolist() == [4, 5]
    tiny = torch.tensor([[0.5, 0.5, 0.51, 0.51], [0.99, 0.99, 1.0, 1.0]])
    assert layouts.boxes(tiny, SIZE, rounded=True).flatten(1).sum(1).tolist() == [1, 1]


def test_the_loss_of_a_word_that_is_all_inside_and_of_one_that_is_everywhere():
    maps = torch.full((3, *SIZE, 5), 0.25)
    maps[..., 2] = torch.where(REGION, 1.0, 0.0)
    inside, outside = inside_and_outside(maps, [2], BOX, smooth=None)
    assert inside > 1 - 1e-6
    assert outside < 1e-6
    assert attention_loss(maps, [2], BOX, smooth=None) < 1e-5
    even = torch.full((3, *SIZE, 5), 0.2)
    for smooth in (None, 0.25):
        inside, outside = inside_and_outside(even, [1, 3], BOX.repeat(2, 1), smooth=smooth)
        assert (inside - outside).abs().max() < 1e-6
        assert (inside - 0.25).abs().max() < 1e-6
        assert attention_loss(even, [1, 3], BOX.repeat(2, 1), smooth=smooth) == pytest.approx(2)
    with pytest.raises(ChronotopeError, match="start token"):
        attention_loss(even, [0], BOX)


def test_the_mean_of_the_largest_fifth():
    maps = torch.arange(64.0).view(1, 8, 8)
    inside = maps[0][REGION].sort(descending=True).values[:2].mean()
    outside = maps[0][~REGION].sort(descending=True).values[:10].mean()
    assert top_mean(maps, REGION[None], 0.2) == inside
    assert top_mean(maps, ~REGION[None], 0.2) == outside
    one = torch.zeros(1, 8, 8, dtype=torch.bool)
    one[0, 3, 3] = True
    assert top_mean(maps, one, 0.2) == 27
    assert top_mean(maps, one & ~one, 0.2) == 0


def test_boxes_that_move_with_the_frames():
    maps = tensor(3, *SIZE, 5).softmax(-1)
    moving = torch.stack([BOX + 0.125 * i * torch.tensor([1.0, 0, 1, 0]) for i in range(3)])
    inside, _ = inside_and_outside(maps, [2], moving, smooth=None)
    frames = [inside_and_outside(maps[i : i + 1], [2], moving[i], smooth=None)[0] for i in range(3)]
    assert (inside - torch.stack(frames).mean(0)).abs().max() < 1e-6


def test_smoothing_is_a_gaussian_over_space_and_time():
    point = torch.zeros(5, 7, 7, dtype=torch.float64)
    point[2, 3, 3] = 1
    found = smoothed(point, 0.25, dims=(0, 1, 2))
    assert found.sum() == pytest.approx(1)
    assert found[2, 3, 4] / found[2, 3, 3] == pytest.approx(torch.tensor(-2.0).exp().item())
    assert torch.equal(found, found.transpose(1, 2))
    assert found[1, 3, 3] == found[2, 2, 3]


def test_gradients_of_the_loss():
    maps = tensor(2, 4, 4, 4, dtype=torch.float64).mul(0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_loss(x, [2, 3], BOX.double().repeat(2, 1)), maps)


class Looks(nn.Module):
    """Pixels look at six words; q = conv(z), which blurs, and a bias towards the first word."""

    def __init__(self, seed, gain=1.0, first=0.5, width=16):
        super().__init__()
        torch.manual_seed(seed)
        mix = nn.init.orthogonal_(torch.empty(width, width))
        self.q = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")
        self.text = nn.Parameter(4 * nn.init.orthogonal_(torch.empty(6, width)))
        with torch.no_grad():
            self.q.weight.copy_(gain * mix[:, :, None, None].expand_as(self.q.weight) / 9)
            self.q.bias.copy_(first * self.text[0])
        self.requires_grad_(False)

    def forward(self, z, t):
        q, k = self.q(z).flatten(2).transpose(1, 2), self.text.expand(len(z), -1, -1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None])[:, 0]
        return out.transpose(1, 2).unflatten(2, z.shape[-2:])


@pytest.mark.parametrize("kind", ["as published", "as it is"])
def test_25_updates_move_the_attention_of_a_word_into_its_box(kind):
    """Its attention as the loss sees it at the published factor; and as it is, at the factor for few words."""
    how = {"as published": (1.0, 0.5, 100), "as it is": (6.0, 0.25, 5)}[kind]
    rad, rungs, found = Refocus([2], BOX, goals={}, sharp=how[2]), ladder(ALPHAS, 50), []
    assert [rad.eta(0), rad.eta(49)] == [20, pytest.approx(20 * 0.5**0.5)]
    for seed in range(8):
        model, maps = Looks(seed, *how[:2]), Capture(grad=True)
        with control(model, maps):
            z, pull = torch.randn(3, 16, *SIZE), refocusing(rad, model, maps, SIZE)
            before = shares(model, maps, z)
            for step in range(26):
                last, z = z, pull(z, step, rungs[step], slice(0, 3))
            found.append((before, shares(model, maps, z)))
        assert torch.equal(last, z), "after 25 steps nothing is changed"
    before, after = torch.tensor(found)[..., 0 if kind == "as published" else 1].unbind(1)
    assert before.mean() == pytest.approx(0.2, abs=0.05)
    assert after.min() > 0.8


def shares(model, maps, z):
    """How much of a word's attention is in its box: sharpened, and as it is."""
    maps.clear()
    model(z, torch.zeros(len(z)))
    seen = pixel_maps([kept[0] for kept in maps.kept.values()], SIZE)
    sharpened = (100 * seen[..., 1:]).softmax(-1)[..., 1]
    return [float((x * REGION).sum() / x.sum()) for x in (sharpened, seen[..., 2])]


def test_inner_updates_stop_at_their_goal():
    model, maps, asked = Looks(0), Capture(grad=True), []

    def look(z):
        maps.clear()
        asked.append(0)
        model(z, torch.zeros(3))
        return pixel_maps([kept[0] for kept in maps.kept.values()], SIZE)

    z = tensor(3, 16, *SIZE)
    with control(model, maps):
        start = float(inside_and_outside(look(z), [2], BOX)[0])
        for goal, most in ((start - 0.01, 1), (start + 0.1, 20), (2.0, 5)):
            asked.clear()
            got = Refocus([2], BOX, goals={3: goal}, until=0, inner=most)(z, 3, look)
            reached = float(inside_and_outside(look(got), [2], BOX)[0])
            assert torch.equal(got, z) == (goal < start)
            assert reached >= goal or len(asked) == most + 1
        assert torch.equal(Refocus([2], BOX, goals={3: 2.0}, until=0)(z, 4, look), z)


def oracle(source, alphas):
    """Says the noise that is in x, if the clean x is the source."""

    def noise(x, t):
        a = alphas[t.long()].view(-1, 1, 1, 1)
        return (x - a.sqrt() * source[: len(x)]) / (1 - a).sqrt()

    return noise


def test_joint_sampling_keeps_the_source_and_a_mask_of_all_is_plain_sampling():
    source, mask = tensor(3, 2, *SIZE), torch.zeros(1, 1, *SIZE)
    mask[..., 2:6, 2:6] = 1
    rng = torch.Generator().manual_seed(3)
    out = joint_sample(
        oracle(source, ALPHAS), tensor(3, 2, *SIZE, seed=1), ALPHAS, 20, source=source, mask=mask, generator=rng
    )
    assert (out - source).abs()[(mask == 0).expand_as(out)].max() < 1e-4
    model, noise = toys.as_ddpm(lambda x, t: torch.tanh(x) - x.mean(0), ALPHAS), tensor(3, 2, *SIZE, seed=1)
    plain = ddim_sample(model, noise, ALPHAS, 20)
    for one in (torch.ones_like(mask), torch.ones_like(mask, dtype=torch.bool)):
        assert torch.equal(joint_sample(model, noise, ALPHAS, 20, source=source, mask=one, generator=rng), plain)
    assert torch.equal(joint_sample(model, noise, ALPHAS, 20), plain)
    with pytest.raises(ChronotopeError, match="belong together"):
        joint_sample(model, noise, ALPHAS, 20, mask=mask)


def test_the_source_that_enters_is_as_noisy_as_the_step():
    source, mask, entered = tensor(4, 2, 16, 16), torch.zeros(1, 1, 16, 16), []

    def model(x, t):
        entered.append((int(t[0]), x))
        return x / 2

    rng = torch.Generator().manual_seed(2)
    joint_sample(model, tensor(4, 2, 16, 16, seed=1), ALPHAS, 5, source=source, mask=mask, generator=rng)
    assert len(entered) == 5
    noises = [(x - ALPHAS[t].sqrt() * source) / (1 - ALPHAS[t]).sqrt() for t, x in entered]
    assert all(noise.std() == pytest.approx(1, abs=0.1) for noise in noises)
    assert all((a * b).mean().abs() < 0.1 for a, b in pairwise(noises)), "fresh in each step"


def smooth_pictures(side=12, reach=2.0):
    """The denoiser that is right for smooth random pictures, normal ones whose covariance falls with distance."""
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    cov = (-torch.cdist(at, at).square() / (2 * reach**2)).exp() + 1e-4 * torch.eye(side**2, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(cov)

    def noise(x, t):
        a = float(ALPHAS[int(t[0])])
        share = (1 - a) ** 0.5 / (a * values + 1 - a)
        return ((x.double().flatten(1) @ vectors * share) @ vectors.T).view_as(x).to(x.dtype)

    def draw(count, seed):
        flat = tensor(count, side**2, seed=seed, dtype=torch.float64) * values.clamp(min=0).sqrt()
        return (flat @ vectors.T).view(count, 1, side, side).float()

    return noise, draw


def test_borders_are_smoother_than_those_of_a_paste_at_the_end():
    model, draw = smooth_pictures()
    source, start = draw(64, 1), tensor(64, 1, 12, 12, seed=2)
    mask = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    mask[..., 3:9, 3:9] = True
    joint = joint_sample(
        model, start, ALPHAS, 50, source=source, mask=mask, window=64, generator=torch.Generator().manual_seed(0)
    )
    free = ddim_sample(model, start, ALPHAS, 50)

    def border(x):
        """Energy of the differences between neighbours on both sides of the border."""
        across = [(mask.diff(dim=d), x.diff(dim=d)) for d in (-1, -2)]
        return float(sum(step[edge.expand_as(step)].square().sum() for edge, step in across))

    pasted = torch.where(mask, free, source)
    kept = torch.where(mask, joint, source)
    assert border(kept) < 0.5 * border(pasted)
    assert border(joint) < 0.5 * border(pasted)
    assert border(source) < border(joint)


def test_windows_over_frames():
    counts = torch.zeros(16)
    for window in views(16, 4):
        counts[window] += 1
    assert counts.tolist() == [1, 2, 3, *[4] * 10, 3, 2, 1]
    assert [(w.start, w.stop) for w in views(17, 4, 3)][-2:] == [(12, 16), (13, 17)]
    assert views(3, 4) == [slice(0, 3)]
    assert views(4, 4) == [slice(0, 4)]
    x = tensor(7, 3)
    assert (averaged(lambda some, _: some.exp(), x, views(7, 3), 0) - x.exp()).abs().max() < 1e-6
    assert (averaged(lambda some, _: some.exp(), x, views(3, 2), -1) - x.exp()).abs().max() < 1e-6
    torch.manual_seed(0)
    model, words = toys.Toy("cross", dim=16, layers=1, heads=2).requires_grad_(False), toys.prompt("a red square")
    denoise, noise = toys.as_ddpm(toys.told(model, words), ALPHAS), tensor(7, 3, *SIZE)
    out = joint_sample(denoise, noise, ALPHAS, 6, window=4)
    assert (out - ddim_sample(denoise, noise, ALPHAS, 6)).abs().max() < 1e-5


def test_boxes_go_with_the_frames_of_a_window():
    """As if each window were a video with the boxes of its own frames."""
    model, maps = Looks(0), Capture(grad=True)
    moving = torch.stack([BOX + 0.125 * (i % 3) * torch.tensor([1.0, 0, 1, 0]) for i in range(5)])
    noise = tensor(5, 16, *SIZE)

    def sample(frames, **options):
        rad = Refocus([2], moving[frames], goals={}, steps=4)
        with control(model, maps):
            pull = refocusing(rad, model, maps, SIZE)
            return joint_sample(model, noise[frames], ALPHAS, 4, pull=pull, **options)

    apart = torch.cat([sample(slice(i, i + 1), window=1) for i in range(5)])
    assert (sample(slice(0, 5), window=1) - apart).abs().max() < 1e-5
    assert (sample(slice(0, 5), window=3) - apart).abs().max() > 1e-3
    assert len(maps.kept) == 1, "what was kept of a step goes with the next one"
    still = Refocus([2], BOX, goals={}, steps=4)
    with control(model, maps):
        other = joint_sample(model, noise, ALPHAS, 4, window=1, pull=refocusing(still, model, maps, SIZE))
    assert (other - apart).abs()[1].max() > 1e-3
    assert (other - apart).abs()[0].max() < 1e-5


def noise_ladder():
    """That of Stable Diffusion."""
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).float()


@pytest.mark.slow
def test_objects_are_drawn_inside_their_boxes(one_thread):
    count, side, alphas = 16, 4, noise_ladder()
    model, maps, rng = toys_video.trained(), Capture(grad=True), torch.Generator().manual_seed(1)
    colour, ground = (torch.randint(n, (count,), generator=rng) for n in (4, 2))
    corner = torch.randint(9 - side, (count, 2), generator=rng)
    noise = torch.randn(count, 4, 3, *SIZE, generator=rng)
    prompts, hits, squares = toys_video.prompt(colour, ground), torch.zeros(2), torch.zeros(2)
    for i in range(count):
        denoise = toys.as_ddpm(lambda x, t, i=i: model(x, t, prompts[i : i + 1]), alphas)
        box = torch.cat((corner[i], corner[i] + side))[None] / 8
        region = layouts.boxes(box, SIZE, rounded=True)
        rad = Refocus([1], box, sharp=5)
        with control(model, maps, layers="*cross_attention"):
            pulled = joint_sample(denoise, noise[i], alphas, pull=refocusing(rad, denoise, maps, SIZE))
        for j, frames in enumerate((ddim_sample(denoise, noise[i], alphas), pulled)):
            object_ = toys_video.painted(frames, colour[i].expand(4))
            pixels, inside = object_.sum((1, 2)), (object_ & region).sum((1, 2))
            hits[j] += ((pixels >= 4) & (inside >= 0.75 * pixels)).float().mean() / count
            common = F.avg_pool2d(object_[:, None].float(), 3, 1, divisor_override=1).flatten(1).amax(1)
            squares[j] += (common / (pixels + 9 - common)).mean() / count
    print(f"in the box, without and with RAD: {hits.tolist()} of the frames; IoU with a square: {squares.tolist()}")
    assert hits[0] < 0.5
    assert hits[1] > 0.85
    assert squares[1] > squares[0]
