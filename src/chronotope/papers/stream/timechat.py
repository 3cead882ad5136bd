"""Differential Token Drop (TimeChat-Online): of each frame of a stream, the tokens that differ from those before.

Token i of frame t is dropped where it is like the token at the same place of the frame just before:

    feature:   cos(x_t,i, x_t-1,i) > tau            pixel:   mean |x_t,i - x_t-1,i| < tau, colours in [0, 1]
    relative:  the floor(tau * n) tokens of the frame that are most alike, whatever their likeness

The first frame is kept whole. What is kept keeps its coordinates (t, h, w), so that a rotary code sees the same
differences; the sequence gets ragged, and grows with change and not with time. No question is asked of the frames, and
history is not looked at again: the state is one frame. `last_kept=True` compares with the last token that was kept at a
place instead, which finds a drift whose every step is small.

The share dropped of each frame is a signal of its own: where it falls into a valley, the scene changed, and a model
may speak (`valleys`).

Sizes: x [B, T, n, C], n = h * w -> keep [B, T, n]; of x, `pack` gives tokens [M, C] with ids [3, M] and members [M].

    >>> grid, x = Grid(t=10, h=4, w=4), torch.randn(2, 1, 16, 8).repeat(1, 10, 1, 1)
    >>> keep, state = differential_token_drop(x, tau=0.5)
    >>> packed = pack(x, keep, grid)
    >>> packed.tokens.shape, packed.ids.shape, keep.float().mean().item() < 0.11
    (torch.Size([32, 8]), torch.Size([3, 32]), True)
    >>> q = ct.Rope()(torch.randn(1, 4, 32, 12), coords=packed.ids.T)
    >>> ct.attention(q, q, q, grid=Grid(n=32), where=ct.segments(packed.member) & ct.causal()).shape
    torch.Size([1, 4, 32, 12])

Measured: questions about a thing that moves over 4 x 4 cells for 12 frames, 38 of 192 tokens kept, 4% of the work of
attention: a small model that learnt with all tokens answers 1.00, one that learnt with these 1.00, the first one given
these 0.88. The released code (yaolinli/TimeChat-Online at 25a15783) keeps the same tokens with the same ids, in both
modes, where both pictures of a pair are one: it compares the last picture of a pair with the first of the pair before,
since its tokens stand for two pictures each; here a frame is one picture.

Left out: the language model, its training data and StreamingBench. When a valley speaks is not said in the paper; the
rule here is the plainest one.

Paper: Yao et al. 2025, "TimeChat-Online: 80% Visual Tokens are Naturally Redundant in Streaming Videos",
arXiv 2504.17343.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.registry import paper

MODES = ("feature", "pixel")


@dataclass(frozen=True)
class DropState(Carried):
    """What the next frame is compared with, [B, n, C]."""

    frame: Float[Tensor, "b n c"]


class Packed(NamedTuple):
    """The tokens kept, one member of the batch after the other, in the order of time.

    ids: the coordinates t, h, w of each; member: of which member of the batch each is.
    """

    tokens: Float[Tensor, "m c"]
    ids: Int64[Tensor, "3 m"]
    member: Int64[Tensor, "m"]


@paper(
    system=116,
    name="TimeChat-Online (Differential Token Drop)",
    family="stream",
    claim="drops tokens that are like the one at their place in the frame before; the cache grows with change",
    evidence=["tests/papers/stream/test_timechat.py"],
)
@torch.no_grad()
def differential_token_drop(
    x: Float[Tensor, "b t n c"],
    tau: float = 0.5,
    *,
    mode: str = "feature",
    relative: bool = False,
    last_kept: bool = False,
    state: DropState | None = None,
) -> tuple[Bool[Tensor, "b t n"], DropState]:
    """Which tokens are kept, and what the next frames are compared with.

    Args:
        x: features of the tokens; in mode "pixel" the colours of their patches, in [0, 1].
        tau: the likeness above which (pixel: the difference below which) a token is dropped; relative: the share.
        mode: "feature" or "pixel".
        relative: drop the same share of every frame but the first.
        last_kept: compare with the token kept last at a place, not with the frame just before.
        state: that of the frames before, as a former call returned it; None: these are the first.

    The share dropped of each frame is `1 - keep.float().mean(-1)`. A choice has no gradient; tokens kept have theirs.
    """
    if mode not in MODES:
        raise ChronotopeError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
    if relative and not 0 <= tau <= 1:
        raise ChronotopeError(f"tau={tau}: expected a share from 0 to 1 of the tokens of a frame.")
    if x.shape[1] == 0:
        raise ChronotopeError(f"x of shape {list(x.shape)}: expected at least one frame.")
    before = x[:, 0] if state is None else state.frame
    kept = []
    for t in range(x.shape[1]):
        if state is None and t == 0:
            keep = torch.ones(x[:, 0].shape[:2], dtype=torch.bool, device=x.device)
        else:
            keep = ~_dropped(x[:, t], before, tau, mode, relative)
        before = torch.where(keep[..., None], x[:, t], before) if last_kept else x[:, t]
        kept.append(keep)
    return torch.stack(kept, 1), DropState(before.clone())


def _dropped(
    new: Float[Tensor, "b n c"], old: Float[Tensor, "b n c"], tau: float, mode: str, relative: bool
) -> Bool[Tensor, "b n"]:
    alike = torch.cosine_similarity(new, old, dim=2) if mode == "feature" else -(new - old).abs().mean(2)
    if not relative:
        return alike > (tau if mode == "feature" else -tau)
    most = alike.topk(int(tau * alike.shape[1]), dim=1).indices
    return torch.zeros_like(alike, dtype=torch.bool).scatter_(1, most, torch.ones_like(most, dtype=torch.bool))


def pack(x: Float[Tensor, "b t n c"], keep: Bool[Tensor, "b t n"], grid: Grid, start: int = 0) -> Packed:
    """The tokens kept of some frames, with their coordinates. grid: of these frames; start: the time of the first."""
    if len(grid.axes) != 3 or grid.prefix or grid.size != keep[0].numel():
        raise ChronotopeError(
            f"{grid!r}: expected frames, rows and columns of {keep.shape[1]} frames of {keep.shape[2]}."
        )
    member, token = keep.flatten(1).nonzero().T
    ids = grid.coords(keep.device)[token].T.clone()
    ids[0] += start
    return Packed(x.flatten(1, 2)[member, token], ids, member)


def valleys(
    ratio: Float[Tensor, "b t"], below: float = 0.5, before: Float[Tensor, "b"] | None = None
) -> Bool[Tensor, "b t"]:
    """Where the share dropped falls below a bound: the first frame of each valley, known as soon as it is seen.

    before: the share of the frame before these; None: these are the first, of which the very first has no change.
    """
    low = ratio < below
    if before is None:
        low[:, 0] = False
        before = ratio.new_full((len(ratio),), torch.inf)
    return low & ~torch.cat(((before < below)[:, None], low[:, :-1]), 1)
