"""Cambrian-S on streams: events found, objects counted room by room, rare events remembered."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.stream.cambrian import EventSegmenter, LatentPredictor, SurpriseMemory, calibrated, surprise


def drifting(segments, least, most, rng, channels=32, drift=0.15):
    """A latent that begins anew in each segment and drifts there, and where segments begin (not the first)."""
    lengths = torch.randint(least, most + 1, (segments,), generator=rng).tolist()
    z = torch.cat([
        torch.randn(1, channels, generator=rng) + drift * torch.randn(n, channels, generator=rng).cumsum(0)
        for n in lengths
    ])  # fmt: skip
    return z, torch.tensor(lengths).cumsum(0)[:-1].tolist()


def test_events_begin_where_segments_do():
    rng = torch.Generator().manual_seed(0)
    scores, ahead = [], []
    before = calibrated(surprise(*(lambda z: (z[:-1], z[1:]))(drifting(8, 30, 70, rng)[0])))
    for _ in range(20):
        z, cuts = drifting(8, 30, 70, rng)
        s = surprise(z[:-1], z[1:])  # persistence: the next frame is expected to be as this one
        for threshold, into in ((calibrated(s), scores), (before, ahead)):
            events = EventSegmenter(lambda frames: (frames[0], len(frames)), float(threshold))
            for t in range(len(z)):
                events.step(t, float(s[t - 1]) if t else 0.0)
            events.close()
            found = {first for first, _ in events.answers} - {0}
            into.append(2 * len(found & set(cuts)) / (len(found) + len(cuts)))
            assert sum(count for _, count in events.answers) == len(z)
    print(f"F1 {sum(scores) / 20:.3f}, worst {min(scores):.3f}; threshold of an earlier stream {sum(ahead) / 20:.3f}")
    assert sum(scores) / 20 >= 0.9
    assert sum(ahead) / 20 >= 0.9


def test_three_deviations_are_out_of_reach_of_more_than_one_frame_in_ten():
    for rare, reached in ((9, True), (11, False)):
        s = torch.zeros(100)
        s[:rare] = torch.ones(())
        assert bool(calibrated(s) < 1) == reached


CODE, COLOURS = 16, 4


def room(rng, most=5):
    """A walk through one room: frames [T, 20] of its code, which drifts, and the coloured objects in view, each for
    three frames; and how many objects of the first colour it has."""
    frames = int(torch.randint(12, 21, (), generator=rng))
    code = torch.randn(CODE, generator=rng) + 0.05 * torch.randn(frames, CODE, generator=rng).cumsum(0)
    seen, wanted = torch.zeros(frames, COLOURS), 0
    for colour in range(COLOURS):
        count = int(torch.randint(0, most + 1, (), generator=rng))
        for start in torch.randint(0, frames - 2, (count,), generator=rng).tolist():
            seen[start : start + 3, colour] += 1
        wanted = count if colour == 0 else wanted
    return torch.cat((code, seen), 1), wanted


class Counter(nn.Module):
    """A causal block over frames, from whose rows the count so far and the next frame are read."""

    def __init__(self, dim=48):
        super().__init__()
        self.enter, self.read = nn.Linear(CODE + COLOURS, dim), nn.Linear(dim, 1)
        self.mix = ct.nn.Block([ct.nn.Attention(dim, 4, where=ct.causal())])
        self.start, self.predictor = nn.Parameter(torch.zeros(dim)), LatentPredictor(dim, CODE + COLOURS)

    def forward(self, x):
        """Counts [B, T], and h [B, T, dim]. A first token that is always there makes room for how many came."""
        start = self.start.expand(len(x), 1, -1)
        h = self.mix(torch.cat((start, self.enter(x)), 1), ct.Grid(n=x.shape[1] + 1))[:, 1:]
        return self.read(h)[..., 0], h


def trained_counter(rng, rooms=1500, steps=1500):
    torch.manual_seed(0)
    model = Counter()
    examples = [room(rng) for _ in range(rooms)]
    lengths = torch.tensor([len(x) for x, _ in examples])
    x = nn.utils.rnn.pad_sequence([x for x, _ in examples], batch_first=True)
    wanted = torch.tensor([float(n) for _, n in examples])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        length = 12 + int(torch.randint(0, 9, (), generator=rng))
        i = torch.where(lengths == length)[0]
        i = i[torch.randint(0, len(i), (48,), generator=rng)]
        counts, h = model(x[i, :length])
        loss = F.mse_loss(counts[:, -1], wanted[i]) + 0.1 * model.predictor.loss(h, x[i, :length])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def counted(model, stream, threshold):
    """The answers of all segments: what is in the buffer is what the model sees, and expects the next frame from."""
    events = EventSegmenter(lambda frames: float(model(torch.stack(frames)[None])[0][0, -1]), threshold)
    for frame in stream:
        unexpected = 0.0
        if events.buffer:
            expected = model.predictor(model(torch.stack(events.buffer)[None])[1])[0, -1]
            unexpected = float(surprise(expected, frame))
        events.step(frame, unexpected)
    events.close()
    return events.answers


@pytest.mark.slow
def test_objects_are_counted_room_by_room():
    rng = torch.Generator().manual_seed(0)
    model = trained_counter(rng)
    errors, whole, rooms = [], [], []
    for _ in range(10):
        walks = [room(rng) for _ in range(20)]
        stream, truth = torch.cat([x for x, _ in walks]), sum(n for _, n in walks)
        answers = counted(model, stream, 0.5)
        with torch.no_grad():
            at_once = float(model(stream[None])[0][0, -1])
        errors.append(abs(sum(answers) - truth) / truth)
        whole.append(1 - at_once / truth)
        rooms.append(len(answers))
    print(f"error room by room: mean {sum(errors) / 10:.3f}, worst {max(errors):.3f}; undercount of the whole "
          f"{sum(whole) / 10:.3f}, least {min(whole):.3f}; segments {rooms}")  # fmt: skip
    assert sum(errors) / 10 <= 0.1
    assert min(whole) >= 0.5


def walks(runs, frames, rng, size=16):
    """Latents [T, runs, size] of walks: another room every 100 frames, and 4 odd objects, in view for 3 frames each.

    Also the direction of the object, and at which frames each of the four begins, in order [runs, 4].
    """
    rooms = torch.randn(frames // 100, runs, size, generator=rng).repeat_interleave(100, 0)
    z = rooms + 0.1 * torch.randn(frames, runs, size, generator=rng)
    # One in each quarter, not at a change of rooms.
    quarter = frames // 4
    start = torch.randint(0, quarter // 100, (runs, 4), generator=rng) * 100 + torch.arange(4) * quarter
    start = start + torch.randint(5, 90, (runs, 4), generator=rng)
    odd = F.normalize(torch.randn(runs, size, generator=rng), dim=1) * 4
    for i in range(3):
        z[(start + i).T, torch.arange(runs)] += odd
    return z, odd, start


@pytest.mark.parametrize(("frames", "budget"), [(400, 32), pytest.param(2000, 64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["drop", "merge"])
def test_rare_events_are_remembered(policy, frames, budget):
    runs = 100
    z, odd, start = walks(runs, frames, torch.Generator().manual_seed(0))
    s = torch.cat((torch.zeros(1, runs), surprise(z[:-1], z[1:])))
    memory = SurpriseMemory(8, budget, threshold=float(calibrated(s.flatten())), policy=policy)
    keys = z[:, :, None, None].expand(-1, -1, 1, 2, -1)
    state = None
    for frame in zip(keys, keys, s, strict=True):
        state = memory.step(*frame, state)

    def all_four(times):
        """times [runs, n]: kept by each run; -1: none."""
        inside = (times[:, None] >= start[..., None]) & (times[:, None] < start[..., None] + 3)
        return inside.any(2).all(1).float().mean().item()

    kept = all_four(torch.cat((state.memory.time, state.window.time), 1))
    uniform = all_four((torch.arange(budget) * frames // budget).expand(runs, -1))
    sliding = all_four(torch.arange(frames - budget, frames).expand(runs, -1))
    # The question shows the object; the frames retrieved come in the order of time.
    found = memory.retrieved(odd[:, None, None], state, 16)
    recalled = all_four(state.memory.time.masked_fill(~found, -1))
    print(f"all four: kept {kept:.2f}, recalled {recalled:.2f}, uniform {uniform:.2f}, sliding {sliding:.2f}")
    assert kept >= 0.95
    assert recalled >= 0.95
    assert uniform <= 0.2
    assert sliding <= 0.1
