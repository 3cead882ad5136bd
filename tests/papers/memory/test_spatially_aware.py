"""Spatially-Aware Transformer (system 28): what a place memory holds, what it forgets, and what can be read from it.

Against the released reader (`htm/hcam.py` at commit 5ed6f9f, torch 2.13 on a CPU, float32, the same weights):
largest difference 6.9e-7 over 20 masked memories of 9 or 10 chunks, 8.9e-8 with its eps of the mean set to 0.
"""

import math

import pytest
import torch
from _rooms import CAPACITY, ROOMS, filled, last_visits, plain, walk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.memory.spatially_aware import POLICIES, PlaceMemory, code
from chronotope.papers.memory.spatially_aware_reader import HierarchicalChunkAttention


def coded(memory, state, member):
    """What the reader sees of every slot."""
    return state.x[member] + code(state.time[member], memory.dim) + code(state.place[member], memory.dim)


def times(state, member=0):
    """The times of what one member remembers."""
    held = state.time[member][state.place[member] >= 0]
    return sorted(held.tolist())


# (1) the reader


def cross_attention(layer, q, memory, mask):
    """Multi-head attention of the queries over one chunk, with the layer's weights."""
    heads = [x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (layer.q(q), *layer.kv(memory).chunk(2, -1))]
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None])
    return layer.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tokens", [32, 20])
def test_one_chunk_is_cross_attention(tokens):
    torch.manual_seed(0)
    layer = HierarchicalChunkAttention(64, heads=4, chunk=32, top=4)
    q, memory, mask = torch.randn(3, 5, 64), torch.randn(3, tokens, 64), torch.rand(3, tokens) < 0.7
    assert (layer(q, memory, mask) - cross_attention(layer, q, memory, mask)).abs().max() < 1e-5
    everything = torch.ones_like(mask)
    assert (layer(q, memory) - cross_attention(layer, q, memory, everything)).abs().max() < 1e-5


def test_all_chunks_are_a_weighted_sum_of_cross_attentions():
    torch.manual_seed(0)
    layer = HierarchicalChunkAttention(32, heads=2, chunk=8, top=5)
    q, memory, mask = torch.randn(2, 3, 32), torch.randn(2, 40, 32), torch.rand(2, 40) < 0.7
    parts = list(zip(memory.split(8, 1), mask.split(8, 1), strict=True))
    means = torch.stack([(m * s[..., None]).sum(1) / s.sum(1)[:, None] for m, s in parts], 1)
    weight = (layer.summary_q(q) @ layer.summary_k(means).mT / math.sqrt(32)).softmax(-1)
    expected = sum(weight[..., [i]] * cross_attention(layer, q, m, s) for i, (m, s) in enumerate(parts))
    assert (layer(q, memory, mask) - expected).abs().max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6))
def test_masked_tokens_and_chunks_do_not_count(tokens, chunk, top, seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layer = HierarchicalChunkAttention(16, heads=2, chunk=chunk, top=top)
    q, memory = (torch.randn(2, n, 16, generator=generator) for n in (3, tokens))
    mask = torch.rand(2, tokens, generator=generator) < 0.5
    mask[0, : chunk * 2] = False
    mask[1] = False
    memory.requires_grad_()
    out = layer(q, memory, mask)
    (grad,) = torch.autograd.grad(out.square().sum(), memory)
    assert grad.isfinite().all()
    assert (grad[~mask] == 0).all()
    broken = torch.where(mask[..., None], memory.detach(), torch.nan)
    assert torch.equal(layer(q, broken, mask), out)
    assert (out[1] == 0).all(), "nothing there, nothing read"
    spare = -tokens % chunk
    seen = F.pad(mask, (spare, 0)).unflatten(1, (-1, chunk))
    chunks = F.pad(torch.where(mask[..., None], memory.detach(), 0.0), (0, 0, spare, 0)).unflatten(1, (-1, chunk))
    weight, chosen = layer.choose(q, chunks, seen)
    there = seen.any(2)[:, None].expand(-1, 3, -1).gather(2, chosen)
    assert (weight[~there] == 0).all()
    assert torch.allclose(weight[0].sum(-1), mask[0].any().float(), atol=1e-6)


# (2) capacity and forgetting

# The trace that the rules are checked on: place 2 has most memories when the fifth of them comes, place 0 fewest.
TRACE = torch.tensor([[2, 0, 2, 1, 2, 1, 2, 0, 1]])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # capacity 6, full after times 0 to 5 in places 2 0 2 1 2 1; then times 6, 7, 8 come in places 2 0 1
        ("fifo", [3, 4, 5, 6, 7, 8]),
        ("lifo", [0, 1, 2, 3, 4, 5]),
        # 6: place 2 has three, its oldest 0 goes; 7: place 2 has three (2 4 6), 2 goes;
        # 8: places 0 (1 7), 1 (3 5) and 2 (4 6) have two each, the first place gives 1
        ("mvfo", [3, 4, 5, 6, 7, 8]),
        # 6: place 0 has one, 1 goes; 7: place 1 has two, 3 goes; 8: places 0 (7) and 1 (5) have one each, 7 goes
        ("lvfo", [0, 2, 4, 5, 6, 8]),
    ],
)
def test_each_rule_on_a_trace(policy, expected):
    assert times(filled(plain(6, 3, policy=policy), TRACE)) == expected


def test_most_visited_first_spares_rare_places():
    places = torch.tensor([[1] + [0] * 20 + [2] + [0] * 20])
    assert times(filled(plain(4, 3), places, "mvfo")) == [0, 21, 40, 41]
    assert times(filled(plain(4, 3), places, "lvfo")) == [38, 39, 40, 41]
    assert times(filled(plain(4, 3), places, "fifo")) == [38, 39, 40, 41]


def test_a_place_forgets_its_own_oldest_first():
    state = filled(plain(6, 3, per_place=2, policy="lifo"), TRACE)
    assert times(state) == [1, 4, 5, 6, 7, 8]
    assert (state.place[0].bincount() == 2).all()


def oracle(places, capacity, per_place, policy):
    """The rules once more, with lists: what is held, as (time, place) in order of writing."""
    held = []
    for time, place in enumerate(places):
        counts = {p: sum(q == p for _, q in held) for _, p in held}
        if counts.get(place, 0) >= per_place:
            held.remove(next(m for m in held if m[1] == place))
        elif len(held) == capacity:
            if policy == "lifo":
                continue
            if policy == "fifo":
                victim = held[0][1]
            else:
                extreme = (max if policy == "mvfo" else min)(counts.values())
                victim = min(p for p, n in counts.items() if n == extreme)
            held.remove(next(m for m in held if m[1] == victim))
        held.append((time, place))
    return held


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 9), st.integers(0, 40), st.integers(0, 10**6))
def test_rules_equal_lists_and_capacity_holds(capacity, places, per_place, steps, seed):
    trace = torch.randint(places, (len(POLICIES), steps), generator=torch.Generator().manual_seed(seed))
    memory = plain(capacity, places, per_place=per_place)
    state = filled(memory, trace, torch.arange(len(POLICIES)))  # each member has a rule of its own
    for member, policy in enumerate(POLICIES):
        held = state.place[member] >= 0
        order = state.order[member][held].argsort()
        found = list(zip(*(x[member][held][order].tolist() for x in (state.time, state.place)), strict=True))
        assert found == oracle(trace[member].tolist(), capacity, per_place, policy)
        assert len(found) <= capacity
    assert state.nbytes == memory.init_state(len(POLICIES)).nbytes


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 7), st.integers(0, 40), st.integers(0, 10**6))
def test_chunks_hold_everything_once_and_one_place_each(capacity, places, chunk, steps, seed):
    trace = torch.randint(places, (2, steps), generator=torch.Generator().manual_seed(seed))
    for by in ("place", "time"):
        memory = PlaceMemory(8, capacity, places, layers=0, chunk=chunk, by=by)
        state = filled(memory, trace)
        tokens, there = memory.chunks(state)
        for member in range(2):
            held = state.place[member] >= 0
            places_of = state.place[member][held].repeat(2, 1)[0]
            expected = coded(memory, state, member)[held]
            found = tokens[member][there[member]]
            assert found.shape == expected.shape
            if by == "time":
                assert torch.allclose(found, expected[state.order[member][held].argsort()])
                continue
            order = (places_of * 1000 + state.order[member][held]).argsort()
            assert torch.allclose(found, expected[order])
            sorted_places = torch.full(there[member].shape, -1)
            sorted_places[there[member]] = places_of[order]
            for cut in sorted_places.split(chunk):
                assert len(set(cut[cut >= 0].tolist())) <= 1


def test_tokens_carry_the_codes_of_time_and_place_and_gradients():
    memory = PlaceMemory(16, 4, 3, layers=0)
    x = torch.randn(2, 16, requires_grad=True)
    state = memory.write(memory.init_state(2), x, torch.tensor([5, 900]), torch.tensor([2, 0]))
    tokens, there = memory.chunks(state)
    assert torch.allclose(tokens[there], x + code(torch.tensor([5, 900]), 16) + code(torch.tensor([2, 0]), 16))
    speed = 10000.0 ** (-torch.arange(8) / 8)
    assert torch.allclose(code(torch.tensor([7]), 16)[0], torch.cat(((7 * speed).sin(), (7 * speed).cos())))
    for learned in (False, True):
        reader = PlaceMemory(16, 4, 3, layers=2, learned_places=learned)
        x.grad = None
        written = reader.write(reader.init_state(2), x, torch.tensor([5, 900]), torch.tensor([2, 0]))
        reader.read(torch.randn(2, 1, 16), written).square().sum().backward()
        assert (x.grad.abs().sum(1) > 0).all()
        assert (reader.place.weight.grad is not None) == learned


def test_states_are_left_alone_move_and_come_back():
    memory = PlaceMemory(8, 3, 4, layers=1, policy="mvfo")
    torch.manual_seed(0)
    trace = torch.randint(4, (3, 7))
    state = filled(memory, trace)
    before = {name: x.clone() for name, x in state.to_dict().items()}
    after = memory.write(state, torch.randn(3, 8), torch.tensor([7, 7, 7]), torch.tensor([0, 1, 2]))
    assert all(torch.equal(x, before[name]) for name, x in state.to_dict().items())
    assert torch.equal(after.written, state.written + 1)
    q, order = torch.randn(3, 2, 8), torch.tensor([2, 0, 1])
    assert torch.allclose(memory.read(q[order], state.select(order)), memory.read(q, state)[order], atol=1e-6)
    assert torch.equal(memory.read(q, memory.init_state(3).from_dict(before)), memory.read(q, state))
    # A member alone is what it is among others.
    alone = filled(memory, trace[1:2])
    assert torch.allclose(memory.read(q[1:2], alone), memory.read(q, state)[1:2], atol=1e-6)


def test_bad_input_is_refused():
    memory = plain(4, 3)
    with pytest.raises(ct.ChronotopeError, match="numbers from 0 to 2"):
        filled(memory, torch.tensor([[3]]))
    with pytest.raises(ct.ChronotopeError, match="policy of fifo, lifo, mvfo, lvfo"):
        plain(4, 3, policy="lru")
    with pytest.raises(ct.ChronotopeError, match="or their numbers"):
        filled(memory, torch.tensor([[0]]), "lru")
    with pytest.raises(ct.ChronotopeError, match="an even dim"):
        PlaceMemory(7, 4, 3)
    with pytest.raises(ct.ChronotopeError, match="heads that divide dim"):
        HierarchicalChunkAttention(10, heads=4)


# (3) a walk through 16 rooms


def test_the_last_visit_of_every_room_stays():
    rooms = walk(100, torch.Generator().manual_seed(0))
    last = last_visits(rooms)
    visited = last >= 0
    assert visited.float().mean() > 0.9
    shares = {}
    for name, options in (
        ("place", {"per_place": CAPACITY // ROOMS}),
        ("mvfo", {"policy": "mvfo"}),
        ("fifo", {"policy": "fifo"}),
        ("lifo", {"policy": "lifo"}),
    ):
        state = filled(plain(CAPACITY, ROOMS, **options), rooms)
        assert ((state.place >= 0).sum(1) <= CAPACITY).all()
        kept = (state.time[:, None, :] == last[..., None]).any(2)
        shares[name] = kept[visited].float().mean().item()
    # found: place 1.00, mvfo 1.00, fifo 0.43, lifo 0.001
    assert shares["place"] >= 0.95, shares
    assert shares["mvfo"] >= 0.95, shares
    assert shares["fifo"] <= 0.5, shares
    assert shares["lifo"] <= 0.1, shares
