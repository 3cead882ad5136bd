"""DATE: frames chosen against a reference in plain Python, planted events, position ids, and seconds that are read."""

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import chronotope as ct
from chronotope.papers.stream.date import candidates, spread, tass, timestamp_positions


def passes(scores, times, count, delta, decay, limit):
    """Pass after pass over the frames above the mean, the best first, in plain Python: (frame, delta) as they enter."""
    mean = sum(scores) / len(scores)
    order = sorted((i for i in range(len(scores)) if scores[i] > mean), key=lambda i: -scores[i])[:limit]
    if len(order) <= count:
        return [(i, 0.0) for i in order]
    accepted = []
    while len(accepted) < count:
        for i in order:
            taken = [j for j, _ in accepted]
            if i not in taken and all(abs(times[i] - times[j]) >= delta for j in taken) and len(taken) < count:
                accepted.append((i, delta))
        delta = delta * decay if delta > 1e-6 else 0.0  # nothing is nearer, but for frames at the same time
    return accepted


@st.composite
def films(draw):
    """Scores of few values, so that some are equal, and times with gaps and with pairs at the same time."""
    n = draw(st.integers(1, 60))
    scores = draw(st.lists(st.integers(0, 12), min_size=n, max_size=n))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.04, 0.5, 1.0, 7.3, 30.0]), min_size=n, max_size=n))
    times = torch.tensor(gaps, dtype=torch.float64).cumsum(0)
    return torch.tensor(scores, dtype=torch.float64), times


OPTIONS = st.fixed_dictionaries({
    "max_frames": st.sampled_from([1, 2, 5, 16]), "delta0": st.sampled_from([0.0, 0.5, 20.0]),
    "decay": st.sampled_from([0.0, 0.5, 0.9]), "cand_mult": st.sampled_from([1, 4]),
})  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(films(), OPTIONS)
def test_the_choice_is_that_of_passes_in_plain_python(film, options):
    scores, times = film
    count, limit = options["max_frames"], options["max_frames"] * options["cand_mult"]
    expected = passes(scores.tolist(), times.tolist(), count, options["delta0"], options["decay"], limit)
    found = tass(scores, times, **options)
    assert sorted(found.tolist()) == sorted(i for i, _ in expected)
    assert bool((times[found].diff() >= 0).all())
    assert len(found) == min(count, int((scores > scores.mean()).sum()), limit)
    order = candidates(scores, limit)
    entered, deltas = spread(times[order], count, options["delta0"], options["decay"])
    assert [(int(order[i]), d) for i, d in zip(entered.tolist(), deltas.tolist(), strict=True)] == expected


@settings(max_examples=100, deadline=None)
@given(films(), OPTIONS)
def test_accepted_frames_are_as_far_apart_as_their_pass_asks(film, options):
    scores, times = film
    order = candidates(scores, 4 * options["max_frames"])
    entered, deltas = spread(times[order], options["max_frames"], options["delta0"], options["decay"])
    places = times[order][entered]
    for i in range(1, len(entered)):
        assert (places[:i] - places[i]).abs().min() >= deltas[i]
    assert bool((deltas.diff() <= 0).all())


@pytest.mark.parametrize("count", [1, 7, 40])
def test_without_a_distance_the_best_frames_are_chosen(count):
    scores = torch.randperm(300, generator=torch.Generator().manual_seed(0)).float()
    times = torch.arange(300.0) / 2
    best = scores.topk(count).indices.sort().values
    assert torch.equal(tass(scores, times, count, delta0=0.0), best)
    assert not torch.equal(tass(scores, times, count), best) or count == 1


def planted(duplicates, seed):
    """600 frames, one a second, that are noise, and 3 events: one with many near duplicates that score best."""
    rng = torch.Generator().manual_seed(seed)
    scores = 0.2 + 0.05 * torch.randn(600, generator=rng)
    events = [range(100, 100 + duplicates), range(300, 303), range(500, 503)]
    for event, height in zip(events, (0.9, 0.7, 0.6), strict=True):
        scores[event[0] : event[-1] + 1] = height + 0.01 * torch.rand(len(event), generator=rng)
    return scores, torch.arange(600.0), events


def covered(chosen, events):
    return sum(any(i in event for i in chosen.tolist()) for event in events)


@pytest.mark.parametrize("seed", range(5))
def test_events_beside_near_duplicates_are_found_and_where_they_are_not(seed):
    scores, times, events = planted(20, seed)
    assert covered(tass(scores, times, 8), events) == 3
    assert covered(scores.topk(8).indices, events) == 1
    # The limit: all 4 * 8 candidates are of one event.
    scores, times, events = planted(40, seed)
    assert covered(tass(scores, times, 8), events) == 1
    assert covered(tass(scores, times, 8, cand_mult=8), events) == 3


def test_a_window_chooses_as_the_stretch_alone_would():
    scores, times, _ = planted(20, 0)
    times = times + 0.25
    found = tass(scores, times, 4, window=120)
    alone = [120 * i + tass(scores[part], times[part], 4) for i, part in enumerate(torch.arange(600).split(120))]
    assert torch.equal(found, torch.cat(alone)) and len(found) == 20
    # What comes later changes nothing of it.
    later = scores.clone()
    later[360:] = torch.rand(240, generator=torch.Generator().manual_seed(1))
    assert torch.equal(tass(later, times, 4, window=120)[:12], found[:12])
    assert torch.equal(tass(scores, times, 4, window=1e6), tass(scores, times, 4))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_frames_at_one_time_are_chosen_last(decay):
    times = torch.tensor([5.0, 5.0, 5.0, 5.0, 6.0, 40.0, 90.0])
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.5, 0.0, 0.0])
    assert tass(scores, times, 2, decay=decay).tolist() == ([0, 1] if decay == 0 else [0, 4])
    assert tass(scores, times, 4, decay=decay).tolist() == ([0, 1, 2, 3] if decay == 0 else [0, 1, 2, 4])


def test_scores_that_are_equal_choose_nothing_and_order_does_not_matter():
    assert tass(torch.zeros(5), torch.arange(5.0)).tolist() == []
    assert tass(torch.zeros(0), torch.zeros(0)).tolist() == []
    scores, times, _ = planted(20, 0)
    shuffled = torch.randperm(600, generator=torch.Generator().manual_seed(2))
    assert torch.equal(shuffled[tass(scores[shuffled], times[shuffled], 8)], tass(scores, times, 8))


def test_the_released_code_chooses_the_same():
    """yuanc3/DATE at c3961287, utils/sampling.py, ran on these frames: what it chose, sorted.

    On 300 more random films of up to 400 frames, K from 1 to 64, it chose what `tass` does, each time.
    """
    rng = torch.Generator().manual_seed(5)
    scores, times = torch.rand(200, generator=rng), torch.arange(200.0) / 2
    scores[60:90] += 1.0
    assert tass(scores, times, 8).tolist() == RELEASED[8]
    assert tass(scores, times, 12).tolist() == RELEASED[12]


RELEASED = {8: [9, 39, 60, 65, 70, 77, 83, 88], 12: [9, 24, 39, 65, 70, 77, 88, 111, 125, 135, 171, 192]}


GRIDS = st.builds(ct.Grid, t=st.integers(1, 6), h=st.integers(1, 4), w=st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.integers(0, 9), st.integers(0, 999))
def test_time_ids_count_frames_and_words_and_places_are_those_of_the_first_frame(grid, start, seed):
    times = (1000 * torch.rand(grid.shape[0], generator=torch.Generator().manual_seed(seed))).sort().values
    stamped = timestamp_positions(grid, times, start=start)
    text, size = stamped.source < 0, grid.shape[1] * grid.shape[2]
    # One number for each frame and each token of a stamp, without a gap.
    count = [start]
    for i in range(1, len(text)):
        same = not text[i] and not text[i - 1] and stamped.source[i] // size == stamped.source[i - 1] // size
        count.append(count[-1] + (not same))
    assert stamped.ids[0].tolist() == count
    places = stamped.ids[1:, ~text].unflatten(1, (grid.shape[0], size))
    assert torch.equal(places, places[:, :1].expand_as(places))
    assert torch.equal(places[:, 0].T - start, ct.Grid(h=grid.shape[1], w=grid.shape[2]).coords())
    assert torch.equal(stamped.ids[1:, text], stamped.ids[:1, text].expand(2, -1))
    # Each stamp is behind its frame.
    assert torch.equal(stamped.source[~text], torch.arange(grid.size))
    behind = bytes(stamped.tokens.tolist()).decode()
    assert behind == "".join(stamped.texts) and int(text.sum()) == len(behind)
    last = [int((stamped.source == size * (t + 1) - 1).nonzero()) for t in range(grid.shape[0])]
    words = [len(s) for s in stamped.texts]
    assert [bool(text[i + 1 : i + 1 + n].all()) for i, n in zip(last, words, strict=True)] == [True] * len(last)
    assert stamped.end == stamped.ids.max() + 1


def test_embeddings_are_joined_where_the_ids_are():
    grid = ct.Grid(t=3, h=2, w=2)
    stamped = timestamp_positions(grid, [0, 7.54, 3600.0])
    assert stamped.texts == ("0s", "7.5s", "3600s")
    frames = torch.arange(12.0).view(1, 12, 1).requires_grad_()
    x = stamped.join(frames, stamped.tokens.view(1, -1, 1).float())
    expected = [0, 1, 2, 3, *b"0s", 4, 5, 6, 7, *b"7.5s", 8, 9, 10, 11, *b"3600s"]
    assert x.flatten().tolist() == expected
    (grad,) = torch.autograd.grad(x.sum(), frames)
    assert torch.equal(grad, torch.ones(1, 12, 1))


def test_the_released_code_gives_the_same_ids():
    """yuanc3/DATE at c3961287, `date_get_rope_index`, ran on 5 tokens of text and these 3 frames: its ids.

    On 100 more random grids its ids were equal too, but for the last stamp where pictures are larger than c.
    """
    stamped = timestamp_positions(ct.Grid(t=3, h=2, w=1), [1.0, 2.5, 4.0], start=5)
    assert stamped.ids.tolist() == [
        [5, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13, 13, 14, 15],
        [5, 6, 6, 7, 5, 6, 9, 10, 11, 12, 5, 6, 14, 15],
        [5, 5, 6, 7, 5, 5, 9, 10, 11, 12, 5, 5, 14, 15],
    ]


def test_bad_input_is_refused():
    scores, times = torch.rand(4), torch.arange(4.0)
    for options in ({"max_frames": 0}, {"decay": 1.0}, {"delta0": -1.0}, {"cand_mult": 0}, {"window": 0.0}):
        with pytest.raises(ct.ChronotopeError, match="from 1 on"):
            tass(scores, times, **options)
    with pytest.raises(ct.ChronotopeError, match="not finite"):
        tass(scores.log() * torch.nan, times)
    with pytest.raises(ct.ChronotopeError, match="3 times"):
        timestamp_positions(ct.Grid(t=4, h=2, w=2), [0.0, 1.0, 2.0])
    with pytest.raises(ct.ChronotopeError, match="rows and columns"):
        timestamp_positions(ct.Grid(n=4), [0.0])


CLIP = ct.Grid(t=6, h=1, w=2)
RATES, UNSEEN = (1, 2, 3, 5, 7, 9, 11), (4, 6, 8, 10)  # seconds from frame to frame
STARTS = 20


@lru_cache
def stamped_clip(start, step, words):
    """The stamps of a clip, two digits and an "s"; or only the places of its frames."""
    return timestamp_positions(
        CLIP, [start + step * i for i in range(6)], stamp=lambda time: f"{time:02.0f}s",
        encode=lambda text: [10 if x == "s" else int(x) for x in text] if words else [],
    )  # fmt: skip


def clips(count, rates, rng):
    """Frames, of 6 kinds of things one in each; the kinds asked for; second of the first frame, of a step; answers.

    An answer is two digits: the second in which the kind that is asked for is seen.
    """
    seen = torch.rand(count, 6, generator=rng).argsort(1)
    x = 0.3 * torch.randn(count, 6, 2, 6, generator=rng)
    cell = torch.randint(0, 2, (count, 6), generator=rng)
    x[torch.arange(count)[:, None], torch.arange(6), cell] += 2 * torch.eye(6)[seen]
    asked = torch.rand(count, 6, generator=rng).argsort(1)
    step = torch.tensor(rates)[torch.randint(0, len(rates), (count,), generator=rng)]
    start = torch.randint(0, STARTS, (count,), generator=rng)
    second = start[:, None] + step[:, None] * asked
    return x.flatten(1, 2), seen.gather(1, asked), start, step, torch.stack((second // 10, second % 10), 2)


class Reader(nn.Module):
    """Two layers of causal attention over frames, stamps where `words`, and two tokens for each question, by ids."""

    def __init__(self, words, dim=64, heads=2):
        super().__init__()
        self.words, self.heads, self.read = words, heads, nn.Linear(dim, 10)
        self.enter, self.word, self.ask = nn.Linear(6, dim), nn.Embedding(11, dim), nn.Embedding(6, dim)
        self.digit = nn.Parameter(torch.randn(2, dim))
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(4)])
        self.qkv = nn.ModuleList([nn.Linear(dim, 3 * dim) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(dim, dim) for _ in range(2)])
        self.mlp = nn.ModuleList([
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(2)
        ])  # fmt: skip
        self.rope = ct.Rope(base=50.0, share={"t": 0.375, "h": 0.0625, "w": 0.0625})

    def forward(self, x, kinds, start, step):
        each = [stamped_clip(*clock, self.words) for clock in zip(start.tolist(), step.tolist(), strict=True)]
        stamps = self.word(torch.stack([stamped.tokens for stamped in each]))
        asked = (self.ask(kinds)[:, :, None] + self.digit).flatten(1, 2)
        y = torch.cat((each[0].join(self.enter(x), stamps), asked), 1)
        behind = (each[0].end + torch.arange(asked.shape[1])).expand(3, -1)
        ids, grid = torch.cat((each[0].ids, behind), 1).T, ct.Grid(n=y.shape[1])
        for i in range(2):
            qkv = self.qkv[i](self.norms[i](y)).unflatten(2, (3 * self.heads, -1)).transpose(1, 2)
            q, k, v = qkv.chunk(3, 1)
            q, k = (self.rope(z, coords=ids) for z in (q, k))
            y = y + self.out[i](ct.attention(q, k, v, grid=grid, where=ct.causal()).transpose(1, 2).flatten(2))
            y = y + self.mlp[i](self.norms[i + 2](y))
        return self.read(y[:, -asked.shape[1] :]).unflatten(1, (-1, 2))


def trained(words, steps=600):
    torch.manual_seed(0)
    model, rng = Reader(words), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for _ in range(steps):
        *posed, answers = clips(64, RATES, rng)
        loss = nn.functional.cross_entropy(model(*posed).flatten(0, 2), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model, rates):
    *posed, answers = clips(512, rates, torch.Generator().manual_seed(9))
    return (model(*posed).argmax(3) == answers).all(2).float().mean().item()


@pytest.mark.slow
def test_the_second_is_read_off_stamps_at_a_frame_rate_never_seen():
    of_stamps, of_places = trained(True), trained(False)
    print([accuracy(model, rates) for model in (of_stamps, of_places) for rates in (RATES, UNSEEN)])
    assert accuracy(of_stamps, UNSEEN) >= 0.9
    assert accuracy(of_places, UNSEEN) <= 0.5
