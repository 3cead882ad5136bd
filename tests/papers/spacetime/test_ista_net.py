"""ISTA-Net (system 20): tokens there and back, the scores, entities split or not, absent ones, and two toys."""

import math

import pytest
import torch
from torch import nn

import chronotope as ct
from chronotope.papers.spacetime.ista_net import (
    ISTANet,
    TanhTokenAttention,
    TokenBlock,
    TokenWindow,
    shuffle_entities,
)


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(count=6, heads=2, seed=0):
    torch.manual_seed(seed)
    return TanhTokenAttention(8, heads, 4, count), ct.Grid(t=3, e=2, u=count)


def small(window=(4, 5, 2), entities=2, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"classes": 4, "steps": 10, "joints": 7, "widths": ((12, 12, 4), (12, 16, 4)), "heads": 2}
    return ISTANet(entities=entities, window=window, **{**sizes, **options})


@pytest.mark.parametrize("window", [(4, 5, 2), (1, 1, 1), (3, 2, 2), (10, 7, 3), (7, 4, 1)])
def test_tokens_go_there_and_back_exactly(window):
    cut, x = TokenWindow(*window), tokens(2, 3, 10, 7, 3)
    out = cut(x)
    assert out.shape == (2, 3, window[0], window[1] * window[2], math.prod(cut.stretches((10, 7, 3))))
    assert torch.equal(cut.inverse(out, (10, 7, 3)), x)


def test_a_token_holds_elements_at_strides_and_copies_of_the_last_one():
    x = torch.arange(10.0).view(1, 1, 10, 1, 1)
    out = TokenWindow(4, 1, 1)(x)[0, 0, :, 0]  # 10 becomes 12: three tokens of four moments, three apart
    assert out.T.tolist() == [[0, 3, 6, 9], [1, 4, 7, 9], [2, 5, 8, 9]]


def test_scores_are_the_sum_over_the_elements_of_two_tokens():
    layer, grid = attention()
    x = tokens(2, grid.size, 8)
    placed = (x.unflatten(1, grid.shape) + layer.code).flatten(1, 3)
    q, k = (part.unflatten(2, (2, 4)).unflatten(1, grid.shape) for part in layer.qk(placed).chunk(2, -1))
    for p in range(6):
        for r in range(6):
            expected = torch.tanh((q[:, :, :, p] * k[:, :, :, r]).sum((1, 2, 4)) / (4 * 3 * 2))
            assert (layer.scores(x, grid)[:, :, p, r] - expected).abs().max() <= 1e-6


def test_without_alpha_tokens_are_mixed_alike_whatever_they_are():
    layer, grid = attention()
    nn.init.normal_(layer.static)
    a, b = tokens(1, grid.size, 8), tokens(1, grid.size, 8, seed=1)
    assert not torch.equal(layer.weights(a, grid), layer.weights(b, grid))
    nn.init.zeros_(layer.alpha)
    assert torch.equal(layer.weights(a, grid), layer.weights(b, grid))
    assert torch.equal(layer.weights(a, grid)[0], layer.static)
    assert (layer(a, grid) + layer(b, grid) - layer(a + b, grid)).abs().max() <= 1e-5  # a linear map


def test_without_the_table_scores_lie_between_minus_and_plus_alpha():
    layer, grid = attention()
    nn.init.zeros_(layer.static)
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor([0.5, 2.0])[:, None, None])
    found = layer.weights(3 * tokens(4, grid.size, 8), grid).abs().amax((0, 2, 3))
    assert (found < layer.alpha.flatten()).all()
    assert (found > 0.5 * layer.alpha.flatten()).all()


def test_twice_as_many_tokens_leave_the_scores_as_they_are():
    layer, grid = attention()
    double, wide = attention(count=12)
    double.qk.load_state_dict(layer.qk.state_dict())
    double.code[:] = layer.code.repeat(2, 1)
    x = tokens(2, grid.size, 8).unflatten(1, grid.shape)
    scores, both = layer.scores(x.flatten(1, 3), grid), double.scores(torch.cat((x, x), 3).flatten(1, 3), wide)
    assert (both - scores.repeat(1, 1, 2, 2)).abs().max() <= 1e-6
    longer = ct.Grid(t=6, e=2, u=6)  # and so do twice as many elements
    assert (layer.scores(torch.cat((x, x), 1).flatten(1, 3), longer) - scores).abs().max() <= 1e-6


def test_entities_in_one_token_or_each_in_its_own():
    whole, split = small(window=(4, 5, 2)), small(window=(4, 5, 1))
    assert whole.grid.shape == (4, 10, 3 * 2)
    assert split.grid.shape == (4, 5, 3 * 2 * 2)
    x = tokens(3, 3, 10, 7, 2)
    swapped = x.flip(-1)
    for model in (whole.eval(), split.eval()):
        assert model(x).shape == (3, 4)
        for block in model.blocks:
            nn.init.normal_(block.attention.static)
    # What holds all entities cannot tell who is the first; who has a token alone is told apart by its number.
    assert (whole(swapped) - whole(x)).abs().max() <= 1e-5
    assert (split(swapped) - split(x)).abs().max() > 1e-2


def test_entities_in_another_order_are_the_same_entities():
    x = tokens(50, 2, 4, 3, 3)
    out = shuffle_entities(x, torch.Generator().manual_seed(0))
    assert torch.equal(out.sort(-1).values, x.sort(-1).values)
    firsts = torch.stack([(out[..., 0] == x[..., e]).flatten(1).all(1) for e in range(3)])
    assert torch.equal(firsts.sum(0), torch.ones(50, dtype=torch.int64))
    assert firsts.sum(1).min() >= 8


@pytest.mark.parametrize("window", [(4, 5, 3), (4, 5, 1), (3, 7, 2)])
def test_absent_entities_change_nothing(window):
    model, x = small(window=window, entities=3).eval(), tokens(4, 3, 10, 7, 3)
    real = torch.tensor([[True, True, True], [True, False, True], [False, True, True], [True, False, False]])
    spoilt = torch.where(real[:, None, None, None], x, torch.nan)
    out = model(spoilt, real)
    assert out.isfinite().all()
    assert torch.equal(model(torch.where(spoilt.isnan(), 1e3, spoilt), real), out)
    assert (out[0] - model(x)[0]).abs().max() <= 1e-5
    assert (out[1:] - model(x)[1:]).abs().amax(1).min() > 1e-3


def test_gradients_and_what_is_refused():
    model, x = small(), tokens(3, 3, 10, 7, 2)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ct.ChronotopeError, match="cannot be stepped: a token holds moments"):
        model.blocks[0].init_state(1, model.grid)
    with pytest.raises(ct.ChronotopeError, match=r"expected \[B, C, 10, 7, 2\]"):
        model(x[:, :, 1:])
    with pytest.raises(ct.ChronotopeError, match="odd widths"):
        TokenBlock(4, 4, 2, 1, 3, kernels=(2, 3))
    with pytest.raises(ct.ChronotopeError, match="sizes of 1 or more"):
        TokenWindow(0, 1, 1)


STEPS, JOINTS, CLASSES = 16, 5, 4  # approach, follow, mirror, none


def figures(count, seed):
    """Two stick figures that walk and swing two arms: [n, 2, T, J, 2], and how they relate.

    Who approaches walks to the other, who follows walks behind, who mirrors walks the mirrored way with arms in
    unison. Of one figure alone the place, way and arms are distributed alike in all four classes.
    """
    rng = torch.Generator().manual_seed(seed)

    def uniform(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(count, *shape, generator=rng)

    def unit(angle):
        return torch.stack((angle.cos(), angle.sin()), -1)

    label = torch.randint(CLASSES, (count,), generator=rng)
    approach, follow, mirror = (label == which for which in range(3))
    way, side = uniform(2, high=2 * math.pi), uniform(high=2 * math.pi)
    first, second = way.unbind(1)
    askew = uniform(low=math.pi / 6, high=5 * math.pi / 6) * torch.where(uniform() < 0.5, -1.0, 1.0)
    side = torch.where(approach, first, torch.where(follow, first + math.pi, torch.where(mirror, first + askew, side)))
    second = torch.where(approach, first + math.pi, torch.where(follow, first, second))
    second = torch.where(mirror, 2 * side + math.pi - first, second)
    apart = uniform(1, low=0.8, high=1.2) * unit(side)
    middle, time = torch.randn(count, 2, generator=rng), torch.arange(STEPS).float()[:, None] - STEPS / 2
    roots = [
        (middle + half)[:, None] + 0.1 * time * unit(angle)[:, None]
        for half, angle in ((-apart, first), (apart, second))
    ]
    arms = 1.2 * torch.sin(uniform(1, 2, 2, low=0.25, high=0.6) * time[..., None] + uniform(1, 2, 2, high=2 * math.pi))
    arms[:, :, 1] = torch.where(mirror[:, None, None], arms[:, :, 0], arms[:, :, 1])
    hands = 0.6 * torch.stack((arms.cos() * torch.tensor([-1.0, 1.0]), arms.sin()), -1)  # [n, T, E, 2, 2]
    body = torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.0, -0.7]]).expand(count, STEPS, 2, 3, 2)
    x = torch.stack(roots, 2)[:, :, :, None] + torch.cat((body, hands), 3)
    return (x + 0.02 * torch.randn(x.shape, generator=rng)).permute(0, 4, 1, 3, 2), label


class LateFusion(nn.Module):
    """A network that sees one figure; the scores of both are added."""

    def __init__(self, **options):
        super().__init__()
        self.one = ISTANet(entities=1, **options)

    def forward(self, x):
        return self.one(x[..., :1]) + self.one(x[..., 1:])


def taught(late=False, shuffled=True, steps=1000, batch=64, rate=3e-3):
    """A network after a training on new figures in every step."""
    torch.manual_seed(0)
    sizes = {"classes": CLASSES, "steps": STEPS, "joints": JOINTS, "channels": 2, "kernels": (3, 3)}
    sizes |= {"window": (4, 5, 1), "widths": ((24, 24, 8), (24, 24, 8)), "heads": 3}
    model = LateFusion(**sizes) if late else ISTANet(entities=2, **sizes)
    opt, rng = torch.optim.AdamW(model.parameters(), rate), torch.Generator().manual_seed(1)
    course = torch.optim.lr_scheduler.OneCycleLR(opt, rate, total_steps=steps)
    for step in range(steps):
        x, label = figures(batch, 100 + step)
        loss = nn.functional.cross_entropy(model(shuffle_entities(x, rng) if shuffled else x), label)
        opt.zero_grad()
        loss.backward()
        opt.step()
        course.step()
    return model.eval()


@torch.no_grad()
def accuracy(model):
    x, label = figures(2000, 7)
    return (model(x).argmax(1) == label).float().mean().item()


@torch.no_grad()
def spread_over_orders(model):
    """Variance of the scores over both orders of the figures, mean over figures and classes."""
    x, _ = figures(1000, 8)
    return torch.stack((model(x), model(x.flip(-1)))).var(0, correction=0).mean().item()


@pytest.mark.slow
def test_relations_are_seen_by_tokens_together_and_not_by_late_fusion(one_thread):
    model, late = taught(), taught(late=True, steps=500)
    together, apart, spread = accuracy(model), accuracy(late), spread_over_orders(model)
    fixed = taught(shuffled=False)
    without = spread_over_orders(fixed)
    print(f"accuracy {together:.3f}, late fusion {apart:.3f}; without rearrangement {accuracy(fixed):.3f}")
    print(f"variance over orders {spread:.4f}, without rearrangement {without:.4f}: {without / spread:.1f} times")
    assert together >= 0.9
    assert apart <= 0.6
    assert without >= 5 * spread
