"""LaVie (system 146): the image model at first, images beside clips, the mask it means, distances, one toy model."""

import pytest
import torch
from _squares import bouncing, found
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.models.diffusion import flow_loss, flow_sample
from chronotope.nn import PatchEmbed, Sinusoidal, TimeEmbedding, Unpatch
from chronotope.papers.spacetime.lavie import BucketBias, ImageBlock, Inflated, LaVieBlock
from chronotope.patterns import along


def lively(module, seed=0):
    """The same module with nothing at 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.double().eval()


def problem(frames=5, dim=64, text=True):
    grid = ct.Grid(t=frames, h=2, w=3)
    words = torch.randn(2, 7, 24, dtype=torch.float64), ct.Grid(n=7)
    return grid, torch.randn(2, grid.size, dim, dtype=torch.float64), words if text else None


class Diffusers(nn.Module):
    """An image block with the modules of diffusers' `BasicTransformerBlock`."""

    def __init__(self, dim, text):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1, self.attn2, self.ff = Look(dim, dim), Look(dim, text), nn.Linear(dim, dim)

    def forward(self, x, words):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), encoder_hidden_states=words)
        return x + self.ff(self.norm3(x))


class Look(nn.Module):
    def __init__(self, dim, source):
        super().__init__()
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(source, 2 * dim)

    def forward(self, x, encoder_hidden_states=None):
        k, v = self.kv(x if encoder_hidden_states is None else encoder_hidden_states).chunk(2, -1)
        return F.scaled_dot_product_attention(self.q(x), k, v)


def frame_by_frame(image, x, grid, text):
    one = grid.replace(t=1)
    frames = x.unflatten(1, (grid.sizes["t"], -1)).unbind(1)
    return torch.cat([image.feed(image.look(frame, one, text), one) for frame in frames], 1)


@pytest.mark.parametrize("kind", ["own", "diffusers"])
def test_at_first_it_is_the_image_model_on_each_frame(kind):
    grid, x, text = problem()
    image = ImageBlock(64, 2, 24) if kind == "own" else Inflated(Diffusers(64, 24))
    block = LaVieBlock(64, 2, 24, image=lively(image)).double()
    out = block(x, grid, text)
    assert (out - frame_by_frame(block.image, x, grid, text)).abs().max() < 1e-12
    if kind == "diffusers":
        frames = x.unflatten(1, (5, -1))
        plain = [block.image.block(frames[:, t], text[0]) for t in range(5)]
        assert (out.unflatten(1, (5, -1)) - torch.stack(plain, 1)).abs().max() < 1e-12
    assert (lively(block)(x, grid, text) - out).abs().max() > 0.1


def test_images_beside_a_clip_are_images():
    grid, x, _ = problem(frames=6)
    block = lively(LaVieBlock(64, 2, 24))
    words = torch.randn(2, 6 * 7, 24, dtype=torch.float64)  # a caption for each frame
    text = words, ct.Grid(t=6, n=7)
    out = block(x, grid, text, images=2)
    changed = torch.cat((torch.randn(2, 24, 64, dtype=torch.float64), x[:, 24:]), 1)
    other = torch.cat((torch.randn(2, 28, 24, dtype=torch.float64), words[:, 28:]), 1), text[1]
    assert torch.equal(block(changed, grid, other, images=2)[:, 24:], out[:, 24:])
    two, own = grid.replace(t=2), (words[:, 28:], ct.Grid(t=2, n=7))
    assert (block(x[:, 24:], two, own, images=2) - out[:, 24:]).abs().max() < 1e-12
    assert (frame_by_frame_captions(block, x[:, 24:], two, own) - out[:, 24:]).abs().max() < 1e-12
    four = words[:, :28], ct.Grid(t=4, n=7)
    assert (block(x[:, :24], grid.replace(t=4), four) - out[:, :24]).abs().max() < 1e-12
    with pytest.raises(ct.ChronotopeError, match="images=7"):
        block(x, grid, text, images=7)


def frame_by_frame_captions(block, x, grid, text):
    one, parts = grid.replace(t=1), []
    for t, frame in enumerate(x.unflatten(1, (grid.sizes["t"], -1)).unbind(1)):
        own = text[0].unflatten(1, (grid.sizes["t"], -1))[:, t], ct.Grid(n=text[1].sizes["n"])
        parts.append(block.image.feed(block.image.look(frame, one, own), one))
    return torch.cat(parts, 1)


def test_captions_of_frames_by_both_kinds_of_image_block():
    grid, x, _ = problem(frames=3)
    text = torch.randn(2, 21, 24, dtype=torch.float64), ct.Grid(t=3, n=7)
    for image in (ImageBlock(64, 2, 24), Inflated(Diffusers(64, 24))):
        block = LaVieBlock(64, 2, 24, image=lively(image)).double()
        assert (block(x, grid, text) - frame_by_frame_captions(block, x, grid, text)).abs().max() < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_time_is_dense_attention_under_its_mask(causal):
    grid, x, _ = problem(frames=9)
    time = lively(LaVieBlock(64, 2, causal=causal)).time
    q, k, v = time.project(x, grid)
    mask = ct.plan(time.where, grid).mask()
    t, place = torch.arange(grid.size) // 6, torch.arange(grid.size) % 6
    same = place[:, None] == place
    assert torch.equal(mask, same & (t[:, None] >= t) if causal else same)
    offset = t - t[:, None]
    bias = time.bias.table[time.bias.bucket(offset)].permute(2, 0, 1)
    dense = F.scaled_dot_product_attention(q, k, v, bias.masked_fill(~mask, -torch.inf)[None])
    assert (time(x, grid) - time.out(dense.transpose(1, 2).flatten(2))).abs().max() < 1e-5
    pairs = sum(ct.plan(p, grid).density for p in (along("t"), along("h", "w"))) * grid.size**2
    assert round(pairs) == 6 * 9**2 + 9 * 6**2


def test_scores_know_differences_of_time_only():
    grid, x, _ = problem(frames=6)
    time = lively(LaVieBlock(64, 2)).time
    (q, k, _), (moved, keys, _) = time.project(x, grid), time.project(x, grid, time=100)
    assert (q - moved).abs().max() > 0.1
    assert (q @ k.transpose(2, 3) - moved @ keys.transpose(2, 3)).abs().max() < 1e-5


@pytest.mark.parametrize("head", [16, 64])
def test_the_rotation_takes_32_channels_of_a_head_or_all_of_a_small_one(head):
    grid = ct.Grid(t=4, h=1, w=1)
    time = LaVieBlock(2 * head, 2).double().time
    x = torch.randn(1, 4, 2 * head, dtype=torch.float64)
    q, moved = (time.project(x, grid, time=start)[0] for start in (0, 3))
    same = (q == moved).all(2).all(1)[0]
    assert int((~same).sum()) == min(32, head)
    assert not same[: min(32, head)].any()


def test_buckets():
    bias = BucketBias(2)
    offsets = torch.arange(-60, 61)
    found = dict(zip(offsets.tolist(), bias.bucket(offsets).tolist(), strict=True))
    assert [found[-n] for n in range(8)] == list(range(8))
    assert [found[n] for n in range(1, 8)] == [16 + n for n in range(1, 8)]
    for n in range(8, 61):
        expected = min(15, 8 + int(8 * torch.log(torch.tensor(n / 8)) / torch.log(torch.tensor(4.0))))
        assert found[-n] == expected
        assert found[n] == 16 + expected
    with pytest.raises(ct.ChronotopeError, match="buckets=6"):
        BucketBias(2, buckets=6)


@pytest.mark.parametrize("frames", [1, 16, 41])
def test_the_bias_is_its_own_table_for_kernels_at_any_length(frames):
    grid = ct.Grid(t=frames, h=2, w=1)
    time = lively(LaVieBlock(32, 2)).time
    q, k, v = (torch.randn(1, 2, grid.size, 16, dtype=torch.float64) for _ in range(3))
    found = {
        name: ct.attention(q, k, v, grid=grid, where=along("t"), bias=time.bias, backend=name)
        for name in ("reference", "torch")
    }
    assert (found["reference"] - found["torch"]).abs().max() < 1e-12
    single = [x.float() for x in (q, k, v)]
    auto = ct.attention(*single, grid=grid, where=along("t"), bias=time.bias.float())
    assert (found["reference"] - auto).abs().max() < 1e-5


def test_looking_back_only_it_can_be_stepped():
    grid, x, text = problem(frames=6)
    block = lively(LaVieBlock(64, 2, 24, causal=True))
    whole, one = block(x, grid, text), grid.replace(t=1)
    state, outs = block.init_state(2, one, text), []
    for frame in x.split(6, 1):
        y, state = block.step(frame, state)
        outs.append(y)
    assert (torch.cat(outs, 1) - whole).abs().max() < 1e-12
    with pytest.raises(ct.ChronotopeError, match="causal"):
        LaVieBlock(64, 2, 24).init_state(2, one, text)
    with pytest.raises(ct.ChronotopeError, match="one text for all frames"):
        block.init_state(2, one, (text[0], ct.Grid(t=1, n=7)))
    with pytest.raises(ct.ChronotopeError, match="give context=\\(text"):
        block(x, grid)


def test_frozen_images_and_gradients_in_time():
    grid, x, text = problem()
    block = LaVieBlock(64, 2, 24, freeze=True).double()
    block(x, grid, text).square().sum().backward()
    assert all(parameter.grad is None for parameter in block.image.parameters())
    assert block.time.out.weight.grad.abs().max() > 0


class Denoiser(nn.Module):
    """Two blocks between patches and velocities; `apart`: frames are images, which no attention over time joins."""

    def __init__(self, apart, dim=64):
        super().__init__()
        self.apart = apart
        self.embed, self.leave = PatchEmbed(dim, 4), Unpatch(dim, 4)
        self.place, self.time = Sinusoidal(dim, ("h", "w")), TimeEmbedding(dim, scale=1000)
        self.blocks = nn.ModuleList(LaVieBlock(dim, 2) for _ in range(2))
        self.norm = nn.LayerNorm(dim)

    def forward(self, clips, t):
        x, grid = self.embed(clips)
        x = self.place(x, grid) + self.time(t)[:, None]
        for block in self.blocks:
            x = block(x, grid, images=grid.sizes["t"] if self.apart else 0)
        return self.leave(self.norm(x), grid)


def flow_error(apart, steps, count=64):
    """How far steps of the square in samples are from 1 place a frame on each axis; and the distance to squares."""
    torch.manual_seed(0)
    model, generator = Denoiser(apart), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        flow_loss(model, bouncing(16, 8, 16, generator, square=5), generator=generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    made = flow_sample(model, torch.randn(count, 8, 1, 16, 16, generator=generator), 20)
    places, far = found(made, square=5)
    return float((places.diff(dim=1).abs() - 1).abs().float().mean()), float(far.mean())


@pytest.mark.slow
def test_with_attention_over_time_samples_move_as_squares_do():
    """Steps of the square are 1.47 off with it and 2.87 without, after 700 steps (2026-11-21); frames are blurred."""
    (joined, sharp), (apart, _) = flow_error(False, 700), flow_error(True, 700)
    print(joined, sharp, apart)
    assert joined < 0.7 * apart, (joined, apart)
