"""Animate3D (system 43): what it is at first, its branches as dense attention, who hears of frame 0, the adapter."""

import pytest
import torch
from torch.nn import functional as F

import chronotope as ct
from chronotope.models.diffusion import flow_loss
from chronotope.nn import Attention, Block, Chain, Sinusoidal
from chronotope.papers.spacetime.animate3d import Branch, MV2VAdapter, ParallelAttention, view_time_attention
from chronotope.patterns import along

GRID = ct.Grid(n=3, t=4, h=2, w=5)
N, T, H, W = GRID.coords().T


def lively(module, seed=0):
    """The same module with nothing at 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.double().eval()


def tokens(seed=1):
    return torch.randn(2, GRID.size, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(x, frame=0):
    """x with other values in one frame."""
    return torch.where((frame == T)[:, None], x + tokens(7), x)


def changed(layer, x, other):
    """[N, T]: whether the output of a frame of a view is another."""
    gap = (layer(other, GRID) - layer(x, GRID)).abs().amax((0, 2))
    return gap.view(GRID.shape).amax((2, 3)) > 1e-12


def dense(attend, x, mask, source=None):
    """Attention of all tokens over all tokens, or all of `source`, under a mask that is written out."""

    def heads(y):
        return F.linear(y, attend.qkv.weight, attend.qkv.bias).unflatten(2, (3, attend.heads, -1)).unbind(2)

    q, k, v = heads(x)[0], *heads(x if source is None else source)[1:]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return attend.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


@pytest.mark.parametrize("image", [False, True])
def test_a_sum_begins_as_the_video_model(image):
    """Error 0, alone and inside a block, with the weights of a video model loaded."""
    torch.manual_seed(0)
    video = Block([Chain([Sinusoidal(32, ("t",)), Attention(32, 2, where=along("t"), biases=True)])])
    layer = view_time_attention(32, 2, merge="zero_sum", image=image, camera="learned")
    layer.branches[0].attend.load_state_dict(video.mixers[0].layers[1].state_dict())
    x = tokens().float()
    assert torch.equal(layer(x, GRID), video.mixers[0](x, GRID))
    whole = Block([layer])
    kept = {name: value for name, value in video.state_dict().items() if not name.startswith("mixers")}
    assert not whole.load_state_dict(kept, strict=False).unexpected_keys
    assert torch.equal(whole(x, GRID), video(x, GRID))
    assert (layer.shares() == 1).all()
    assert (lively(layer)(tokens(), GRID) - video.mixers[0].double()(tokens(), GRID)).abs().max() > 0.1


def test_a_blend_begins_as_the_mean():
    torch.manual_seed(0)
    x = tokens().float()
    for image in (False, True):
        layer = view_time_attention(32, 2, image=image, camera="sinusoid")
        mean = torch.stack([branch(x, GRID) for branch in layer.branches]).mean(0)
        assert mean.abs().max() > 0.05
        assert (layer(x, GRID) - mean).abs().max() <= 1e-6
        assert layer.mix.shape == ((3,) if image else (1,))
    two = view_time_attention(32, 2)
    two.mix.data.fill_(20.0)
    assert (two(x, GRID) - two.branches[1](x, GRID)).abs().max() < 1e-6
    two.mix.data.fill_(-20.0)
    assert (two(x, GRID) - two.branches[0](x, GRID)).abs().max() < 1e-6


def test_each_branch_is_dense_attention_under_its_mask():
    layer, x = lively(view_time_attention(32, 2, image=True, camera="learned")), tokens()
    view, place = N, H * 5 + W
    same_place = (view[:, None] == view) & (place[:, None] == place)
    masks = [same_place, T[:, None] == T, (view[:, None] == view) & (T == 0)]
    for branch, mask in zip(layer.branches, masks, strict=True):
        y = x
        for code in branch.codes:
            y = code(y, GRID)
        assert (branch(x, GRID) - dense(branch.attend, y, mask)).abs().max() < 1e-12
    assert torch.equal(ct.plan(along("t"), GRID).mask(), masks[0])
    assert torch.equal(ct.plan(along("n", "h", "w"), GRID).mask(), masks[1])
    pairs = sum(ct.plan(branch.attend.where, GRID).density for branch in layer.branches[:2]) * GRID.size**2
    assert round(pairs) == 30 * 4**2 + 4 * 30**2


def test_codes_are_of_the_branch():
    """Time is told to the first alone, places and cameras to the second alone, none to the third."""
    layer, x = lively(view_time_attention(32, 2, image=True, camera="sinusoid")), tokens()
    still = x.view(2, *GRID.shape, 32)[:, :, :1].expand(2, *GRID.shape, 32).flatten(1, 4)
    alike = torch.ones(2, GRID.size, 32).double()
    told = [[], [], []]
    for which, branch in enumerate(layer.branches):
        frames = branch(still, GRID).view(2, *GRID.shape, 32)
        told[which].append(bool((frames - frames[:, :, :1]).abs().max() > 1e-6))
        places = branch(alike, GRID).view(2, *GRID.shape, 32)
        told[which] += [bool(places.diff(dim=axis).abs().max() > 1e-6) for axis in (1, 3, 4)]
    assert told == [[True, False, False, False], [False, True, True, True], [False] * 4]


def test_who_hears_of_the_first_frame():
    layer, x = lively(view_time_attention(32, 2, image=True)), tokens()
    time, views, image = layer.branches
    only = torch.arange(4)[None].expand(3, 4) == 0
    assert changed(image, x, moved(x)).all()
    assert torch.equal(changed(views, x, moved(x)), only)
    assert changed(time, x, moved(x)).all()
    later = torch.arange(4)[None].expand(3, 4) == 2
    assert torch.equal(changed(image, x, moved(x, 2)), later)  # as queries only
    view = torch.where((N == 1)[:, None], moved(x), x)
    assert torch.equal(changed(image, x, view), (torch.arange(3) == 1)[:, None].expand(3, 4))


def test_the_adapter_begins_as_its_base_and_looks_at_frame_0():
    torch.manual_seed(0)
    base = Attention(32, 2, where=along("n", "h", "w"), biases=True)
    adapter, x = MV2VAdapter(base), tokens()
    assert torch.equal(adapter(x.float(), GRID), base(x.float(), GRID))
    lively(adapter)
    assert (adapter(x, GRID) - base(x, GRID)).abs().max() > 0.1
    assert changed(adapter, x, moved(x)).all()
    assert torch.equal(changed(base, x, moved(x)), torch.arange(4)[None].expand(3, 4) == 0)

    class Second:
        """The second query as an attention of its own, over all of frame 0 without W_o."""

        heads, out = 2, adapter.out
        qkv = torch.nn.Linear(32, 96).double()

    with torch.no_grad():
        Second.qkv.weight.copy_(torch.cat((adapter.query.weight, base.qkv.weight[32:])))
        Second.qkv.bias.copy_(torch.cat((torch.zeros(32), base.qkv.bias[32:])))
    told = dense(Second, x, (T == 0)[None].expand(GRID.size, -1))
    assert (adapter(x, GRID) - base(x, GRID) - F.linear(told, base.out.weight)).abs().max() < 1e-12


def test_gradients_reach_what_is_not_frozen():
    torch.manual_seed(0)
    layer = view_time_attention(32, 2, merge="zero_sum", image=True)
    layer.branches[0].requires_grad_(False)
    adapter = MV2VAdapter(Attention(32, 2, where=along("n", "h", "w")))
    layer(adapter(tokens().float(), GRID), GRID).square().sum().backward()
    assert all(parameter.grad is None for part in (layer.branches[0], adapter.base) for parameter in part.parameters())
    assert all(branch.attend.out.weight.grad.abs().max() > 0 for branch in layer.branches[1:])
    assert adapter.out.weight.grad.abs().max() > 0


def test_the_first_frame_stays_clean_in_training():
    layer, clean = lively(view_time_attention(32, 2)), tokens()
    mask = (T > 0)[None, :, None]
    entered = []

    def model(x, t):
        entered.append(x)
        return layer(x, GRID)

    flow_loss(model, clean, mask=mask)
    assert torch.equal(entered[0][:, T == 0], clean[:, T == 0])
    assert not torch.equal(entered[0][:, T > 0], clean[:, T > 0])


def test_what_it_refuses():
    time = Branch(Attention(32, 2, where=along("t")))
    with pytest.raises(ct.ChronotopeError, match="merge='mean'"):
        view_time_attention(32, 2, merge="mean")
    with pytest.raises(ct.ChronotopeError, match="1 branches"):
        ParallelAttention([time])
    with pytest.raises(ct.ChronotopeError, match="camera='plucker'"):
        view_time_attention(32, 2, camera="plucker")
    with pytest.raises(ct.ChronotopeError, match="cannot be stepped"):
        view_time_attention(32, 2).init_state(1, GRID.replace(t=1))
    with pytest.raises(ct.ChronotopeError, match="no prefix"):
        Branch(Attention(32, 2), first=True)(torch.zeros(1, 3, 32), ct.Grid(t=3))
