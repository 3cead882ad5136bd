"""I2XTraj (system 172): each axis against dense, agents reordered and padded, likeliest choices, and a crossing."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.model.i2xtraj import STRATEGIES, AxialBlock, Crossing, I2XTraj, Road, likeliest
from chronotope.papers.spacetime.hpnet_poses import Poses, headings, relative

AGENTS, STEPS, MODES = 4, 5, 3
GRID = ct.Grid(t=STEPS, v=AGENTS, m=MODES)


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(seed=0, **options):
    torch.manual_seed(seed)
    return I2XTraj(**{"ahead": 4, "modes": MODES, "dim": 16, "heads": 2, **options}).double()


def scene(agents=AGENTS, seed=0):
    """Places, headings, lanes, zones."""
    places = (4 * tokens(2, agents, 1, 2, seed=seed) + tokens(2, agents, STEPS, 2, seed=seed + 1).cumsum(2)).double()
    road = Road(
        3 * tokens(2, 6, 2, seed=seed + 2).double(),
        tokens(2, 6, seed=seed + 3).double(),
        torch.arange(6).remainder(3).expand(2, -1),
        torch.cat((F.one_hot(torch.arange(6) % 3, 3), torch.arange(6)[:, None]), 1).double().expand(2, -1, -1),
    )
    zone = torch.rand(2, agents, STRATEGIES, generator=torch.Generator().manual_seed(seed)) > 0.4
    zone[..., 1] = True
    return places, headings(places.transpose(1, 2)).transpose(1, 2), road, zone


def some(road, order):
    """Another order of the lanes."""
    return Road(*(part[:, order] for part in vars(road).values()))


@pytest.mark.parametrize("causal_time", [False, True])
@pytest.mark.parametrize("axis", ["t", "v", "m"])
def test_each_axis_is_dense_under_the_mask_differs_only_along_it(axis, causal_time):
    torch.manual_seed(0)
    block = AxialBlock(16, 2, axis, causal_time).double()
    x = tokens(2, GRID.size, 16).double()
    places, ways, _, _ = scene()
    poses = Poses(places.transpose(1, 2), ways.mT, ways.mT < 9).spread(MODES).flat(1, 3)
    seen = torch.rand(2, AGENTS, AGENTS, generator=torch.Generator().manual_seed(1)) > 0.3
    got = block(x, GRID, poses, seen)

    coords = dict(zip(GRID.axes, GRID.coords().T, strict=True))
    mask = torch.ones(GRID.size, GRID.size, dtype=torch.bool)
    for other in set(GRID.axes) - {axis}:
        mask = mask & (coords[other][:, None] == coords[other])
    if axis == "t" and causal_time:
        mask = mask & (coords["t"][:, None] >= coords["t"])
    mask = mask.expand(2, -1, -1)
    y = block.norms[0](x)
    if axis == "v":
        mask = mask & seen[:, coords["v"][:, None], coords["v"]]
        to = Poses(poses.place[:, None], poses.heading[:, None], poses.seen[:, None])
        layer = block.among
        q, kv = layer.q(y), layer.kv(y)[:, None] + layer.edge(block.edge(relative(poses.spread(1), to)))
    else:
        layer = block.along
        q, kv = (y @ layer.qkv.weight.T).split((16, 32), -1)
        kv = kv[:, None].expand(-1, GRID.size, -1, -1)
    heads = [z.flatten(0, 1).unflatten(-1, (2, 8)).transpose(1, 2) for z in (q[:, :, None], *kv.chunk(2, 3))]
    blind = ~mask.any(2)
    out = sdpa(*heads, attn_mask=(mask | blind[..., None]).flatten(0, 1)[:, None, None])
    out = torch.where(blind[..., None], 0.0, out.transpose(1, 2).flatten(1).unflatten(0, (2, -1)))
    h = x + layer.out(out)
    assert (got - h - block.mlp(block.norms[1](h))).abs().max() <= 1e-6


def same(a, b, agents=slice(None)):
    return max(
        (a.places[:, :, agents] - b.places).abs().max().item(),
        (a.probability - b.probability).abs().max().item(),
        (a.strategy[:, agents] - b.strategy).nan_to_num(posinf=0, neginf=0).abs().max().item(),
    )


@pytest.mark.parametrize("order", [("t", "v", "m"), ("v", "m", "t")])
def test_agents_in_another_order_give_forecasts_in_that_order(order):
    model, (places, ways, road, zone) = small(order=order), scene()
    real = torch.tensor([[True, True, True, False], [True, False, True, True]])
    turn = [2, 0, 3, 1]
    out = model(places, ways, road, zone, real)
    assert same(out, model(places[:, turn], ways[:, turn], road, zone[:, turn], real[:, turn]), turn) <= 1e-6
    assert same(out, model(places, ways, some(road, [3, 5, 0, 1, 4, 2]), zone, real)) <= 1e-6


def test_agents_that_are_not_real_change_nothing():
    model, (places, ways, road, zone) = small(), scene()
    alone = model(places[:, :3], ways[:, :3], road, zone[:, :3])
    real = torch.tensor([True, True, True, False]).expand(2, -1)
    spoilt = places.clone()
    spoilt[:, 3] = torch.nan
    padded = model(spoilt, torch.where(real[..., None], ways, torch.nan), road, zone, real)
    assert same(Crossing(padded.places[:, :, :3], padded.probability, padded.strategy[:, :3]), alone) <= 1e-6
    assert same(model(places, ways, road, zone), alone, slice(0, 3)) > 1e-3


def test_moving_and_turning_the_crossing_moves_and_turns_the_forecasts():
    model, (places, ways, road, zone) = small(), scene()
    turn = torch.tensor([[math.cos(2.0), math.sin(2.0)], [-math.sin(2.0), math.cos(2.0)]]).double()
    turned = Road(road.place @ turn - 7, road.heading + 2.0, road.role, road.signal)
    out, moved = model(places, ways, road, zone), model(places @ turn - 7, ways + 2.0, turned, zone)
    assert (moved.places - (out.places @ turn - 7)).abs().max() <= 1e-6
    assert (moved.probability - out.probability).abs().max() <= 1e-6
    assert same(out, model(places, ways, turned, zone)) > 1e-2


def test_the_light_changes_what_lanes_tell():
    model, (places, ways, road, zone) = small(), scene()
    for column in range(4):
        signal = road.signal.clone()
        signal[:, :, column] += 1
        other = model(places, ways, Road(road.place, road.heading, road.role, signal), zone)
        assert same(model(places, ways, road, zone), other) > 1e-4


def test_time_looks_back_only_where_asked():
    places, ways, *_ = scene()
    x, poses = tokens(2, GRID.size, 16).double(), Poses(places.transpose(1, 2), ways.mT, ways.mT < 9)
    poses, seen = poses.spread(MODES).flat(1, 3), torch.ones(2, AGENTS, AGENTS, dtype=torch.bool)
    later = x.clone()
    later[:, -AGENTS * MODES :] += 1
    for causal_time in (False, True):
        blocks, a, b = small(causal_time=causal_time).blocks, x, later
        for block in blocks:
            a, b = block(a, GRID, poses, seen), block(b, GRID, poses, seen)
        assert torch.equal(a[:, : -AGENTS * MODES], b[:, : -AGENTS * MODES]) is causal_time


def test_the_likeliest_choices_are_those_of_all_combinations():
    rng = torch.Generator().manual_seed(0)
    strategy = torch.randn(5, 3, 4, generator=rng)
    strategy[1, 0, 2:] = strategy[2, :, 1:] = -torch.inf
    strategy[2, 1, 1] = 0.0
    strategy = strategy.log_softmax(-1)
    real = torch.ones(5, 3, dtype=torch.bool)
    real[3, 1] = False
    got = likeliest(strategy, real, 6)
    for b in range(5):
        ways = [range(4) if real[b, a] else range(1) for a in range(3)]
        scores = {}
        for choice in itertools.product(*ways):
            score = sum(strategy[b, a, c].item() for a, c in enumerate(choice) if real[b, a])
            if score > -math.inf:
                scores[choice] = score
        ranked = sorted(scores, key=scores.get, reverse=True)[:6]
        expected = [ranked[i % len(ranked)] for i in range(6)]
        assert [tuple(column) for column in got[b].T.tolist()] == expected
    assert len({tuple(column) for column in got[2].T.tolist()}) == 2


def test_the_loss_is_that_of_the_nearest_joint_forecast():
    model, (places, ways, road, zone) = small(), scene()
    out, future = model(places, ways, road, zone), tokens(2, AGENTS, 4, 2, seed=9).double()
    taken = zone.float().argmax(-1)
    best = (out.places - future[:, None]).norm(dim=-1).mean((2, 3)).argmin(1)
    chosen = torch.stack([out.places[b, k] for b, k in enumerate(best.tolist())])
    expected = 2 * F.smooth_l1_loss(chosen, future) - out.probability[range(2), best].log().mean()
    expected = expected + F.nll_loss(out.strategy.flatten(0, 1), taken.flatten())
    assert (model.loss(out, future, taken) - expected).abs() <= 1e-9
    model.loss(out, future, taken).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ct.ChronotopeError, match="an order of 't', 'v', 'm'"):
        I2XTraj(order=("t", "x"))


SEEN, AHEAD, STEP = 5, 10, 0.5  # steps known, steps ahead, seconds
LINE, INSIDE = 6.0, 3.0  # where to stop, and where to turn, metres before the middle


def crossing(count, seed):
    """Two vehicles on different arms of four; a light for each; they stop at the line while it is not green.

    Past the line they go left, straight or right as they like, of the two that their lane allows. How fast they come
    says nothing of the light. Returns places, headings, lanes, zones, future, strategies, and whether the line is
    crossed, for those who would be past it by then without a light.
    """
    rng = torch.Generator().manual_seed(seed)

    def uniform(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(count, *shape, generator=rng)

    arm = torch.rand(count, 4, generator=rng).argsort(1)[:, :2]
    speed, before = uniform(2, low=5.0, high=9.0), uniform(2, low=0.5, high=18.0)
    lane = torch.rand(count, 2, generator=rng) < 0.5
    turn = torch.where(torch.rand(count, 2, generator=rng) < 0.5, torch.where(lane, 0, 2), 1)  # left or right, or on
    green, change = torch.rand(count, 2, generator=rng) < 0.5, uniform(2, high=6.0)
    times = STEP * torch.arange(1 - SEEN, AHEAD + 1)
    # Way along the path: nobody passes the line in the dark of the light, be it now or after the change.
    way, ways = -before - LINE + speed * times[0], []
    for time in times:
        ways.append(way)
        after = way + speed * STEP
        lit = green ^ (time + STEP > change)
        way = torch.where((way <= -LINE) & (after > -LINE) & ~lit & (time >= 0), way.clamp(max=-LINE), after)
    way = torch.stack(ways, 2)
    straight, past = way.clamp(max=-INSIDE), (way + INSIDE).clamp(min=0)
    bend = (1 - turn).float()[..., None] * math.pi / 2
    local = torch.stack((straight + past * bend.cos(), past * bend.sin()), -1)
    toward = (arm.float() * math.pi / 2)[..., None]
    cos, sin = toward.cos(), toward.sin()
    places = torch.stack((cos * local[..., 0] - sin * local[..., 1], sin * local[..., 0] + cos * local[..., 1]), -1)
    angle = torch.arange(4) * math.pi / 2
    stops = -LINE * torch.stack((angle.cos(), angle.sin()), -1)
    light = torch.zeros(count, 4, 4)
    light[..., 0], light[..., 3] = 1.0, 3.0
    rows = torch.arange(count)[:, None]
    light[rows, arm] = torch.stack(((~green).float(), torch.zeros_like(change), green.float(), change), -1)
    light[..., 3] /= 3
    road = Road(stops.expand(count, -1, -1), angle.expand(count, -1), torch.zeros(count, 4, dtype=torch.int64), light)
    zone = torch.stack((lane, torch.ones_like(lane), ~lane, torch.zeros_like(lane)), -1)
    crossed = way[..., -1] > -LINE
    near = before + 1 < speed * STEP * AHEAD
    noisy = places[:, :, :SEEN] + 0.05 * torch.randn(count, 2, SEEN, 2, generator=rng)
    return noisy, toward.expand(-1, -1, SEEN), road, zone, places[:, :, SEEN:], turn, (crossed, near)


def dark(road):
    return Road(road.place, road.heading, road.role, torch.zeros_like(road.signal))


def crossed_and_missed(lit=True, seeded=True, steps=600, batch=32, rate=3e-3):
    """Share of vehicles whose likeliest forecast goes where they stop, or stops where they go; and joint minADE."""
    torch.manual_seed(0)
    model = I2XTraj(AHEAD, 4, 32, 4, layers=2, seeded=seeded)
    opt = torch.optim.AdamW(model.parameters(), rate)
    course = torch.optim.lr_scheduler.OneCycleLR(opt, rate, total_steps=steps)
    for step in range(steps):
        places, ways, road, zone, future, turn, _ = crossing(batch, 10 + step)
        out = model(places / 5, ways, _fifth(road if lit else dark(road)), zone)
        opt.zero_grad()
        model.loss(out, future / 5, turn).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        course.step()
    places, ways, road, zone, future, _, (crossed, near) = crossing(1500, 5)
    with torch.no_grad():
        out = model(places / 5, ways, _fifth(road if lit else dark(road)), zone)
    made = 5 * out.places
    least = (made - future[:, None]).norm(dim=-1).mean((2, 3)).amin(1).mean().item()
    last = made[torch.arange(1500), out.probability.argmax(1)][:, :, -1]
    # Past the line: in the frame of the vehicle it has left the arm that it came on.
    toward = torch.stack((ways[..., -1].cos(), ways[..., -1].sin()), -1)
    goes = (last * toward).sum(-1) > -LINE + 0.5
    return (goes != crossed)[near].float().mean().item(), least


def _fifth(road):
    return Road(road.place / 5, road.heading, road.role, road.signal)


@pytest.mark.slow
def test_lights_halve_wrong_stops_and_strategies_beat_learned_modes(one_thread):
    lit, unlit, unseeded = crossed_and_missed(), crossed_and_missed(lit=False), crossed_and_missed(seeded=False)
    print(f"wrong at the line {lit[0]:.3f}, without lights {unlit[0]:.3f}")
    print(f"joint minADE {lit[1]:.3f} m, modes of their own {unseeded[1]:.3f} m, without lights {unlit[1]:.3f} m")
    assert lit[0] <= 0.5 * unlit[0]
    assert lit[1] < unseeded[1]
