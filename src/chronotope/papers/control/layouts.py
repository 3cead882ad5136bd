"""Regions of an image as masks: boxes and discs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def boxes(corners: Float[Tensor, "*k four"], size: tuple[int, int], rounded: bool = False) -> Bool[Tensor, "*k h w"]:
    """Every cell of h x w that a box (left, top, right, bottom) touches, in parts of the image's sides.

    rounded: the box whose sides are rounded to whole cells instead, of one cell at least.
    """
    h, w = size
    scaled = corners * corners.new_tensor([w, h, w, h])
    first, last = scaled[..., :2].floor(), scaled[..., 2:].ceil()
    if rounded:
        first = scaled[..., :2].round().minimum(scaled.new_tensor([w - 1, h - 1]))
        last = scaled[..., 2:].round().maximum(first + 1)
    left, top, right, bottom = (*first.unbind(-1), *last.unbind(-1))
    y, x = (torch.arange(side, device=corners.device) for side in size)
    rows = (y >= top[..., None]) & (y < bottom[..., None])
    return rows[..., :, None] & ((x >= left[..., None]) & (x < right[..., None]))[..., None, :]


def discs(centres: Float[Tensor, "*k two"], radius: float | int, size: tuple[int, int]) -> Bool[Tensor, "*k h w"]:
    """Every cell of h x w whose middle is within `radius` cells of a centre (x, y), in parts of the image's sides."""
    h, w = size
    x, y = (centres * centres.new_tensor([w, h])).unbind(-1)
    rows, columns = (torch.arange(side, device=centres.device) + 0.5 for side in size)
    far = (rows[:, None] - y[..., None, None]).square() + (columns - x[..., None, None]).square()
    return far <= radius**2
