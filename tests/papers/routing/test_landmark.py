"""Landmark Attention (system 74): its weights, the identity with dense attention, memory, positions.

CausalSelfAttention of epfml/landmark-attention at commit d963e50 with its memory cache, given the same weights and
chunks of 35, 10, 14, 21 and 28 tokens (blocks of 7), 2026-11-21, float64 (its rotary frequencies are float32): largest
difference 2.0e-8 with 1 block kept, 6.2e-8 with 2, 4.4e-8 with 3 shared by heads, 4.3e-8 with 2 shared by tokens, and
9.0e-8 for 140 tokens at once.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.routing.landmark import (
    LandmarkAttention,
    grouped_softmax,
    insert_landmarks,
    landmark_attention,
    landmarks,
)
from chronotope.papers.routing.landmark_memory import Cache, chosen_blocks, read, read_slots, rotated, scored_slots

DOUBLE = torch.float64
BLOCK = 5


def tokens(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(n, batch=2, heads=2, d=8, dtype=DOUBLE):
    return tuple(tokens(batch, heads, n, d, seed=i, dtype=dtype) for i in range(3))


def marks(n, batch=2, block=BLOCK):
    return landmarks(n, block).expand(batch, -1)


def one_row(scores, landmark, i):
    """The weights of query i, [N], from its scores, sum by sum."""
    group = [int(landmark[:j].sum()) for j in range(len(scores))]
    first = [j for j in range(i + 1) if (group[j] < group[i] if landmark[j] else group[j] == group[i])]
    total = sum(scores[j].exp() for j in first)
    weights = torch.zeros_like(scores)
    for j in first:
        if not landmark[j]:
            weights[j] = scores[j].exp() / total
            continue
        inside = [n for n in range(j) if group[n] == group[j] and not landmark[n]]
        for n in inside:
            weights[n] = scores[j].exp() / total * scores[n].exp() / sum(scores[m].exp() for m in inside)
    return weights


def test_weights_add_up_to_one_and_landmarks_have_none():
    q, k, _ = inputs(36)
    weights = grouped_softmax(q @ k.mT / 8**0.5, marks(36))
    assert (weights.sum(-1) - 1).abs().max() < 1e-15
    assert weights[..., landmarks(36, BLOCK)].abs().max() == 0
    assert weights.triu(1).abs().max() == 0


def test_landmarks_at_the_log_sum_of_their_block_give_dense_attention():
    q, k, _ = inputs(36)
    logits, landmark = q @ k.mT / 8**0.5, landmarks(36, BLOCK)
    logits[..., landmark] = logits.unflatten(3, (-1, BLOCK + 1))[..., :BLOCK].logsumexp(-1)
    later = torch.ones(36, 36, dtype=torch.bool).triu(1)
    dense = logits.masked_fill(later | landmark, -torch.inf).softmax(-1)
    weights = grouped_softmax(logits, marks(36))
    assert (weights - dense).abs().max() < 1e-15
    # And with other landmarks it does not.
    logits[..., landmark] += 1
    assert (grouped_softmax(logits, marks(36)) - dense).abs().max() > 1e-2


def test_one_block_is_causal_attention():
    q, k, v = inputs(20)
    assert (landmark_attention(q, k, v, block=20) - sdpa(q, k, v, is_causal=True)).abs().max() < 1e-14


def test_landmarks_anywhere_follow_the_definition():
    landmark = torch.zeros(2, 14, dtype=torch.bool)
    landmark[0, [2, 6, 7, 12]] = True
    landmark[1, [1, 13]] = True
    landmark[0, 7] = False
    logits = tokens(2, 1, 14, 14, seed=4)
    weights = grouped_softmax(logits, landmark)
    for b in range(2):
        for i in range(14):
            assert (weights[b, 0, i] - one_row(logits[b, 0, i], landmark[b], i)).abs().max() < 1e-14
    # The last queries alone have the same weights.
    assert torch.equal(grouped_softmax(logits[:, :, -3:], landmark), weights[:, :, -3:])


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9))
def test_block_by_block_equals_the_definition_in_values_and_gradients(n, block):
    parts = [x.requires_grad_() for x in inputs(n)]
    whole = landmark_attention(*parts, block=block)
    expected = landmark_attention(*parts, landmark=marks(n, block=block))
    assert (whole - expected).abs().max() < 1e-13
    dout = tokens(*whole.shape, seed=9)
    for found, exact in zip(*(torch.autograd.grad(y, parts, dout) for y in (whole, expected)), strict=True):
        assert (found - exact).abs().max() < 1e-12


def test_gradcheck():
    logits = tokens(1, 1, 8, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grouped_softmax(x, marks(8, 1, 2)), logits)
    parts = [x.requires_grad_() for x in inputs(7, 1, 1, 2)]
    assert torch.autograd.gradcheck(lambda *x: landmark_attention(*x, block=2), parts)


def test_group_dropout_leaves_out_earlier_blocks_of_single_queries():
    torch.manual_seed(0)
    q, k, v = inputs(36)
    logits = q @ k.mT / 8**0.5
    plain = grouped_softmax(logits, marks(36))
    dropped = torch.stack([grouped_softmax(logits, marks(36), 0.5) for _ in range(400)])
    own = torch.arange(36) // 6 == torch.arange(36)[:, None] // 6
    assert torch.equal(dropped[0][..., own], plain[..., own])
    ratio = torch.where(plain > 0, dropped[0] / plain, 0.0)[..., ~own]
    assert ((ratio - 2).abs().minimum(ratio.abs()) < 1e-12).all()
    assert (dropped.mean(0) - plain).abs().max() < 0.1
    # Of the parts of a query each is in once or not at all: left out, doubled, or as it was in the own block.
    q, k, v = (x[:, :, :12] for x in (q, k, v))
    weights = grouped_softmax(q @ k.mT / 8**0.5, marks(12))
    early, own = weights[..., :6] @ v[:, :, :6], weights[..., 6:] @ v[:, :, 6:]
    merged = landmark_attention(q, k, v, block=BLOCK, group_dropout=0.5)[:, :, 6:] - own[:, :, 6:]
    share = (merged / early[:, :, 6:]).round(decimals=8)
    assert sorted(share.unique().tolist()) == [0, 2]
    assert (share == share[..., :1]).all()


def chunked(layer, x, cuts, grid=None):
    """The layer over slices of these lengths, and the state after them."""
    state, out = layer.init_state(len(x), grid or ct.Grid(t=1, n=cuts[0])), []
    for part in x.split(cuts, 1):
        y, state = layer.step(part, state if grid else replace(state, grid=ct.Grid(t=1, n=part.shape[1])))
        out.append(y)
    return torch.cat(out, 1), state


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 7),
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.sampled_from(["token_head", "heads", "tokens"]),
    st.booleans(),
)
def test_chunks_that_read_every_block_equal_the_whole(block, cuts, share, rope):
    torch.manual_seed(0)
    position = ct.Rope("n") if rope else None
    # All blocks by default, or so many that none is left out.
    for keep in (None, sum(cuts)):
        layer = LandmarkAttention(16, 2, block=block, keep=keep, share=share, position=position).double()
        x = tokens(2, sum(cuts), 16)
        out, state = chunked(layer, x, cuts)
        assert (out - layer(x, ct.Grid(n=sum(cuts)))).abs().max() < 1e-12
        assert state.cache.landmarks.shape[2] == sum(cuts) // (block + 1)


def test_stepping_in_float32_by_token_and_by_frame():
    torch.manual_seed(0)
    x = tokens(2, 60, 16, dtype=torch.float32)
    by_token, by_frame = LandmarkAttention(16, 2, block=5), LandmarkAttention(16, 2, block=9)
    for layer, grid in ((by_token, ct.Grid(n=60)), (by_frame, ct.Grid(t=6, n=10))):
        one = grid.replace(**{grid.axes[0]: 1})
        out, state = chunked(layer, x, [one.size] * grid.shape[0], one)
        assert (out - layer(x, grid)).abs().max() < 1e-5
        assert state.nbytes == 4 * 2 * 2 * 8 * (2 * 60 - 60 // (layer.block + 1))  # of a landmark no value is held


@pytest.mark.parametrize("share", ["token_head", "heads", "tokens"])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_memory_equals_the_grouped_softmax_over_what_was_fetched(keep, share):
    """Each query by itself: keys rotated at the places that its blocks take, one grouped softmax over all."""
    torch.manual_seed(0)
    layer, block, cuts = LandmarkAttention(16, 2, block=4, keep=keep, share=share).double(), 4, [33, 9, 13]
    size, x = block + 1, tokens(1, sum(cuts), 16)
    out, _ = chunked(layer, x, cuts)
    start = sum(cuts[:-1])
    count, first = start // size, start // size * size
    q, k, v = layer._heads(x)
    shift = max(count - keep - 1, 0)
    scored = [max(b - shift, 0) for b in range(count)]
    rope = layer.position
    queries = rope(q[:, :, start:], coords=torch.arange(start, sum(cuts), dtype=DOUBLE)[:, None] - shift * size)
    marked = k[:, :, block : count * size : size]
    marked = rope(marked, coords=torch.tensor(scored, dtype=DOUBLE)[:, None] * size + block)
    odds = (queries @ marked.mT / 8**0.5).softmax(-1)
    odds = odds.amax(1, True).expand_as(odds) if share == "heads" else odds
    odds = odds.amax(2, True).expand_as(odds) if share == "tokens" else odds
    expected = torch.zeros(1, 2, cuts[-1], 8, dtype=DOUBLE)
    for h in range(2):
        for i in range(cuts[-1]):
            best = sorted(odds[0, h, i].topk(keep).indices.tolist())
            places = [(n + (b >= count - keep)) * size + r for n, b in enumerate(best) for r in range(size)]
            kept = [b * size + r for b in best for r in range(size)]
            seen = kept + list(range(first, start + i + 1))
            places += [j - shift * size for j in range(first, start + i + 1)]
            keys = rope(k[:, h : h + 1, seen], coords=torch.tensor(places, dtype=DOUBLE)[:, None])
            logits = queries[:, h : h + 1, i : i + 1] @ keys.mT / 8**0.5
            weights = grouped_softmax(logits, (torch.tensor(seen) % size == block)[None])
            expected[0, h, i] = (weights @ v[:, h : h + 1, seen])[0, 0, 0]
    assert (out[:, start:] - layer._left(expected)).abs().max() < 1e-12


def test_a_query_reads_so_many_tokens_exactly_and_nothing_else():
    keep, n, position = 3, 7, ct.Rope("n")
    q = tokens(1, 2, n, 8)
    k, v = (tokens(1, 2, 10 * (BLOCK + 1), 8, seed=s).requires_grad_() for s in (1, 2))
    empty = q[:, :, :0]
    cached = Cache(empty, empty, empty, BLOCK).grown(k, v)
    parts = read(q, torch.arange(n), cached, position, keep)
    assert len(parts) == keep
    for h in range(2):
        for i in range(n):
            total = sum(out[0, h, i].sum() + score[0, h, i] for out, score in parts)
            touched = [x.abs().sum(-1) > 0 for x in torch.autograd.grad(total, (k, v), retain_graph=True)]
            assert touched[0].sum() == keep * (BLOCK + 1)
            assert touched[1].sum() == keep * BLOCK
            assert touched[0][0, h].unflatten(0, (10, -1)).all(1).sum() == keep
    # Blocks that nobody reads do not leave the place where they lie.
    shared = chosen_blocks((q @ cached.landmarks.mT / 8**0.5).detach(), keep, "tokens").unique().tolist()
    spoiled = cached.each(lambda x: x.detach().clone())
    for b in set(range(10)) - set(shared):
        spoiled.keys[:, :, b * BLOCK : (b + 1) * BLOCK] = torch.nan
        spoiled.values[:, :, b * BLOCK : (b + 1) * BLOCK] = torch.nan
    assert all(out.isfinite().all() for out, _ in read(q, torch.arange(n), spoiled, None, keep, "tokens"))


def test_no_place_lies_beyond_the_slots_and_their_order_is_kept():
    for count in range(1, 12):
        for keep in range(1, 12):
            slots = scored_slots(count, keep, torch.device("cpu"))
            assert slots.max() <= keep
            assert (slots.diff() >= 0).all()
            assert slots[-1] == min(count, keep + 1) - 1
            assert slots[-keep:].diff().eq(1).all()
            best = torch.rand(1, 1, 50, count).argsort(-1)[..., :keep].sort(-1).values
            places = read_slots(best, count, keep)
            assert places.max() <= slots[-1]
            assert (places.diff(dim=-1) > 0).all()
            if count <= keep:
                assert torch.equal(places, best)
            else:
                recent = best >= count - keep
                assert (places[recent] > 0).all()
                assert torch.equal(recent, places > torch.arange(best.shape[-1]))


def test_a_rotation_by_places_of_ones_own():
    x, position = tokens(2, 3, 5, 8), ct.Rope("n")
    place = torch.randint(-20, 20, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    out = rotated(x, position, place)
    for b in range(2):
        for h in range(3):
            alone = position(x[b : b + 1, h : h + 1], coords=place[b, h, :, None])
            assert (out[b, h] - alone[0, 0]).abs().max() < 1e-14
    assert rotated(x, None, place) is x


def test_the_future_changes_nothing():
    torch.manual_seed(0)
    x, grid = tokens(1, 40, 16), ct.Grid(n=40)
    for share in ("token_head", "heads"):
        layer = LandmarkAttention(16, 2, block=BLOCK, keep=2, share=share).double()
        whole, steps = layer(x, grid), chunked(layer, x, [25, 15])[0]
        for j in (5, 17, 26, 33):
            changed = x.clone()
            changed[:, j:] += 1
            assert (layer(changed, grid)[:, :j] - whole[:, :j]).abs().max() < 1e-13
            assert (chunked(layer, changed, [25, 15])[0][:, :j] - steps[:, :j]).abs().max() < 1e-13
            assert (layer(changed, grid)[:, j] - whole[:, j]).abs().max() > 1e-3


def test_a_state_is_left_as_it_was_and_follows_its_batch():
    torch.manual_seed(0)
    layer = LandmarkAttention(16, 2, block=BLOCK, keep=1, cache_device="cpu").double()
    x = tokens(3, 44, 16)
    _, before = chunked(layer, x[:, :31], [31])
    before = replace(before, grid=ct.Grid(t=1, n=13))
    held = [y.clone() for y in before.tensors()]
    y, _ = layer.step(x[:, 31:], before)
    assert all(torch.equal(a, b) for a, b in zip(held, before.tensors(), strict=True))
    order = torch.tensor([2, 0])
    assert (layer.step(x[order, 31:], before.select(order))[0] - y[order]).abs().max() < 1e-13


def test_landmarks_are_inserted_after_whole_blocks():
    x, mark = tokens(2, 13, 4), tokens(4, seed=5)
    out = insert_landmarks(x, mark, 5)
    assert out.shape == (2, 15, 4)
    where = landmarks(15, 5)
    assert where.nonzero()[:, 0].tolist() == [5, 11]
    assert torch.equal(out[:, ~where], x)
    assert (out[:, where] == mark).all()


def test_gradients_reach_every_weight_and_the_landmark():
    torch.manual_seed(0)
    layer, mark = LandmarkAttention(16, 2, block=BLOCK), nn.Parameter(torch.zeros(16))
    out = layer(insert_landmarks(tokens(1, 30, 16, dtype=torch.float32), mark, BLOCK), ct.Grid(n=36))
    out.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in (*layer.parameters(), mark))


def test_what_is_refused():
    q = tokens(1, 1, 6, 4)
    with pytest.raises(ct.ChronotopeError, match="not both"):
        landmark_attention(q, q, q)
    with pytest.raises(ct.ChronotopeError, match="share is one of token_head, heads, tokens"):
        LandmarkAttention(16, 2, share="all")
    with pytest.raises(ct.ChronotopeError, match="takes no context"):
        LandmarkAttention(16, 2)(torch.zeros(1, 4, 16), ct.Grid(n=4), torch.zeros(1, 4, 16))
