"""ConvFormer (system 169): width 1 is plain attention, parameters, frames that are not there, steps, and lifting."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.pattern.hopfir import SKELETON
from chronotope.papers.spacetime.convformer import ConvAttention, ConvFormer, ConvQKV


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(axis="v", kernels=(1, 3), causal=False, seed=0):
    torch.manual_seed(seed)
    out = ConvAttention(16, 4, axis, kernels, causal)
    nn.init.normal_(out.qkv.blend)
    return out


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("axis", ["t", "v"])
def test_one_branch_of_width_one_is_plain_attention(axis):
    mixer, grid = layer(axis, kernels=(1,)), ct.Grid(t=5, v=7)
    plain = ct.nn.Attention(16, 4, where=ct.along(axis))
    plain.qkv.weight.data = mixer.qkv.branches[0].weight.data[:, :, 0]
    plain.out.load_state_dict(mixer.out.state_dict())
    x = tokens(2, grid.size, 16)
    assert (mixer(x, grid) - plain(x, grid)).abs().max() <= 1e-6


def test_queries_keys_and_values_are_blends_of_convolutions_head_by_head():
    torch.manual_seed(0)
    make, x = ConvQKV(8, 2, kernels=(1, 3, 5)), tokens(2, 9, 8)
    nn.init.normal_(make.blend)
    share = make.blend.softmax(0).view(3, 3, 2)
    assert (share.sum(0) - 1).abs().max() <= 1e-6
    for which, got in enumerate(make(x)):
        for head in range(2):
            for place in range(9):
                expected = torch.zeros(2, 4)
                for branch, conv in enumerate(make.branches):
                    reach = conv.kernel_size[0] // 2
                    rows = slice(8 * which + 4 * head, 8 * which + 4 * head + 4)
                    for offset in range(-reach, reach + 1):
                        if 0 <= place + offset < 9:
                            weight = conv.weight[rows, :, offset + reach]
                            expected = expected + share[branch, which, head] * (x[:, place + offset] @ weight.T)
                assert (got[:, head, place] - expected).abs().max() <= 1e-5


def test_attention_is_along_its_axis_alone():
    grid, x = ct.Grid(t=5, v=7), tokens(1, 35, 16)
    for axis in ("t", "v"):
        mixer = layer(axis)
        change = torch.autograd.functional.jacobian(lambda x: mixer(x, grid).sum(2), x)[0, :, 0].abs().amax(-1)  # noqa: B023
        assert torch.equal(change > 0, ct.plan(ct.along(axis), grid).mask())
    looks_back = layer("t", causal=True)
    change = torch.autograd.functional.jacobian(lambda x: looks_back(x, grid).sum(2), x)[0, :, 0].abs().amax(-1)
    assert torch.equal(change > 0, ct.plan(ct.along("t") & ct.causal("t"), grid).mask())


@pytest.mark.parametrize("kernels", [(1,), (1, 3), (2, 4)])
def test_steps_give_what_the_whole_gives(kernels):
    mixer, grid = layer("t", kernels, causal=True), ct.Grid(t=8, v=3)
    x = tokens(2, grid.size, 16)
    state, out = mixer.init_state(2, ct.Grid(t=1, v=3)), []
    for part in x.split(3, 1):
        y, state = mixer.step(part, state)
        out.append(y)
    assert (torch.cat(out, 1) - mixer(x, grid)).abs().max() <= 1e-5


def test_parameters_are_under_half_of_those_of_frames_as_tokens():
    steps, joints, dim, depth = 27, 17, 32, 4
    ours = ConvFormer(steps, joints, dim, depth=depth)

    def stack(width):
        return [ct.nn.Block([ct.nn.Attention(width, 4)], mlp="gelu", mlp_ratio=2) for _ in range(depth)]

    # PoseFormer: joints of width d in space; in time, a frame is one token of width J d.
    other = nn.ModuleList([*stack(dim), *stack(joints * dim), nn.Linear(joints * dim, 3 * joints)])
    print(f"{size(ours)} parameters against {size(other)}")
    assert size(ours) / size(other) < 0.5
    assert size(ConvFormer(steps, joints, dim, depth=depth, kernels=(1, 3, 5, 7))) / size(other) < 0.5


def test_frames_that_are_not_there_are_seen_by_nobody():
    torch.manual_seed(0)
    model, x = ConvFormer(9, 16, 16, depth=2), tokens(3, 9, 16, 2)
    real = torch.ones(3, 9, dtype=torch.bool)
    real[0, :3] = real[1, 5] = False
    spoilt = torch.where(real[..., None, None], x, torch.nan)
    out = model(spoilt, real)
    assert out.isfinite().all()
    assert torch.equal(out, model(torch.where(spoilt.isnan(), 1e3, spoilt), real))
    assert (out[2] - model(x)[2]).abs().max() <= 1e-5
    assert (out[:2] - model(x)[:2]).abs().amax((1, 2)).min() > 1e-4


def test_gradients_and_what_is_refused():
    torch.manual_seed(0)
    model = ConvFormer(5, 16, 16, depth=1)
    model(tokens(2, 5, 16, 2)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ct.ChronotopeError, match=r"expected \[B, 5, 16, 2\]"):
        model(tokens(2, 4, 16, 2))
    with pytest.raises(ct.ChronotopeError, match="odd where they look both ways"):
        ConvQKV(16, 4, kernels=(2,))
    for mixer in (layer("t"), layer("v", causal=True)):
        with pytest.raises(ct.ChronotopeError, match="causal=True along the first axis"):
            mixer.init_state(1, ct.Grid(t=1, v=16))


STEPS, CENTRE = 7, 3
BONES = (0.2, 0.45, 0.42, 0.2, 0.45, 0.42, 0.25, 0.25, 0.2, 0.3, 0.28, 0.25, 0.3, 0.28, 0.25)


def figures(count, seed):
    """Stick figures that swing their limbs and turn: [n, T, 16, 2] seen from far away, [n, 16, 3] in the centre.

    All turn the same way round, some faster than others: what of a joint moves left is in front.
    """
    rng = torch.Generator().manual_seed(seed)

    def uniform(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(count, *shape, generator=rng)

    time = torch.arange(STEPS).float() - CENTRE
    swing = uniform(16, 1, low=0.2, high=0.6) * torch.sin(
        uniform(16, 1, low=0.05, high=0.2) * time + uniform(16, 1, high=2 * math.pi)
    )
    lean = uniform(16, 1, low=-0.3, high=0.3)
    side = {1: -1.0, 4: 1.0, 10: 1.0, 13: -1.0}
    place = torch.zeros(count, 16, STEPS, 3)
    for (parent, joint), bone in zip(SKELETON, BONES, strict=True):
        if joint in side:
            way = torch.tensor([side[joint], 0.0, 0.0]).expand(count, STEPS, 3)
        else:
            # Knees bend backwards and elbows forwards: what makes one of two depths the likely one.
            bend = {3: -0.5, 6: -0.5, 12: 0.7, 15: 0.7}.get(joint, 0.0)
            angle, up = swing[:, joint] + bend, 1.0 if joint in (7, 8, 9) else -1.0
            angle = 0.2 * angle if up > 0 else angle
            tilt = lean[:, joint].expand(-1, STEPS)
            way = torch.stack((tilt.sin(), up * tilt.cos() * angle.cos(), tilt.cos() * angle.sin()), -1)
        place[:, joint] = place[:, parent] + bone * way
    turn = uniform(1, high=2 * math.pi) + uniform(1, low=0.15, high=0.3) * time
    sin, cos = turn.sin()[:, None], turn.cos()[:, None]
    x, y, z = place.unbind(-1)
    place = torch.stack((cos * x + sin * z, y, cos * z - sin * x), -1).transpose(1, 2)
    return place[..., :2], place[:, CENTRE]


def mpjpe(out, solid):
    return (out - solid).norm(dim=-1).mean().item()


def lifted(model, steps=800, batch=32, rate=6e-3):
    """MPJPE on other figures after a training on 3000 windows."""
    flat, solid = figures(3000, seed=0)
    opt = torch.optim.AdamW(model.parameters(), rate)
    course = torch.optim.lr_scheduler.OneCycleLR(opt, rate, total_steps=steps)
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(flat), (batch,), generator=rng)
        loss = (model(flat[chosen]) - solid[chosen]).norm(dim=-1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        course.step()
    flat, solid = figures(1000, seed=1)
    with torch.no_grad():
        return mpjpe(model(flat), solid)


def linear_regressor():
    """The centre frame alone, by least squares."""
    rows, goals = zip(*(figures(count, seed) for count, seed in ((3000, 0), (1000, 1))), strict=True)
    rows = [F.pad(flat[:, CENTRE].flatten(1), (0, 1), value=1.0) for flat in rows]
    weights = torch.linalg.lstsq(rows[0].double(), goals[0].flatten(1).double(), driver="gelsd").solution
    return mpjpe((rows[1].double() @ weights).view(-1, 16, 3), goals[1])


@pytest.mark.slow
def test_lifts_windows_better_than_a_regressor_of_frames_and_no_worse_than_plain_maps(one_thread):
    found = {}
    for name, kernels, dim in (("convolutions", (1, 3), 24), ("plain", (1,), 32)):
        torch.manual_seed(0)
        model = ConvFormer(STEPS, 16, dim, depth=2, kernels=kernels)
        found[name] = (lifted(model), size(model))
    floor = linear_regressor()
    print(found, floor)
    assert abs(found["convolutions"][1] / found["plain"][1] - 1) <= 0.1
    assert found["convolutions"][0] < 0.6 * floor
    assert found["convolutions"][0] <= found["plain"][0]
