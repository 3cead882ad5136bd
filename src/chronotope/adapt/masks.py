"""A mask that a model brings, read as a rule where it is one."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.grid import Grid
from chronotope.patterns import Pattern, causal, full, window

KEPT = 8


@dataclass(frozen=True, eq=False)
class Mask:
    """A rule of token order, and keys that are hidden from all queries; None: every one is in sight.

    rule: "none", "causal", "reach" (causal, and not more than `reach` tokens back), or "other": what no rule says.
    `own`: the mask itself, as it is added to the scores.
    """

    rule: Literal["none", "causal", "reach", "other"]
    reach: int
    hidden: Float[Tensor, "*b 1 nk"] | None
    own: Tensor

    def on(self, grid: Grid) -> tuple[Pattern, Tensor | None]:
        """A pattern of this grid and what is added to the scores besides.

        A prefix of several tokens sees itself under every pattern, and distance in token order is distance on a grid of
        one axis alone: elsewhere the mask is added as it is.
        """
        axis = grid.axes[0]
        if self.rule == "none":
            return full(), self.hidden
        if self.rule == "causal" and grid.prefix <= 1:
            return causal(), self.hidden
        if self.rule == "reach" and grid.prefix == 0 and len(grid.axes) == 1:
            spans: dict[str, Any] = {axis: (self.reach, 0)}
            return window(**spans), self.hidden
        return full(), self.own


_READ: dict[int, tuple[weakref.ref[Tensor], int, torch.dtype, Mask]] = {}


def read_mask(mask: Tensor, dtype: torch.dtype) -> Mask:
    """What a mask says, bool or additive, [.., Nq or 1, Nk].

    Causal masks, windows into the past and hidden keys are recognised by comparing every entry, so that no kernel reads
    N x N numbers for what is known by a rule. Layers that share a mask share the reading, which ends with the mask.
    """
    if mask.requires_grad:
        return Mask("other", 0, None, mask)
    if mask.is_inference():  # it does not tell when it is changed
        return _read(mask, dtype)
    key = id(mask)
    known = _READ.get(key)
    if known is not None and known[0]() is mask and known[1:3] == (mask._version, dtype):
        return known[3]
    found = _read(mask.detach(), dtype)
    if len(_READ) >= KEPT:
        _READ.pop(next(iter(_READ)), None)

    def gone(ref: weakref.ref[Tensor]) -> None:
        if key in _READ and _READ[key][0] is ref:
            del _READ[key]

    _READ[key] = weakref.ref(mask, gone), mask._version, dtype, found
    return found


def causal_mask(nq: int, nk: int, start: int, like: Tensor) -> Float[Tensor, "nq nk"]:
    """Query i sees keys up to start + i, as what is added to the scores."""
    seen = torch.ones(nq, nk, dtype=torch.bool, device=like.device).tril(start)
    return _added(seen, like.dtype)


def _read(mask: Tensor, dtype: torch.dtype) -> Mask:
    seen = mask if mask.dtype == torch.bool else _hides(mask)
    own = _added(mask, dtype) if mask.dtype == torch.bool else mask
    if seen is None:
        return Mask("other", 0, None, own)
    if bool(seen.all()):
        return Mask("none", 0, None, own)
    if seen.shape[-2] == 1:
        return Mask("none", 0, own, own)
    if seen.shape[-2] != seen.shape[-1]:
        return Mask("other", 0, None, own)
    # A token that is not hidden sees itself under each of these rules.
    keys = seen.diagonal(dim1=-2, dim2=-1)[..., None, :]
    hidden = None if bool(keys.all()) else _added(keys, dtype)
    ones = torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device)
    reach = int(seen[..., -1, :].sum(-1).max())
    if torch.equal(seen, keys.expand_as(seen)):
        return Mask("none", 0, hidden, own)
    if torch.equal(seen, ones.tril() & keys):
        return Mask("causal", 0, hidden, own)
    if reach > 0 and torch.equal(seen, ones.tril() & ones.triu(1 - reach) & keys):
        return Mask("reach", reach - 1, hidden, own)
    return Mask("other", 0, None, own)


def _hides(mask: Tensor) -> Bool[Tensor, "*b nq nk"] | None:
    """An additive mask that does nothing but hide, as a bool one. None: it does more, or hides all from some query.

    A large negative number, unlike -inf, leaves a query from which all is hidden with equal weights: that has to stay.
    """
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((hidden | (mask == 0)).all()) or bool(hidden.all(-1).any()):
        return None
    return ~hidden


def _added(seen: Bool[Tensor, "*b q k"], dtype: torch.dtype) -> Float[Tensor, "*b q k"]:
    """0 and -inf in place of True and False."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)
