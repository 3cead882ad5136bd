"""The denoiser of clips: nothing said at first, its blocks by hand, who sees whom, saving, learning, refusals."""

import pytest
import torch

import chronotope as ct
from chronotope.models import VideoDiT
from chronotope.models.video_dit import DiTBlock


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def lively(**options):
    """A model that says something: what is 0 at first is drawn."""
    torch.manual_seed(0)
    model = VideoDiT(**{"patch": 2, "dim": 24, "layers": 2, "heads": 2, **options})
    for name, parameter in model.named_parameters():
        if "modulation" in name or name.startswith("leave"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def clips(frames=3, height=6, width=8, seed=0):
    return torch.randn(2, frames, 1, height, width, generator=rng(seed), dtype=torch.float64)


TIMES = torch.tensor([0.2, 0.9], dtype=torch.float64)


def test_at_first_it_says_nothing_and_learns_from_there():
    torch.manual_seed(0)
    model = VideoDiT(dim=24, layers=2, heads=2)
    x = clips().float()
    assert torch.equal(model(x, TIMES.float()), torch.zeros_like(x))
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    # A flow to one clip: v = (clip - x_t) / (1 - t), whatever the noise.
    one = clips(seed=1)[:1].float().expand(16, -1, -1, -1, -1)
    losses = []
    for step in range(60):
        opt.zero_grad()
        loss = model.loss(one, rng(step))
        loss.backward()
        losses.append(float(loss.detach()))
        opt.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    noise = torch.randn(4, 3, 1, 6, 8, generator=rng(99))
    with torch.no_grad():
        made = model.sample(noise, 16)
        assert torch.equal(made, model.sample(noise, 16))
    assert (made - one[:4]).square().mean() < 0.7 * (noise - one[:4]).square().mean()


def test_a_block_is_its_formula():
    torch.manual_seed(0)
    block, grid = DiTBlock(12, 2).double(), ct.Grid(t=2, h=1, w=3)
    for steer in block.steer:
        torch.nn.init.normal_(steer.modulation.weight)
    x, c = torch.randn(2, 6, 12, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    expected = x
    for steer, layer in zip(block.steer, (lambda y: block.attention(y, grid), block.mlp), strict=True):
        shift, scale, gate = (steer.modulation.weight @ (c * c.sigmoid()).mT).mT.split(12, 1)
        centred = expected - expected.mean(2, keepdim=True)
        normed = centred / (expected.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        expected = expected + gate[:, None] * layer((1 + scale[:, None]) * normed + shift[:, None])
    assert (block(x, grid, c) - expected).abs().max() < 1e-12


def test_all_tokens_see_all_and_the_pattern_of_each_layer_can_be_set():
    model, x = lively(), clips(frames=5)
    assert [type(block.attention) for block in model.blocks] == [ct.nn.Attention] * 2
    assert [block.attention.where for block in model.blocks] == [None] * 2
    other = x.clone()
    other[:, 4, :, 5, 7] += 1
    with torch.no_grad():
        moved = (model(other, TIMES) - model(x, TIMES)).abs().amax((0, 2))
        assert (moved > 1e-9).all()
        dense = model(x, TIMES)
        for block in model.blocks:
            block.attention.where = ct.full()
        assert (model(x, TIMES) - dense).abs().max() < 1e-12
        model.blocks[0].attention.where = ct.along("h", "w")
        model.blocks[1].attention.where = ct.per_head([ct.along("h", "w"), ct.along("h", "w")])
        moved = (model(other, TIMES) - model(x, TIMES)).abs().amax((0, 2, 3, 4))
        assert torch.equal(moved > 1e-12, torch.tensor([False, False, False, False, True]))


def test_places_and_times_are_known():
    """Tokens of equal content are told apart by where they are and clips by how noisy they are."""
    model, x = lively(), clips(frames=4)
    with torch.no_grad():
        for dims, shift in (((1,), 1), ((3,), 2), ((4,), 2)):
            rolled = model(x.roll(shift, dims), TIMES).roll(-shift, dims)
            assert (rolled - model(x, TIMES)).abs().max() > 1e-6
        same = x[:1].expand(2, -1, -1, -1, -1)
        first, second = model(same, TIMES)
        assert (first - second).abs().max() > 1e-6
        # Nobody else in the batch is seen.
        assert (model(x, TIMES)[1:] - model(x[1:], TIMES[1:])).abs().max() < 1e-12


def test_the_loss_and_the_samples_are_those_of_the_flow():
    model, x = lively(), clips()
    draw = rng(3)
    t = torch.rand(2, generator=draw, dtype=torch.float64)
    noise = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        mixed = torch.stack([s * a + (1 - s) * b for s, a, b in zip(t, x, noise, strict=True)])
        expected = (model(mixed, t) - (x - noise)).square().mean()
        assert abs(float(model.loss(x, rng(3))) - float(expected)) < 1e-12
        by_hand = x
        for step in range(4):
            by_hand = by_hand + model(by_hand, torch.full((2,), step / 4, dtype=torch.float64)) / 4
        assert (model.sample(x, 4) - by_hand).abs().max() < 1e-12


@pytest.mark.parametrize("options", [{}, {"channels": 3, "patch": 1, "layers": 1, "dim": 12, "ratio": 2.0}])
def test_saved_and_read_again(options, tmp_path):
    model = lively(**options).float()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, options.get("channels", 1), 4, 6)
    with torch.no_grad():
        assert torch.equal(VideoDiT.from_pretrained(tmp_path)(x, TIMES.float()), model(x, TIMES.float()))


def test_refusals():
    with pytest.raises(ct.ChronotopeError, match="layers=0"):
        VideoDiT(layers=0)
    with pytest.raises(ct.ChronotopeError, match="not a multiple of the patch size"):
        VideoDiT(dim=24)(torch.zeros(1, 2, 1, 7, 8), torch.zeros(1))
    block = DiTBlock(12, 2)
    with pytest.raises(ct.ChronotopeError, match="give context=condition"):
        block(torch.zeros(1, 4, 12), ct.Grid(t=1, h=2, w=2))
    with pytest.raises(ct.ChronotopeError, match="sees those of frames to come"):
        block.init_state(1, ct.Grid(t=1, h=2, w=2))
