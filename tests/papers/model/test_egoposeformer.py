"""EgoPoseFormer (system 178): sampling, views that do not see, what is read, cameras; coloured joints in two views."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.errors import ChronotopeError
from chronotope.papers.model.egoposeformer import EgoPoseFormer, StereoAttention, distance, fisheye, seen


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scattered(heads: int = 4, views: int = 2, points: int = 16) -> StereoAttention:
    torch.manual_seed(0)
    layer = StereoAttention(8, heads, views, points).double()
    nn.init.normal_(layer.offsets.weight, std=0.3)
    nn.init.normal_(layer.read.weights.weight)
    return layer


def test_sampling_is_a_loop_over_grid_sample() -> None:
    layer = scattered()
    q, features = numbers(2, 5, 8), numbers(2, 2, 8, 6, 9)
    anchors, valid = torch.rand(2, 2, 5, 2, dtype=torch.float64), torch.rand(2, 2, 5) < 0.7
    offsets = layer.offsets(q).view(2, 5, 4, 16, 2).flip(-1)  # across, down
    weight = layer.read.weights(q).view(2, 5, 4, 16).softmax(-1)
    views = []
    for v in range(2):
        value = layer.read.value(features[:, v].movedim(1, -1)).movedim(-1, 1)
        heads = []
        for h in range(4):
            at = anchors[:, v, :, None] + offsets[:, :, h] / torch.tensor([9.0, 6.0])
            read = F.grid_sample(value[:, 2 * h : 2 * h + 2], 2 * at - 1, align_corners=False)  # [2, 2, 5, 16]
            heads.append((read * weight[:, None, :, h]).sum(-1).transpose(1, 2))
        views.append(layer.read.out(torch.cat(heads, 2)) * valid[:, v, :, None])
    expected = layer.fuse(torch.cat(views, 2))
    torch.testing.assert_close(layer(q, features, anchors, valid), expected, rtol=0, atol=1e-6)


def test_without_offsets_and_with_equal_weights_it_looks_at_the_anchor() -> None:
    layer = StereoAttention(8, 4, views=1).double()
    nn.init.zeros_(layer.offsets.bias)
    q, features, anchors = numbers(2, 5, 8), numbers(2, 1, 8, 6, 9), torch.rand(2, 1, 5, 2, dtype=torch.float64)
    value = layer.read.value(features[:, 0].movedim(1, -1)).movedim(-1, 1)
    read = F.grid_sample(value, 2 * anchors[:, :1, :] - 1, align_corners=False)[:, :, 0].transpose(1, 2)
    out = layer(q, features, anchors, torch.ones(2, 1, 5, dtype=torch.bool))
    torch.testing.assert_close(out, layer.fuse(layer.read.out(read)), rtol=0, atol=1e-12)


def test_offsets_begin_on_rays() -> None:
    rays = StereoAttention(8, 8).offsets.bias.view(8, 16, 2)
    torch.testing.assert_close(rays.norm(dim=2), torch.arange(1.0, 17).expand(8, -1))
    torch.testing.assert_close(rays[1, 4], torch.tensor([5.0, 5.0]) / math.sqrt(2))


def test_a_view_that_does_not_see_a_joint_gives_nothing() -> None:
    layer = scattered()
    q, features = numbers(1, 3, 8), numbers(1, 2, 8, 5, 5).requires_grad_()
    anchors, valid = torch.rand(1, 2, 3, 2, dtype=torch.float64), torch.ones(1, 2, 3, dtype=torch.bool)
    valid[0, 1, 1] = False
    out = layer(q, features, anchors, valid)
    (touched,) = torch.autograd.grad(out[:, 1].square().sum(), features, retain_graph=True)
    assert touched[:, 0].abs().max() > 0 and touched[:, 1].abs().max() == 0
    other = features.detach().clone()
    other[:, 1] = numbers(8, 5, 5)
    assert torch.equal(layer(q, other, anchors, valid)[:, 1], out[:, 1])
    # Nor does what a blind view has for this joint: only the bias of the matrix that joins the views is left.
    blind = layer(q, features, anchors, torch.zeros_like(valid))
    assert torch.equal(blind, layer.fuse.bias.expand_as(blind))


def test_what_is_read_is_as_many_places_for_any_size_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, inner = [], ct.nn.sample

    def counting(x: torch.Tensor, grid: ct.Grid, places: torch.Tensor, outside: str) -> torch.Tensor:
        counted.append(places.numel() // 2)
        return inner(x, grid, places, outside)  # type: ignore[arg-type]

    monkeypatch.setattr("chronotope.nn.sampling.sample", counting)
    layer = scattered()
    for h, w in ((4, 4), (32, 17)):
        layer(numbers(1, 16, 8), numbers(1, 2, 8, h, w), torch.rand(1, 2, 16, 2).double(), torch.ones(1, 2, 16) > 0)
    assert counted == [16 * 2 * 4 * 16] * 2


def test_gradients_reach_features_offsets_and_weights_but_not_anchors() -> None:
    layer = scattered(points=2)
    q, features, anchors = numbers(1, 2, 8), numbers(1, 2, 8, 3, 4), torch.rand(1, 2, 2, 2, dtype=torch.float64)
    valid = torch.ones(1, 2, 2, dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda a, b: layer(a, b, anchors, valid), (q.requires_grad_(), features.requires_grad_())
    )
    layer(q, features, anchors.requires_grad_(), valid).square().sum().backward()
    assert anchors.grad is None
    assert all(values.grad is not None and values.grad.abs().max() > 0 for values in layer.parameters())
    with pytest.raises(ChronotopeError, match="1 views; expected 2"):
        layer(q, features[:, :1], anchors[:, :1], valid[:, :1])


def test_the_guess_is_taught_by_its_own_loss_alone() -> None:
    torch.manual_seed(0)
    camera = fisheye((0.5, 0.1), torch.tensor([[-0.1, 0.0, 0.0], [0.1, 0.0, 0.0]]))
    model = EgoPoseFormer(nn.Conv2d(3, 16, 4, 4), camera, dim=16, joints=5, layers=2, hidden=32)
    stages = model(torch.randn(2, 2, 3, 32, 32))
    assert stages.shape == (3, 2, 5, 3)
    pose = torch.randn(2, 5, 3)
    distance(stages[1:], pose).sum().backward(retain_graph=True)
    assert not any(values.grad.any() for values in model.guess.parameters())
    images = torch.randn(2, 2, 3, 32, 32)
    by_hand = 0.1 * (model(images) - pose).square().sum(-1).sqrt().mean((1, 2)).sum()
    torch.testing.assert_close(model.loss(images, pose), by_hand)


def test_a_fisheye_sees_what_is_ahead_at_its_centre_and_no_more_than_the_image() -> None:
    camera = fisheye((math.pi / 4, -0.5), torch.zeros(1, 3))  # equidistant: (pi / 2 - angle) / 2 from the centre
    joints = torch.tensor([[[1e-6, 0.0, -1.0], [1.0, 0.0, -1.0], [0.0, -1.0, -1.0], [1.0, 0.0, 1.0]]])
    anchors, valid = camera(joints)
    expected = torch.tensor([[0.5, 0.5], [0.5 + math.pi / 8, 0.5], [0.5, 0.5 - math.pi / 8], [1.0, 0.5]])
    torch.testing.assert_close(anchors[0, 0], expected, rtol=0, atol=1e-5)
    assert valid.flatten().tolist() == [True, True, True, False]


def pinhole(joints: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two cameras, 0.8 apart, that look along z."""
    moved = joints[:, None] + torch.tensor([0.4, -0.4])[:, None, None] * torch.tensor([1.0, 0.0, 0.0])
    return seen(0.5 + 0.6 * moved[..., :2] / moved[..., 2:])


COLOURS = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3)[1:17]


def scenes(count: int, mean: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views [count, 2, 3, 64, 64] of 16 coloured joints, a part of one of which is covered, and the joints."""
    pose = mean + 0.15 * torch.randn(count, 16, 3, generator=rng) + 0.2 * torch.randn(count, 1, 3, generator=rng)
    at = pinhole(pose)[0] * 64 - 0.5
    bump = torch.exp(-0.5 * (torch.arange(64.0) - at[..., None]).square() / 1.5**2)  # [count, 2, 16, 2, 64]
    blobs = bump[:, :, :, 1, :, None] * bump[:, :, :, 0, None]
    images = (blobs[:, :, :, None] * COLOURS[:, :, None, None]).amax(2)
    corner = torch.randint(44, (count, 2), generator=rng)
    view = torch.randint(2, (count,), generator=rng)
    inside = ((torch.arange(64) - corner[..., None]) % 64 < 20).float()
    cover = (inside[:, 0, :, None] * inside[:, 1, None]).bool()
    hidden = cover[:, None, None] & (view[:, None] == torch.arange(2))[:, :, None, None, None]
    return images.masked_fill(hidden, 0.3), pose


def trained(views: int, steps: int = 600) -> tuple[float, float]:
    """Distances of the first and the second stage, over scenes that were not seen."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    mean = torch.randn(16, 3, generator=rng) * torch.tensor([0.35, 0.35, 0.15]) + torch.tensor([0.0, 0.0, 2.0])
    encoder = nn.Sequential(
        nn.Conv2d(3, 48, 4, 4), nn.GELU(), nn.Conv2d(48, 48, 3, 1, 1), nn.GELU(), nn.Conv2d(48, 48, 3, 1, 1)
    )

    def camera(joints: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        anchors, valid = pinhole(joints)
        return anchors[:, :views], valid[:, :views]

    model = EgoPoseFormer(encoder, camera, dim=48, views=views, hidden=256)
    model.guess[-1].bias.data.copy_(mean.flatten())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        images, pose = scenes(16, mean, rng)
        optimizer.zero_grad()
        model.loss(images[:, :views], pose).backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        images, pose = scenes(256, mean, torch.Generator().manual_seed(1))
        found = distance(model(images[:, :views]), pose)
    return float(found[0]), float(found[-1])


@pytest.mark.slow
def test_the_second_stage_is_nearer_and_two_views_are_nearer_than_one() -> None:
    guess, stereo = trained(2)
    _, mono = trained(1)
    print(f"guess {guess:.4f}, two views {stereo:.4f}, one view {mono:.4f}")
    assert stereo <= 0.7 * guess, (stereo, guess)
    assert stereo <= 0.85 * mono, (stereo, mono)
