"""Grids of tokens that models of diffusers are given with their coordinates or sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chronotope.adapt.place import Inputs, Place
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid


def _lattice(points: Tensor, what: str) -> Grid:
    """The grid whose row-major order are these points [N, (t, h, w, ...)], at any distances from each other."""
    points = points.detach().cpu().double()
    values = [column.unique() for column in points.T]
    steps = [len(value) for value in values]
    if math.prod(steps) != len(points) or not torch.equal(torch.cartesian_prod(*values).view_as(points), points):
        raise ChronotopeError(
            f"{what} puts the {len(points)} tokens on no grid in row-major order (t, h, w): "
            "images or clips of different sizes side by side? Give `grid` yourself."
        )
    if math.prod(steps[3:]) != 1:
        raise ChronotopeError(f"{what} has {len(steps)} columns that vary; expected t, h and w.")
    sizes = dict(zip("thw", steps, strict=False))
    # Images have all the same time.
    return Grid(**{axis: size for axis, size in sizes.items() if axis != "t" or size > 1})


def _same_count(inputs: Inputs, grid: Grid, what: str) -> Grid:
    """The grid, when hidden_states [B, N, C] has as many tokens."""
    shape = inputs["hidden_states"].shape
    if len(shape) != 3 or shape[1] != grid.size:
        raise ChronotopeError(
            f"hidden_states has shape {list(shape)}; expected [B, {grid.size}, C], as {what} says {grid!r}."
        )
    return grid


def ltx(inputs: Inputs, config: Any) -> Grid:
    """Videos that come as tokens, with their sizes or with the coordinates of every token [B, 3, N] or [B, 3, N, 2]."""
    names = ("num_frames", "height", "width")
    sizes = [inputs[name] for name in names]
    coords = inputs["video_coords"]
    if coords is None:
        if None in sizes:
            missing = ", ".join(name for name, size in zip(names, sizes, strict=True) if size is None)
            raise ChronotopeError(f"{missing} not given, nor video_coords: the tokens' grid cannot be known.")
        return _same_count(inputs, Grid(t=sizes[0], h=sizes[1], w=sizes[2]), "num_frames, height, width")
    if not torch.equal(coords, coords[:1].expand_as(coords)):
        raise ChronotopeError("video_coords differ between the samples of the batch; run them one by one.")
    # LTX-2 tells where each token begins and ends.
    grid = _lattice((coords[0] if coords.ndim == 3 else coords[0, ..., 0]).T, "video_coords")
    return _same_count(inputs, Grid(**{"t": 1, **grid.sizes}), "video_coords")


def image_ids(inputs: Inputs, config: Any) -> Grid:
    """Images that come as tokens, with the coordinates of every token [N, (t, h, w, ...)]."""
    ids = inputs["img_ids"]
    if ids is None:
        raise ChronotopeError("img_ids not given: the tokens' grid cannot be known.")
    return _same_count(inputs, _lattice(ids[0] if ids.ndim == 3 else ids, "img_ids"), "img_ids")


def flux2(inputs: Inputs, config: Any) -> Grid:
    """As Flux, but for keys of reference images that are kept from an earlier call and are not among the ids."""
    if inputs["kv_cache_mode"] is not None:
        raise ChronotopeError(
            f"kv_cache_mode={inputs['kv_cache_mode']!r}: attention reads keys that this call has no places for; "
            "call the model without a key cache."
        )
    return image_ids(inputs, config)


def _in_a_row(samples: Sequence[Sequence[Any]], name: str) -> Grid:
    """The grid of images of these sizes (t, h, w), one after another, which are the same in each sample."""
    images = [[tuple(image) for image in sample] for sample in samples]
    if any(sample != images[0] for sample in images):
        raise ChronotopeError(f"{name}={samples}: the samples of the batch differ; run them one by one.")
    if len({image[1:] for image in images[0]}) > 1:
        raise ChronotopeError(f"{name}={samples}: images of different sizes share no grid. Give `grid` yourself.")
    t, (h, w) = sum(image[0] for image in images[0]), images[0][0][1:]
    return Grid(h=h, w=w) if t == 1 else Grid(t=t, h=h, w=w)


def image_shapes(inputs: Inputs, config: Any) -> Grid:
    """Images that come as tokens, with the sizes (t, h, w) of each, one after another."""
    shapes = inputs["img_shapes"]
    if not shapes:
        raise ChronotopeError("img_shapes not given: the tokens' grid cannot be known.")
    samples = [sample if isinstance(sample, list) else [sample] for sample in shapes]
    return _same_count(inputs, _in_a_row(samples, "img_shapes"), "img_shapes")


def patches_in_a_row(inputs: Inputs, config: Any) -> Grid:
    """Patches [B, N, C, t, h, w] with the sizes of the images of each sample in patches; those beyond are padding."""
    shapes, count = inputs["shape_list"], inputs["hidden_states"].shape[1]
    if not shapes:
        raise ChronotopeError("shape_list not given: the patches' grid cannot be known.")
    grid = _in_a_row(shapes, "shape_list")
    if grid.size > count:
        raise ChronotopeError(f"hidden_states has {count} patches; shape_list says {grid!r}.")
    return grid


def krea2(inputs: Inputs, config: Any) -> Grid:
    """Images that come as tokens after their text, with the coordinates of all [N, (t, h, w)]."""
    ids = inputs["position_ids"][-inputs["hidden_states"].shape[1] :]
    return _same_count(inputs, _lattice(ids, "position_ids"), "position_ids")


def flux3(inputs: Inputs, config: Any) -> Place:
    """As Flux, with text before and reference images behind, whose sizes are their own."""
    return Place(image_ids(inputs, config), ahead=inputs["encoder_hidden_states"].shape[1])


def _amid(ids: Tensor, rows: Tensor, what: str) -> Place:
    """Tokens among others, with the coordinates of all [N, (t, h, w)] and the rows of those that have a place."""
    first = int(rows[0]) if len(rows) else 0
    if not len(rows) or not torch.equal(rows, torch.arange(first, first + len(rows), device=rows.device)):
        raise ChronotopeError(f"{what} does not put the tokens of the picture one after another.")
    return Place(_lattice(ids[rows], "position_ids"), ahead=first)


def minimax(inputs: Inputs, config: Any) -> Place:
    """Videos in one sequence with text and sound."""
    return _amid(inputs["position_ids"], inputs["video_indices"], "video_indices")


def ideogram(inputs: Inputs, config: Any) -> Place:
    """Images in one sequence with text; 2 indicates their tokens."""
    ids, image = inputs["position_ids"], inputs["indicator"] == 2
    if not torch.equal(image, image[:1].expand_as(image)) or not torch.equal(ids[image], ids[:1].expand_as(ids)[image]):
        raise ChronotopeError("indicator and position_ids: the images of the batch differ; run them one by one.")
    return _amid(ids[0], image[0].nonzero()[:, 0], "indicator")
