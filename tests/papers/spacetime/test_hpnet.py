"""HPNet (system 78): each attention against dense, causality, steps, a world that turns, lanes, steady forecasts."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.spacetime.hpnet import Forecasts, HPNet
from chronotope.papers.spacetime.hpnet_poses import Poses, headings, relative
from chronotope.papers.spacetime.hpnet_stage import Lanes

STEPS, AGENTS, MODES = 5, 4, 3
GRID = ct.Grid(t=STEPS, v=AGENTS, k=MODES)


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"ahead": 5, "modes": MODES, "dim": 16, "heads": 2, "layers": 1, "span": 3, "radius": 3.0}
    return HPNet(**{**sizes, **options}).double()


def walks(batch=2, steps=STEPS, seed=0):
    places = 2 * tokens(batch, 1, AGENTS, 2, seed=seed) + tokens(batch, steps, AGENTS, 2, seed=seed + 1).cumsum(1) / 2
    return places.double(), headings(places.double())


def poses(seed=0):
    places, ways = walks(seed=seed)
    seen = torch.rand(ways.shape, generator=torch.Generator().manual_seed(seed)) > 0.2
    return Poses(places, ways, seen)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("axis", ["v", "t", "k"])
def test_each_attention_is_dense_over_all_tokens_with_its_mask_and_edges(stage, axis):
    part, at = (small().first, small().second)[stage], poses().spread(MODES)
    block = {"v": part.agents, "t": part.history, "k": part.modes}[axis][0]
    x = tokens(2, GRID.size, 16).double()
    got = block(x, x, *part.token_edges(GRID, at)[axis])

    flat = at.flat(1, 3)
    t, v, k = GRID.coords().T
    same = {"t": t[:, None] == t, "v": v[:, None] == v, "k": k[:, None] == k}
    mask = ~same[axis] & flat.seen[:, :, None] & flat.seen[:, None]
    for other in {"t", "v", "k"} - {axis}:
        mask = mask & same[other]
    ahead = t - t[:, None]  # of the key
    if axis == "t":
        mask = mask & (ahead < 0) & (ahead >= -3)
    if axis == "v":
        mask = mask & (torch.cdist(flat.place, flat.place) < 3)
    to = Poses(flat.place[:, None], flat.heading[:, None], flat.seen[:, None])
    attend, y = block.attention, block.norm(x)
    q, kv = attend.q(y), attend.kv(y)[:, None]
    if block.edge is not None:
        kv = kv + attend.edge(block.edge(relative(flat.spread(1), to, ahead if axis == "t" else None)))
    kv = kv.expand(2, GRID.size, GRID.size, 32)
    # One query at a time, since its keys are its own: the batch is batch and queries.
    heads = [z.flatten(0, 1).unflatten(-1, (2, 8)).transpose(1, 2) for z in (q[:, :, None], *kv.chunk(2, 3))]
    lonely = ~mask.any(2)
    out = sdpa(*heads, attn_mask=(mask | lonely[:, :, None]).flatten(0, 1)[:, None, None])
    out = out.transpose(1, 2).flatten(1).unflatten(0, (2, -1))
    h = x + attend.out(torch.where(lonely[..., None], 0.0, out))
    assert (got - h - block.mlp(block.mlp_norm(h))).abs().max() <= 1e-5
    assert 0 < lonely.sum() < lonely.numel()


def test_what_comes_later_changes_nothing_before():
    model, (places, ways) = small(), walks()
    out = model(places, ways)
    for step in range(1, STEPS):
        later = places.clone()
        later[:, step:] += tokens(2, STEPS - step, AGENTS, 2, seed=9)
        changed = model(later, torch.cat((ways[:, :step], headings(later)[:, step:]), 1))
        for name in ("proposal", "refined", "probability"):
            before, after = getattr(out, name), getattr(changed, name)
            assert torch.equal(before[:, :step], after[:, :step])
            assert not torch.equal(before[:, step], after[:, step])


def stepped(model, places, ways, seen=None):
    state, out = model.init_state(len(places), AGENTS), []
    for step in range(places.shape[1]):
        made, state = model.step(places[:, step], ways[:, step], state, None if seen is None else seen[:, step])
        out.append(made)
    names = ("proposal", "refined", "probability")
    return Forecasts(*(torch.cat([getattr(made, name) for made in out], 1) for name in names)), state


def test_steps_give_what_the_whole_gives_while_it_is_short():
    model, (places, ways) = small(span=STEPS - 1), walks()
    seen = poses().seen
    whole, (out, state) = model(places, ways, seen), stepped(model, places, ways, seen)
    for name in ("proposal", "refined", "probability"):
        assert (getattr(whole, name) - getattr(out, name)).abs().max() <= 1e-5
    assert state.poses.place.shape[1] == STEPS - 1


def test_a_longer_stream_equals_the_whole_and_sees_further_than_a_window():
    model, (places, ways) = small(span=2), walks(steps=7)
    out, state = stepped(model, places, ways)
    assert state.tokens[0].shape[1] == 2
    assert (model(places, ways).refined - out.refined).abs().max() <= 1e-5
    window = model(places[:, -3:], ways[:, -3:]).refined[:, -1]
    assert (window - out.refined[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moving_and_turning_the_world_moves_and_turns_the_forecasts(dtype):
    model, (places, ways) = small().to(dtype), walks()
    places, ways = places.to(dtype), ways.to(dtype)
    angle = 2.1
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=dtype)
    lanes = Poses(places[:, 0, :2] + 1, ways[:, 1, :2], ways[:, 0, :2] < 9)
    turned = Poses(lanes.place @ turn + 3, lanes.heading + angle, lanes.seen)
    road = tokens(2, 2, 16).to(dtype)
    out = model(places, ways, None, Lanes(road, lanes))
    moved = model(places @ turn + 3, ways + angle, None, Lanes(road, turned))
    for name in ("proposal", "refined"):
        assert (getattr(moved, name) - getattr(out, name) @ turn - 3).abs().max() <= 1e-4
    assert (moved.probability - out.probability).abs().max() <= 1e-4
    still = model(places, ways + angle, None, Lanes(road, lanes))
    assert (still.refined - out.refined).abs().max() > 1e-2


def test_lanes_are_seen_where_they_are_near():
    model, (places, ways) = small(), walks()
    where = Poses(places[:, 0, :2] + 0.5, ways[:, 0, :2], ways[:, 0, :2] < 9)
    road = Lanes(tokens(2, 2, 16).double(), where)
    out = model(places, ways)
    with_road = model(places, ways, None, road)
    assert (with_road.refined[:, 0, :2] - out.refined[:, 0, :2]).abs().max() > 1e-3
    far = Lanes(road.tokens, Poses(where.place + 100, where.heading, where.seen))
    other = Lanes(tokens(2, 2, 16, seed=5).double(), far.poses)
    assert torch.equal(model(places, ways, None, far).refined, model(places, ways, None, other).refined)
    assert not torch.equal(model(places, ways, None, Lanes(other.tokens, where)).refined, with_road.refined)


def test_who_is_not_there_is_seen_by_nobody():
    model, (places, ways), seen = small(), walks(), poses().seen
    spoilt = torch.where(seen[..., None], places, 50 * tokens(*places.shape, seed=8).double())
    out, other = model(places, ways, seen), model(spoilt, torch.where(seen, ways, 1.0), seen)
    for name in ("proposal", "refined", "probability"):
        assert torch.equal(getattr(out, name)[seen], getattr(other, name)[seen])
    assert (out.refined[seen] - model(places, ways).refined[seen]).abs().max() > 1e-2


def test_the_loss_is_that_of_the_best_proposal():
    model, (places, ways) = small(), walks()
    out, future = model(places, ways), tokens(2, STEPS, AGENTS, 5, 2).double()
    best = (out.proposal - future[:, :, :, None]).norm(dim=-1).sum(-1).argmin(-1)
    total, count = 0.0, 0
    for b in range(2):
        for h in range(STEPS):
            for a in range(AGENTS):
                k = best[b, h, a]
                for made in (out.proposal, out.refined):
                    off = (made[b, h, a, k] - future[b, h, a]).abs()
                    total += torch.where(off < 1, off**2 / 2, off - 0.5).sum(-1).mean()
                total -= out.probability[b, h, a, k].log()
                count += 1
    assert (model.loss(out, future) - total / count).abs() <= 1e-9
    model.loss(out, future).backward()
    lanes = {name for name, _ in model.named_parameters() if ".lanes." in name}
    assert {name for name, p in model.named_parameters() if p.grad is None} == lanes
    real = torch.rand(2, STEPS, AGENTS, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    spoilt = torch.where(real[..., None], future, torch.nan)
    assert torch.equal(model.loss(out, spoilt, real), model.loss(out, spoilt.nan_to_num(5.0), real))
    with pytest.raises(ct.ChronotopeError, match="expected ahead from 2 on"):
        HPNet(ahead=1)


PAST, AHEAD = 8, 6


def traffic(count, seed, noise=0.3):
    """Two agents on circles or lines, seen with noise: [n, PAST, 2, 2], and where they are after each step, exactly."""
    rng = torch.Generator().manual_seed(seed)
    time = torch.arange(PAST + AHEAD).float()[:, None]
    pace, start = 0.5 + torch.rand(count, 1, 2, generator=rng), 2 * math.pi * torch.rand(count, 1, 2, generator=rng)
    bend = 0.3 * torch.randn(count, 1, 2, generator=rng) * (torch.rand(count, 1, 2, generator=rng) < 0.5)
    # Places of a curve whose heading grows by `bend` a step: a circle, or a line where that is 0.
    ways = start + bend * time
    steps = pace[..., None] * torch.stack((ways.cos(), ways.sin()), -1)
    places = 4 * torch.randn(count, 1, 2, 2, generator=rng) + steps.cumsum(1)
    future = places.unfold(1, AHEAD, 1)[:, 1 : PAST + 1].movedim(-1, 3)
    return places[:, :PAST] + noise * torch.randn(count, PAST, 2, 2, generator=rng), future


def forecasts(history, steps=800, batch=16, rate=3e-3):
    """minFDE after the last step, and how far the likeliest forecast of one moment moves from step to step."""
    torch.manual_seed(0)
    model = HPNet(AHEAD, 2, 16, 2, layers=1, span=PAST, radius=20.0, history=history)
    opt = torch.optim.AdamW(model.parameters(), rate)
    course = torch.optim.lr_scheduler.OneCycleLR(opt, rate, total_steps=steps)
    for step in range(steps):
        places, future = traffic(batch, 10 + step)
        opt.zero_grad()
        model.loss(model(places, headings(places)), future).backward()
        opt.step()
        course.step()
    places, future = traffic(1000, 5)
    with torch.no_grad():
        out = model(places, headings(places))
    late = slice(PAST // 2, None)
    miss = (out.refined[:, late, ..., -1, :] - future[:, late, :, None, -1]).norm(dim=-1).amin(-1).mean().item()
    best = out.probability.argmax(-1)[..., None, None, None].expand(-1, -1, -1, 1, AHEAD, 2)
    likely = out.refined.gather(3, best)[:, late, :, 0]
    moved = (likely[:, 1:, :, :-1] - likely[:, :-1, :, 1:]).norm(dim=-1).mean().item()
    return miss, moved


@pytest.mark.slow
def test_forecasts_that_know_earlier_ones_are_as_near(one_thread):
    """They should also move 20% less from step to step, at equal minFDE, and do not: the page says so.

    Found with history and without: after 500 steps minFDE 1.675 and 1.813, moved 1.825 and 2.303; after 800, as here,
    1.492 and 1.586, moved 1.713 and 1.317; after 1200, 1.411 and 1.429, moved 1.519 and 1.449.
    """
    (miss, moved), (miss_without, moved_without) = forecasts(True), forecasts(False)
    print(
        f"minFDE {miss:.3f} and {miss_without:.3f}, moved {moved:.3f} and {moved_without:.3f}, with history and without"
    )
    assert miss <= 1.02 * miss_without
