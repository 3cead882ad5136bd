"""Small models of diffusers' classes for images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.nn import functional as F
from zoo_diffusers_parts import BOTH, IMAGE, LAYERS, B, C, D, Subject, mask, numbers, subject, words

import chronotope as ct


def flux_pack(latents: Tensor) -> Tensor:
    batch, channels, *sizes = latents.shape
    return diffusers.FluxPipeline._pack_latents(latents, batch, channels, *sizes)


def flux_ids(grid: ct.Grid) -> Tensor:
    return diffusers.FluxPipeline._prepare_latent_image_ids(B, *grid.shape, torch.device("cpu"), torch.float32)


ROPE = {"axes_dims_rope": (4, 4, 4)}
PACKED = {"in_channels": 4 * C, "out_channels": 4 * C, "joint_attention_dim": D}


FLUX = BOTH | PACKED | ROPE | {"pooled_projection_dim": 8, "guidance_embeds": True}


def flux() -> Subject:
    inputs = {
        "encoder_hidden_states": words(6),
        "pooled_projections": numbers(B, 8),
        "img_ids": flux_ids(IMAGE),
        "txt_ids": torch.zeros(6, 3),
        "guidance": torch.full((B,), 3.5),
    }
    return subject("FluxTransformer2DModel", FLUX, IMAGE, (2, 2), inputs, 6, pack=flux_pack, scale=1e-3)


PAIR = ct.Grid(t=2, h=5, w=3)


def pair_pack(latents: Tensor) -> Tensor:
    return torch.cat([flux_pack(image) for image in latents.unbind(2)], dim=1)


def flux_pair() -> Subject:
    """An image, and one to edit after it, which has another first coordinate."""
    ids = flux_ids(ct.Grid(h=5, w=3))
    inputs = {
        "encoder_hidden_states": words(6),
        "pooled_projections": numbers(B, 8),
        "img_ids": torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])]),
        "txt_ids": torch.zeros(6, 3),
        "guidance": torch.full((B,), 3.5),
    }
    return subject("FluxTransformer2DModel", FLUX, PAIR, (1, 2, 2), inputs, 6, pack=pair_pack, scale=1e-3)


def chroma() -> Subject:
    inputs = {
        "encoder_hidden_states": words(6),
        "img_ids": flux_ids(IMAGE),
        "txt_ids": torch.zeros(6, 3),
        "attention_mask": torch.cat([mask(6, 4, 5), torch.ones(B, IMAGE.size)], dim=1).bool(),
    }
    config = BOTH | PACKED | ROPE
    config |= {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return subject("ChromaTransformer2DModel", config, IMAGE, (2, 2), inputs, 6, pack=flux_pack, scale=1e-3, hidden=5)


def flux2() -> Subject:
    config = BOTH | PACKED | {"axes_dims_rope": (4, 4, 2, 2), "timestep_guidance_channels": 16}
    pixels = torch.zeros(B, 4 * C, *IMAGE.shape)
    inputs = {
        "encoder_hidden_states": words(6),
        "img_ids": diffusers.Flux2Pipeline._prepare_latent_ids(pixels).float(),
        "txt_ids": torch.zeros(6, 4),
        "guidance": torch.full((B,), 3.5),
    }
    return subject("Flux2Transformer2DModel", config, IMAGE, (2, 2), inputs, 6, pack=flux_pack, scale=1e-3)


QWEN = LAYERS | PACKED | ROPE | {"out_channels": C}


def qwen_image() -> Subject:
    inputs = {
        "encoder_hidden_states": words(6),
        "encoder_hidden_states_mask": mask(6, 4, 5),
        "img_shapes": [[(1, *IMAGE.shape)]] * B,
    }
    return subject("QwenImageTransformer2DModel", QWEN, IMAGE, (2, 2), inputs, 6, pack=flux_pack, scale=1e-3, hidden=5)


def qwen_image_pair() -> Subject:
    """An image, and one to edit after it."""
    inputs = {"encoder_hidden_states": words(6), "img_shapes": [[(1, 5, 3), (1, 5, 3)]] * B}
    config = QWEN | {"zero_cond_t": True}
    return subject("QwenImageTransformer2DModel", config, PAIR, (1, 2, 2), inputs, 6, pack=pair_pack, scale=1e-3)


def sd3() -> Subject:
    """One layer of two has a second attention over the image alone."""
    config = LAYERS | {"sample_size": 16, "pos_embed_max_size": 8, "joint_attention_dim": D}
    config |= {"caption_projection_dim": 24, "pooled_projection_dim": 8, "dual_attention_layers": (0,)}
    inputs = {"encoder_hidden_states": words(6), "pooled_projections": numbers(B, 8)}
    return subject("SD3Transformer2DModel", config, IMAGE, (2, 2), inputs, 6, after=True)


def pixart() -> Subject:
    config = LAYERS | {"cross_attention_dim": 24, "sample_size": 16, "caption_channels": D, "num_embeds_ada_norm": 10}
    inputs = {"encoder_hidden_states": words(6), "encoder_attention_mask": mask(6, 4, 5)}
    return subject("PixArtTransformer2DModel", config, IMAGE, (2, 2), inputs, hidden=5)


def dit() -> Subject:
    """Square: the class puts its output together as one."""
    config = LAYERS | {"sample_size": 10, "num_embeds_ada_norm": 10}
    inputs = {"class_labels": torch.tensor([3, 7])}
    return subject("DiTTransformer2DModel", config, ct.Grid(h=5, w=5), (2, 2), inputs)


def hunyuan_dit() -> Subject:
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": C, "patch_size": 2, "sample_size": 16}
    config |= {"hidden_size": 24, "num_layers": 2, "learn_sigma": False, "cross_attention_dim": D}
    config |= {"cross_attention_dim_t5": 8, "pooled_projection_dim": 8, "text_len": 6, "text_len_t5": 4}
    config |= {"use_style_cond_and_image_meta_size": False}
    inputs = {
        "encoder_hidden_states": words(6),
        "text_embedding_mask": mask(6, 4, 5),
        "encoder_hidden_states_t5": words(4, 8),
        "text_embedding_mask_t5": mask(4, 3, 4),
    }
    return subject("HunyuanDiT2DModel", config, IMAGE, (2, 2), inputs, hidden=5)


SIZES = {name: torch.tensor([[80.0, 112.0]] * B) for name in ("original_size", "target_size", "crop_coords")}
COGVIEW = {"text_embed_dim": D, "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 16}


def cogview3() -> Subject:
    inputs = {"encoder_hidden_states": words(6), **SIZES}
    return subject("CogView3PlusTransformer2DModel", LAYERS | COGVIEW, IMAGE, (2, 2), inputs, 6)


def cogview4() -> Subject:
    """Its mask is one to add to the scores, of ones and zeros: it hides nothing."""
    inputs = {"encoder_hidden_states": words(6), "attention_mask": mask(6, 4, 5), **SIZES}
    config = LAYERS | COGVIEW | {"rope_axes_dim": (16, 16)}
    return subject("CogView4Transformer2DModel", config, IMAGE, (2, 2), inputs, 6)


def hunyuan_image(grid: ct.Grid = IMAGE) -> Subject:
    patch = (1, 2, 2)[-len(grid.axes) :]
    config = BOTH | {"num_refiner_layers": 1, "text_embed_dim": D, "patch_size": patch}
    config |= {"rope_axes_dim": (4, 4, 4) if len(patch) == 3 else (6, 6)}
    inputs = {"encoder_hidden_states": words(7), "encoder_attention_mask": mask(7, 5, 6)}
    return subject("HunyuanImageTransformer2DModel", config, grid, patch, inputs, 7, after=True, hidden=6)


def lumina2() -> Subject:
    """The text that is hidden is cut off, and as much of it in each sample. Two heads of queries share one of keys."""
    config = {"sample_size": 16, "in_channels": C, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1}
    config |= {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 4, 4)}
    config |= {"axes_lens": (16, 16, 16), "cap_feat_dim": D}
    inputs = {"encoder_hidden_states": words(6), "encoder_attention_mask": mask(6, 4, 4)}
    return subject("Lumina2Transformer2DModel", config, IMAGE, (2, 2), inputs, 4, scale=1e-3, hidden=5)


def hidream(grid: ct.Grid = IMAGE) -> Subject:
    """Images that are not square are padded to 8 x 8 tokens; text twice, and once more in layers of their own."""
    config = BOTH | {"patch_size": 2, "caption_channels": [D, 8], "text_emb_dim": 8}
    # No experts: rounding may send a token to another one.
    config |= {"num_routed_experts": 0, "axes_dims_rope": (4, 4, 4), "max_resolution": (16, 16)}
    config |= {"llama_layers": [0, 1]}
    inputs = {
        "encoder_hidden_states_t5": words(4),
        "encoder_hidden_states_llama3": numbers(2, B, 3, 8),
        "pooled_embeds": numbers(B, 8),
    }
    padding = 0 if grid.shape[0] == grid.shape[1] else 64 - grid.size
    text = padding + 4 + 3 + 3
    return subject("HiDreamImageTransformer2DModel", config, grid, (2, 2), inputs, text, after=True, time="timesteps")


def auraflow() -> Subject:
    """Eight registers before the text."""
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": C, "out_channels": C}
    config |= {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "sample_size": 16, "joint_attention_dim": D}
    config |= {"caption_projection_dim": 24, "pos_embed_max_size": 64}
    inputs = {"encoder_hidden_states": words(6)}
    return subject("AuraFlowTransformer2DModel", config, IMAGE, (2, 2), inputs, 14, scale=1e-3)


# The newer ones.


def like_flux(name: str, config: dict[str, Any], **more: Any) -> Subject:
    """Tokens with coordinates after those of the text."""
    inputs = {"encoder_hidden_states": words(6), "img_ids": flux_ids(IMAGE), "txt_ids": torch.zeros(6, 3)}
    return subject(name, config, IMAGE, (2, 2), inputs | more, 6, pack=flux_pack, scale=1e-3)


PACKED_ALIKE = {key: value for key, value in (BOTH | PACKED | ROPE).items() if key != "out_channels"}


def ovis() -> Subject:
    return like_flux("OvisImageTransformer2DModel", BOTH | PACKED | ROPE)


def longcat() -> Subject:
    return like_flux("LongCatImageTransformer2DModel", PACKED_ALIKE)


def bria() -> Subject:
    return like_flux("BriaTransformer2DModel", PACKED_ALIKE)


def bria_fibo() -> Subject:
    """Texts of its own for each layer."""
    config = PACKED_ALIKE | {"text_encoder_dim": 8}
    return like_flux("BriaFiboTransformer2DModel", config, text_encoder_layers=[words(6, 8), words(6, 8)])


def krea2() -> Subject:
    """Text from three layers of an encoder; two heads of queries share one of keys."""
    config = {"in_channels": 4 * C, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": D}
    config |= {"num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2}
    config |= {"text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
    places = torch.cat([torch.zeros(6, 3), flux_ids(IMAGE)])
    inputs = {
        "encoder_hidden_states": numbers(B, 6, 3, D),
        "encoder_attention_mask": mask(6, 4, 5, dtype=torch.bool),
        "position_ids": places,
    }
    config |= {"axes_dims_rope": (4, 4, 4)}
    return subject("Krea2Transformer2DModel", config, IMAGE, (2, 2), inputs, 6, pack=flux_pack, scale=1e-3, hidden=5)


def flux3() -> Subject:
    """Text before the image, a smaller one to look at behind it."""
    config = {key: value for key, value in (BOTH | PACKED).items() if key != "out_channels"}
    config |= {"cond_in_channels": 4 * C, "timestep_channels": 16, "axes_dims_rope": (4, 4, 2, 2)}
    config |= {"num_single_layers": 2}
    places = torch.cartesian_prod(torch.ones(1), *(torch.arange(float(size)) for size in (3, 4, 1)))
    inputs = {
        "encoder_hidden_states": words(6),
        "txt_ids": torch.zeros(6, 4),
        "img_ids": diffusers.Flux2Pipeline._prepare_latent_ids(torch.zeros(B, 4 * C, *IMAGE.shape))[0].float(),
        "image_cond_hidden_states": words(12, 4 * C),
        "image_cond_ids": places,
    }
    return subject("Flux3Transformer2DModel", config, IMAGE, (2, 2), inputs, 18, True, flux_pack, scale=1e-3, ahead=6)


def ideogram() -> Subject:
    """One sequence of padding, text and image; padding sees itself alone."""
    config = {"in_channels": 4 * C, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "adaln_dim": 8, "llm_features_dim": D, "mrope_section": (2, 2, 2)}
    image = torch.cartesian_prod(torch.zeros(1), *(100 + torch.arange(float(size)) for size in IMAGE.shape))
    real = mask(6, 4, 6).flip(1)
    inputs = {
        "encoder_hidden_states": F.pad(words(6), (0, 0, 0, IMAGE.size)),
        "position_ids": torch.cat([torch.arange(6.0)[:, None].expand(-1, 3), image]).expand(B, -1, -1),
        "segment_ids": torch.cat([real * 2 - 1, torch.ones(B, IMAGE.size)], dim=1),
        "indicator": torch.cat([real * 4 - 1, torch.full((B, IMAGE.size), 2)], dim=1),
    }

    def pack(latents: Tensor) -> Tensor:
        return F.pad(flux_pack(latents), (0, 0, 6, 0))

    return subject("Ideogram4Transformer2DModel", config, IMAGE, (2, 2), inputs, 6, True, pack, scale=1e-3, ahead=6)


def lumina_next() -> Subject:
    config = {"sample_size": 16, "in_channels": C, "hidden_size": 24, "num_layers": 2, "num_attention_heads": 2}
    config |= {"num_kv_heads": 1, "multiple_of": 8, "learn_sigma": False, "cross_attention_dim": D}
    rotary = diffusers.models.embeddings.get_2d_rotary_pos_embed_lumina(12, 16, 16)
    inputs = {
        "encoder_hidden_states": words(6),
        "encoder_mask": mask(6, 4, 5),
        "image_rotary_emb": rotary,
        "cross_attention_kwargs": {},
    }
    pooled = "time_caption_embed"
    return subject("LuminaNextDiT2DModel", config, IMAGE, (2, 2), inputs, scale=1e-3, hidden=5, pooled=pooled)


def ernie() -> Subject:
    config = {"hidden_size": 24, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32, "in_channels": C}
    config |= {"out_channels": C, "patch_size": 2, "text_in_dim": D, "rope_axes_dim": (4, 4, 4)}
    inputs = {"text_bth": words(6), "text_lens": torch.tensor([4, 5])}
    return subject("ErnieImageTransformer2DModel", config, IMAGE, (2, 2), inputs, 6, after=True, hidden=5)


def glm() -> Subject:
    """Codes of an image that another model drew."""
    config = LAYERS | {"text_embed_dim": D, "time_embed_dim": 8, "condition_dim": 4}
    config |= {"prior_vq_quantizer_codebook_size": 10}
    inputs = {
        "encoder_hidden_states": words(6),
        "prior_token_id": torch.randint(10, (B, IMAGE.size)),
        "prior_token_drop": torch.tensor([False, True]),
        "target_size": SIZES["target_size"],
        "crop_coords": SIZES["crop_coords"],
    }
    return subject("GlmImageTransformer2DModel", config, IMAGE, (2, 2), inputs, 6)


JOY = {"in_channels": C, "hidden_size": 24, "num_attention_heads": 2, "text_dim": D, "num_layers": 2}
JOY |= {"rope_dim_list": (4, 4, 4)}


def joy(pack: Callable[[Tensor], Tensor] = lambda latents: latents) -> Subject:
    inputs = {"encoder_hidden_states": words(6)}
    return subject("JoyImageEditTransformer3DModel", JOY, PAIR, (1, 2, 2), inputs, 6, after=True, pack=pack)


def joy_pair() -> Subject:
    """Two images, of which the model takes the second first."""

    def pack(latents: Tensor) -> Tensor:
        return latents.flip(2).transpose(1, 2)[:, :, :, None]

    return joy(pack)


def joy_plus() -> Subject:
    """Two images, and as many patches of padding as a larger one in the batch would leave; they are hidden."""

    def pack(latents: Tensor) -> Tensor:
        boxes = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
        return F.pad(boxes.permute(0, 2, 3, 5, 1, 4, 6).flatten(1, 3)[:, :, :, None], (0, 0) * 4 + (0, 4))

    inputs = {
        "encoder_hidden_states": words(6),
        "encoder_hidden_states_mask": mask(6, 4, 5),
        "shape_list": [[(1, 5, 3), (1, 5, 3)]] * B,
    }
    name = "JoyImageEditPlusTransformer3DModel"
    return subject(name, JOY, PAIR, (1, 2, 2), inputs, 4 + 6, after=True, pack=pack, hidden=5)


def omnigen() -> Subject:
    """Words and a token of time before the image, which sees all of them; they see what came before them."""
    config = {"in_channels": C, "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "num_layers": 2}
    config |= {"intermediate_size": 32, "pad_token_id": 0, "vocab_size": 20, "time_step_dim": 16}
    config |= {"rope_scaling": {"short_factor": [1.0] * 6, "long_factor": [1.0] * 6}, "pos_embed_max_size": 16}
    whole = 7 + IMAGE.size
    seen = torch.ones(B, whole, whole).tril()
    seen[:, 7:] = 1
    inputs = {
        "input_ids": torch.randint(1, 20, (B, 6)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": seen,
        "position_ids": torch.arange(whole).expand(B, -1),
    }
    return subject("OmniGenTransformer2DModel", config, IMAGE, (2, 2), inputs, 7, scale=1e-3)


SQUARE = ct.Grid(h=8, w=8)


def zimage(grid: ct.Grid = SQUARE, **more: Any) -> Subject:
    """Lists of images and texts; both are padded to 32 tokens or twice as many."""
    config = {"in_channels": C, "dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    config |= {"cap_feat_dim": D, "siglip_feat_dim": 8, "axes_dims": [4, 4, 4], "axes_lens": [64, 64, 64]}
    inputs = {"cap_feats": [numbers(6, D), numbers(5, D)]}

    def pack(latents: Tensor) -> list[Tensor]:
        return list(latents[:, :, None])

    text = -grid.size % 32 + 32
    return subject(
        "ZImageTransformer2DModel", config | more, grid, (2, 2), inputs, text, True, pack, "t", 1e-3, into="x"
    )
