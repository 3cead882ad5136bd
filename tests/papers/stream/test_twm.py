"""Temporal Working Memory: its limits, its loss, planted segments, what it looks at, and questions about clips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.stream.twm import AlignmentHead, Refined, infonce, keep_best, search, select_segments

TOPICS, FRAME, QUESTION = 24, 32, 40


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 12), st.integers(1, 4),
    st.sampled_from([(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]), st.integers(0, 99),
)  # fmt: skip
def test_frames_are_distinct_ascending_and_each_clip_has_its_own(length, keep, window, iters, weights, seed):
    keep = min(keep, length)
    x, q = numbers(3, length, 6, seed=seed), numbers(3, 6, seed=seed + 1)
    index = select_segments(x, q, keep, window, *weights, iters)
    assert index.shape == (3, keep)
    assert index.min() >= 0 and index.max() < length
    assert (index[:, 1:] > index[:, :-1]).all()
    for i in range(3):
        assert torch.equal(select_segments(x[i : i + 1], q[i : i + 1], keep, window, *weights, iters)[0], index[i])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(0, 5), st.integers(0, 99))
def test_with_room_for_all_all_are_kept_in_order(length, window, seed):
    x, q = numbers(2, length, 6, seed=seed), numbers(2, 6, seed=seed + 1)
    assert torch.equal(select_segments(x, q, length, window), torch.arange(length).expand(2, -1))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 99))
def test_likeness_alone_and_a_window_over_all_is_top_k(length, keep, seed):
    keep = min(keep, length)
    x, q = numbers(3, length, 6, seed=seed), numbers(3, 6, seed=seed + 1)
    best = F.cosine_similarity(x, q[:, None], dim=2).topk(keep, dim=1).indices.sort(1).values
    for iters in (1, 3):
        assert torch.equal(select_segments(x, q, keep, length, 1.0, 0.0, iters), best)


def plainly(x, q, candidates, keep, alpha, beta):
    """The frames of one clip chosen one by one, the slow way."""
    chosen = []
    for _ in range(keep):

        def worth(t):
            near = max((torch.cosine_similarity(x[t], x[s], dim=0) for s in chosen), default=-1.0)
            return float(alpha * torch.cosine_similarity(x[t], q, dim=0) + beta * (1 - near))

        chosen.append(max((t for t in candidates if t not in chosen), key=worth))
    return sorted(chosen)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 25), st.integers(1, 6), st.integers(0, 4), st.integers(1, 3), st.integers(0, 99))
def test_rounds_choose_one_by_one_from_what_is_near(length, keep, window, iters, seed):
    keep = min(keep, length)
    x, q = numbers(length, 4, seed=seed), numbers(4, seed=seed + 1)
    chosen = [(2 * i + 1) * length // (2 * keep) for i in range(keep)]
    for _ in range(iters):
        near = {t for c in chosen for t in range(max(c - window, 0), min(c + window + 1, length))}
        chosen = plainly(x, q, sorted(near), keep, 0.6, 0.4)
    assert select_segments(x[None], q[None], keep, window, 0.6, 0.4, iters).tolist() == [chosen]


def test_without_a_window_the_frames_are_evenly_spaced():
    x, q = numbers(1, 200, 6), numbers(1, 6)
    assert select_segments(x, q, 8, 0).tolist() == [[12, 37, 62, 87, 112, 137, 162, 187]]
    assert select_segments(x, q, 1, 0).tolist() == [[100]]


@pytest.mark.parametrize("temperature", [1.0, 0.07])
@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_the_released_one_and_the_same_both_ways(temperature, seed):
    """The formula of `InfoNCELoss` in xid32/NAACL_2025_TWM at e990ae23, LAVISH/net_grd_avst/main_alvs.py."""
    u, v = numbers(17, 9, seed=seed).requires_grad_(), numbers(17, 9, seed=seed + 50).requires_grad_()
    s = F.cosine_similarity(u[:, None], v[None], dim=2) / temperature
    there, back = s.exp() / s.exp().sum(1, keepdim=True), s.exp() / s.exp().sum(0, keepdim=True)
    expected = -there.diagonal().log().mean() - back.diagonal().log().mean()
    loss = infonce(u, v, temperature)
    assert abs(loss - expected) < 1e-6
    assert abs(loss - infonce(v, u, temperature)) < 1e-12
    for ours, theirs in zip(torch.autograd.grad(loss, (u, v)), torch.autograd.grad(expected, (u, v)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_candidates_grow_with_what_is_kept_the_window_and_the_rounds_and_not_with_the_clip():
    q = numbers(1, 6)

    def looked_at(length, keep, window, iters):
        seen = []

        def encode(index):  # features of frames that were asked for, and of no others
            seen.append(index.shape[1])
            return torch.stack([numbers(6, seed=int(i)) for i in index[0]])[None]

        search(encode, length, q, keep, window, 0.7, 0.3, iters)
        assert max(seen) <= keep * (2 * window + 1) and len(seen) <= iters
        return sum(seen)

    for length in (1_000, 10_000, 1_000_000):
        assert looked_at(length, 4, 3, 1) == 4 * 7
        assert looked_at(length, 8, 3, 1) == 8 * 7
        assert looked_at(length, 4, 6, 1) == 4 * 13
        assert looked_at(length, 4, 3, 4) <= 4 * 4 * 7


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 99))
def test_a_stream_keeps_the_most_alike_of_all_that_came(cuts, keep, seed):
    x, q, state = numbers(3, sum(cuts), 6, seed=seed), numbers(3, 6, seed=seed + 1), None
    for part in x.split(cuts, 1):
        state = keep_best(part, q, keep, 1.0, 0.0, state)
        assert state.x.shape[1] <= keep
    count = min(keep, x.shape[1])
    assert torch.equal(state.index, select_segments(x, q, count, sum(cuts), 1.0, 0.0))
    assert torch.equal(state.x, x.gather(1, state.index[..., None].expand(-1, -1, 6)))
    assert state.seen == sum(cuts)


class World:
    """Topics, and how frames and questions about them look."""

    def __init__(self, seed=0):
        self.rng = torch.Generator().manual_seed(seed)
        self.frame, self.question = (self.random(TOPICS, n) / TOPICS**0.5 for n in (FRAME, QUESTION))

    def random(self, *shape):
        return torch.randn(*shape, generator=self.rng)

    def frames(self, topic):
        return topic @ self.frame + 0.3 * self.random(*topic.shape[:-1], FRAME)

    def questions(self, topic):
        return topic @ self.question + 0.3 * self.random(*topic.shape[:-1], QUESTION)

    def inside(self, count, length=200, segment=10, first=0, last=None):
        start = torch.randint(first, (last or length) - segment + 1, (count, 1), generator=self.rng)
        return (torch.arange(length) >= start) & (torch.arange(length) < start + segment)

    def background(self, count, length=200, scenes=20):
        return self.random(count, scenes, TOPICS).repeat_interleave(length // scenes, 1)


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def head(world):
    """Trained on 2,000 pairs of frames and questions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = AlignmentHead(FRAME, QUESTION, 32, temperature=0.1)
    topic = world.random(2000, TOPICS)
    frames, questions = world.frames(topic), world.questions(topic)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(400):
        i = torch.randperm(2000, generator=world.rng)[:100]
        loss = head.loss(frames[i], questions[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.requires_grad_(False)


def test_a_planted_segment_is_found(world, head):
    topic, inside = world.random(400, TOPICS), world.inside(400)
    x = world.frames(torch.where(inside[..., None], topic[:, None], world.background(400)))
    x, q = head(x, world.questions(topic))

    def recall(window, alpha, beta, query=q):
        return inside.gather(1, select_segments(x, query, 8, window, alpha, beta)).sum(1).float().mean().item()

    assert abs(recall(0, 1.0, 0.0) - 8 * 10 / 200) < 0.1  # uniform: 0.4 of the 8
    hits = recall(8, 0.9, 0.1)
    print(f"of 8 frames, {hits:.2f} in the segment; likeness alone {recall(8, 1.0, 0.0):.2f}, equal weights "
          f"{recall(8, 0.5, 0.5):.2f}, window 3 {recall(3, 0.9, 0.1):.2f}")  # fmt: skip
    assert hits >= 0.9 * 8
    assert recall(8, 0.9, 0.1, q.roll(1, 0)) < 1.0  # another clip's question


def test_distinctiveness_covers_both_of_two_segments(world, head):
    common = world.random(400, TOPICS)
    first, second = world.inside(400, last=100), world.inside(400, first=100)
    topic = world.background(400)
    for inside, own in ((first, 0.6), (second, 0.8)):  # both are about the question, each in its own way
        here = common + own * world.random(400, TOPICS)
        topic = torch.where(inside[..., None], here[:, None], topic)
    x, q = head(world.frames(topic), world.questions(common))

    def covered(alpha, beta):
        index = select_segments(x, q, 8, 8, alpha, beta)
        return torch.stack([inside.gather(1, index).any(1) for inside in (first, second)])

    alone, spread = covered(1.0, 0.0), covered(0.5, 0.5)
    one = alone[0] ^ alone[1]
    raised = spread.all(0)[one].float().mean().item()
    print(
        f"likeness alone covers one of the two in {one.float().mean():.2f}; of these, distinctiveness both {raised:.2f}"
    )
    assert one.float().mean() >= 0.3
    assert raised >= 0.8
    assert spread.all(0).float().mean() >= 0.8


class Reader(nn.Module):
    """Answers a question from a few frames: a token that asks, among them, and one block of attention."""

    def __init__(self, dim=48):
        super().__init__()
        self.enter, self.ask, self.read = nn.Linear(FRAME + 4, dim), nn.Linear(QUESTION, dim), nn.Linear(dim, 4)
        self.mix = ct.nn.Block([ct.nn.Attention(dim, 4)])

    def forward(self, frames, question):
        x = torch.cat((self.ask(question)[:, None], self.enter(frames)), 1)
        return self.read(self.mix(x, ct.Grid(n=x.shape[1]))[:, 0])


def asked(world, head, count, window):
    """Twenty scenes of ten frames, each with one of 4 signs; the question names a scene, the answer is its sign.

    Frames chosen, questions, answers, and in which clips a frame chosen is of the scene.
    """
    topic = world.random(count, 20, TOPICS)
    sign, scene = (torch.randint(0, n, (count, m), generator=world.rng) for n, m in ((4, 20), (20, 1)))
    x = world.frames(topic.repeat_interleave(10, 1))
    question = world.questions(topic[torch.arange(count), scene[:, 0]])
    whole = torch.cat((x, 2 * F.one_hot(sign, 4).repeat_interleave(10, 1)), 2)
    chosen = Refined(head, lambda frames, index: (frames, index), keep=8, window=window, alpha=0.9, beta=0.1)
    frames, index = chosen(whole, x, question)
    return frames, question, sign.gather(1, scene)[:, 0], (index // 10 == scene).any(1)


def accuracy(world, head, window, steps=60):
    """Of a reader that learnt with frames chosen like this; and of one that reads perfectly, and guesses the rest."""
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    frames, question, answer, _ = asked(world, head, 1500, window)
    for _ in range(steps):
        i = torch.randint(0, 1500, (100,), generator=world.rng)
        loss = F.cross_entropy(model(frames[i], question[i]), answer[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    frames, question, answer, seen = asked(world, head, 500, window)
    with torch.no_grad():
        right = (model(frames, question).argmax(1) == answer).float().mean().item()
    return right, torch.where(seen, 1.0, 0.25).mean().item()


def test_questions_are_answered_from_eight_frames(world, head):
    torch.manual_seed(0)
    (chosen, _), (uniform, at_best) = accuracy(world, head, 8), accuracy(world, head, 0)
    print(f"accuracy {chosen:.3f} from chosen frames, {uniform:.3f} from uniform ones, where {at_best:.3f} is possible")
    assert chosen >= max(uniform, at_best) + 0.2


def test_only_the_head_learns_and_the_model_behind_sees_the_chosen_frames():
    torch.manual_seed(0)
    head, model = AlignmentHead(5, 7, 4), nn.Linear(6, 2)
    feats, query, frames = torch.randn(3, 30, 5, requires_grad=True), torch.randn(3, 7, requires_grad=True), None
    head.loss(feats[:, 0], query).backward()
    assert feats.grad is None and query.grad is None
    assert all(parameter.grad.abs().max() > 0 for parameter in (head.frames.weight, head.query.weight))
    head.zero_grad()
    frames = torch.randn(3, 30, 6)
    seen = {}

    def behind(frames, index):
        seen.update(frames=frames, index=index)
        return model(frames).sum()

    Refined(head, behind, keep=4)(frames, feats, query).backward()
    assert torch.equal(seen["index"], select_segments(*head(feats, query), 4))
    assert all(torch.equal(seen["frames"][i], frames[i, seen["index"][i]]) for i in range(3))
    assert model.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in head.parameters())


def test_bad_input_is_refused():
    x, q = numbers(1, 5, 3), numbers(1, 3)
    for options in ({"keep": 6}, {"keep": 0}, {"keep": 2, "window": -1}, {"keep": 2, "iters": 0}):
        with pytest.raises(ct.ChronotopeError, match="of 5 frames"):
            select_segments(x, q, **options)
    with pytest.raises(ct.ChronotopeError, match="keep=0"):
        keep_best(x, q, 0)
