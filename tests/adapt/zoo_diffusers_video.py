"""Small models of diffusers' classes for videos."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor
from zoo_diffusers_parts import BOTH, LAYERS, VIDEO, B, C, D, Subject, mask, numbers, sampler, subject, words

import chronotope as ct

# Wan and its kin: text comes in by cross-attention.

WAN = {"text_dim": D, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32, **LAYERS}


def wan(name: str = "WanTransformer3DModel", grid: ct.Grid = VIDEO, **more: Any) -> Subject:
    return subject(name, WAN | more, grid, (1, 2, 2), {"encoder_hidden_states": words(6)})


def wan_of_boxes() -> Subject:
    """Patches of two frames, and times of its own for each token."""
    inputs = {"encoder_hidden_states": words(6), "timestep": 1000 * torch.rand(B, VIDEO.size)}
    made = subject("WanTransformer3DModel", WAN | {"patch_size": (2, 1, 2)}, VIDEO, (2, 1, 2), inputs)
    return made


def vace() -> Subject:
    config = WAN | {"vace_layers": [0, 1], "vace_in_channels": 6}
    inputs = {"encoder_hidden_states": words(6), "control_hidden_states": numbers(B, 6, 3, 8, 10)}
    return subject("WanVACETransformer3DModel", config, VIDEO, (1, 2, 2), inputs)


# The others.


def hunyuan_video(**more: Any) -> Subject:
    config = {"num_refiner_layers": 1, "text_embed_dim": D, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4)}
    inputs = {
        "encoder_hidden_states": words(7),
        "encoder_attention_mask": mask(7, 5, 6),
        "pooled_projections": numbers(B, 8),
        "guidance": torch.full((B,), 6000.0),
    }
    return subject(
        "HunyuanVideoTransformer3DModel", BOTH | config | more, VIDEO, (1, 2, 2), inputs, 7, after=True, hidden=6
    )


def hunyuan_video_15() -> Subject:
    """Text, glyphs and an image, joined so that what is hidden comes last."""
    config = {"num_refiner_layers": 1, "text_embed_dim": D, "text_embed_2_dim": 8, "image_embed_dim": 8}
    inputs = {
        "encoder_hidden_states": words(7),
        "encoder_attention_mask": mask(7, 5, 6),
        "encoder_hidden_states_2": words(4, 8),
        "encoder_attention_mask_2": mask(4, 4, 2),
        "image_embeds": words(3, 8),
    }
    config |= {"rope_axes_dim": (4, 4, 4), "patch_size": 2}
    return subject(
        "HunyuanVideo15Transformer3DModel", LAYERS | config, VIDEO, (1, 2, 2), inputs, 14, after=True, hidden=6
    )


COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": C,
    "out_channels": C,
    "time_embed_dim": 8,
    "text_embed_dim": D,
    "num_layers": 2,
    "max_text_seq_length": 6,
    "sample_width": 10,
    "sample_height": 8,
    "sample_frames": 9,
}


def frames_first(latents: Tensor) -> Tensor:
    return latents.transpose(1, 2)


def cogvideox(name: str = "CogVideoXTransformer3DModel") -> Subject:
    inputs = {"encoder_hidden_states": words(6)}
    return subject(name, COGVIDEOX, VIDEO, (1, 2, 2), inputs, 6, pack=frames_first)


def cogvideox_15() -> Subject:
    """Patches of two frames, rotary positions, and larger latents than the model was made for."""
    config = COGVIDEOX | {"patch_size_t": 2, "use_rotary_positional_embeddings": True, "ofs_embed_dim": 8}
    grid = ct.Grid(t=2, h=5, w=3)
    rotary = diffusers.models.embeddings.get_3d_rotary_pos_embed(16, ((0, 0), (5, 3)), (5, 3), 2)
    inputs = {"encoder_hidden_states": words(6), "image_rotary_emb": rotary, "ofs": torch.full((1,), 2.0)}
    return subject("CogVideoXTransformer3DModel", config, grid, (2, 2, 2), inputs, 6, pack=frames_first)


def consisid() -> Subject:
    """A face, seen by a cross-attention that is written out."""
    face = {"LFE_id_dim": 8, "LFE_vit_dim": 8, "LFE_depth": 5, "LFE_dim_head": 4, "LFE_num_heads": 2}
    face |= {"LFE_num_id_token": 2, "LFE_num_querie": 2, "LFE_output_dim": 21, "LFE_ff_mult": 1}
    face |= {"is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 4, "cross_attn_num_heads": 2}
    inputs = {
        "encoder_hidden_states": words(6),
        "id_cond": numbers(B, 8),
        "id_vit_hidden": [numbers(B, 3, 8) for _ in range(5)],
    }
    return subject("ConsisIDTransformer3DModel", COGVIDEOX | face, VIDEO, (1, 2, 2), inputs, 6, pack=frames_first)


def ltx() -> Subject:
    config = {"cross_attention_dim": 24, "caption_channels": D, **LAYERS}
    inputs = {
        "encoder_hidden_states": words(6),
        "encoder_attention_mask": mask(6, 4, 5),
        "num_frames": 3,
        "height": 4,
        "width": 5,
    }
    pack = diffusers.LTXPipeline._pack_latents
    return subject("LTXVideoTransformer3DModel", config, VIDEO, (1, 1, 1), inputs, pack=pack, hidden=5)


def ltx_of_coordinates() -> Subject:
    """Every token's frame, row and column in pixels and seconds."""
    made = ltx()
    t, h, w = torch.tensor([0, 1, 9]) / 25, torch.arange(4.0) * 32, torch.arange(5.0) * 32
    coords = torch.cartesian_prod(t, h, w).T.expand(B, -1, -1)
    inputs = made.inputs | {"num_frames": None, "height": None, "width": None, "video_coords": coords}
    sample = sampler(inputs, "timestep", 1.0)
    return Subject(made.model, inputs, VIDEO, 0, False, sample, made.latents, made.pack, 5, None)


def mochi() -> Subject:
    """Each sample attends alone, without the text that is hidden; as much of it in each, but not the same."""
    config = {"pooled_projection_dim": 8, "text_embed_dim": D, "time_embed_dim": 16, **LAYERS}
    kept = torch.tensor([[1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 1, 0]], dtype=torch.bool)
    inputs = {"encoder_hidden_states": words(6), "encoder_attention_mask": kept}
    return subject(
        "MochiTransformer3DModel",
        config,
        VIDEO,
        (1, 2, 2),
        inputs,
        4,
        after=True,
        hidden=5,
        pooled="time_embed.pooler",
    )


def allegro() -> Subject:
    """The last column of the second sample is padding."""
    config = {"cross_attention_dim": 24, "caption_channels": D, "sample_height": 8, "sample_width": 10, **LAYERS}
    freqs = diffusers.models.embeddings.get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 5)), (4, 5), 3)
    places = torch.cartesian_prod(*(torch.arange(size) for size in VIDEO.shape)).T[:, None]
    real = torch.ones(B, 3, 8, 10)
    real[1, :, :, 8:] = 0
    inputs = {
        "encoder_hidden_states": words(6),
        "encoder_attention_mask": mask(6, 4, 5),
        "attention_mask": real,
        "image_rotary_emb": (freqs[:3], tuple(places)),
    }
    return subject("AllegroTransformer3DModel", config, VIDEO, (1, 2, 2), inputs, hidden=5)


def cosmos() -> Subject:
    config = {"text_embed_dim": D, "adaln_lora_dim": 8, "max_size": (6, 12, 14), "patch_size": (2, 2, 1), **LAYERS}
    # Resizing a mask of padding would need torchvision.
    config |= {"concat_padding_mask": False}
    inputs = {"encoder_hidden_states": words(6), "attention_mask": mask(6, 4, 5, dtype=torch.bool), "fps": 24}
    return subject("CosmosTransformer3DModel", config, VIDEO, (2, 2, 1), inputs, hidden=5)


def easyanimate() -> Subject:
    """A block that projects text by itself, then one that projects both alike."""
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": C, "out_channels": C}
    config |= {"num_layers": 2, "mmdit_layers": 1, "patch_size": 2, "time_embed_dim": 8}
    config |= {"text_embed_dim": D, "text_embed_dim_t5": 8}
    inputs = {"encoder_hidden_states": words(6), "encoder_hidden_states_t5": words(3, 8)}
    return subject("EasyAnimateTransformer3DModel", config, VIDEO, (1, 2, 2), inputs, 9)
