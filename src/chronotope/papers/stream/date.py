"""DATE: frames chosen by likeness to a question, far apart in time, and their times written between them as text.

Sampling, of frames with scores s and times t. Candidates: the frames with s > mean(s), at most 4 K of them, the best
first. Then, with delta = 20 s at first and nothing accepted,

    accept the first candidate that is at least delta seconds from all accepted;  where there is none, delta = delta / 2

until K are accepted: a fixed order of passes over the candidates. Fewer candidates than K: all of them.

Stamps: <tokens of frame 0><"83s"><tokens of frame 1><"91.5s">..., with position ids (t, h, w)

    token of a frame at (y, x):  (c, start + y, start + x)          token of a stamp:  (c, c, c)

where c counts on by one with each frame and with each token of a stamp, from start: no time is in the ids, however
long the video; the times are words. The places of a frame are those of the first frame.

Sizes: scores [T], times [T] -> indices [K], in the order of time; a grid of N' tokens with T times and M tokens of
stamps -> ids [3, N' + M].

    >>> scores, times = torch.zeros(600), torch.arange(600.0)
    >>> scores[100:112], scores[300], scores[301], scores[500] = 0.9, 0.8, 0.79, 0.7
    >>> tass(scores, times, max_frames=4).tolist(), tass(scores, times, max_frames=4, delta0=0).tolist()
    ([100, 110, 300, 500], [100, 101, 102, 103])
    >>> stamped = timestamp_positions(Grid(t=2, h=1, w=2), [83.0, 91.5])
    >>> stamped.texts, stamped.ids.tolist()[0], stamped.ids.tolist()[2]
    (('83s', '91.5s'), [0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9], [0, 1, 1, 2, 3, 0, 1, 5, 6, 7, 8, 9])
    >>> x = stamped.join(torch.randn(1, 4, 8), torch.randn(1, 8, 8))
    >>> ct.Rope()(x[:, None].repeat(1, 1, 1, 2), coords=stamped.ids.T).shape
    torch.Size([1, 1, 12, 16])

A limit: of an event with more near duplicates than 4 K all candidates are duplicates, and other events are lost (600
frames, 3 events, K = 8: 3 events of 3 are found beside 20 duplicates, 1 of 3 beside 40). Scores that are all equal
choose nothing.

Measured: asked in which second a thing is seen, at frame rates that it never saw, a toy of two layers answers right in
1.00 with stamps and in 0.03 by places alone.

Left out: the language model, the caption that it makes of a question, the scores by CLIP, benchmarks. Sampling needs
all scores; `window` chooses in each stretch of a stream for itself, which is of this page.

The released code (yuanc3/DATE at c3961287) chooses the same frames and gives the same ids but those of the last stamp,
which it treats as the text after the video: that starts behind the largest of t, h, w. It sorts the times and not the
indices, and `topk=None`, as its example calls it, is an error; any number works, and is not used.

Paper: Yuan, Yang, Yang, Cheng 2025, "DATE: Dynamic Absolute Time Enhancement for Long Video Understanding",
arXiv 2509.09263.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper


@paper(
    system=93,
    name="DATE",
    family="stream",
    claim="chooses frames like the question and far apart in time; their times are words between them",
    evidence=["tests/papers/stream/test_date.py"],
)
@torch.no_grad()
def tass(
    scores: Float[Tensor, "t"],
    times: Float[Tensor, "t"],
    max_frames: int = 256,
    delta0: float | int = 20.0,
    decay: float | int = 0.5,
    cand_mult: int = 4,
    *,
    window: float | int | None = None,
) -> Int64[Tensor, "k"]:
    """Temporal-aware similarity sampling: the frames chosen, in the order of time.

    Args:
        scores: likeness of each frame to the question; of equal ones the first frame is the better.
        times: seconds.
        max_frames: K; at most so many are chosen, exactly min(K, frames above the mean, cand_mult K).
        delta0: seconds that frames of the first pass are apart; 0: the K best above the mean.
        decay: delta of a pass over that of the pass before it, from 0 to below 1.
        cand_mult: candidates are at most so many times K.
        window: choose among the frames of each stretch of so many seconds for itself, K of each: the choice of a
            stretch is known when it ends. None: among all.
    """
    if max_frames < 1 or cand_mult < 1 or delta0 < 0 or not 0 <= decay < 1 or not (window is None or window > 0):
        raise ChronotopeError(
            f"tass(max_frames={max_frames}, delta0={delta0}, decay={decay}, cand_mult={cand_mult}, window={window}): "
            "expected max_frames and cand_mult from 1 on, delta0 from 0 on, decay from 0 to below 1, window above 0."
        )
    if not bool(scores.isfinite().all() and times.isfinite().all()):
        raise ChronotopeError("scores or times are not finite: leave frames without a score out.")
    if window is None:
        stretches = [torch.arange(len(scores), device=scores.device)]
    else:
        number = (times.double() / window).floor()
        stretches = [(number == n).nonzero()[:, 0] for n in number.unique()]
    chosen = []
    for stretch in stretches:
        order = stretch[candidates(scores[stretch], cand_mult * max_frames)]
        chosen.append(order[spread(times[order], max_frames, delta0, decay)[0]])
    indices = torch.cat(chosen) if chosen else torch.arange(0, device=scores.device)
    return indices[times[indices].argsort(stable=True)]


def candidates(scores: Float[Tensor, "t"], limit: int) -> Int64[Tensor, "c"]:
    """The frames whose score is above the mean, at most `limit` of them, the best first."""
    order = scores.argsort(descending=True, stable=True)
    exact = scores.double()
    return order[exact[order] > exact.mean()][:limit]


def spread(
    times: Float[Tensor, "c"], count: int, delta0: float | int = 20.0, decay: float | int = 0.5
) -> tuple[Int64[Tensor, "k"], Float[Tensor, "k"]]:
    """Accepts `count` of the candidates, which come the best first: which, as they enter, and delta at their entry.

    Fewer than `count`: all of them, in their order, and delta 0. Distances only get smaller, so that a candidate
    that a pass left out stays out for the pass, and the first that is far enough is the next of the pass.
    """
    if len(times) <= count:
        return torch.arange(len(times), device=times.device), torch.zeros_like(times, dtype=torch.float64)
    places, delta, deltas = times.double(), float(delta0), []
    entered: list[int] = []
    distance = torch.full_like(places, torch.inf)  # to the nearest accepted; of an accepted one -inf
    while len(entered) < count:
        far = distance >= delta
        best = int(far.int().argmax())
        if not far[best]:
            # Frames at one time are never apart, however many passes there are.
            delta = delta * decay if distance.max() > 0 else 0.0
            continue
        entered.append(best)
        deltas.append(delta)
        distance = torch.minimum(distance, (places - places[best]).abs())
        distance[best] = -torch.inf
    return torch.tensor(entered, device=times.device), torch.tensor(deltas, dtype=torch.float64, device=times.device)


def seconds(time: float) -> str:
    """The text of a time: "83s", "91.5s"."""
    return str(round(time, 1)).removesuffix(".0") + "s"


def characters(text: str) -> list[int]:
    """A tokenizer that stands in for that of a model: one token for each byte."""
    return list(text.encode())


@dataclass(frozen=True)
class Stamped:
    """A sequence of frames and stamps.

    ids: t, h, w of each token. source: which token of the grid is there; -1: one of a stamp. tokens: those of the
    stamps, one after the other. texts: the stamp behind each frame. end: the id of what follows.
    """

    ids: Int64[Tensor, "3 n"]
    source: Int64[Tensor, "n"]
    tokens: Int64[Tensor, "m"]
    texts: tuple[str, ...]

    @property
    def end(self) -> int:
        """The position of the first token of text behind the video."""
        return int(self.ids.max()) + 1

    def join(self, frames: Float[Tensor, "b f c"], stamps: Float[Tensor, "b m c"]) -> Float[Tensor, "b n c"]:
        """The embeddings of the frames and those of the stamps, in the order of the sequence."""
        text = self.source < 0
        order = torch.where(text, frames.shape[1] + text.cumsum(0) - 1, self.source)
        return torch.cat((frames, stamps), 1)[:, order.to(frames.device)]


def timestamp_positions(
    grid: Grid,
    times: Sequence[float | int] | Float[Tensor, "t"],
    *,
    stamp: Callable[[float], str] = seconds,
    encode: Callable[[str], Sequence[int]] = characters,
    start: int = 0,
) -> Stamped:
    """Where the tokens of frames and of their stamps are.

    Args:
        grid: frames, rows and columns of the tokens that the language model reads.
        times: seconds of each frame.
        stamp: the text of a time.
        encode: the tokenizer of the model; one that gives nothing leaves the plain ids of frames.
        start: the id of the first token; how much text comes before the video.
    """
    given = [float(time) for time in times]
    if len(grid.axes) != 3 or grid.prefix or len(given) != grid.shape[0]:
        raise ChronotopeError(f"{grid!r} and {len(given)} times: expected frames, rows and columns, a time each frame.")
    coords = grid.coords().view(*grid.shape, 3).flatten(1, 2).transpose(1, 2)  # [T, 3, h * w]
    texts = tuple(stamp(time) for time in given)
    ids, source, tokens, count, size = [], [], [], start, coords.shape[2]
    for frame, text in enumerate(texts):
        place = coords[frame] + start
        place[0] = count
        words = list(encode(text))
        ids += [place, (count + 1 + torch.arange(len(words))).expand(3, -1)]
        source += [torch.arange(frame * size, (frame + 1) * size), torch.full((len(words),), -1)]
        tokens += words
        count += 1 + len(words)
    return Stamped(torch.cat(ids, 1), torch.cat(source), torch.tensor(tokens, dtype=torch.int64), texts)
