"""ColorMNet (system 19): its memory's reads and policy, its local attention, and colours after a long occlusion.

Against the released code at commit c88a5ee (torch 2.13 on a CPU, float32, the same weights and inputs): the local
attention (`LocalGatedPropagation`, its correlation sampler written out) differs by at most 1.2e-7 on four maps; reads
of `MemoryManager` over 60 frames of 80 elements, with consolidation into 128 prototypes and a cap of 500, by 3.0e-7.
"""

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.memory.colormnet import ColorMNet, LocalFrameAttention, local_attention
from chronotope.papers.memory.colormnet_memory import FeatureMemory, key_features, query_features


def frame(generator, tokens=12, key=8, value=5, batch=2):
    """Key, shrinkage, value and selection of a frame."""
    k, v, s, e = (torch.randn(batch, tokens, n, generator=generator) for n in (key, value, 1, key))
    return k, s[..., 0].square() + 1, v, e.sigmoid()


def question(generator, tokens=12, key=8, batch=2):
    q, e = (torch.randn(batch, tokens, key, generator=generator) for _ in range(2))
    return q, e.sigmoid()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def filled(memory, frames, seed=0, reads=1, **sizes):
    """The state after some frames, each followed by reads."""
    generator = seeded(seed)
    first = frame(generator, **sizes)
    state = memory.init_state(len(first[0]), first[0].shape[1], first[0].shape[2], first[2].shape[2])
    for _ in range(frames):
        state = memory.write(state, *frame(generator, **sizes))
        for _ in range(reads):
            asked = {name: n for name, n in sizes.items() if name != "value"}
            _, state = memory.read(state, *question(generator, **asked))
    return state


# (1) and (2): similarity and reading


def similarity(q, e, k, s):
    """The definition."""
    return -s[:, None] * (e[:, :, None] * (k[:, None] - q[:, :, None]).square()).sum(-1) / math.sqrt(q.shape[-1])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 64), st.integers(0, 10**6))
def test_features_give_the_weighted_squared_distance(channels, seed):
    generator = seeded(seed)
    k, s, _, _ = frame(generator, 30, channels)
    q, e = question(generator, 20, channels)
    found = query_features(q, e) @ key_features(k, s).mT
    assert (found - similarity(q, e, k, s)).abs().max() < 1e-4


def test_reading_all_is_a_softmax():
    generator = seeded(0)
    parts, asked = frame(generator, 40), question(generator, 12)
    expected = similarity(*asked, *parts[:2]).softmax(-1)
    for top_k in (None, 40, 1000):
        memory = FeatureMemory(top_k=top_k)
        state = memory.write(memory.init_state(2, 40, 8, 5), *parts)
        out, after = memory.read(state, *asked)
        assert (out - expected @ parts[2]).abs().max() < 1e-5
        assert (after.work.use - expected.sum(1)).abs().max() < 1e-4
        assert (after.work.life == 1).all()
        assert (state.work.use == 0).all(), "the state given is left as it was"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.booleans(), st.integers(0, 10**6))
def test_order_does_not_matter_and_few_are_read(top_k, blocks, seed):
    generator = seeded(seed)
    parts, asked = frame(generator, 40), question(generator, 12)
    order = torch.randperm(40, generator=generator)
    memory = FeatureMemory(top_k=top_k)
    empty = memory.init_state(2, 40, 8, 5)
    with pytest.MonkeyPatch.context() as patch:
        if blocks:  # one query at a time
            patch.setattr("chronotope.papers.memory.colormnet_memory.BLOCK", 1)
        one, used = memory.read(memory.write(empty, *parts), *asked)
        other, used_too = memory.read(memory.write(empty, *(x[:, order] for x in parts)), *asked)
    assert (one - other).abs().max() < 1e-5
    assert (used.work.use[:, order] - used_too.work.use).abs().max() < 1e-5
    scores = similarity(*asked, *parts[:2])
    kept = scores >= scores.topk(min(top_k, 40)).values[..., -1:]
    expected = scores.masked_fill(~kept, -torch.inf).softmax(-1) @ parts[2]
    assert (one - expected).abs().max() < 1e-5
    assert used.work.use.sum(1).allclose(torch.tensor(12.0))


def test_gradients_reach_everything_that_is_read():
    generator = seeded(0)
    for top_k in (None, 7):
        memory = FeatureMemory(top_k=top_k)
        parts = [x.requires_grad_() for x in (*frame(generator), *question(generator))]
        k, s, v, e, q, select = parts
        out, after = memory.read(memory.write(memory.init_state(2, 12, 8, 5), k, s, v, e), q, select)
        grads = torch.autograd.grad(out.square().sum(), (k, s, v, q, select))
        assert all(grad.abs().sum() > 0 for grad in grads)
        assert not after.work.use.requires_grad


# (3) local attention


@pytest.mark.parametrize(("h", "w"), [(20, 24), (17, 9), (15, 15), (5, 4), (1, 30)])
@pytest.mark.parametrize("radius", [7, 2])
def test_local_attention_is_masked_attention_with_a_bias(h, w, radius):
    generator, size = seeded(h * w), 2 * radius + 1
    q, k = (torch.randn(2, 3, h, w, 16, generator=generator) for _ in range(2))
    v = torch.randn(2, 3, h, w, 6, generator=generator)
    bias = torch.randn(2, 3, h, w, size * size, generator=generator)
    place = ct.Grid(h=h, w=w).coords()
    apart = place[None] - place[:, None]
    seen = (apart.abs() <= radius).all(-1)
    offset = ((apart[..., 0] + radius) * size + apart[..., 1] + radius).clamp(0, size * size - 1)
    for given_bias in (None, bias):
        mask = torch.zeros(2, 3, h * w, h * w)
        if given_bias is not None:
            mask = given_bias.flatten(2, 3).gather(3, offset.expand(2, 3, -1, -1))
        dense = F.scaled_dot_product_attention(
            *(x.flatten(2, 3) for x in (q, k, v)), attn_mask=mask.masked_fill(~seen, -torch.inf)
        )
        found = local_attention(q, k, v, given_bias, radius)
        assert (found.flatten(2, 3) - dense).abs().max() < 1e-5


def test_the_layer_sees_no_further_and_learns_its_bias():
    torch.manual_seed(0)
    layer = LocalFrameAttention(8, 12, radius=3, heads=2)
    q, k, v = (torch.randn(1, n, 14, 13, requires_grad=True) for n in (8, 8, 12))
    out = layer(q, k, v)
    assert out.shape == v.shape
    grad = torch.autograd.grad(out[0, :, 6, 6].square().sum(), (k, v, layer.bias.weight))
    reach = torch.arange(14)[:, None].expand(14, 13), torch.arange(13).expand(14, 13)
    inside = ((reach[0] - 6).abs() <= 5) & ((reach[1] - 6).abs() <= 5)  # 3, and 2 by the convolution
    for x in grad[:2]:
        assert (x[0].abs().sum(0) > 0).equal(inside)
    assert grad[2].abs().sum() > 0
    with pytest.raises(ct.ChronotopeError, match="radius=3 49"):
        local_attention(torch.zeros(1, 1, 4, 4, 2), *[torch.zeros(1, 1, 4, 4, 2)] * 2, torch.zeros(1, 1, 4, 4, 9), 3)


# (4) sizes


def test_the_memory_stays_within_its_bounds():
    memory = FeatureMemory(prototypes=10, cap=64, every=1)
    state, generator = memory.init_state(1, 12, 8, 5), seeded(0)
    works, longs, spent = [], [], []
    for _ in range(500):
        parts, asked = frame(generator, batch=1), question(generator, batch=1)
        start = time.process_time()
        state = memory.write(state, *parts)
        _, state = memory.read(state, *asked)
        spent.append(time.process_time() - start)
        works.append(state.work.size)
        longs.append(state.long.size)
    assert max(longs) <= 64
    assert max(works) == 9 * 12
    assert min(works[20:]) == 5 * 12
    assert longs[-1] > 64 - 10
    assert memory.write(state, *parts).nbytes <= (64 + 10 * 12) * (2 * 8 + 5 + 3) * 4
    # Frame 0 is never consolidated, and the latest frames are there.
    assert torch.equal(state.work.key[:, :12], frame(seeded(0), batch=1)[0])


@pytest.mark.slow
def test_steps_cost_the_same_after_500_frames(one_thread):
    """Last 100 steps over the first 100 after the memory is full: found 0.93, 1.3 allowed."""
    memory = FeatureMemory(every=1, cap=1024)
    generator, spent = seeded(0), []
    state = memory.init_state(1, 144, 64, 128)
    with torch.no_grad():
        for _ in range(500):
            parts, asked = frame(generator, 144, 64, 128, 1), question(generator, 144, 64, 1)
            start = time.process_time()
            state = memory.write(state, *parts)
            _, state = memory.read(state, *asked)
            spent.append(time.process_time() - start)
            assert state.long.size + state.work.size <= 1024 + 10 * 144
    # The long-term store is full after 8 consolidations of 5 frames each.
    ratio = np.median(spent[-100:]) / np.median(spent[60:160])
    assert ratio <= 1.3, ratio


# (5) consolidation


def test_consolidation_keeps_the_most_used():
    memory = FeatureMemory(top_k=4, prototypes=6, cap=12, min_frames=2, max_frames=4)
    state, generator = memory.init_state(1, 12, 8, 5), seeded(0)
    frames = [frame(generator, batch=1) for _ in range(4)]
    for parts in frames[:3]:
        state = memory.write(state, *parts)
    for _ in range(3):
        _, state = memory.read(state, *question(generator, batch=1))
    used = state.work.usage[0, 12:]  # of frames 1 and 2, which go
    after = memory.write(state, *frames[3])
    assert after.work.size == 24
    assert torch.equal(after.work.key, torch.cat((frames[0][0], frames[3][0]), 1))
    expected = used.topk(6).indices.sort().values
    assert used[expected].min() > used[[i for i in range(24) if i not in expected]].max()
    assert torch.equal(after.long.key, torch.cat((frames[1][0], frames[2][0]), 1)[:, expected])
    # Values and shrinkages are averaged by similarity to the kept keys.
    k, s, v, e = (torch.cat(parts, 1) for parts in zip(*frames[1:3], strict=True))
    weight = similarity(k[:, expected], e[:, expected], k, s).softmax(-1)
    assert (after.long.value - weight @ v).abs().max() < 1e-5
    assert (after.long.shrink - (weight @ s[..., None])[..., 0]).abs().max() < 1e-4
    assert (after.long.use == 0).all()


def test_a_full_store_drops_the_least_used():
    memory = FeatureMemory(top_k=2, prototypes=6, cap=15, min_frames=2, max_frames=4)
    state = filled(memory, 14, reads=2, batch=1)
    assert state.long.size == 15
    # The next frame consolidates: 9 of the 15 stay, the most used ones, in their order.
    while state.work.size + 12 < 4 * 12:
        state = memory.write(state, *frame(seeded(5), batch=1))
    use = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9.0])[None]
    state = dataclasses.replace(state, long=dataclasses.replace(state.long, use=use, life=torch.ones(1, 15)))
    after = memory.write(state, *frame(seeded(6), batch=1))
    kept = [4, 5, 7, 8, 10, 11, 12, 13, 14]
    assert torch.equal(after.long.key[:, :9], state.long.key[:, kept])
    assert after.long.size == 15


def test_reading_after_consolidation_on_clustered_features():
    """Keys in 20 clusters with a value each, 288 elements of which 64 stay: found 2.5 % off, 10 % allowed."""
    generator = seeded(0)
    centres, values = 2 * torch.randn(20, 16, generator=generator), torch.randn(20, 5, generator=generator)
    memory = FeatureMemory(min_frames=2, max_frames=10, prototypes=64)
    keeps = FeatureMemory(min_frames=2, max_frames=100)

    def clustered(tokens):
        cluster = torch.randint(20, (1, tokens), generator=generator)
        noise = 0.1 * torch.randn(1, tokens, 16, generator=generator)
        return cluster, centres[cluster] + noise, torch.ones(1, tokens, 16)

    short, whole = (one.init_state(1, 36, 16, 5) for one in (memory, keeps))
    for _ in range(10):
        cluster, key, e = clustered(36)
        value = values[cluster] + 0.1 * torch.randn(1, 36, 5, generator=generator)
        parts = (key, torch.ones(1, 36), value, e)
        short, whole = memory.write(short, *parts), keeps.write(whole, *parts)
        _, asked, select = clustered(100)
        _, short = memory.read(short, asked, select)
    assert short.long.size == 64
    assert short.work.size == 72
    _, asked, select = clustered(500)
    found, expected = memory.read(short, asked, select)[0], keeps.read(whole, asked, select)[0]
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= 0.1, error


# states


def test_states_move_and_come_back():
    memory = FeatureMemory(prototypes=10, cap=64)
    state = filled(memory, 30, batch=3)
    asked = question(seeded(9), batch=3)
    out, _ = memory.read(state, *asked)
    order = torch.tensor([2, 0])
    some, _ = memory.read(state.select(order), *(x[order] for x in asked))
    assert (some - out[order]).abs().max() < 1e-6
    assert torch.equal(memory.read(state.from_dict(state.to_dict()), *asked)[0], out)


def model(memory=None, seed=0, key_dim=16, value_dim=32):
    torch.manual_seed(seed)
    encoder = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 4, stride=2, padding=1), nn.ReLU()
    )
    return ColorMNet(encoder, 32, key_dim, value_dim, 8, memory=memory)


def test_a_video_is_its_steps_and_frames_are_stored_on_time():
    net = model(FeatureMemory(every=3, min_frames=2, max_frames=4, prototypes=8))
    grey, ab = torch.rand(2, 14, 1, 12, 16, generator=seeded(0)), torch.rand(2, 2, 12, 16, generator=seeded(1))
    whole = net(grey, ab)
    assert whole.shape == (2, 14, 2, 12, 16)
    assert torch.equal(whole[:, 0], ab)
    assert whole.abs().max() <= 1
    state, sizes = net.begin(grey[:, 0], ab), []
    for t in range(1, 14):
        before = [x.clone() for x in state.tensors()]
        colours, after = net.step(grey[:, t], state)
        assert all(torch.equal(x, y) for x, y in zip(before, state.tensors(), strict=True))
        assert torch.equal(colours, whole[:, t])
        state = after
        sizes.append((state.since, state.memory.work.size // 48, state.memory.long.size))
    assert [since for since, _, _ in sizes] == [1, 2, 0] * 4 + [1]
    assert [work for _, work, _ in sizes] == [1, 1, 2, 2, 2, 3, 3, 3, 2, 2, 2, 3, 3]
    assert [long for _, _, long in sizes] == [0] * 8 + [8] * 5
    net.memory = dataclasses.replace(net.memory, top_k=None)
    net(grey[:, :8], ab).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    with pytest.raises(ct.ChronotopeError, match="min_frames < max_frames"):
        FeatureMemory(min_frames=5, max_frames=5)
    with pytest.raises(ct.ChronotopeError, match="nothing to read"):
        net.memory.read(net.memory.init_state(1, 4, 8, 5), *question(seeded(0), 4, 8, 1))


# (6) colours after an occlusion


def videos(batch, visible, hidden, generator, size=16, shapes=3):
    """Moving discs of random grey and colour, behind a curtain between two visible parts.

    grey [B, T, 1, size, size], ab [B, T, 2, size, size], T = sum(visible) + hidden.
    """
    frames = sum(visible) + hidden
    radius = 3 + 2 * torch.rand(batch, shapes, 1, generator=generator)
    level = 0.4 + 0.2 * torch.rand(batch, shapes, generator=generator).argsort(1)
    level = level + 0.1 * torch.rand(batch, shapes, generator=generator)
    colour = 1.8 * torch.rand(batch, shapes, 2, generator=generator) - 0.9
    speed = 2 * torch.rand(batch, shapes, 1, 2, generator=generator) - 1
    start = size * torch.rand(batch, shapes, 1, 2, generator=generator)
    # A triangle wave: discs bounce.
    path = start + speed * torch.arange(frames)[:, None]
    path = (size - 1) - (path.remainder(2 * (size - 1)) - (size - 1)).abs()
    ruler = torch.arange(size)
    far = (ruler[:, None] - path[..., :1, None]).square() + (ruler - path[..., 1:, None]).square()
    inside = far <= radius[..., None, None] ** 2  # [B, shapes, T, size, size]
    grey, ab = torch.full((batch, frames, size, size), 0.2), torch.zeros(batch, frames, 2, size, size)
    for i in range(shapes):
        grey = torch.where(inside[:, i], level[:, i, None, None, None], grey)
        ab = torch.where(inside[:, i, :, None], colour[:, i, None, :, None, None], ab)
    grey[:, visible[0] : visible[0] + hidden] = 0.0
    ab[:, visible[0] : visible[0] + hidden] = 0.0
    grey = grey + 0.01 * torch.randn(grey.shape, generator=generator)
    return grey[:, :, None], ab


def copied(grey, ab, match):
    """Every frame with the colours of the one before: of the same place, or of the same grey within 15 x 15."""
    out = [ab]
    for before, now in itertools.pairwise(grey.movedim(2, -1).unbind(1)):
        # The logits are -(now - before)^2, up to what is the same for all keys, times 3000 / sqrt(2).
        q = 3000 * torch.cat((2 * now, -torch.ones_like(now)), -1)[:, None]
        k, v = torch.cat((before, before * before), -1)[:, None], out[-1].movedim(1, -1)[:, None]
        out.append(local_attention(q, k, v)[:, 0].movedim(-1, 1) if match else out[-1])
    return torch.stack(out, 1)


def psnr(found, expected):
    return (10 * torch.log10(4 / (found - expected).square().mean())).item()


def trained(steps, seed=0, clips=8):
    net = model(FeatureMemory(top_k=None, every=1), seed)
    generator = seeded(seed + 1)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        grey, ab = videos(clips, (1, 2), 1, generator)
        loss = (net(grey, ab[:, 0]) - ab)[:, 1:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net


@pytest.mark.slow
def test_colours_come_back_after_fifty_hidden_frames():
    # Trained on clips of 4 frames, one of them hidden, with all frames stored and read whole; tested with the defaults.
    # found: 24.4 dB; copying 13.3 dB, copying from the same grey nearby 16.0 dB, which has lost all colours
    net = trained(1000)
    net.memory = FeatureMemory()
    visible, hidden = (15, 15), 50
    grey, ab = videos(16, visible, hidden, seeded(99))
    after = slice(visible[0] + hidden, None)
    with torch.no_grad():
        found = net(grey, ab[:, 0])
        baselines = [psnr(copied(grey, ab[:, 0], match)[:, after], ab[:, after]) for match in (False, True)]
    ours = psnr(found[:, after], ab[:, after])
    assert ours >= max(baselines) + 3, (ours, baselines)
