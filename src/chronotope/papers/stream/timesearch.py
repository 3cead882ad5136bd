"""TimeSearch: a model that sees few frames at once looks for a moment of a long video, the most promising window first.

The model is asked two things of n frames, which it is given with their times: in which intervals what the query asks
for may be (spotlight), and whether these frames show it (reflection: p in [0, 1]). A window [s, e] is read by n frames
spread evenly over it, (e - s) / n apart: a shorter window is seen in finer time. It is long where they are more than
`resolution` apart. With the whole video in a queue:

    pop the window with the highest p, of equal ones the shortest;  spotlight finds intervals in it, reflection gives
    the p of each
    stop at an interval with p >= threshold that is not long, or after max_visits windows
    into the queue, each with its p: the intervals, a long one in equal parts;  the parts of the window, if it is long

The parts of the window keep everything within reach where spotlight errs. The answer is read from n frames of the best
interval (or of the union of the best ones) and a few of the whole video. Windows know nothing of each other: what the
model said of (s, e) is kept in a cache for later searches with the same query in the same video, such as one that
goes on.

Sizes: a clock of T frames -> intervals [(s, e, p)], frames [K]; a visit costs n frames for spotlight and n for the
reflection on each new window.

    >>> class Eye:
    ...     def propose(self, frames, times, query):
    ...         brightest, apart = times[frames == frames.max()], times[1] - times[0]
    ...         return [(float(brightest[0] - apart), float(brightest[-1] + apart))]
    ...     def reflect(self, frames, times, query):
    ...         return float(frames.max())
    >>> clock, video = Clock.regular(36_000, rate=10), torch.zeros(36_000)  # an hour
    >>> video[18_500:21_500], video[20_000:20_040] = 0.5, 1.0               # a scene, and 4 seconds in it
    >>> found = SearchPolicy(Eye()).search(video.__getitem__, clock, "what is bright")
    >>> found.confirmed, found.visits, bool(video[found.frames].max() == 1)
    (True, 2, True)

Measured with a scripted model (4 seconds to be found, in a scene of 5 minutes that is recognised by itself, in an hour;
n = 32; one reflection of ten wrong): found in 0.94 of timelines within 12 visits, 0.88 within 4; 3.0 visits and 592
frames on average, those of reflection among them. Of uniform frames 384 show it in 0.43, 592 in 0.67. In the order of
arrival, which needs no p for a queue: 5.5 visits, and in all fewer calls, 11 for 19, but it finds it in 0.76 only.
Without errors 2.2 visits and 14 calls; in the order of arrival 14.7 and 29. From 10 minutes to 10 hours visits grow
from 2.9 to 5.5, by 0.53 with each doubling; hits fall to 0.83 from 3 hours on, since more is asked before the scene is
seen.

Left out: the video model, so LVBench and Charades-STA. How the model binds frames to their times is its own affair;
`date.timestamp_positions` writes times as text between frames, the paper may add a learnt fusion. The numbers n,
threshold, parts and resolution, and the rule of what is split, are choices of this page: the paper was at hand as an
abstract only. No gradients: choices have none.

Paper: Pan, Zhang, Wan, Zhang, Lu, She 2025, "TimeSearch: Hierarchical Video Search with Spotlight and Reflection for
Human-like Long Video Understanding", arXiv 2504.01407. A later version is called ZoomV, its parts TemporaLink and
TemporaLight.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.papers.registry import paper

Window = tuple[float | int, float | int]
ORDERS = ("confidence", "arrival")


@runtime_checkable
class VideoModel(Protocol):
    """What is asked of a model; `frames` is whatever `read` gave, `times` are its seconds."""

    def propose(self, frames: Any, times: Float64[Tensor, "n"], query: Any) -> Sequence[Window]:
        """Intervals in which the answer may be, in seconds."""

    def reflect(self, frames: Any, times: Float64[Tensor, "n"], query: Any) -> float:
        """The probability that these frames hold the answer."""


@dataclass(frozen=True)
class Clock:
    """The time of each frame in seconds, increasing: regular or not."""

    times: Float[Tensor, "t"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", self.times.double())
        if len(self.times) == 0 or not bool(self.times.isfinite().all() and (self.times.diff() > 0).all()):
            raise ChronotopeError(f"times of {len(self.times)} frames: expected finite seconds, each after the last.")

    @classmethod
    def regular(cls, frames: int, rate: float | int, start: float | int = 0.0) -> Clock:
        """Frames at so many a second."""
        return cls(start + torch.arange(frames, dtype=torch.float64) / rate)

    @property
    def span(self) -> Window:
        """The times of the first and the last frame."""
        return float(self.times[0]), float(self.times[-1])

    def frames(self, at: Float[Tensor, "n"]) -> Int64[Tensor, "n"]:
        """The frame nearest to each time; between two, the earlier."""
        at = at.double()
        after = torch.searchsorted(self.times, at).clamp(max=len(self.times) - 1)
        before = (after - 1).clamp(min=0)
        return torch.where(at - self.times[before] <= self.times[after] - at, before, after)

    def spread(self, windows: Sequence[Window], count: int) -> Int64[Tensor, "k"]:
        """At most `count` frames, spread evenly over the union of some windows: those nearest to even times."""
        joined: list[list[float]] = []
        for start, end in sorted(windows):
            if joined and start <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([start, end])
        starts, ends = torch.tensor(joined, dtype=torch.float64).T
        before = torch.cat((starts.new_zeros(1), (ends - starts).cumsum(0)))
        at = (torch.arange(count, dtype=torch.float64) + 0.5) / count * before[-1]
        window = (torch.searchsorted(before, at, right=True) - 1).clamp(0, len(joined) - 1)
        return self.frames((starts[window] + at - before[window]).to(self.times.device)).unique()


class Interval(NamedTuple):
    """Where the answer may be, in seconds, and how sure the model is."""

    start: float
    end: float
    confidence: float


class Found(NamedTuple):
    """The end of a search.

    intervals: those that spotlight found, the best first. frames: those to answer from, in order. confirmed: whether
    the first interval ended the search. visits: windows popped. frames_read: frames that the model was given, for
    spotlight and reflection.
    """

    intervals: list[Interval]
    frames: Int64[Tensor, "k"]
    confirmed: bool
    visits: int
    frames_read: int


@dataclass
class Cache:
    """What one model said of each window (s, e), for one query in one video and one number of frames."""

    proposed: dict[Window, list[Window]] = field(default_factory=dict)
    reflected: dict[Window, float] = field(default_factory=dict)


@paper(
    system=90,
    name="TimeSearch",
    family="stream",
    claim="best-first search of a long video: a model proposes intervals, judges them, and zooms into the best",
    evidence=["tests/papers/stream/test_timesearch.py"],
)
@dataclass(frozen=True)
class SearchPolicy:
    """How a video is searched.

    Args:
        model: `propose` and `reflect`.
        budget_frames: n, frames that the model sees at once.
        max_visits: windows that spotlight is asked about.
        threshold: p from which an interval is the answer.
        resolution: seconds between frames, at most, where an interval is judged for good; about the length of the
            shortest thing that is asked for.
        parts: equal parts of a window that is too long for that.
        order: "confidence"; or "arrival", as the windows came, to compare with.
        answers: intervals whose union is read in the end.
        overview: frames of the whole video that are added to these.
    """

    model: VideoModel = field(repr=False)
    budget_frames: int = 32
    max_visits: int = 12
    threshold: float | int = 0.8
    resolution: float | int = 1.0
    parts: int = 4
    order: str = "confidence"
    answers: int = 1
    overview: int = 8

    def __post_init__(self) -> None:
        if min(self.budget_frames, self.max_visits, self.answers) < 1 or self.parts < 2 or self.overview < 0:
            raise ChronotopeError(
                f"{self!r}: expected budget_frames, max_visits and answers from 1 on, parts from 2 on, overview from 0."
            )
        if not 0 <= self.threshold <= 1 or not self.resolution > 0:
            raise ChronotopeError(f"{self!r}: expected a threshold from 0 to 1 and a resolution above 0 seconds.")
        if self.order not in ORDERS:
            raise ChronotopeError(f"{self!r}: expected order to be one of {', '.join(ORDERS)}.")

    @torch.no_grad()
    def search(
        self,
        read: Callable[[Int64[Tensor, "n"]], Any],
        clock: Clock,
        query: Any,
        *,
        window: Window | None = None,
        cache: Cache | None = None,
    ) -> Found:
        """Looks for the query.

        Args:
            read: gives frames by number, such as `video.__getitem__`.
            clock: the time of each frame.
            query: handed to the model.
            window: the stretch of the video that is searched; None: all of it.
            cache: what the model said in former searches.
        """
        whole = clock.span if window is None else window
        asked = _Asked(self.model, read, clock, query, self.budget_frames, Cache() if cache is None else cache)
        found: dict[Window, Interval] = {}
        queue, entered, visits = [(0.0, 0.0, 0, whole)], {whole}, 0
        while queue and visits < self.max_visits:
            visits += 1
            window = heapq.heappop(queue)[-1]
            intervals = asked.spotlight(window)
            for new in intervals:
                found[new] = Interval(*new, asked.reflection(new))
                if found[new].confidence >= self.threshold and not self._long(new):
                    return self._found(clock, whole, [found.pop(new), *_best(found)], True, visits, asked.frames_read)
            parts = [part for new in intervals for part in self._split(new) or [new]] + self._split(window)
            for new in dict.fromkeys(parts):
                if new not in entered and new[1] > new[0]:
                    entered.add(new)
                    first = (-asked.reflection(new), new[1] - new[0]) if self.order == "confidence" else (0.0, 0.0)
                    heapq.heappush(queue, (*first, len(entered), new))
        return self._found(clock, whole, _best(found), False, visits, asked.frames_read)

    def _long(self, window: Window) -> bool:
        return (window[1] - window[0]) / self.budget_frames > self.resolution

    def _split(self, window: Window) -> list[Window]:
        """The parts of a long window."""
        if not self._long(window):
            return []
        start, end = window
        return list(pairwise([start + (end - start) * i / self.parts for i in range(self.parts)] + [end]))

    def _found(
        self, clock: Clock, whole: Window, intervals: list[Interval], confirmed: bool, visits: int, frames_read: int
    ) -> Found:
        best = [(interval.start, interval.end) for interval in intervals[: self.answers]] or [whole]
        frames = [clock.spread(best, self.budget_frames)]
        if self.overview:
            frames.append(clock.spread([whole], self.overview))
        return Found(intervals, torch.cat(frames).unique(), confirmed, visits, frames_read)


@dataclass
class _Asked:
    """A model that is asked about windows of one video, once about each."""

    model: VideoModel
    read: Callable[[Tensor], Any]
    clock: Clock
    query: Any
    count: int
    cache: Cache
    frames_read: int = 0

    def spotlight(self, window: Window) -> list[Window]:
        """The intervals that it proposes, within the window."""
        if window not in self.cache.proposed:
            start, end = window
            given = self.model.propose(*self._seen(window), self.query)
            clipped = [(max(float(s), start), min(float(e), end)) for s, e in given]
            self.cache.proposed[window] = [(s, e) for s, e in dict.fromkeys(clipped) if s <= e]
        return self.cache.proposed[window]

    def reflection(self, window: Window) -> float:
        """How sure it is that the window holds the answer."""
        if window not in self.cache.reflected:
            p = float(self.model.reflect(*self._seen(window), self.query))
            if not 0 <= p <= 1:
                raise ChronotopeError(f"reflect gave {p} for the window {window}: expected a probability.")
            self.cache.reflected[window] = p
        return self.cache.reflected[window]

    def _seen(self, window: Window) -> tuple[Any, Tensor]:
        frames = self.clock.spread([window], self.count)
        self.frames_read += len(frames)
        return self.read(frames), self.clock.times[frames]


def _best(found: dict[Window, Interval]) -> list[Interval]:
    """The surest first; of equally sure ones the one found last, which is of a finer window."""
    return sorted(found.values(), key=lambda interval: interval.confidence)[::-1]
