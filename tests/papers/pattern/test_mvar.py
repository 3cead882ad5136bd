"""MVAR: levels do not interact, the dense limit, sampling without hidden state, counted scores, memory, likelihood."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.pattern.mvar import LevelAttention, ScaleMarkovAR, nearest, resize

PUBLISHED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def model_and_item(levels=(1, 2, 3, 5, 8), window=3, batch=3, classes=4):
    """A model with weights that matter, and random tokens with the states that they add up to."""
    torch.manual_seed(0)
    model = ScaleMarkovAR(torch.randn(6, 2), levels, window, dim=16, heads=2, classes=classes).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    tokens = [torch.randint(6, (batch, side * side)) for side in levels]
    states = []
    for level, token in enumerate(tokens):
        states.append(model.add(states[-1] if states else None, token, level))
    return model, tokens, states, torch.randint(classes, (batch,))


def before(states):
    return [None, *states[:-1]]


def test_levels_in_one_batch_equal_separate_runs():
    model, tokens, states, label = model_and_item()
    together = model.loss(tokens, states, label)
    mine = torch.autograd.grad(together, list(model.parameters()))
    apart = [model.loss(tokens, states, label, [level]) for level in range(len(model.levels))]
    torch.testing.assert_close(torch.stack(apart).sum(), together, atol=1e-10, rtol=0)
    parts = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in apart]
    for i, whole in enumerate(mine):
        torch.testing.assert_close(sum(g[i] for g in parts if g[i] is not None), whole, atol=1e-9, rtol=0)
    some = model(before(states)[1:4:2], label, [1, 3])
    for level, logits in zip([1, 3], some, strict=True):
        torch.testing.assert_close(logits, model(before(states), label)[level], atol=1e-12, rtol=0)


def test_window_over_the_map_is_the_block_mask_of_the_previous_scale():
    """All levels in one sequence, dense, a token seeing those of its own level, whose inputs are the scale before."""
    model, _, states, label = model_and_item(window=9)
    sides = model.levels
    level = torch.tensor([n for n, side in enumerate(sides) for _ in range(side * side)])
    mask = level[:, None] == level

    def dense(self, q, k, v, sides):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    expected = model(before(states), label)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LevelAttention, "attend", dense)
        for a, b in zip(expected, model(before(states), label), strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("side", "size"), [(8, 3), (7, 5), (5, 7), (6, 7), (1, 3)])
def test_neighbours_at_borders_move_inside(side, size):
    """On each axis the window starts at clip(x - size // 2, 0, side - size) and holds min(size, side) places."""
    mask = ct.plan(nearest(side, size), ct.Grid(h=side, w=side)).mask()
    held = min(size, side)
    start = (torch.arange(side) - held // 2).clamp(0, side - held)
    place = torch.arange(side)
    axis = (place >= start[:, None]) & (place < start[:, None] + held)
    expected = axis[:, None, :, None] & axis[None, :, None, :]
    assert torch.equal(mask, expected.reshape(side * side, side * side))
    assert mask.sum(1).eq(min(size * size, side * side)).all()


def test_attention_equals_a_loop_over_neighbours():
    torch.manual_seed(0)
    attend = LevelAttention(8, 2, 3).double()
    q, k, v = torch.randn(3, 1, 2, 25, 4, dtype=torch.float64)
    out = attend.attend(q, k, v, [5])
    for i in range(25):
        top, left = (max(0, min(x - 1, 2)) for x in divmod(i, 5))
        near = [y * 5 + x for y in range(top, top + 3) for x in range(left, left + 3)]
        share = (q[:, :, i, None] * k[:, :, near] / 2).sum(-1).softmax(-1)
        torch.testing.assert_close(out[:, :, i], (share[..., None] * v[:, :, near]).sum(2), atol=1e-12, rtol=0)


def test_sampling_a_level_needs_only_the_state_before_it():
    model, _, _, label = model_and_item()
    states = model.sample(label, seed=5)
    assert [state.shape[1] for state in states] == [side * side for side in model.levels]
    for level, state in enumerate(states):
        fresh = model_and_item()[0]
        again = fresh.sample_level(level, states[level - 1].clone() if level else None, label, seed=5)
        assert torch.equal(again, state)
    assert not torch.equal(model.sample(label, seed=6)[-1], states[-1])


def test_a_level_does_not_see_earlier_ones():
    model, _, states, label = model_and_item()
    states = [state.requires_grad_() for state in states]
    logits = model(before(states), label)[3]
    reached = torch.autograd.grad(logits.square().sum(), states, allow_unused=True)
    assert [g is not None and bool(g.abs().sum() > 0) for g in reached] == [False, False, True, False, False]


def test_counted_scores():
    counts = [side * side for side in PUBLISHED]
    plans = [ct.plan(nearest(side, 7), ct.Grid(h=side, w=side)) for side in PUBLISHED]
    visible = round(sum(p.density * p.pairs for p in plans))
    assert visible == sum(n * min(49, n) for n in counts) == 31136
    assert sum(counts) == 680 and visible / sum(counts) ** 2 < 0.1


def test_errors_say_what_to_do():
    model, _, _, label = model_and_item()
    with pytest.raises(ct.ChronotopeError, match="level 2 needs the state of the level before it"):
        model([None], label, [2])
    with pytest.raises(ct.ChronotopeError, match="1 states for 5 levels"):
        model([None], label)
    with pytest.raises(ct.ChronotopeError, match="must be a multiple of heads=3"):
        ScaleMarkovAR(torch.zeros(2, 2), heads=3)


PEAK = """
import sys, torch
from chronotope.papers.pattern.mvar import ScaleMarkovAR
torch.manual_seed(0)
levels = [int(n) for n in sys.argv[1].split(",")]
model = ScaleMarkovAR(torch.randn(16, 4), dim=128, depth=4, window=7)
tokens = [torch.randint(16, (8, side * side)) for side in model.levels]
states = [model.codebook[token] for token in tokens]
def high():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
model.loss(tokens, states, torch.zeros(8, dtype=torch.int64), [0]).backward()
start = high()
model.loss(tokens, states, torch.zeros(8, dtype=torch.int64), levels).backward()
print(high() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_memory_of_one_level_is_half_of_all():
    """Growth of the process' peak memory by one training step: the largest level of all against all levels."""

    def peak(levels):
        command = [sys.executable, "-c", PEAK, ",".join(map(str, levels))]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    one, every = peak([9]), peak(range(10))
    print(f"peak memory of a step: largest level {one:.0f} MiB, all levels {every:.0f} MiB")
    assert every > 50
    assert one <= 0.5 * every


def pyramids(count, levels, codebook, seed):
    """Binary 16 x 16 disks, boxes and rings; per level the residual of the shrunk picture, rounded to the codebook."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (count,), generator=g)
    u = torch.rand(count, 3, generator=g)
    radius = 2.5 + 3.5 * u[:, 0]
    centre = radius[:, None] + u[:, 1:] * (15 - 2 * radius[:, None])
    place = torch.arange(16.0)
    y, x = place[None, :, None] - centre[:, 0, None, None], place[None, None, :] - centre[:, 1, None, None]
    disk = (x * x + y * y).sqrt() / radius[:, None, None]
    box = torch.maximum(x.abs(), y.abs()) / radius[:, None, None]
    picture = torch.where(
        (label == 1)[:, None, None], box < 0.9, (disk < 1) & ((label == 0)[:, None, None] | (disk > 0.5))
    )
    flat, tokens, states = picture.float().flatten(1)[..., None], [], []
    for side in levels:
        target = resize(flat, side)
        up = resize(states[-1], side) if states else torch.zeros_like(target)
        tokens.append((target - up - codebook[:, 0]).abs().argmin(-1))
        states.append(up + codebook[tokens[-1]])
    return tokens, states, label


@pytest.mark.slow
def test_likelihood_is_within_5_percent_of_the_model_of_all_scales():
    levels, codebook = (2, 4, 8, 16), torch.linspace(-1, 1, 9)[:, None]
    sides = [level for level, side in enumerate(levels) for _ in range(side * side)]
    earlier = torch.tensor(sides)[:, None] >= torch.tensor(sides)

    def all_scales(self, q, k, v, sides):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=earlier)

    data, held_out = pyramids(6000, levels, codebook, seed=0), pyramids(400, levels, codebook, seed=1)
    nats = {}
    for name in ("Markov", "all scales"):
        torch.manual_seed(0)
        model = ScaleMarkovAR(codebook, levels, window=7, dim=32, heads=2, depth=2, classes=3, mlp=2)
        generator = torch.Generator().manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            if name == "all scales":
                patch.setattr(LevelAttention, "attend", all_scales)
            steps = 400
            optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
            for _ in range(steps):
                chosen = torch.randint(6000, (16,), generator=generator)
                loss = model.loss([t[chosen] for t in data[0]], [s[chosen] for s in data[1]], data[2][chosen])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 100.0)
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                nats[name] = model.loss(*held_out).item()
    print(f"nats per picture: {nats}")
    # Every pixel by chance is 340 log 9 = 747 nats: both models must have learned the pictures.
    assert max(nats.values()) < 100
    assert nats["Markov"] <= 1.05 * nats["all scales"]
