"""Small models of diffusers' classes for images."""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor
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
