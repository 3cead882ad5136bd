"""Where the tokens of diffusers' transformers lie, read from what a model is called with.

Sizes that are no multiple of the patch are cut as the models cut them: a patch needs all its pixels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid

Inputs = dict[str, Any]
Reader = Callable[[Inputs, Any], Grid]


@dataclass(frozen=True)
class Place:
    """Where the tokens of one call of a model lie.

    `grid` has the axes t, h, w (video) or h, w (image), no prefix, and the order in which the model lays its tokens
    out. In a joint attention of N tokens, N - grid.size have no place (text, registers, padding): they come `text`
    = "before" or "after" those of the grid. The attention of the submodules `elsewhere` looks at no token of the grid,
    however many it looks at.
    """

    grid: Grid
    text: str = "before"
    elsewhere: tuple[str, ...] = ()


def read_place(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place | None:
    """Where the tokens lie in the call `model(*args, **kwargs)`; None when the model's class is not known here.

    Raises ChronotopeError when the inputs contradict each other, or put the tokens on no grid.
    """
    # Other projects have classes of the same names that take other inputs.
    names = [cls.__name__ for cls in type(model).__mro__ if cls.__module__.partition(".")[0] == "diffusers"]
    name = next((name for name in names if name in TABLE), None)
    if name is None:
        return None
    call = inspect.signature(model.forward).bind(*args, **kwargs)
    call.apply_defaults()
    reader, text, *elsewhere = TABLE[name]
    try:
        return Place(reader(call.arguments, model.config), text, tuple(elsewhere))
    except ChronotopeError as error:
        raise ChronotopeError(f"{name}: {error}") from None


def _patches(inputs: Inputs, form: str, **patch: int) -> Grid:
    """The grid of patches of hidden_states, whose dimensions are the letters of `form`, such as "BCTHW"."""
    shape = inputs["hidden_states"].shape
    if len(shape) != len(form):
        raise ChronotopeError(f"hidden_states has shape {list(shape)}; expected [{', '.join(form)}].")
    sizes = dict(zip(form.lower(), shape, strict=True))
    return Grid(**{axis: sizes[axis] // size for axis, size in patch.items()})


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


def _boxes(inputs: Inputs, config: Any) -> Grid:
    """Videos cut in boxes of `patch_size` = (t, h, w)."""
    t, h, w = config.patch_size
    return _patches(inputs, "BCTHW", t=t, h=h, w=w)


def _boxes_by_parts(inputs: Inputs, config: Any) -> Grid:
    """Videos cut in boxes of `patch_size_t`, `patch_size`, `patch_size`."""
    return _patches(inputs, "BCTHW", t=config.patch_size_t, h=config.patch_size, w=config.patch_size)


def _frames(inputs: Inputs, config: Any) -> Grid:
    """Videos cut in squares, frame by frame."""
    return _patches(inputs, "BCTHW", t=1, h=config.patch_size, w=config.patch_size)


def _frames_first(inputs: Inputs, config: Any) -> Grid:
    """Videos whose frames come before their channels, cut in boxes since CogVideoX 1.5 and in squares before."""
    t = config.get("patch_size_t") or 1
    return _patches(inputs, "BTCHW", t=t, h=config.patch_size, w=config.patch_size)


def _image(inputs: Inputs, config: Any) -> Grid:
    """Images cut in squares."""
    return _patches(inputs, "BCHW", h=config.patch_size, w=config.patch_size)


def _image_or_video(inputs: Inputs, config: Any) -> Grid:
    """Images or videos, cut by as many sizes of a patch."""
    axes = "thw"[-len(config.patch_size) :]
    return _patches(inputs, "BC" + axes.upper(), **dict(zip(axes, config.patch_size, strict=True)))


def _ltx(inputs: Inputs, config: Any) -> Grid:
    """Videos that come as tokens, with their sizes or with the coordinates of every token [B, 3, N]."""
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
    grid = _lattice(coords[0].T, "video_coords")
    return _same_count(inputs, Grid(**{"t": 1, **grid.sizes}), "video_coords")


def _image_ids(inputs: Inputs, config: Any) -> Grid:
    """Images that come as tokens, with the coordinates of every token [N, (t, h, w, ...)]."""
    ids = inputs["img_ids"]
    if ids is None:
        raise ChronotopeError("img_ids not given: the tokens' grid cannot be known.")
    return _same_count(inputs, _lattice(ids[0] if ids.ndim == 3 else ids, "img_ids"), "img_ids")


def _flux2(inputs: Inputs, config: Any) -> Grid:
    """As Flux, but for keys of reference images that are kept from an earlier call and are not among the ids."""
    if inputs["kv_cache_mode"] is not None:
        raise ChronotopeError(
            f"kv_cache_mode={inputs['kv_cache_mode']!r}: attention reads keys that this call has no places for; "
            "call the model without a key cache."
        )
    return _image_ids(inputs, config)


def _image_shapes(inputs: Inputs, config: Any) -> Grid:
    """Images that come as tokens, with the sizes (t, h, w) of each, one after another."""
    shapes = inputs["img_shapes"]
    if not shapes:
        raise ChronotopeError("img_shapes not given: the tokens' grid cannot be known.")
    samples = [[tuple(image) for image in sample] if isinstance(sample, list) else [tuple(sample)] for sample in shapes]
    if any(sample != samples[0] for sample in samples):
        raise ChronotopeError(f"img_shapes={shapes}: the samples of the batch differ; run them one by one.")
    if len({image[1:] for image in samples[0]}) > 1:
        raise ChronotopeError(f"img_shapes={shapes}: images of different sizes share no grid. Give `grid` yourself.")
    t, (h, w) = sum(image[0] for image in samples[0]), samples[0][0][1:]
    return _same_count(inputs, Grid(h=h, w=w) if t == 1 else Grid(t=t, h=h, w=w), "img_shapes")


def _hidream(inputs: Inputs, config: Any) -> Grid:
    """Images cut in squares by the model, or by the caller who then gives their sizes in patches [B, 2].

    Images that are not square are padded to a fixed number of tokens, which lie between those of the grid and the text.
    """
    if inputs["hidden_states_masks"] is None:
        return _image(inputs, config)
    sizes = {tuple(int(size) for size in sample) for sample in inputs["img_sizes"]}
    if len(sizes) != 1:
        raise ChronotopeError(f"img_sizes={sorted(sizes)}: the samples of the batch differ; run them one by one.")
    h, w = sizes.pop()
    return Grid(h=h, w=w)


def _lumina2(inputs: Inputs, config: Any) -> Grid:
    """Images cut in squares, each right after the text that its mask leaves of it."""
    lengths = set(inputs["encoder_attention_mask"].sum(dim=1).tolist())
    if len(lengths) != 1:
        raise ChronotopeError(
            f"the texts have {sorted(lengths)} tokens, and each image comes right after its text: "
            "the samples of the batch have no common grid; run them one by one."
        )
    return _image(inputs, config)


# Class -> how its grid is read, where text lies, and the submodules elsewhere.
TABLE: dict[str, tuple[Reader, str, *tuple[str, ...]]] = {
    "AllegroTransformer3DModel": (_frames, "before"),
    "AuraFlowTransformer2DModel": (_image, "before"),
    "ChromaTransformer2DModel": (_image_ids, "before"),
    "ChronoEditTransformer3DModel": (_boxes, "before"),
    "CogVideoXTransformer3DModel": (_frames_first, "before"),
    "CogView3PlusTransformer2DModel": (_image, "before"),
    "CogView4Transformer2DModel": (_image, "before"),
    "ConsisIDTransformer3DModel": (_frames_first, "before", "local_facial_extractor"),
    "CosmosTransformer3DModel": (_boxes, "before"),
    "DiTTransformer2DModel": (_image, "before"),
    "EasyAnimateTransformer3DModel": (_frames, "before"),
    "Flux2Transformer2DModel": (_flux2, "before"),
    "FluxTransformer2DModel": (_image_ids, "before"),
    "HiDreamImageTransformer2DModel": (_hidream, "after"),
    "HunyuanDiT2DModel": (_image, "before", "time_extra_emb"),
    "HunyuanImageTransformer2DModel": (_image_or_video, "after", "context_embedder"),
    "HunyuanVideo15Transformer3DModel": (_boxes_by_parts, "after", "context_embedder"),
    "HunyuanVideoTransformer3DModel": (_boxes_by_parts, "after", "context_embedder"),
    "LTXVideoTransformer3DModel": (_ltx, "before"),
    "Lumina2Transformer2DModel": (_lumina2, "before", "context_refiner"),
    "MochiTransformer3DModel": (_frames, "after", "time_embed"),
    "PixArtTransformer2DModel": (_image, "before"),
    "QwenImageTransformer2DModel": (_image_shapes, "before"),
    "SD3Transformer2DModel": (_image, "after"),
    "SkyReelsV2Transformer3DModel": (_boxes, "before"),
    "WanTransformer3DModel": (_boxes, "before"),
    "WanVACETransformer3DModel": (_boxes, "before"),
}
