"""TimeSearch: clocks, the order of a search, and a scripted model that looks for four seconds in hours of video."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.papers.stream.date import timestamp_positions
from chronotope.papers.stream.timesearch import Cache, Clock, SearchPolicy


def irregular(frames, seed, start=0.0):
    """A clock with gaps between a millisecond and a minute."""
    gaps = 10 ** (torch.rand(frames, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4.8 - 3)
    return Clock(start + gaps.cumsum(0))


CLOCKS = st.one_of(
    st.builds(Clock.regular, st.integers(1, 400), st.sampled_from([0.1, 1, 8, 23.976, 29.97, 30]), st.floats(0, 1e5)),
    st.builds(irregular, st.integers(1, 400), st.integers(0, 999)),
)


@settings(max_examples=80, deadline=None)
@given(CLOCKS, st.integers(1, 40), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4))
def test_chosen_frames_and_their_times_round_trip(clock, count, parts):
    first, last = clock.span
    windows = [tuple(sorted((first + a * (last - first), first + b * (last - first)))) for a, b in parts]
    frames = clock.spread(windows, count)
    times = clock.times[frames]
    assert torch.equal(clock.frames(times), frames)
    assert 1 <= len(frames) <= count and bool((frames.diff() > 0).all())
    # Written out and read again, they are the same numbers, and lead to the same frames.
    grid = ct.Grid(t=len(frames), h=1, w=2)
    stamped = timestamp_positions(grid, times, stamp=lambda time: f"{time!r}s")
    read = torch.tensor([float(text[:-1]) for text in stamped.texts], dtype=torch.float64)
    assert torch.equal(read, times) and torch.equal(clock.frames(read), frames)


@settings(max_examples=80, deadline=None)
@given(CLOCKS, st.lists(st.floats(-0.1, 1.1), min_size=1, max_size=9))
def test_the_frame_at_a_time_is_the_nearest(clock, shares):
    first, last = clock.span
    at = torch.tensor([first + share * (last - first) for share in shares], dtype=torch.float64)
    apart = (clock.times - at[:, None]).abs()
    found = apart.gather(1, clock.frames(at)[:, None])[:, 0]
    torch.testing.assert_close(found, apart.amin(1), rtol=0, atol=1e-9)


def test_frames_are_spread_over_the_union_of_windows():
    clock = Clock.regular(101, rate=1)
    assert clock.spread([(0.0, 100.0)], 5).tolist() == [10, 30, 50, 70, 90]
    assert clock.spread([(80, 100), (0.0, 20.0), (90, 95)], 4).tolist() == [5, 15, 85, 95]
    assert clock.spread([(0.0, 10.0), (8, 20.0)], 4).tolist() == [2, 7, 12, 17]
    assert clock.spread([(3, 6)], 50).tolist() == [3, 4, 5, 6]
    assert clock.spread([(7.2, 7.2)], 3).tolist() == [7]
    assert Clock(torch.tensor([2.5])).spread([(2.5, 2.5)], 3).tolist() == [0]


class Whim:
    """Proposes and judges at random, never surely; keeps a record of what it was asked."""

    def __init__(self, seed):
        self.rng, self.asked = random.Random(seed), []

    def propose(self, frames, times, query):
        self.asked.append("spotlight")
        a, b = float(times[0]) - 5, float(times[-1]) + 5
        return [(self.rng.uniform(a, b), self.rng.uniform(a, b)) for _ in range(self.rng.randrange(4))]

    def reflect(self, frames, times, query):
        self.asked.append("reflection")
        return self.rng.choice([0.1, 0.3, 0.5])


@pytest.mark.parametrize("seed", range(12))
def test_each_visit_is_to_the_surest_window_of_these_the_shortest(seed):
    policy = SearchPolicy(Whim(seed), budget_frames=8, max_visits=15, resolution=2.0, parts=3)
    clock, cache = Clock.regular(4000, rate=2), Cache()
    found = policy.search(lambda frames: frames, clock, None, cache=cache)
    assert found.visits == 15 == policy.model.asked.count("spotlight") and not found.confirmed
    visited, judged = list(cache.proposed), list(cache.reflected.items())
    long = {new for intervals in cache.proposed.values() for new in intervals if new[1] - new[0] > 16}
    split = long - set(visited)  # a visited window may be proposed as a whole
    assert visited[0] == clock.span
    visits = reflections = 0
    for asked in policy.model.asked:
        if asked == "spotlight":
            waiting = [(-p, w[1] - w[0], w) for w, p in judged[:reflections] if w not in visited[:visits] + list(split)]
            if visits:
                assert visited[visits] == min(waiting)[2]
            visits += 1
        reflections += asked == "reflection"
    # A long window, visited or proposed, has its equal parts in the queue.
    for start, end in [w for w in visited[:-1] if w[1] - w[0] > 16] + [w for w in split if w in dict(judged)]:
        ends = torch.linspace(start, end, 4, dtype=torch.float64).tolist()
        near = [any(abs(a - s) + abs(b - e) < 1e-6 for (s, e), _ in judged) for a, b in pairwise(ends)]
        assert all(near)
    first, last = clock.span
    assert all(first <= s <= e <= last for s, e in cache.proposed.keys() | cache.reflected.keys())
    ps = [interval.confidence for interval in found.intervals]
    assert ps == sorted(ps, reverse=True)
    assert torch.equal(found.frames, found.frames.unique()) and len(found.frames) <= 8 + policy.overview


class Eye:
    """Sees what is in its frames: a video of numbers, of which the largest is what is sought."""

    def propose(self, frames, times, query):
        brightest, apart = times[frames == frames.max()], times[1] - times[0]
        return [(float(brightest[0] - apart), float(brightest[-1] + apart))]

    def reflect(self, frames, times, query):
        return float(frames.max())


def scene(seed, seconds=3600, rate=4):
    """A video of an hour: 0, in a scene of 5 minutes 0.5, in four seconds of it 1; and the frames of these."""
    rng = random.Random(seed)
    start = rng.randrange((seconds - 300) * rate)
    event = start + rng.randrange((300 - 4) * rate)
    video = torch.zeros(seconds * rate)
    video[start : start + 300 * rate] = 0.5
    video[event : event + 4 * rate] = 1.0
    return video, Clock.regular(seconds * rate, rate), event


@pytest.mark.parametrize("seed", range(20))
def test_a_model_that_sees_what_is_there_finds_it(seed):
    video, clock, event = scene(seed)
    policy = SearchPolicy(Eye(), overview=0)
    found = policy.search(video.__getitem__, clock, "what is bright")
    start, end, p = found.intervals[0]
    assert found.confirmed and p == 1.0 and found.visits <= 6
    assert start <= clock.times[event] + 4 and end >= clock.times[event] and (end - start) / 32 <= 1.0
    assert video[found.frames].max() == 1.0
    # Every second frame that the answer is read from shows it, at least, where the overview shows nothing.
    assert (video[clock.spread([clock.span], 8)] == 1.0).sum() <= 1
    assert torch.equal(found.frames, clock.spread([(start, end)], 32))


def test_what_was_said_of_a_window_is_not_asked_again():
    video, clock, _ = scene(3)
    cache, policy = Cache(), SearchPolicy(Eye())
    first = policy.search(video.__getitem__, clock, "?", cache=cache)
    again = policy.search(video.__getitem__, clock, "?", cache=cache)
    assert first.frames_read > 0 and again.frames_read == 0
    assert again.intervals == first.intervals and torch.equal(again.frames, first.frames)
    assert again.visits == first.visits
    # A search that goes on pays for what is new only.
    whim = Whim(0)
    few = SearchPolicy(whim, max_visits=3).search(lambda frames: frames, clock, "?", cache=(cache := Cache()))
    more = SearchPolicy(whim, max_visits=5).search(lambda frames: frames, clock, "?", cache=cache)
    assert whim.asked.count("spotlight") == 5 and 0 < more.frames_read < few.frames_read


def test_a_stretch_of_a_stream_is_searched_for_itself():
    video, clock, event = scene(4)
    stretches = [(900.0 * i, 900.0 * i + 899.75) for i in range(4)]
    policy, cache = SearchPolicy(Eye(), overview=0), Cache()
    whole = [policy.search(video.__getitem__, clock, "?", window=w, cache=cache) for w in stretches]
    for i, window in enumerate(stretches):  # the video grows
        so_far = 3600 * (i + 1)  # frames that have come
        clock_now = Clock(clock.times[:so_far])
        found = policy.search(video[:so_far].__getitem__, clock_now, "?", window=window)
        assert found.intervals == whole[i].intervals and torch.equal(found.frames, whole[i].frames)
        assert found.confirmed is (3600 * i <= event < so_far)


def test_the_answer_is_read_from_the_best_intervals_and_the_whole_video():
    clock = Clock.regular(1001, rate=1)

    class Two:
        def propose(self, frames, times, query):
            return [(100, 120), (300.0, 340.0), (700.0, 720.0), (50, 20), (980, 1200)]

        def reflect(self, frames, times, query):
            return {100: 0.5, 300: 0.2, 700: 0.6}.get(round(float(times[0]), -2), 0.0)

    policy = SearchPolicy(Two(), budget_frames=4, max_visits=1, answers=2, overview=2)
    found = policy.search(lambda frames: frames, clock, None)
    assert found.intervals == [(700.0, 720.0, 0.6), (100.0, 120.0, 0.5), (300.0, 340.0, 0.2), (980.0, 1000.0, 0.0)]
    assert found.frames.tolist() == [105, 115, 250, 705, 715, 750] and not found.confirmed
    part = policy.search(lambda frames: frames, clock, None, window=(600, 800))
    assert part.frames.tolist() == [650, 702, 707, 712, 717, 750] and part.intervals[0] == (700.0, 720.0, 0.6)
    # At the threshold the search is over, where frames are near enough.
    for threshold, resolution, confirmed in [(0.6, 5.0, True), (0.61, 5.0, False), (0.6, 4.9, False)]:
        policy = SearchPolicy(Two(), 4, 1, threshold, resolution)
        assert policy.search(lambda frames: frames, clock, None).confirmed is confirmed


def test_where_nothing_is_proposed_the_answer_is_read_from_the_whole_video():
    class Blind(Eye):
        def propose(self, frames, times, query):
            return []

    clock = Clock.regular(1001, rate=1)
    found = SearchPolicy(Blind(), budget_frames=4, max_visits=1, overview=2).search(
        torch.zeros(1001).__getitem__, clock, 0
    )
    assert found.intervals == [] and not found.confirmed
    assert found.frames.tolist() == [125, 250, 375, 625, 750, 875]


def test_bad_input_is_refused():
    for options in ({"budget_frames": 0}, {"parts": 1}, {"overview": -1}, {"answers": 0}, {"max_visits": 0}):
        with pytest.raises(ct.ChronotopeError, match="from 1 on"):
            SearchPolicy(Eye(), **options)
    for options in ({"threshold": 1.1}, {"resolution": 0.0}):
        with pytest.raises(ct.ChronotopeError, match="threshold from 0 to 1"):
            SearchPolicy(Eye(), **options)
    with pytest.raises(ct.ChronotopeError, match="confidence, arrival"):
        SearchPolicy(Eye(), order="length")
    for times in ([], [0.0, 0.0], [1.0, 0.5], [0.0, torch.inf]):
        with pytest.raises(ct.ChronotopeError, match="each after the last"):
            Clock(torch.tensor(times))
    video, clock, _ = scene(0)
    with pytest.raises(ct.ChronotopeError, match="expected a probability"):
        SearchPolicy(Eye()).search((3 * video).__getitem__, clock, "?")


class Scripted:
    """A model that recognises things that last longer than its frames are apart, and errs in one reflection of ten.

    Things are nested, the shortest is the event that is sought. Spotlight: the shortest that it can recognise, if a
    frame shows it and it is not the whole window, with ends that are off by up to a quarter of its length; else an
    interval at random. Reflection: 0.9 where a frame shows the shortest that it can recognise, else 0.1; or the other.
    """

    def __init__(self, duration, seed, wrong=0.1, lengths=(4.0, 300.0)):
        self.rng, self.wrong, self.calls = random.Random(seed), wrong, 0
        start, end, self.things = 0.0, float(duration), []
        for length in sorted((n for n in lengths if n < duration), reverse=True):
            start = self.rng.uniform(start, end - length)
            end = start + length
            self.things.insert(0, (start, end))

    def shows(self, times):
        apart = float(times[-1] - times[0]) / max(1, len(times) - 1)
        thing = next(((s, e) for s, e in self.things if apart < e - s), None)
        return apart, thing, thing is not None and bool(((times >= thing[0]) & (times <= thing[1])).any())

    def propose(self, frames, times, query):
        self.calls += 1
        apart, thing, shown = self.shows(times)
        first, last = float(times[0]) - apart / 2, float(times[-1]) + apart / 2
        if shown and not (thing[0] <= first and last <= thing[1]):
            off = 0.25 * (thing[1] - thing[0])
            return [(thing[0] + self.rng.uniform(-off, off), thing[1] + self.rng.uniform(-off, off))]
        return [tuple(sorted((self.rng.uniform(first, last), self.rng.uniform(first, last))))]

    def reflect(self, frames, times, query):
        self.calls += 1
        return 0.9 if self.shows(times)[2] != (self.rng.random() < self.wrong) else 0.1

    def hit(self, times):
        return bool(((times >= self.things[0][0]) & (times <= self.things[0][1])).any())


def searches(duration, count, rate=10, wrong=0.1, lengths=(4.0, 300.0), **options):
    """Means over timelines: share in which a chosen frame shows the event, visits, calls of the model, frames read."""
    clock, rows = Clock.regular(duration * rate, rate), []
    for seed in range(count):
        model = Scripted(duration, seed, wrong, lengths)
        found = SearchPolicy(model, overview=0, **options).search(lambda frames: frames, clock, None)
        assert len(found.frames) <= 32
        rows.append((model.hit(clock.times[found.frames]), found.visits, model.calls, found.frames_read))
    return np.array(rows, dtype=float).mean(0).tolist()


def uniform(duration, count, frames, rate=10):
    clock = Clock.regular(duration * rate, rate)
    times = clock.times[clock.spread([clock.span], frames)]
    return sum(Scripted(duration, seed).hit(times) for seed in range(count)) / count


def test_four_seconds_of_an_hour_are_found_and_sooner_the_surest_window_first():
    hit, visits, *_ = searches(3600, 200)
    assert hit >= 0.9
    assert uniform(3600, 200, 384) < 0.5
    _, later, *_ = searches(3600, 100, order="arrival")
    assert visits < later


@pytest.mark.slow
def test_hits_in_an_hour_beside_those_of_uniform_frames():
    within_12, within_4 = searches(3600, 1000), searches(3600, 1000, max_visits=4)
    as_many = [uniform(3600, 2000, frames) for frames in (384, round(within_12[3]))]
    print(within_12, within_4, as_many)
    assert within_12[0] >= 0.9 and within_12[1] <= 12
    assert within_4[0] >= 0.85
    assert as_many[0] == pytest.approx(384 * 4 / 3600, abs=0.03)
    assert as_many[1] <= within_12[0] - 0.2  # as many frames as the search read for spotlight and reflection


@pytest.mark.slow
def test_best_first_needs_fewer_calls_than_the_order_of_arrival():
    for wrong in (0.0, 0.1):
        best, arrival = (
            searches(3600, 200, wrong=wrong, max_visits=1000, order=order) for order in ("confidence", "arrival")
        )
        print(wrong, best, arrival)
        assert best[0] > arrival[0] - 0.01 and best[1] < 0.75 * arrival[1]
        if not wrong:  # both find it in the end, by how many calls of both kinds
            assert best[0] == arrival[0] == 1.0 and best[2] < 0.75 * arrival[2]


def fits(durations, values):
    """Slope for each doubling of the duration, and the share of the variance that the logarithm and a line explain."""
    doublings, out = np.log2(np.array(durations) / durations[0]), []
    for x in (doublings, np.array(durations)):
        slope, level = np.polyfit(x, values, 1)
        out += [slope, 1 - np.var(values - level - slope * x) / np.var(values)]
    return out[0], out[1], out[3]


@pytest.mark.slow
def test_calls_grow_like_the_logarithm_of_the_duration():
    durations = [600, 1800, 3600, 10800, 36000]
    rows = [searches(duration, 200, max_visits=200) for duration in durations]
    visits, calls = [row[1] for row in rows], [row[2] for row in rows]
    print(rows, fits(durations, visits), fits(durations, calls))
    for slope, logarithm, line in (fits(durations, visits), fits(durations, calls)):
        assert slope > 0 and logarithm > line
    assert fits(durations, visits)[0] < 1
    assert visits[-1] <= 2.5 * visits[0] and calls[-1] <= 2.5 * calls[0]  # in 60 times the duration
    # Where something is recognised at every scale, from 10 minutes to four weeks.
    durations = [600 * 4**k for k in range(7)]
    lengths = (4.0, 300.0, 3600.0, 43200.0, 518400.0)
    rows = [searches(duration, 120, rate=1, lengths=lengths, max_visits=200) for duration in durations]
    visits, calls = [row[1] for row in rows], [row[2] for row in rows]
    print(rows, fits(durations, visits), fits(durations, calls))
    for values in (visits, calls):
        slope, logarithm, line = fits(durations, values)
        assert slope > 0 and logarithm >= 0.85 and logarithm > line
        assert values[-1] <= 6 * values[0]  # in 4096 times the duration
