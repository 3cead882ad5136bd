"""Temporal Token Fusion: still scenes, masks, slow drifts, episodes, and a policy that looks for a square in noise."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.stream.ttf_vla import (
    Changed,
    Either,
    FusionState,
    Policy,
    Relevant,
    Smooth,
    TokenFusion,
    patch_change,
    relevance,
)

HYBRID = Changed(0.1) | Relevant(30)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def colours(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def run(fusion, frames, tokens, scores=None):
    """All steps of an episode: tokens [T, B, N, D] and new [T, B, N]; scores [T, B, N]: what the model looked at."""
    fused, new, state = [], [], None
    for t in range(len(frames)):
        out = fusion.step(frames[t], tokens[t], state)
        state = out.state if scores is None else out.state.attended(scores[t])
        fused.append(out.tokens)
        new.append(out.new)
    return torch.stack(fused), torch.stack(new)


# --- 1: still scenes, and no fusion ---


@pytest.mark.parametrize("policy", [Changed(0.1), Changed(0.0), Smooth(0.1), Smooth(0.0), Changed(0.1) | Relevant(0)])
def test_of_a_still_scene_all_tokens_are_those_of_the_first_frame(policy):
    frames = colours(2, 3, 32, 32).expand(9, -1, -1, -1, -1)
    tokens = numbers(9, 2, 64, 5)  # an encoder that flickers: nothing but reuse can make its tokens equal
    fused, new = run(TokenFusion(policy, every=100, patch=4), frames, tokens, colours(9, 2, 64))
    assert torch.equal(fused, tokens[:1].expand(9, -1, -1, -1))
    assert new[0].all() and not new[1:].any()
    fused, new = run(TokenFusion(policy, every=4, patch=4), frames, tokens, colours(9, 2, 64))
    assert torch.equal(fused, tokens[[0, 0, 0, 0, 4, 4, 4, 4, 8]])
    # An encoder that does not flicker gives what it gave, keyframes or not.
    still = tokens[:1].expand(9, -1, -1, -1)
    fused, _ = run(TokenFusion(policy, every=4, patch=4), frames, still, colours(9, 2, 64))
    assert torch.equal(fused, still)


@pytest.mark.parametrize(
    "fusion",
    [TokenFusion(Changed(-1.0), 100, 4), TokenFusion(Smooth(-1.0), 100, 4), TokenFusion(Changed(9.0), 1, 4),
     TokenFusion(Smooth(9.0), 1, 4), TokenFusion(Relevant(64), 100, 4), TokenFusion(HYBRID, 1, 4)],
)  # fmt: skip
def test_a_threshold_below_zero_or_a_keyframe_each_step_is_no_fusion(fusion):
    frames, tokens = colours(1, 2, 3, 32, 32).expand(7, -1, -1, -1, -1), numbers(7, 2, 64, 5)
    fused, new = run(fusion, frames, tokens, colours(7, 2, 64))
    assert torch.equal(fused, tokens) and new.all()
    assert not torch.equal(run(TokenFusion(Changed(9.0), 100, 4), frames, tokens)[0], tokens)


# --- 2: the algebra of masks ---


def test_reused_is_what_neither_changed_nor_mattered_exhaustively():
    """All 16 x 16 ways in which 4 patches change and matter."""
    ways = torch.tensor(list(product((False, True), repeat=4)))
    changed, matters = ways.repeat_interleave(16, 0), ways.repeat(16, 1)
    before = colours(256, 1, 4, 4)
    frame = before + 0.5 * changed.view(256, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    old, fresh = numbers(256, 4, 3), numbers(256, 4, 3, seed=1)
    for keep in range(5):
        some = matters.sum(1) == keep
        fusion = TokenFusion(Changed(0.1) | Relevant(keep), patch=2)
        state = fusion.step(before[some], old[some]).state.attended(matters[some].float())
        fused, new, _ = fusion.step(frame[some], fresh[some], state)
        assert torch.equal(~new, ~(changed | matters)[some])
        assert torch.equal(fused, torch.where(new[..., None], fresh[some], old[some]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70), st.floats(0, 0.6), st.booleans(), st.integers(0, 999))
def test_exactly_k_patches_matter_and_either_test_makes_new(keep, tau, ties, seed):
    frame, before = colours(2, 3, 32, 32, seed=seed), colours(2, 3, 32, 32, seed=seed + 1)
    scores = colours(2, 64, seed=seed)
    scores = (scores * 3).round() if ties else scores
    change = patch_change(frame, before, 4)
    matters = Relevant(keep)(change, scores)
    assert torch.equal(matters.sum(1), torch.full((2,), float(min(keep, 64))))
    if 0 < keep < 64:
        assert (scores.masked_fill(matters == 0, 9).amin(1) >= scores.masked_fill(matters == 1, -9).amax(1)).all()
    changes = Changed(tau)(change, scores)
    assert torch.equal(changes == 1, change > tau)
    both = (Changed(tau) | Relevant(keep))(change, scores)
    assert torch.equal(both == 0, (changes == 0) & (matters == 0))
    smooth = Smooth(tau)(change, scores)
    torch.testing.assert_close(smooth, (change / tau).clamp(0, 1) if tau > 1e-3 else smooth)
    assert torch.equal((Smooth(tau) | Relevant(keep))(change, scores), torch.maximum(smooth, matters))


def test_change_is_the_mean_difference_in_grey_of_each_patch():
    frame, before = colours(2, 3, 6, 8), colours(2, 3, 6, 8, seed=1)
    found = patch_change(frame, before, 2).view(2, 3, 4)
    for b, row, column in product(range(2), range(3), range(4)):
        here = (b, slice(None), slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
        red, green, blue = (frame[here] - before[here]).unbind(0)
        by_hand = (0.299 * red + 0.587 * green + 0.114 * blue).abs().mean()
        torch.testing.assert_close(found[b, row, column], by_hand)
    torch.testing.assert_close(
        patch_change(frame[:, :1], before[:, :1], 2)[0, 0], (frame - before)[0, 0, :2, :2].abs().mean()
    )


def test_attention_counts_for_one_step_and_without_it_all_patches_matter():
    frame, tokens, fusion = colours(1, 3, 32, 32), numbers(4, 1, 64, 5), TokenFusion(HYBRID, every=100, patch=4)
    first = fusion.step(frame, tokens[0])
    second = fusion.step(frame, tokens[1], first.state.attended(colours(1, 64)))
    assert int(second.new.sum()) == 30
    third = fusion.step(frame, tokens[2], second.state)
    assert third.new.all() and torch.equal(third.tokens, tokens[2])
    assert not fusion.step(frame, tokens[3], second.state.attended(colours(1, 64))).new.all()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_relevance_is_a_part_of_the_softmax_that_the_model_took(kv_heads):
    q, k = numbers(2, 4, 30, 8), numbers(2, kv_heads, 30, 8, seed=1)
    _, lse = ct.attention(q, k, k, grid=ct.Grid(n=30), where=ct.causal(), return_lse=True)
    logits = q @ k.repeat_interleave(4 // kv_heads, 1).transpose(2, 3) / 8**0.5
    weights = logits.masked_fill(~torch.ones(30, 30, dtype=torch.bool).tril(), -torch.inf).softmax(-1).mean(1)
    for rows in (slice(20, 30), slice(29, 30)):  # text, and one action
        found = relevance(q[:, :, rows], k[:, :, 4:20], lse[:, :, rows])
        torch.testing.assert_close(found, weights[:, rows, 4:20].mean(1))


# --- 3: drift ---


@pytest.mark.parametrize("every", [2, 3, 5, 8])
@pytest.mark.parametrize("policy", [Changed(0.1), Changed(0.1) | Relevant(7)])
def test_a_drift_below_the_threshold_is_never_more_than_k_minus_one_steps_late(policy, every):
    steps = 3 * every + 1
    frames = 0.05 * torch.arange(steps).view(-1, 1, 1, 1, 1) + colours(1, 1, 3, 32, 32)
    tokens = torch.arange(steps).float().view(-1, 1, 1, 1).expand(-1, 1, 64, 1)  # a token says of which frame it is
    fused, _ = run(TokenFusion(policy, every, 4), frames, tokens, colours(1, 1, 64).expand(steps, -1, -1))
    lag = (tokens - fused)[:, 0, :, 0]
    kept = lag[:, lag.amax(0) > 0]
    assert kept.shape[1] == (64 if policy == Changed(0.1) else 57)
    expected = (torch.arange(steps) % every).float()
    assert torch.equal(kept, expected[:, None].expand_as(kept))  # at most K - 1, and 0 at each keyframe
    # A jump above the threshold is seen at once.
    frames[every - 1] += 1
    fused, new = run(TokenFusion(policy, every, 4), frames, tokens)
    assert new[every - 1].all() and torch.equal(fused[every - 1], tokens[every - 1])


# --- 4: episodes, states ---


def wandering(steps, seed, batch=2):
    noise = 0.12 * numbers(steps, batch, 3, 32, 32, seed=seed)
    return noise.cumsum(0), numbers(steps, batch, 64, 5, seed=seed + 1), colours(steps, batch, 64, seed=seed)


def test_an_episode_knows_nothing_of_the_one_before():
    fusion = TokenFusion(HYBRID, every=5, patch=4)
    first, second = wandering(7, 1), wandering(8, 2)
    alone, alone_new = run(fusion, *second)
    state = None
    for frame, tokens, scores in zip(*first, strict=True):
        state = fusion.step(frame, tokens, state).state.attended(scores)
    stale = fusion.step(second[0][0], second[1][0], state)
    assert not torch.equal(stale.tokens, alone[0])
    # Of two robots one has finished: it starts anew, the other goes on.
    ended = torch.tensor([True, False])
    on = state.restarted(ended)
    for t, (frame, tokens, scores) in enumerate(zip(*second, strict=True)):
        fused = fusion.step(frame, tokens, on)
        other = fusion.step(frame, tokens, state)
        assert torch.equal(fused.tokens[0], alone[t, 0]) and torch.equal(fused.new[0], alone_new[t, 0])
        assert torch.equal(fused.tokens[1], other.tokens[1])
        on, state = fused.state.attended(scores), other.state.attended(scores)


def test_a_state_is_carried_like_any_other():
    fusion = TokenFusion(HYBRID, every=5, patch=4)
    frames, tokens, scores = wandering(3, 4)
    state = fusion.step(frames[0], tokens[0]).state.attended(scores[0])
    index = torch.tensor([1, 0, 1])
    whole = fusion.step(frames[1], tokens[1], state)
    some = fusion.step(frames[1][index], tokens[1][index], state.select(index))
    assert torch.equal(some.tokens, whole.tokens[index])
    back = FusionState(*(torch.zeros_like(x) for x in state.tensors())).from_dict(state.to_dict())
    assert torch.equal(fusion.step(frames[1], tokens[1], back).tokens, whole.tokens)
    # What the caller writes into its own tensors afterwards does not matter.
    frame, made = frames[0].clone(), tokens[0].clone()
    kept = fusion.step(frame, made)
    for mine in (frame, made, kept.tokens):
        mine.zero_()
    assert torch.equal(fusion.step(frames[1], tokens[1], kept.state.attended(scores[0])).tokens, whole.tokens)


def test_only_new_tokens_need_to_be_made():
    """The compute-saving form: an encoder of single patches that leaves all others unwritten."""
    matrix = numbers(48, 5)
    patches = lambda frame: F.unfold(frame, 4, stride=4).transpose(1, 2)  # noqa: E731
    made = []

    def encode(frame, new):
        out = torch.full((*new.shape, 5), torch.nan)
        out[new] = patches(frame)[new] @ matrix
        made.append(int(new.sum()))
        return out

    frames, _, scores = wandering(9, 5)
    for policy in (HYBRID, Smooth(0.1)):
        fusion, state, full = TokenFusion(policy, every=5, patch=4), None, None
        for t in range(9):
            lazy, eager = (
                fusion.step(frames[t], encode, state),
                fusion.step(frames[t], patches(frames[t]) @ matrix, full),
            )
            torch.testing.assert_close(lazy.tokens, eager.tokens)
            state, full = lazy.state.attended(scores[t]), eager.state.attended(scores[t])
    assert made[0] == made[5] == 128 and 60 <= max(made[1:5] + made[6:9]) < 128


def test_no_gradient_passes():
    tokens = numbers(1, 64, 5).requires_grad_()
    fused = TokenFusion(HYBRID, patch=4).step(colours(1, 3, 32, 32), tokens)
    assert not fused.tokens.requires_grad and not fused.state.tokens.requires_grad


def test_a_policy_of_ones_own():
    class Odd(Policy):
        def __call__(self, change, scores):
            return torch.arange(change.shape[1]).expand_as(change) % 2 * 1.0

    fusion = TokenFusion(Odd() | Changed(9.0), every=100, patch=4)
    assert isinstance(fusion.policy, Either)
    tokens = numbers(2, 1, 64, 5)
    fused, _ = run(fusion, colours(2, 1, 3, 32, 32), tokens)
    assert torch.equal(fused[1, :, 1::2], tokens[1, :, 1::2]) and torch.equal(fused[1, :, ::2], tokens[0, :, ::2])


def test_bad_input_is_refused():
    with pytest.raises(ct.ChronotopeError, match="from 1 on"):
        TokenFusion(every=0)
    with pytest.raises(ct.ChronotopeError, match="from 0 on"):
        Relevant(-1)
    fusion = TokenFusion(patch=4)
    with pytest.raises(ct.ChronotopeError, match="multiples of patch=4"):
        fusion.step(colours(1, 3, 30, 32), numbers(1, 64, 5))
    with pytest.raises(ct.ChronotopeError, match=r"\[1, 64\]"):
        fusion.step(colours(1, 3, 32, 32), numbers(1, 60, 5))
    state = fusion.step(colours(1, 3, 32, 32), numbers(1, 64, 5)).state
    with pytest.raises(ct.ChronotopeError, match=r"expected \[1, 64\]"):
        state.attended(colours(1, 60))
    with pytest.raises(ct.ChronotopeError, match="multiples of patch"):
        fusion.step(colours(2, 3, 32, 32), numbers(2, 64, 5), state)


# --- the released code ---


def test_the_released_code_makes_the_same_tokens_new():
    """PKU-XLab/TTF-VLA at afbd6bf3, `APTubeManager`, ran on these frames: patches that it recomputed of 256.

    Its masks and fused tokens were equal to those here, in all these cases and in those of smooth fusion, of one layer
    or the mean of four, and of text or action.
    """
    torch.manual_seed(0)
    drift = (torch.rand(7, 1, 1, 16, 16) / 4).repeat_interleave(14, 3).repeat_interleave(14, 4)
    frames = (drift * torch.randn(7, 1, 3, 224, 224)).cumsum(0)
    scores = torch.rand(7, 1, 256)
    for policy, counts in [
        (Changed(0.1), [256, 65, 69, 61, 61, 256, 58]),
        (Changed(0.03), [256, 196, 198, 199, 183, 256, 201]),
        (Changed(0.1) | Relevant(120), [256, 158, 153, 155, 154, 256, 149]),
        (Changed(0.03) | Relevant(70), [256, 220, 213, 215, 204, 256, 219]),
    ]:
        _, new = run(TokenFusion(policy), frames, torch.zeros(7, 1, 256, 1), scores)
        assert new.sum(2)[:, 0].tolist() == counts


# --- 5: a policy that looks for a square ---

SIDE, PATCH = 32, 4
SCENE = 0.1 + 0.2 * colours(3, SIDE, SIDE)


def episode(steps, size, speed, rng):
    """A white square that wanders over a still scene, under noise of 0.05 in each pixel; and where it is [T, 2]."""
    place, turn = torch.rand(2, generator=rng) * (SIDE - size), torch.rand(1, generator=rng) * 2 * torch.pi
    velocity, pixel, last = speed * torch.cat((turn.cos(), turn.sin())), torch.arange(SIDE), SIDE - size
    frames, places = [], []
    for _ in range(steps):
        place = place + velocity
        velocity = torch.where((place < 0) | (place > last), -velocity, velocity)
        place = place.abs()
        place = torch.where(place > last, 2 * last - place, place)
        rows, columns = (((pixel + 1).clamp(max=p + size) - pixel.clamp(min=p)).clamp(0, 1) for p in place)
        inside = rows[:, None] * columns
        frames.append(SCENE * (1 - inside) + inside)
        places.append(place)
    frames = torch.stack(frames)
    return frames + 0.05 * torch.randn(frames.shape, generator=rng), torch.stack(places)


def encoded(frames):
    """Tokens [.., 64, 12]: the colours of the four quarters of each patch."""
    halves = F.avg_pool2d(frames, 2).unflatten(2, (8, 2)).unflatten(4, (8, 2))
    return halves.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def fitted(x, y):
    """The linear policy from all tokens to the place: ridge regression."""
    x, y = F.pad(x.flatten(1), (0, 1), value=1.0).double(), y.double()
    return torch.linalg.solve(x.T @ x + 0.01 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


def looked_at(tokens):
    """Attention of one word, "white", to patches with their neighbours: a layer of a model on fused tokens."""
    grid = ct.Grid(h=8, w=8)
    flat = torch.zeros(len(tokens), 1, 64, 12)
    keys = ct.attention(flat, flat, tokens[:, None], grid=grid, where=ct.window(h=3, w=3))
    word = torch.full((len(tokens), 1, 1, 12), 2.0)
    _, lse = ct.attention(word, keys, keys, grid=ct.Grid(n=1), key_grid=ct.Grid(n=64), return_lse=True)
    return relevance(word, keys, lse)


def acted(weights, frames, fusion):
    """What the policy says in each step [T, B, 2]."""
    said, state = [], None
    for frame in frames:
        tokens = encoded(frame)
        if fusion is not None:
            fused = fusion.step(frame, tokens, state)
            tokens, state = fused.tokens, fused.state.attended(looked_at(fused.tokens))
        said.append(F.pad(tokens.flatten(1), (0, 1), value=1.0).double() @ weights)
    return torch.stack(said)


def errors(size, speed, fusions, steps=40, every=5):
    """By name: the mean square of the error, its variance, that between keyframes, and that from step to step."""
    rng = torch.Generator().manual_seed(1)
    taught = [episode(steps, size, pace, rng) for pace in [speed] * 50 + [1.0] * 50]
    weights = fitted(torch.cat([encoded(x) for x, _ in taught]), torch.cat([y for _, y in taught]))
    asked = [episode(steps, size, speed, rng) for _ in range(30)]
    frames, places = (torch.stack(x, 1) for x in zip(*asked, strict=True))
    found = {}
    for name, fusion in {"each frame": None, **fusions}.items():
        wrong = acted(weights, frames, fusion) - places
        between = wrong.unflatten(0, (-1, every)).var(1).mean()
        step = wrong.diff(dim=0).square().mean() / 2
        found[name] = [float(x) for x in (wrong.square().mean(), wrong.flatten(0, 1).var(0).mean(), between, step)]
    return found


def test_fused_tokens_make_a_policy_steadier():
    """30 of 64 patches is the share of 120 of 256. The noise alone is a change of 0.04 in a patch."""
    found = errors(
        8, 2.0,
        {"hard": TokenFusion(HYBRID, 5, PATCH), "smooth": TokenFusion(Smooth(0.1), 5, PATCH),
         "smooth or relevant": TokenFusion(Smooth(0.1) | Relevant(30), 5, PATCH)},
    )  # fmt: skip
    share = {name: [x / y for x, y in zip(of, found["each frame"], strict=True)] for name, of in found.items()}
    print(share)
    assert share["smooth"][1] <= 0.7 and share["smooth or relevant"][1] <= 0.8
    # Noise that is held still is as large as noise that changes: hard fusion cuts what changes between keyframes.
    assert share["hard"][2] <= 0.6 and share["hard"][3] <= 0.6
    assert 0.8 <= share["hard"][1] <= 1.05


def test_attention_restores_what_moves_too_slowly_to_be_seen_as_change():
    for every, lost, restored in ((5, 3, 1.1), (20, 30, 1.5)):
        fusions = {"change": TokenFusion(Changed(0.1), every, PATCH), "hybrid": TokenFusion(HYBRID, every, PATCH)}
        found = errors(6, 0.3, fusions, every=5)
        share = {name: of[0] / found["each frame"][0] for name, of in found.items()}
        print(every, share)
        assert share["change"] > lost
        assert share["hybrid"] < restored
