"""Cambrian-S: what surprises, and what a bounded memory keeps of it and reads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.stream.cambrian import LatentPredictor, SurpriseMemory, surprise


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stream(frames, batch=2, heads=2, n=4, size=8, seed=0, dtype=torch.float64):
    """k and v [T, B, Hk, n, D], and surprises [T, B] from 0 to 2."""
    k, v = (numbers(frames, batch, heads, n, size, seed=seed + i, dtype=dtype) for i in (1, 2))
    return k, v, numbers(frames, batch, seed=seed + 3, dtype=dtype).abs().clamp(max=2)


def fed(policy, k, v, s, state=None):
    for frame in zip(k, v, s, strict=True):
        state = policy.step(*frame, state)
    return state


def dense(q, k, v):
    return ct.attention(q, k, v, grid=ct.Grid(n=q.shape[2]), key_grid=ct.Grid(n=k.shape[2]), return_lse=True)


def plainly(policy, k, v, s):
    """What one member stores, as a list of [time, surprise, frames that it stands for, k, v], the slow way."""

    def pooled(x):
        return x.unflatten(1, (-1, policy.compress)).mean(2)

    window, memory, size = [], [], k.shape[2] // policy.compress
    for t in range(len(k)):
        window.append([t, s[t].item(), 1.0, k[t], v[t]])
        if len(window) <= policy.window:
            continue
        time, unexpected, count, *kv = window.pop(0)
        memory.append([time, unexpected, count, *(map(pooled, kv) if unexpected < policy.threshold else kv)])
        while sum(x[3].shape[1] for x in memory) > policy.budget * size * policy.compress:
            if policy.policy == "drop":
                memory.remove(min(memory, key=lambda x: x[1]))
                continue
            i = min(range(len(memory) - 1), key=lambda i: max(memory[i][1], memory[i + 1][1]))
            (time, s1, n1, *kv1), (_, s2, n2, *kv2) = memory[i : i + 2]
            kv1, kv2 = ([x if x.shape[1] == size else pooled(x) for x in kv] for kv in (kv1, kv2))
            kv = [(n1 * a + n2 * b) / (n1 + n2) for a, b in zip(kv1, kv2, strict=True)]
            memory[i : i + 2] = [[time, max(s1, s2), n1 + n2, *kv]]
    return memory + window


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["drop", "merge"]), st.integers(1, 4), st.sampled_from([1, 1.5, 2, 5, math.inf]),
    st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 0.7, 3.0]), st.integers(1, 25), st.integers(0, 99),
)  # fmt: skip
def test_what_is_stored_and_read_is_what_the_words_say(how, window, budget, compress, threshold, frames, seed):
    policy = SurpriseMemory(window, budget, threshold, compress, how)
    k, v, s = stream(frames, batch=3, seed=seed)
    q, state = numbers(3, 4, 5, 8, seed=seed + 9), fed(policy, k, v, s)
    out, lse = policy.read(q, state)
    for i in range(3):
        stored = plainly(policy, k[:, i], v[:, i], s[:, i])
        times = torch.cat([x.time[i].unique() for x in (state.memory, state.window)])
        assert times[times >= 0].tolist() == [x[0] for x in stored]
        keys, values = (torch.cat([x[j] for x in stored], 1)[None] for j in (3, 4))
        assert state.tokens[i] == keys.shape[2] <= (window + budget) * 4
        expected = dense(q[i : i + 1], keys, values)
        torch.testing.assert_close(out[i : i + 1], expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(lse[i : i + 1], expected[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", ["drop", "merge"])
def test_room_for_all_and_no_pooling_is_the_full_cache(policy):
    k, v, s = stream(300, dtype=torch.float32)
    memory = SurpriseMemory(4, math.inf, 0.7, compress=1, policy=policy)
    q, state = numbers(2, 4, 6, 8, seed=9, dtype=torch.float32), fed(memory, k, v, s)
    expected, _ = dense(q, *(x.movedim(0, 2).flatten(2, 3) for x in (k, v)))
    for retrieve in (None, 296, 10_000):
        out, _ = memory.read(q, state, retrieve)
        assert (out - expected).abs().max() < 1e-5
    # What the mean of all of them hides, few frames do not show.
    assert (memory.read(q, state, 3)[0] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("frames", [300, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["drop", "merge"])
def test_a_long_stream_takes_no_more_room_than_the_budget(policy, frames):
    memory, state, most = SurpriseMemory(5, 12, 0.7, policy=policy), None, 0
    k, v, s = stream(frames, batch=2, heads=1, n=2, size=2, dtype=torch.float32)
    for t in range(len(k)):
        state = memory.step(k[t], v[t], s[t], state)
        most = max(most, int(state.tokens.max()))
    assert state.length == frames
    assert 12 * 2 <= most <= (5 + 12) * 2
    # Not only counted: the tensors are no larger.
    assert state.memory.k.shape[2] * state.memory.k.shape[3] <= 12 * 2
    if policy == "merge":  # nothing is forgotten: what is there stands for all frames
        weight = torch.where(state.memory.time >= 0, state.memory.weight, 0).sum(1)
        torch.testing.assert_close(weight, torch.full((2,), frames - 5.0))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12), st.integers(1, 20), st.integers(1, 3), st.integers(0, 99))
def test_retrieval_is_full_attention_restricted_to_the_frames_most_alike(count, frames, window, seed):
    memory = SurpriseMemory(window, math.inf, 0.0)
    k, v, s = stream(frames, seed=seed)
    q, state = numbers(2, 4, 5, 8, seed=seed + 9), fed(memory, k, v, s)
    out, lse = memory.read(q, state, count)
    old = max(frames - window, 0)
    asked = q.unflatten(1, (2, 2)).mean((2, 3))
    alike = F.cosine_similarity(k[:old].mean(3).flatten(2), asked.flatten(1)[None], dim=2)
    best = alike.topk(min(count, old), dim=0).indices
    seen = torch.arange(frames)[:, None].expand(-1, 2) >= old
    seen = seen.scatter(0, best, torch.ones_like(best, dtype=torch.bool))
    every = [x.movedim(0, 2).flatten(2, 3) for x in (k, v)]
    bias = torch.zeros(2, 1, 1, frames * 4, dtype=q.dtype)
    bias = bias.masked_fill(~seen.T.repeat_interleave(4, 1)[:, None, None], -torch.inf)
    grids = {"grid": ct.Grid(n=5), "key_grid": ct.Grid(n=frames * 4)}
    expected = ct.attention(q, *every, bias=bias, return_lse=True, backend="reference", **grids)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-6)


def test_a_question_reads_memory_and_its_own_text():
    memory, (k, v, s) = SurpriseMemory(2, 4, 0.7), stream(20)
    q, state = numbers(2, 4, 3, 8, seed=7), fed(memory, k, v, s)
    text = [numbers(2, 2, 3, 8, seed=i) for i in (8, 9)]
    words = ct.attention(q, *text, grid=ct.Grid(n=3), where=ct.causal(), return_lse=True)
    out, _ = ct.merge([memory.read(q, state), words])
    frames = state.memory.joined(state.window).tokens()[:2]
    assert bool((state.memory.joined(state.window).time >= 0).all())
    keys, values = (torch.cat(pair, 2) for pair in zip(frames, text, strict=True))
    n = keys.shape[2]
    bias = torch.zeros(3, n, dtype=q.dtype)
    bias[:, n - 3 :] = torch.full((3, 3), -torch.inf, dtype=q.dtype).triu(1)
    expected = ct.attention(q, keys, values, grid=ct.Grid(n=3), key_grid=ct.Grid(n=n), bias=bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", ["drop", "merge"])
def test_layers_and_members_are_their_own_and_states_stay_as_they_were(policy):
    memory, (k, v, s) = SurpriseMemory(2, 3, 0.7, policy=policy), stream(30, batch=3)
    whole = fed(memory, k, v, s)
    # Another layer, with other keys and the same surprises, keeps the same frames.
    assert torch.equal(fed(memory, 2 * v, k, s).memory.time, whole.memory.time)
    half = fed(memory, k[:15], v[:15], s[:15])
    before, index = half.to_dict(), torch.tensor([2, 0, 2])
    before = {name: x.clone() for name, x in before.items()}
    rest = fed(memory, k[15:, index], v[15:, index], s[15:, index], half.select(index))
    q = numbers(3, 4, 5, 8, seed=7)
    torch.testing.assert_close(memory.read(q[index], rest)[0], memory.read(q, whole)[0][index], rtol=0, atol=1e-12)
    assert all(torch.equal(x, before[name]) for name, x in half.to_dict().items())


def test_gradients_reach_what_is_stored_and_nothing_else():
    memory, (k, v, s) = SurpriseMemory(2, 3, 0.7), stream(12, batch=1)
    v.requires_grad_(), s.requires_grad_()
    state = fed(memory, k, v, s)
    memory.read(numbers(1, 4, 5, 8), state)[0].square().sum().backward()
    stored = torch.cat((state.memory.time, state.window.time), 1).unique().tolist()
    assert s.grad is None
    assert [t for t in range(12) if v.grad[t].abs().max() > 0] == stored


@pytest.mark.parametrize("policy", ["drop", "merge"])
def test_a_frame_of_nan_spoils_nothing_but_itself(policy):
    memory, (k, v, s) = SurpriseMemory(2, 3, 0.7, policy=policy), stream(12, batch=2)
    k[3, 0], v[3, 0] = torch.full_like(k[3, 0], math.nan), torch.full_like(v[3, 0], math.inf)
    s[3, 0], s[3, 1] = (0.0, 0.0) if policy == "drop" else (2.0, 2.0)
    state = fed(memory, k, v, s)
    spoilt = ~state.memory.k.isfinite().all(-1).all(-1).all(1)
    assert not spoilt[1].any()
    assert state.memory.time[spoilt].unique().tolist() == ([] if policy == "drop" else [3])
    assert memory.read(numbers(2, 4, 5, 8), state)[0][1 if policy == "merge" else slice(None)].isfinite().all()


def test_bad_input_is_refused():
    for options in ({"window": 0}, {"budget": -1}, {"compress": 0}, {"budget": 0.5, "policy": "merge"}):
        with pytest.raises(ct.ChronotopeError, match="expected window and compress"):
            SurpriseMemory(**({"window": 1, "budget": 2, "threshold": 0.5} | options))
    with pytest.raises(ct.ChronotopeError, match="drop, merge"):
        SurpriseMemory(1, 2, 0.5, policy="keep")
    k, v, s = stream(1, n=3)
    with pytest.raises(ct.ChronotopeError, match="multiple of compress=2"):
        fed(SurpriseMemory(1, 2, 0.5), k, v, s)


def test_surprise_and_the_loss_are_their_formulas():
    torch.manual_seed(0)
    predictor, h, z = LatentPredictor(6, 5), torch.randn(2, 7, 6), torch.randn(2, 7, 5)
    expected, came = predictor(h)[:, :-1], z[:, 1:]
    cosine = (expected * came).sum(-1) / (expected.norm(dim=-1) * came.norm(dim=-1))
    torch.testing.assert_close(surprise(expected, came), 1 - cosine)
    torch.testing.assert_close(predictor.loss(h, z), (expected - came).square().mean() + (1 - cosine).mean())
    assert surprise(z, z).abs().max() < 1e-6
    torch.testing.assert_close(surprise(z, -z), torch.full((2, 7), 2.0))


def test_a_predictor_expects_what_persistence_does_not():
    """Latents that turn by 0.8 a frame: foreseeable, though never as before."""
    torch.manual_seed(0)
    turn = torch.matrix_exp(0.8 * torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]])] * 4))

    def turning(batch):
        z = [torch.randn(batch, 8)]
        for _ in range(15):
            z.append(z[-1] @ turn.T)
        return torch.stack(z, 1)

    predictor = LatentPredictor(8, 8, 64)
    optimizer = torch.optim.Adam(predictor.parameters(), 3e-3)
    for _ in range(300):
        z = turning(32)
        loss = predictor.loss(z, z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z = turning(64).detach()
    z[:, 8:] = turning(64)[:, 8:]  # here is another thing to see
    with torch.no_grad():
        foreseen, same = surprise(predictor(z)[:, :-1], z[:, 1:]), surprise(z[:, :-1], z[:, 1:])
    calm = torch.arange(15) != 7
    print(f"calm {foreseen[:, calm].mean():.3f}, cut {foreseen[:, 7].mean():.3f}; by persistence "
          f"{same[:, calm].mean():.3f}, {same[:, 7].mean():.3f}")  # fmt: skip
    assert foreseen[:, calm].mean() < 0.1 * same[:, calm].mean()
    assert foreseen[:, 7].mean() > 0.8
