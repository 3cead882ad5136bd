"""Small random models of diffusers' transformer classes: what each is called with, and where its tokens then lie.

Sizes are odd and not square where the class can; texts are partly hidden where it takes a mask. Grids are written
by hand. `MODELS` maps a name, the class's own and for variants "Class (what differs)", to a maker of a `Subject`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import zoo_diffusers_image as image
import zoo_diffusers_video as video
from zoo_diffusers_parts import VIDEO, WARNINGS, Subject

import chronotope as ct

__all__ = ["MODELS", "WARNINGS", "Subject"]

MAKERS: dict[str, Callable[[], Subject]] = {
    "AllegroTransformer3DModel": video.allegro,
    "AnyFlowTransformer3DModel": video.anyflow,
    "AuraFlowTransformer2DModel": image.auraflow,
    "BriaFiboTransformer2DModel": image.bria_fibo,
    "BriaTransformer2DModel": image.bria,
    "ChromaTransformer2DModel": image.chroma,
    "ChronoEditTransformer3DModel": lambda: video.wan("ChronoEditTransformer3DModel"),
    "CogVideoXTransformer3DModel": video.cogvideox,
    "CogVideoXTransformer3DModel (boxes)": video.cogvideox_15,
    "CogView3PlusTransformer2DModel": image.cogview3,
    "CogView4Transformer2DModel": image.cogview4,
    "ConsisIDTransformer3DModel": video.consisid,
    "CosmosTransformer3DModel": video.cosmos,
    "DiTTransformer2DModel": image.dit,
    "EasyAnimateTransformer3DModel": video.easyanimate,
    "ErnieImageTransformer2DModel": image.ernie,
    "Flux2Transformer2DModel": image.flux2,
    "Flux3Transformer2DModel": image.flux3,
    "FluxTransformer2DModel": image.flux,
    "FluxTransformer2DModel (two images)": image.flux_pair,
    "GlmImageTransformer2DModel": image.glm,
    "HeliosTransformer3DModel": video.helios,
    "HeliosTransformer3DModel (past)": video.helios_with_past,
    "HiDreamImageTransformer2DModel": image.hidream,
    "HiDreamImageTransformer2DModel (square)": lambda: image.hidream(ct.Grid(h=5, w=5)),
    "HunyuanDiT2DModel": image.hunyuan_dit,
    "HunyuanImageTransformer2DModel": image.hunyuan_image,
    "HunyuanImageTransformer2DModel (video)": lambda: image.hunyuan_image(VIDEO),
    "HunyuanVideo15Transformer3DModel": video.hunyuan_video_15,
    "HunyuanVideoFramepackTransformer3DModel": video.framepack,
    "HunyuanVideoTransformer3DModel": video.hunyuan_video,
    "HunyuanVideoTransformer3DModel (first frame)": lambda: video.hunyuan_video(image_condition_type="token_replace"),
    "Ideogram4Transformer2DModel": image.ideogram,
    "JoyImageEditPlusTransformer3DModel": image.joy_plus,
    "JoyImageEditTransformer3DModel": image.joy,
    "JoyImageEditTransformer3DModel (two images)": image.joy_pair,
    "Kandinsky5Transformer3DModel": video.kandinsky5,
    "Kandinsky6Transformer3DModel": video.kandinsky6,
    "Krea2Transformer2DModel": image.krea2,
    "LTX2VideoTransformer3DModel": video.ltx2,
    "LTX2VideoTransformer3DModel (coordinates)": video.ltx2_of_coordinates,
    "LTXVideoTransformer3DModel": video.ltx,
    "LTXVideoTransformer3DModel (coordinates)": video.ltx_of_coordinates,
    "LatteTransformer3DModel": video.latte,
    "LongCatImageTransformer2DModel": image.longcat,
    "Lumina2Transformer2DModel": image.lumina2,
    "LuminaNextDiT2DModel": image.lumina_next,
    "MiniMaxH3Transformer3DModel": video.minimax,
    "MochiTransformer3DModel": video.mochi,
    "MotifVideoTransformer3DModel": video.motif,
    "OmniGenTransformer2DModel": image.omnigen,
    "OvisImageTransformer2DModel": image.ovis,
    "PixArtTransformer2DModel": image.pixart,
    "QwenImageTransformer2DModel": image.qwen_image,
    "QwenImageTransformer2DModel (two images)": image.qwen_image_pair,
    "SD3Transformer2DModel": image.sd3,
    "SkyReelsV2Transformer3DModel": lambda: video.wan(
        "SkyReelsV2Transformer3DModel", ct.Grid(t=4, h=3, w=5), num_frame_per_block=2
    ),
    "WanAnimateTransformer3DModel": video.wan_animate,
    "WanTransformer3DModel": video.wan,
    "WanTransformer3DModel (boxes)": video.wan_of_boxes,
    "WanVACETransformer3DModel": video.vace,
    "ZImageTransformer2DModel": image.zimage,
    "ZImageTransformer2DModel (padding)": lambda: image.zimage(ct.Grid(h=5, w=7), n_refiner_layers=0),
}


def seeded(maker: Callable[[], Subject]) -> Callable[[], Subject]:
    def make() -> Subject:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return maker()

    return make


MODELS = {name: seeded(maker) for name, maker in MAKERS.items()}
