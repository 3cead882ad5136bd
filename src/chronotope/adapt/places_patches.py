"""Grids of latents that models of diffusers cut in patches themselves.

Sizes that are no multiple of the patch are cut as the models cut them: a patch needs all its pixels.
"""

from __future__ import annotations

import math
from typing import Any

from chronotope.adapt.place import Inputs, Place
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid


def _patches(inputs: Inputs, form: str, **patch: int) -> Grid:
    """The grid of patches of hidden_states, whose dimensions are the letters of `form`, such as "BCTHW"."""
    shape = inputs["hidden_states"].shape
    if len(shape) != len(form):
        raise ChronotopeError(f"hidden_states has shape {list(shape)}; expected [{', '.join(form)}].")
    sizes = dict(zip(form.lower(), shape, strict=True))
    return Grid(**{axis: sizes[axis] // size for axis, size in patch.items()})


def boxes(inputs: Inputs, config: Any) -> Grid:
    """Videos cut in boxes of `patch_size` = (t, h, w)."""
    t, h, w = config.patch_size
    return _patches(inputs, "BCTHW", t=t, h=h, w=w)


def boxes_by_parts(inputs: Inputs, config: Any) -> Grid:
    """Videos cut in boxes of `patch_size_t`, `patch_size`, `patch_size`."""
    return _patches(inputs, "BCTHW", t=config.patch_size_t, h=config.patch_size, w=config.patch_size)


def frames(inputs: Inputs, config: Any) -> Grid:
    """Videos cut in squares, frame by frame."""
    return _patches(inputs, "BCTHW", t=1, h=config.patch_size, w=config.patch_size)


def frames_first(inputs: Inputs, config: Any) -> Grid:
    """Videos whose frames come before their channels, cut in boxes since CogVideoX 1.5 and in squares before."""
    t = config.get("patch_size_t") or 1
    return _patches(inputs, "BTCHW", t=t, h=config.patch_size, w=config.patch_size)


def image(inputs: Inputs, config: Any) -> Grid:
    """Images cut in squares."""
    return _patches(inputs, "BCHW", h=config.patch_size, w=config.patch_size)


def image_or_video(inputs: Inputs, config: Any) -> Grid:
    """Images or videos, cut by as many sizes of a patch."""
    axes = "thw"[-len(config.patch_size) :]
    return _patches(inputs, "BC" + axes.upper(), **dict(zip(axes, config.patch_size, strict=True)))


def hidream(inputs: Inputs, config: Any) -> Grid:
    """Images cut in squares by the model, or by the caller who then gives their sizes in patches [B, 2].

    Images that are not square are padded to a fixed number of tokens, which lie between those of the grid and the text.
    """
    if inputs["hidden_states_masks"] is None:
        return image(inputs, config)
    sizes = {tuple(int(size) for size in sample) for sample in inputs["img_sizes"]}
    if len(sizes) != 1:
        raise ChronotopeError(f"img_sizes={sorted(sizes)}: the samples of the batch differ; run them one by one.")
    h, w = sizes.pop()
    return Grid(h=h, w=w)


def lumina2(inputs: Inputs, config: Any) -> Grid:
    """Images cut in squares, each right after the text that its mask leaves of it."""
    lengths = set(inputs["encoder_attention_mask"].sum(dim=1).tolist())
    if len(lengths) != 1:
        raise ChronotopeError(
            f"the texts have {sorted(lengths)} tokens, and each image comes right after its text: "
            "the samples of the batch have no common grid; run them one by one."
        )
    return image(inputs, config)


def boxes_of_frames(inputs: Inputs, config: Any) -> Grid:
    """Videos whose frames come before their channels, cut in boxes of `patch_size` = (t, h, w)."""
    t, h, w = config.patch_size
    return _patches(inputs, "BTCHW", t=t, h=h, w=w)


def kandinsky(inputs: Inputs, config: Any) -> Grid:
    """Videos whose channels come last, cut in boxes."""
    if inputs.get("sparse_params") is not None:
        raise ChronotopeError(
            "sparse_params given: the model chooses by itself who looks at whom, over tokens in another order; "
            "call it without them."
        )
    t, h, w = config.patch_size
    return _patches(inputs, "BTHWC", t=t, h=h, w=w)


def glm(inputs: Inputs, config: Any) -> Grid:
    """As other images, but for keys of reference images that are kept from earlier calls."""
    if inputs["kv_caches"] is not None and any(cache.mode == "read" for cache in inputs["kv_caches"].caches):
        raise ChronotopeError(
            "kv_caches are read: attention reads keys that this call has no places for; call the model without them."
        )
    return image(inputs, config)


def joyimage(inputs: Inputs, config: Any) -> Grid:
    """Images or videos cut in boxes, or several to each sample, which lie one after another, the last one first."""
    if inputs["hidden_states"].ndim != 6:
        return boxes(inputs, config)
    t, h, w = config.patch_size
    grid = _patches(inputs, "BNCTHW", t=t, h=h, w=w)
    return grid.replace(t=inputs["hidden_states"].shape[1] * grid.sizes["t"])


def latte(inputs: Inputs, config: Any) -> Place:
    """Videos cut in squares; some blocks look at one frame each, the others at one place through all frames."""
    grid = frames(inputs, config)
    parts = {"transformer_blocks": grid.replace(t=1), "temporal_transformer_blocks": grid.replace(h=1, w=1)}
    return Place(grid, parts=parts)


def motif(inputs: Inputs, config: Any) -> Place:
    """Videos cut in boxes; the last layers see them twice, as they came and as the other layers left them."""
    last = range(config.num_single_layers - config.num_decoder_layers, config.num_single_layers)
    return Place(boxes_by_parts(inputs, config), elsewhere=tuple(f"single_transformer_blocks.{i}" for i in last))


PAST = {"latents_clean": (1, 2, 2), "latents_history_2x": (2, 4, 4), "latents_history_4x": (4, 8, 8)}


def framepack(inputs: Inputs, config: Any) -> Place:
    """Videos cut in boxes, after frames of the past in boxes that grow with their age and are filled with padding."""
    ahead = 0
    for name, box in PAST.items():
        if inputs[name] is not None:
            sizes = zip(inputs[name].shape[2:], box, strict=True)
            ahead += math.prod(size // step if name == "latents_clean" else -(-size // step) for size, step in sizes)
    return Place(boxes_by_parts(inputs, config), ahead=ahead)


def zimage(inputs: Inputs, config: Any) -> Grid:
    """A list of images or videos [C, T, H, W], each padded to a multiple of some tokens, then followed by its text."""
    images = inputs["x"]
    if isinstance(images[0], list):
        raise ChronotopeError("x has several images to a sample, which share no grid. Give `grid` yourself.")
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) != 1:
        raise ChronotopeError(f"x has images of {sorted(shapes)}: the samples differ; run them one by one.")
    t, h, w = shapes.pop()
    size = inputs["patch_size"]
    grid = Grid(t=t // inputs["f_patch_size"], h=h // size, w=w // size)
    # Images have all the same time.
    return Grid(h=grid.sizes["h"], w=grid.sizes["w"]) if grid.sizes["t"] == 1 else grid
