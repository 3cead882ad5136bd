"""Where the tokens of transformers' image and video models lie, read from the inputs of one call.

A vision transformer cuts `pixel_values` into patches and lays them out in row-major order, after its class token
and registers: an image [B, C, H, W] with patches of p x q makes `Grid(prefix=1, h=H // p, w=W // q)`, a video
[B, T, C, H, W] with tubes of s frames `Grid(t=T // s, h=H // p, w=W // q)`. The sizes are those of the input, not of
the configuration: most of these models stretch their positions over other sizes.

What is not here: language models (each call of attention is a `Grid(n=…)` of its own), models whose layers attend
along one axis at a time (TimeSformer) or within windows (Swin), and models that drop patches at random (ViTMAE).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid

Reader = Callable[[nn.Module, dict[str, Any]], Grid | None]


def read_grid(model: nn.Module, args: tuple, kwargs: dict) -> Grid | None:
    """The grid on which the tokens of `model(*args, **kwargs)` lie, prefix included; None if the class is not known.

    A head (`ViTForImageClassification`) is read through the model inside it. V-JEPA 2: the grid of the encoder; its
    predictor attends to another number of tokens.

    Raises ChronotopeError when the pixels are missing or of another rank, or when the call drops patches.
    """
    tower = _tower(model)
    if tower is None:
        return None
    read = next(PLACES[kind.__name__] for kind in type(tower).__mro__ if kind.__name__ in PLACES)
    return read(tower, _bound(model, args, kwargs))


def _tower(model: nn.Module) -> nn.Module | None:
    """The model whose tokens these are: itself, or the one inside a head."""
    inside = getattr(model, TOWERS[type(model).__name__]) if type(model).__name__ in TOWERS else None
    for candidate in (model, getattr(model, "base_model", None), inside):
        if candidate is not None and any(kind.__name__ in PLACES for kind in type(candidate).__mro__):
            return candidate
    return None


def _bound(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """All arguments of the call by name. What lands in **kwargs of a head goes on to the model inside."""
    signature = inspect.signature(model.forward)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def _pixels(model: nn.Module, given: dict[str, Any], name: str, axes: str) -> Sequence[int]:
    """The shape of the pixels of a call."""
    pixels, rank = given.get(name), len(axes.split())
    if not isinstance(pixels, Tensor) or pixels.ndim != rank:
        what = f"shape {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ChronotopeError(
            f"{type(model).__name__}: {name} is {what}; its grid is read from {name} of shape [{axes}]."
        )
    return pixels.shape


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size


def _image(prefix: Callable[[Any], int]) -> Reader:
    """Patches of an image after `prefix(config)` tokens."""

    def read(model: nn.Module, given: dict[str, Any]) -> Grid:
        config: Any = model.config
        height, width = _pixels(model, given, "pixel_values", "B C H W")[2:]
        down, across = _pair(config.patch_size)
        return Grid(prefix=prefix(config), h=height // down, w=width // across)

    return read


def _videomae(model: nn.Module, given: dict[str, Any]) -> Grid:
    if given.get("bool_masked_pos") is not None:
        raise ChronotopeError(
            f"{type(model).__name__} drops the patches of bool_masked_pos, and what is left lies on no grid: "
            "call the model without bool_masked_pos, or give the grid as Grid(n=…)."
        )
    config: Any = model.config
    _, frames, _, height, width = _pixels(model, given, "pixel_values", "B T C H W")
    down, across = _pair(config.patch_size)
    return Grid(t=frames // config.tubelet_size, h=height // down, w=width // across)


def _vivit(model: nn.Module, given: dict[str, Any]) -> Grid:
    config: Any = model.config
    _, frames, _, height, width = _pixels(model, given, "pixel_values", "B T C H W")
    deep, down, across = config.tubelet_size
    return Grid(prefix=1, t=frames // deep, h=height // down, w=width // across)


def _vjepa2(model: nn.Module, given: dict[str, Any]) -> Grid:
    config: Any = model.config
    _, frames, _, height, width = _pixels(model, given, "pixel_values_videos", "B T C H W")
    deep, (down, across) = config.tubelet_size, _pair(config.patch_size)
    # A clip shorter than one tube is repeated as often as a tube has frames: one step per frame is left.
    return Grid(t=frames if frames < deep else frames // deep, h=height // down, w=width // across)


PLACES: dict[str, Reader] = {
    "ViTModel": _image(lambda config: 1),
    "DeiTModel": _image(lambda config: 2),
    "IJepaModel": _image(lambda config: 0),
    "Dinov2Model": _image(lambda config: 1),
    "Dinov2WithRegistersModel": _image(lambda config: 1 + config.num_register_tokens),
    "DINOv3ViTModel": _image(lambda config: 1 + config.num_register_tokens),
    "CLIPVisionModel": _image(lambda config: 1),
    "SiglipVisionModel": _image(lambda config: 0),
    "VideoMAEModel": _videomae,
    "VivitModel": _vivit,
    "VJEPA2Model": _vjepa2,
}
# Heads that keep their model under a name other than that of their base model.
TOWERS = {"CLIPForImageClassification": "vision_model", "SiglipForImageClassification": "vision_model"}
