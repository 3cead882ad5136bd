"""VDT (system 5): against an image denoiser written out, who reaches whom, the masks, counted scores, one toy model."""

import math
import sys
from pathlib import Path

import pytest
import torch
from _squares import bouncing, found
from torch.nn import functional as F

import chronotope as ct
from chronotope.models.diffusion import ddpm_loss, flow_loss, flow_sample, linear_alphas
from chronotope.papers.spacetime.vdt import VDT, SpaceTimeMask, VDTBlock
from chronotope.papers.spacetime.vdt_masks import KINDS, TEMPORAL
from chronotope.patterns import along

sys.path.insert(0, str(Path(__file__).parents[1] / "pattern"))
from _meter import Meter


def lively(model, seed=0):
    """The same model with nothing at 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


def small(**more):
    return VDT(**{"channels": 2, "patch": 2, "dim": 16, "depth": 2, "heads": 2, "classes": 3} | more)


def attend(x, layer):
    """Full attention of x [B, N, C] in plain torch."""
    q, k, v = (
        part.unflatten(2, (layer.heads, -1)).transpose(1, 2)
        for part in F.linear(x, layer.qkv.weight, layer.qkv.bias).chunk(3, -1)
    )
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(-1)
    return F.linear((weights @ v).transpose(1, 2).flatten(2), layer.out.weight, layer.out.bias)


def dit(model, frame, t, label, moment):
    """The image denoiser with the weights of `model`, on frames [B, C, H, W], `moment` [C] being added to tokens."""
    patch = model.embed.patch[1]
    tokens = F.unfold(frame, patch, stride=patch).transpose(1, 2)
    h, w = frame.shape[2] // patch, frame.shape[3] // patch
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    dim = model.embed.project.out_features
    speed = 10000.0 ** (-torch.arange(dim // 4).double() / (dim // 4))
    waves = [torch.stack(((p.flatten()[:, None] * speed).sin(), (p.flatten()[:, None] * speed).cos()), -1).flatten(1)
             for p in (rows, columns)]  # fmt: skip
    x = model.embed.project(tokens) + torch.cat(waves, 1) + moment
    c = F.silu(model.time(t) + model.label.table(label))[:, None]
    for block in model.blocks:
        for steer, layer in zip(block.steer, (lambda y, b=block: attend(y, b.space), block.mlp), strict=True):
            shift, scale, gate = steer.modulation(c).chunk(3, -1)
            x = x + gate * layer(F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale) + shift)
    shift, scale = model.last.modulation(c).chunk(2, -1)
    x = model.leave.project(F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale) + shift)
    return F.fold(x.transpose(1, 2), frame.shape[2:], patch, stride=patch)


def test_it_begins_with_zero():
    model = small()
    out = model(torch.randn(2, 5, 2, 4, 6), torch.rand(2), label=torch.tensor([0, 2]))
    assert out.shape == (2, 5, 2, 4, 6)
    assert not out.any()


@pytest.mark.parametrize("order", ["ts", "st"])
def test_without_attention_over_time_it_is_the_image_denoiser_on_each_frame(order):
    model = lively(small(order=order))
    for block in model.blocks:
        torch.nn.init.zeros_(block.join.weight)
        torch.nn.init.zeros_(block.join.bias)
    clips, t, label = torch.randn(2, 5, 2, 4, 6).double(), torch.tensor([3.0, 700.0]).double(), torch.tensor([2, 0])
    out, worst = model(clips, t, label=label), 0.0
    moments = model.moment(torch.zeros(1, 5, 16).double(), ct.Grid(t=5))[0]
    for frame in range(5):
        gap = (out[:, frame] - dit(model, clips[:, frame], t, label, moments[frame])).detach()
        worst = max(worst, float(gap.abs().max()))
    assert worst < min(1e-6, 1e-12 * float(out.detach().abs().max()))


def test_one_frame_is_an_image():
    model = lively(small())
    clips, t, label = torch.randn(2, 1, 2, 4, 6).double(), torch.rand(2).double(), torch.tensor([1, 1])
    expected = dit(model, clips[:, 0], t, label, torch.zeros(16).double())
    out = model(clips, t, label=label)
    assert (out[:, 0] - expected).abs().max() < 1e-12 * expected.abs().max()


def reach(layer, grid):
    """[N, N]: whether a token of the output depends on one of the input."""
    x = torch.randn(1, grid.size, 16, dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(lambda x: layer(x).sum(-1)[0], x)
    return slopes[:, 0].abs().amax(-1) > 0


@pytest.mark.parametrize("order", ["ts", "st"])
def test_one_block_sees_all_of_the_clip_and_one_attention_does_not(order):
    grid, block = ct.Grid(t=3, h=2, w=3), lively(VDTBlock(16, 2, order))
    condition = torch.randn(1, 16).double()
    assert reach(lambda x: block(x, grid, condition), grid).all()
    t, h, w = grid.coords().T
    place = h * 3 + w
    assert torch.equal(reach(lambda x: block.time(x, grid), grid), place[:, None] == place)
    assert torch.equal(reach(lambda x: block.space(x, grid), grid), t[:, None] == t)


def test_frames_may_be_of_any_number_and_have_conditions_of_their_own():
    block, grid = lively(VDTBlock(16, 2)), ct.Grid(t=4, h=2, w=2)
    x, c = torch.randn(2, 16, 16).double(), torch.randn(2, 16).double()
    assert torch.allclose(block(x, grid, c), block(x, grid, c[:, None].expand(2, 4, 16)))
    with pytest.raises(ct.ChronotopeError, match="cannot be stepped"):
        block.init_state(1, grid.replace(t=1))
    with pytest.raises(ct.ChronotopeError, match="give context=condition"):
        block(x, grid)
    with pytest.raises(ct.ChronotopeError, match="order='tt'"):
        VDTBlock(16, 2, "tt")


def test_what_is_known_enters_clean_and_has_no_loss():
    model, grid = lively(small()), ct.Grid(t=5, h=4, w=6)
    clips = torch.randn(3, 5, 2, 4, 6).double()
    mask = SpaceTimeMask(grid, given=2)(3, generator=torch.Generator().manual_seed(0))
    noisy, t = torch.randn_like(clips), torch.rand(3).double()
    entered = []
    model.embed.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    out = model(noisy, t, clips, mask)
    wide = mask[:, :, None].expand_as(clips)
    assert torch.equal(entered[0][~wide], clips[~wide])
    assert torch.equal(entered[0][wide], noisy[wide])
    assert torch.equal(model(torch.where(wide, noisy, 7.0), t, clips, mask), out)
    said = []

    def kept(x, t):
        said.append(model(x, t, clips, mask))
        said[-1].retain_grad()
        return said[-1]

    ddpm_loss(kept, clips, linear_alphas(), mask=mask[:, :, None]).backward()
    assert torch.equal(said[0].grad != 0, wide)
    with pytest.raises(ct.ChronotopeError, match="clean and mask together"):
        model(noisy, t, clips)


def test_masks_of_each_kind():
    grid = ct.Grid(t=16, h=10, w=10)
    sample, generator = SpaceTimeMask(grid), torch.Generator().manual_seed(0)
    drawn = {kind: sample(300, kind, generator) for kind in KINDS}
    for kind in TEMPORAL:
        flat = drawn[kind].flatten(2)
        assert (flat == flat[..., :1]).all(), kind
    frames = {kind: mask[:, :, 0, 0].int() for kind, mask in drawn.items()}
    assert (frames["predict"] == torch.tensor([0] * 8 + [1] * 8)).all()
    assert (frames["backward"] == torch.tensor([1] * 8 + [0] * 8)).all()
    assert (frames["interpolate"] == torch.tensor([0, 1, 1, 1] * 4)).all()
    assert (frames["unconditional"] == 1).all()
    assert (frames["one"].sum(1) == 15).all()
    assert frames["one"].float().mean(0).max() < 1  # every frame is the one that is given, now and then
    assert abs(float(frames["random"].float().mean()) - 0.8) < 0.03
    lengths, covered = set(), []
    for mask in drawn["space"]:
        some = mask.flatten(1).any(1)
        first, last = int(some.int().argmax()), 15 - int(some.flip(0).int().argmax())
        assert (mask[first : last + 1] == mask[first]).all()
        lengths.add((first, 15 - last))
        covered.append(float(mask[first].float().mean()))
    assert lengths == {(a, b) for a in range(4) for b in range(4)}
    assert max(covered) <= 0.5
    assert sum(covered) / 300 > 0.35


def test_kinds_are_drawn_as_told():
    grid, generator = ct.Grid(t=16, h=4, w=4), torch.Generator().manual_seed(0)
    sample = SpaceTimeMask(grid)
    kinds = [sample._kind(generator) for _ in range(6000)]
    assert abs(kinds.count("space") / 6000 - 0.2) < 0.02
    assert all(abs(kinds.count(kind) / 6000 - 0.8 / 6) < 0.02 for kind in TEMPORAL)
    assert sample(5, generator=generator).shape == (5, 16, 4, 4)
    with pytest.raises(ct.ChronotopeError, match="fewer frames given"):
        SpaceTimeMask(ct.Grid(t=8, h=4, w=4))
    with pytest.raises(ct.ChronotopeError, match="no block"):
        SpaceTimeMask(ct.Grid(t=16, h=2, w=2))
    with pytest.raises(ct.ChronotopeError, match="axes t, h, w"):
        SpaceTimeMask(ct.Grid(n=16))
    with pytest.raises(ct.ChronotopeError, match="kind='none'"):
        sample(1, "none")


@pytest.mark.usefixtures("torch_operators")
def test_scores_counted():
    """T N^2 + N T^2 of them for each head, and not (T N)^2."""
    frames, places = 36, 42  # blocks of more pairs than those for which scores are written out, uncounted
    grid, block = ct.Grid(t=frames, h=6, w=7), VDTBlock(16, 2)
    with Meter() as meter, torch.no_grad():
        block(torch.randn(1, grid.size, 16), grid, torch.randn(1, 16))
    assert meter.scores == 2 * (frames * places**2 + places * frames**2)
    assert meter.scores < 2 * (frames * places) ** 2 / 15
    pairs = sum(ct.plan(along(*axes), grid).density for axes in (("t",), ("h", "w"))) * grid.size**2
    assert round(pairs) == frames * places**2 + places * frames**2


def taught(steps):
    """One small model for all masks, of latents 8 x 8: 8 frames, 4 given where frames are given."""
    torch.manual_seed(0)
    model, generator = VDT(channels=1, patch=2, dim=64, depth=4, heads=4), torch.Generator().manual_seed(1)
    masks = SpaceTimeMask(ct.Grid(t=8, h=8, w=8), given=4)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        clips, mask = bouncing(16, 8, 8, generator), masks(16, generator=generator)[:, :, None]
        optimizer.zero_grad()
        flow_loss(lambda x, t: model(x, 1000 * t), clips, mask=mask, generator=generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), masks, generator


@pytest.mark.slow
def test_one_model_predicts_interpolates_and_makes_up():
    """Errors after 800 steps, and of the last frame known: predicting 0.084 and 0.885, interpolating 0.41 and 0.85; of
    moves between frames made from nothing a third is one of a square's (2026-11-21).

    By flow matching: after 1200 steps of DDPM's loss, which hardly asks for anything where clips are nearly noise,
    errors of predictions were still above those of the last frame (0.83 and 0.66, with squares of which some rest).
    """
    model, masks, generator = taught(800)
    clips, errors = bouncing(64, 8, 8, generator), {}
    for kind in ("predict", "interpolate", "unconditional"):
        mask = masks(64, kind, generator)[:, :, None]
        noise = torch.randn(clips.shape, generator=generator)
        made = flow_sample(lambda x, t: model(x, 1000 * t), noise, 20, known=clips, mask=mask)
        last = clips.clone()
        for frame in range(1, 8):
            last[:, frame] = torch.where(mask[:, frame], last[:, frame - 1], clips[:, frame])
        asked = mask.expand_as(clips)
        places, far = found(made)
        errors[kind] = {
            "model": float((made - clips)[asked].square().mean()),
            "last": float((last - clips)[asked].square().mean()),
            "far": float(far.mean()),
            "moves": float((places.diff(dim=1).abs() == 1).all(-1).float().mean()),
        }
    print(errors)
    assert errors["predict"]["model"] < 0.5 * errors["predict"]["last"], errors
    assert errors["interpolate"]["model"] < errors["interpolate"]["last"], errors
    blurred = float(found(bouncing(500, 8, 8, generator).mean((0, 1))[None, None])[1])
    assert errors["unconditional"]["far"] < 0.5 * blurred, (errors, blurred)
