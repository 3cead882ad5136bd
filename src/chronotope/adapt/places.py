"""Where the tokens of diffusers' transformers lie, read from what a model is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from chronotope.adapt import places_patches as patches
from chronotope.adapt import places_tokens as tokens
from chronotope.adapt.place import Inputs, Place
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid

__all__ = ["TABLE", "Place", "read_place"]

Reader = Callable[[Inputs, Any], Grid | Place]


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
        found = reader(call.arguments, model.config)
    except ChronotopeError as error:
        raise ChronotopeError(f"{name}: {error}") from None
    place = found if isinstance(found, Place) else Place(found)
    return replace(place, text=text, elsewhere=(*elsewhere, *place.elsewhere))


# Class -> how its grid is read, where text lies, and the submodules elsewhere.
TABLE: dict[str, tuple[Reader, str, *tuple[str, ...]]] = {
    "AllegroTransformer3DModel": (patches.frames, "before"),
    "AnyFlowTransformer3DModel": (patches.boxes_of_frames, "before"),
    "AuraFlowTransformer2DModel": (patches.image, "before"),
    "BriaFiboTransformer2DModel": (tokens.image_ids, "before"),
    "BriaTransformer2DModel": (tokens.image_ids, "before"),
    "ChromaTransformer2DModel": (tokens.image_ids, "before"),
    "ChronoEditTransformer3DModel": (patches.boxes, "before"),
    "CogVideoXTransformer3DModel": (patches.frames_first, "before"),
    "CogView3PlusTransformer2DModel": (patches.image, "before"),
    "CogView4Transformer2DModel": (patches.image, "before"),
    "ConsisIDTransformer3DModel": (patches.frames_first, "before", "local_facial_extractor"),
    "CosmosTransformer3DModel": (patches.boxes, "before"),
    "DiTTransformer2DModel": (patches.image, "before"),
    "EasyAnimateTransformer3DModel": (patches.frames, "before"),
    "ErnieImageTransformer2DModel": (patches.image, "after"),
    "Flux2Transformer2DModel": (tokens.flux2, "before"),
    "Flux3Transformer2DModel": (tokens.flux3, "after", "txt_mode_blocks", "mode_blocks.image_cond"),
    "FluxTransformer2DModel": (tokens.image_ids, "before"),
    "GlmImageTransformer2DModel": (patches.glm, "before"),
    "HeliosTransformer3DModel": (patches.boxes, "before"),
    "HiDreamImageTransformer2DModel": (patches.hidream, "after"),
    "HunyuanDiT2DModel": (patches.image, "before", "time_extra_emb"),
    "HunyuanImageTransformer2DModel": (patches.image_or_video, "after", "context_embedder"),
    "HunyuanVideo15Transformer3DModel": (patches.boxes_by_parts, "after", "context_embedder"),
    "HunyuanVideoFramepackTransformer3DModel": (patches.framepack, "after", "context_embedder"),
    "HunyuanVideoTransformer3DModel": (patches.boxes_by_parts, "after", "context_embedder"),
    "Ideogram4Transformer2DModel": (tokens.ideogram, "after"),
    "JoyImageEditPlusTransformer3DModel": (tokens.patches_in_a_row, "after"),
    "JoyImageEditTransformer3DModel": (patches.joyimage, "after"),
    "Kandinsky5Transformer3DModel": (patches.kandinsky, "before", "text_transformer_blocks"),
    "Kandinsky6Transformer3DModel": (patches.kandinsky, "before", "*_text_transformer_blocks", "*.audio_dec_block"),
    "Krea2Transformer2DModel": (tokens.krea2, "before", "text_fusion"),
    "LTX2VideoTransformer3DModel": (tokens.ltx, "before", "*.audio_attn1"),
    "LTXVideoTransformer3DModel": (tokens.ltx, "before"),
    "LatteTransformer3DModel": (patches.latte, "before"),
    "LongCatImageTransformer2DModel": (tokens.image_ids, "before"),
    "Lumina2Transformer2DModel": (patches.lumina2, "before", "context_refiner"),
    "LuminaNextDiT2DModel": (patches.image, "before"),
    "MiniMaxH3Transformer3DModel": (tokens.minimax, "after", "token_refiner"),
    "MochiTransformer3DModel": (patches.frames, "after", "time_embed"),
    "MotifVideoTransformer3DModel": (patches.motif, "after"),
    "OmniGenTransformer2DModel": (patches.image, "before"),
    "OvisImageTransformer2DModel": (tokens.image_ids, "before"),
    "PixArtTransformer2DModel": (patches.image, "before"),
    "QwenImageTransformer2DModel": (tokens.image_shapes, "before"),
    "SD3Transformer2DModel": (patches.image, "after"),
    "SkyReelsV2Transformer3DModel": (patches.boxes, "before"),
    "WanAnimateTransformer3DModel": (patches.boxes, "before", "face_adapter"),
    "WanTransformer3DModel": (patches.boxes, "before"),
    "WanVACETransformer3DModel": (patches.boxes, "before"),
    "ZImageTransformer2DModel": (patches.zimage, "after", "context_refiner", "siglip_refiner"),
}
