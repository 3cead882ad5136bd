"""Temporal Token Fusion (TTF-VLA): patches that neither change nor matter keep their tokens of the step before.

Of step t: the grey frame g_t, the encoder's tokens x_t, and a, how much the model's text (or its first action) looked
at each patch in step t - 1. For patch i, with y the fused tokens:

    c_i = mean over the patch of |g_t - g_t-1|,    g = 0.299 R + 0.587 G + 0.114 B
    w_i = 1 where c_i > tau (it changes) or a_i is among the k highest (it matters), else 0
    y_t,i = w_i x_t,i + (1 - w_i) y_t-1,i

The smooth variant takes w_i = min(c_i / tau, 1). In every K-th step all tokens are new, so none is older than K - 1
steps however slowly its patch changes: frames are compared with the one just before. Nothing is trained; the encoder
still sees every frame, and what is gained is steadiness.

Sizes: frame [B, 3 (or 1), H, W], tokens [B, N, D], N = (H / patch) * (W / patch) -> tokens [B, N, D], new [B, N]. Each
encoder of a model has a fusion of its own, over the frame as this encoder is given it; tau is in those units.

    >>> fusion = TokenFusion(Changed(0.1) | Relevant(30), every=5, patch=14)
    >>> frame, tokens = torch.rand(1, 3, 112, 112), torch.randn(1, 64, 32)
    >>> fused = fusion.step(frame, tokens)
    >>> q, k, v = torch.randn(3, 1, 4, 74, 32)  # in a layer of the model: 64 patches, then 10 tokens of text
    >>> _, lse = ct.attention(q, k, v, grid=Grid(n=74), where=ct.causal(), return_lse=True)
    >>> state = fused.state.attended(relevance(q[:, :, 64:], k[:, :, :64], lse[:, :, 64:]))
    >>> fused = fusion.step(frame, torch.randn(1, 64, 32), state)
    >>> fused.tokens.shape, int(fused.new.sum())
    (torch.Size([1, 64, 32]), 30)

A policy is a function of the change and the attention of each patch; policies join by `|`. An extension that saves
work: `tokens` may be a function of the frame and of `new`, which makes the tokens that are new and may leave others.

Measured (a policy, linear in the tokens, that tells where a square is, over a still background with noise of 0.05 in
every pixel; K = 5, tau = 0.1, k = 30 of 64; variance of its error, as a share of that with the tokens of each frame):
smooth 0.60, smooth with k 0.70, hard 0.92. Noise that is held still is as large as noise that changes, so what hard
fusion cuts is the variance between keyframes, to 0.52, and that from step to step, to 0.54. Of a square too slow for
tau the squared error is 3.8 times as large where only change counts, and 1.01 times with k; with K = 20, 53 and 1.35.
The released code (PKU-XLab/TTF-VLA at afbd6bf3), given the same frames, tokens and attention, fuses the same tokens
in every mode that this page has; the largest difference is 0.

Defaults are those of that code; its README runs tau = 0.03, K = 3 and k = 70, on frames normalised for the encoder.
That code keeps an attention map until a new one comes; here one is used for one step, and where there is none all
patches matter. It also has a mode by likeness of shallow features, which is left out, as are LIBERO, SimplerEnv and
robots, and the reuse of rows of queries inside the model.

Paper: Liu, Zhang, Li, Zhou, Wu, Huang, Duan 2025, "TTF-VLA: Temporal Token Fusion via Pixel-Attention Integration for
Vision-Language-Action Models", arXiv 2508.19257.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.papers.registry import paper

GREY = (0.299, 0.587, 0.114)

Frame = Float[Tensor, "b c height width"]
Tokens = Float[Tensor, "b n d"]
PerPatch = Float[Tensor, "b n"]


class Policy(ABC):
    """How much of each new token is taken: 1 is new, 0 is that of the step before."""

    @abstractmethod
    def __call__(self, change: PerPatch, scores: PerPatch | None) -> PerPatch:
        """From the change of each patch and the attention it got in the step before; None: that is not known."""

    def __or__(self, other: Policy) -> Policy:
        """As much as either takes."""
        return Either(self, other)


@dataclass(frozen=True)
class Changed(Policy):
    """New where the patch changed by more than tau; everywhere if tau < 0."""

    tau: float = 0.1

    def __call__(self, change: PerPatch, scores: PerPatch | None) -> PerPatch:
        return (change > self.tau).to(change.dtype)


@dataclass(frozen=True)
class Smooth(Policy):
    """The share min(change / tau, 1) of the new token; all of it if tau < 0."""

    tau: float = 0.1

    def __call__(self, change: PerPatch, scores: PerPatch | None) -> PerPatch:
        return torch.where(change > self.tau, 1.0, change / max(self.tau, torch.finfo(change.dtype).tiny))


@dataclass(frozen=True)
class Relevant(Policy):
    """New are the `keep` patches that got most attention, of equals the first; all, where attention is not known."""

    keep: int = 120

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise ChronotopeError(f"{self!r}: expected a number of patches from 0 on.")

    def __call__(self, change: PerPatch, scores: PerPatch | None) -> PerPatch:
        if scores is None:
            return torch.ones_like(change)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, : self.keep]
        return torch.zeros_like(change).scatter_(1, best, 1.0)


@dataclass(frozen=True)
class Either(Policy):
    """The larger of two weights."""

    one: Policy
    other: Policy

    def __call__(self, change: PerPatch, scores: PerPatch | None) -> PerPatch:
        return torch.maximum(self.one(change, scores), self.other(change, scores))


@dataclass(frozen=True)
class FusionState(Carried):
    """The last frame, its fused tokens, the attention that they got, and each member's steps since its start."""

    frame: Frame
    tokens: Tokens
    scores: PerPatch | None
    steps: Int64[Tensor, "b"]

    def attended(self, scores: PerPatch) -> FusionState:
        """With the attention that each patch got from what the model did with these tokens."""
        if scores.shape != self.tokens.shape[:2]:
            raise ChronotopeError(f"scores of shape {list(scores.shape)}: expected {list(self.tokens.shape[:2])}.")
        return replace(self, scores=scores.detach())

    def restarted(self, ended: Bool[Tensor, "b"]) -> FusionState:
        """For members whose episode has ended the next step is a first one."""
        return replace(self, steps=self.steps.masked_fill(ended, 0))


class Fused(NamedTuple):
    """Fused tokens, where anything of the new ones was taken, and the state for the next step."""

    tokens: Tokens
    new: Bool[Tensor, "b n"]
    state: FusionState


@paper(
    system=198,
    name="TTF-VLA (Temporal Token Fusion)",
    family="stream",
    claim="image tokens of patches that neither changed nor were attended to are those of the step before",
    evidence=["tests/papers/stream/test_ttf_vla.py"],
    missing="with hard fusion the variance of the action's error falls by 8% over all steps, not 20%, and by 48% "
    "between keyframes; with the smooth variant by 40%",
)
@dataclass(frozen=True)
class TokenFusion:
    """Fuses the tokens of one encoder over time; what it carries is in its state.

    Args:
        policy: what is new; the default is the paper's hybrid rule.
        every: K, from one step in which all tokens are new to the next; 1: no fusion.
        patch: pixels along a side of a patch.
    """

    policy: Policy = field(default_factory=lambda: Changed() | Relevant())
    every: int = 5
    patch: int = 14

    def __post_init__(self) -> None:
        if self.every < 1 or self.patch < 1:
            raise ChronotopeError(f"{self!r}: expected every and patch from 1 on.")

    @torch.no_grad()
    def step(
        self,
        frame: Frame,
        tokens: Tokens | Callable[[Tensor, Tensor], Tensor],
        state: FusionState | None = None,
    ) -> Fused:
        """The next step; state: what the former call returned, None at the start of an episode.

        tokens: the encoder's, or a function (frame, new [B, N]) that makes at least those that are new.
        """
        weight = self.weight(frame, state)
        new = weight > 0
        made = (tokens if isinstance(tokens, Tensor) else tokens(frame, new)).detach()
        if made.shape[:2] != new.shape:
            raise ChronotopeError(
                f"tokens of shape {list(made.shape)}: expected [B, N, D] with [B, N] {list(new.shape)}."
            )
        fused = made if state is None else _mixed(made, state.tokens, weight)
        steps = torch.zeros(len(frame), dtype=torch.int64, device=frame.device) if state is None else state.steps
        # Copies: the caller may write its next frame over this one.
        return Fused(fused, new, FusionState(frame.clone(), fused.clone(), None, steps + 1))

    @torch.no_grad()
    def weight(self, frame: Frame, state: FusionState | None) -> PerPatch:
        """How much of each new token the next step takes."""
        change = patch_change(frame, frame if state is None else state.frame, self.patch)
        if state is None:
            return torch.ones_like(change)
        return self.policy(change, state.scores).masked_fill((state.steps % self.every == 0)[:, None], 1.0)


def patch_change(frame: Frame, before: Float[Tensor, "..."], patch: int) -> PerPatch:
    """The mean over each patch of the difference in grey, in rows of patches from the top."""
    if frame.shape != before.shape or frame.shape[1] not in (1, 3) or frame.shape[2] % patch or frame.shape[3] % patch:
        raise ChronotopeError(
            f"frames of shape {list(frame.shape)} and {list(before.shape)}: expected two of [B, 1 or 3, H, W], "
            f"H and W multiples of patch={patch}."
        )
    grey = frame.new_tensor(GREY if frame.shape[1] == 3 else (1.0,), dtype=torch.float32)[:, None, None]
    diff = ((frame.float() * grey).sum(1, keepdim=True) - (before.float() * grey).sum(1, keepdim=True)).abs()
    return F.avg_pool2d(diff, patch).flatten(1)


@torch.no_grad()
def relevance(
    q: Float[Tensor, "b h m d"],
    k: Float[Tensor, "b hk n d"],
    lse: Float[Tensor, "b h m"],
    scale: float | None = None,
) -> PerPatch:
    """How much attention n patches get from m rows (the text, or the first action): the mean over heads and rows.

    q, lse: of these rows, as `ct.attention(..., return_lse=True)` over all keys gave them; k: of the patches. For
    several layers, take the mean of their results.
    """
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    rows = q.unflatten(1, (k.shape[1], -1)).to(lse.dtype)
    scores = scale * rows @ k[:, :, None].to(lse.dtype).transpose(3, 4)
    return (scores - lse.view(*rows.shape[:4], 1)).exp().mean((1, 2, 3))


def _mixed(new: Tokens, old: Tokens, weight: PerPatch) -> Tokens:
    """Exactly the new or the old token where all of it is taken, whatever the other one holds."""
    weight = weight[:, :, None].to(new.dtype)
    return torch.where(weight == 0, old, torch.where(weight == 1, new, weight * new + (1 - weight) * old))
