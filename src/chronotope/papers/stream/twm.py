"""Temporal Working Memory: of a long clip, the K frames that a question needs, found without looking at all of them.

Frames x and question q are projected into one space, and frames are chosen one by one: the next one has the largest

    worth(t) = alpha cos(x_t, q) + beta (1 - max over s chosen so far of cos(x_t, x_s))

The candidates are found by a search: start with K frames, evenly spaced; candidates are all frames at most `window`
from a chosen one; choose K of them; repeat, `iters` times or until nothing changes. The projections learn by InfoNCE
between matching rows u_i, v_i of a batch, s_ij = cos(u_i, v_j) / temperature:

    loss = mean_i -log softmax_j(s_ij)[i] + mean_j -log softmax_i(s_ij)[j]

The model behind sees the K frames alone, in order. A choice carries no gradient: only the projections learn. Segments
of sound are chosen the same way, with the question or with the mean of the chosen frames in place of q. Of a stream,
`keep_best` keeps the worthiest K so far; with beta = 0 these are the K most similar of all that came.

Sizes: feats [B, T, D], query [B, D] -> int [B, K], ascending. At most K (2 window + 1) iters frames are looked at,
however long the clip is: `search` asks an encoder for the features of these alone.

    >>> head = AlignmentHead(32, 48, 16)
    >>> x, q = head(torch.randn(2, 200, 32), torch.randn(2, 48))
    >>> index = select_segments(x, q, keep=8, window=6)
    >>> index.shape, head.loss(torch.randn(5, 32), torch.randn(5, 48)).shape
    (torch.Size([2, 8]), torch.Size([]))
    >>> model = Refined(head, lambda frames, index: frames.mean((1, 2, 3)), keep=8, window=6)
    >>> model(torch.randn(2, 200, 4, 4), torch.randn(2, 200, 32), torch.randn(2, 48)).shape
    torch.Size([2])

Measured: 200 frames, 10 of them about the question, head trained on 2,000 pairs, K = 8, window 8: all 8 frames kept lie
in the segment with weights 0.9, 0.1 (uniform: 0.4 of 8), 3.5 with equal ones, which spread over what differs. Of two
such segments likeness alone finds one in half the clips, and equal weights both in 90% of these. Questions about one of
20 scenes: 1.00 answered from the 8 frames chosen, at best 0.57 from uniform ones.

Left out: the nine models of the paper, their encoders, and their scores.

The released code (xid32/NAACL_2025_TWM at e990ae23) searches in another way: of k evenly spaced frames it centres on
the one that is most like the next one, and takes k frames near it, m times; its calls (3, 3, 0.5, 0.5), (11, 8, 0.2,
0.8), are k, m and the weights of that likeness before and after attention to the question. Each frame is attended to
alone, with softmax weight 1, so that there no question changes a choice (200 clips with 4 questions each: the same
frames). The paper's text was at hand in part only: how candidates compete, and when the search ends, is this page's.

Paper: Diao et al. 2025, "Temporal Working Memory: Query-Guided Segment Refinement for Enhanced Multimodal
Understanding", Findings of NAACL, arXiv 2502.06020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.papers.registry import paper

Encoder = Callable[[Int64[Tensor, "b n"]], Float[Tensor, "b n d"]]


def infonce(u: Float[Tensor, "n d"], v: Float[Tensor, "n d"], temperature: float | int = 1.0) -> Float[Tensor, ""]:
    """Cross-entropy of each row's match among all rows, both ways, added up."""
    s = F.normalize(u, dim=1) @ F.normalize(v, dim=1).T / temperature
    match = torch.arange(len(u), device=u.device)
    return F.cross_entropy(s, match) + F.cross_entropy(s.T, match)


class AlignmentHead(nn.Module):
    """Frames and questions in one space.

    Args:
        frame_dim, query_dim: sizes of what the encoders give.
        dim: size of the common space.
        temperature: of the loss.
    """

    def __init__(self, frame_dim: int, query_dim: int, dim: int, temperature: float | int = 1.0):
        super().__init__()
        self.frames, self.query = nn.Linear(frame_dim, dim), nn.Linear(query_dim, dim)
        self.temperature = temperature

    def forward(
        self, feats: Float[Tensor, "b t c"], query: Float[Tensor, "b e"]
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
        """Both, projected."""
        return self.frames(feats), self.query(query)

    def loss(self, feats: Float[Tensor, "n c"], query: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
        """InfoNCE of rows that match; the encoders behind them get no gradient."""
        return infonce(self.frames(feats.detach()), self.query(query.detach()), self.temperature)


@paper(
    system=38,
    name="Temporal Working Memory",
    family="stream",
    claim="keeps the K frames that a question needs, by a local search over likeness to it and to each other",
    evidence=["tests/papers/stream/test_twm.py"],
)
def select_segments(
    feats: Float[Tensor, "b t d"],
    query: Float[Tensor, "b d"],
    keep: int,
    window: int = 3,
    alpha: float | int = 0.5,
    beta: float | int = 0.5,
    iters: int = 3,
) -> Int64[Tensor, "b keep"]:
    """Numbers of the frames kept, ascending.

    Args:
        feats, query: in one space.
        keep: K, frames kept and frames to start with.
        window: frames to both sides of a chosen one that are looked at in the next round.
        alpha, beta: weights of likeness to the question and of unlikeness to the frames chosen.
        iters: rounds.
    """
    return search(lambda index: _take(feats, index), feats.shape[1], query, keep, window, alpha, beta, iters)


@torch.no_grad()
def search(
    encode: Encoder, length: int, query: Float[Tensor, "b d"], keep: int,
    window: int = 3, alpha: float | int = 0.5, beta: float | int = 0.5, iters: int = 3,
) -> Int64[Tensor, "b keep"]:  # fmt: skip
    """`select_segments` for features that are made when asked for: encode(int [B, n]) -> [B, n, D]."""
    if not 1 <= keep <= length or window < 0 or iters < 1:
        raise ChronotopeError(
            f"keep={keep}, window={window}, iters={iters} of {length} frames: expected keep from 1 to {length}, "
            "window from 0 and iters from 1 on."
        )
    steps = torch.arange(-window, window + 1, device=query.device)
    # The middles of K equal parts, exact in integers.
    chosen = (2 * torch.arange(keep, device=query.device) + 1) * length // (2 * keep)
    chosen = chosen.expand(len(query), -1)
    for _ in range(iters):
        near, real = _distinct((chosen[:, :, None] + steps).flatten(1).clamp(0, length - 1))
        before, chosen = chosen, near.gather(1, _worthiest(encode(near), query, real, keep, alpha, beta)).sort(1).values
        if torch.equal(before, chosen):
            break
    return chosen


@dataclass(frozen=True)
class Kept(Carried):
    """The worthiest frames of a stream so far: features and numbers, ascending; and how many frames have come."""

    x: Float[Tensor, "b n d"]
    index: Int64[Tensor, "b n"]
    seen: int


@torch.no_grad()
def keep_best(
    feats: Float[Tensor, "b t d"], query: Float[Tensor, "b d"], keep: int,
    alpha: float | int = 0.5, beta: float | int = 0.5, state: Kept | None = None,
) -> Kept:  # fmt: skip
    """The next frames of a stream join those kept, and the worthiest `keep` stay: memory for K frames."""
    if keep < 1:
        raise ChronotopeError(f"keep={keep}: expected 1 or more.")
    if state is None:
        state = Kept(feats[:, :0], torch.zeros(len(feats), 0, dtype=torch.int64, device=feats.device), 0)
    new = torch.arange(state.seen, state.seen + feats.shape[1], device=feats.device).expand(len(feats), -1)
    x, index = torch.cat((state.x, feats), 1), torch.cat((state.index, new), 1)
    real = torch.ones_like(index, dtype=torch.bool)
    place = _worthiest(x, query, real, min(keep, index.shape[1]), alpha, beta).sort(1).values
    return Kept(_take(x, place), index.gather(1, place), state.seen + feats.shape[1])


class Refined(nn.Module):
    """A model that sees the chosen frames alone.

    Args:
        head: brings frames and question into one space.
        model: (frames [B, K, ...], index [B, K]) -> anything.
        keep, window, alpha, beta, iters: as for `select_segments`.
    """

    def __init__(
        self, head: AlignmentHead, model: Callable[..., Any], keep: int,
        window: int = 3, alpha: float | int = 0.5, beta: float | int = 0.5, iters: int = 3,
    ):  # fmt: skip
        super().__init__()
        self.head, self.model = head, model
        self.keep, self.window, self.alpha, self.beta, self.iters = keep, window, alpha, beta, iters

    def forward(
        self, frames: Float[Tensor, "b t ..."], feats: Float[Tensor, "b t c"], query: Float[Tensor, "b e"]
    ) -> Any:
        """What the model says of the frames that its features, such as cheap ones, find for the question."""
        x, q = self.head(feats, query)
        index = select_segments(x, q, self.keep, self.window, self.alpha, self.beta, self.iters)
        return self.model(torch.stack([x[i] for x, i in zip(frames, index, strict=True)]), index)


def _worthiest(
    x: Float[Tensor, "b n d"], query: Float[Tensor, "b d"], real: Bool[Tensor, "b n"],
    keep: int, alpha: float | int, beta: float | int,
) -> Int64[Tensor, "b keep"]:  # fmt: skip
    """Places of the frames chosen one by one."""
    x = F.normalize(x, dim=2)
    likeness = alpha * (x @ F.normalize(query, dim=1)[..., None])[..., 0]
    free, found, nearest = real.clone(), [], torch.full_like(likeness, -1.0)
    for _ in range(keep):
        worth = likeness + beta * (1 - nearest)
        best = worth.masked_fill(~free, -torch.inf).argmax(1, keepdim=True)
        free.scatter_(1, best, torch.zeros_like(best, dtype=torch.bool))
        nearest = torch.maximum(nearest, (x @ _take(x, best).transpose(1, 2))[..., 0])
        found.append(best)
    return torch.cat(found, 1)


def _distinct(index: Int64[Tensor, "b n"]) -> tuple[Int64[Tensor, "b m"], Bool[Tensor, "b m"]]:
    """Each number once, ascending, and where these are real: rows with fewer of them end with repetitions."""
    index = index.sort(1).values
    real = torch.ones_like(index, dtype=torch.bool)
    real[:, 1:] = index[:, 1:] != index[:, :-1]
    order = (~real).to(torch.uint8).argsort(stable=True, dim=1)[:, : int(real.sum(1).max())]
    return index.gather(1, order), real.gather(1, order)


def _take(x: Float[Tensor, "b n d"], index: Int64[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
