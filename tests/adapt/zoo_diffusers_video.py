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


def anyflow() -> Subject:
    """A time to be at for each frame, and one to go to."""
    inputs = {
        "encoder_hidden_states": words(6),
        "timestep": torch.full((B, 3), 500.0),
        "r_timestep": torch.full((B, 3), 200.0),
    }
    return subject("AnyFlowTransformer3DModel", WAN, VIDEO, (1, 2, 2), inputs, pack=frames_first)


def wan_animate() -> Subject:
    """A pose and a face; latents of three kinds in its channels."""
    config = WAN | {"in_channels": 3 * C, "latent_channels": C, "out_channels": 3 * C, "image_dim": None}
    config |= {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16}
    config |= {"motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8}
    config |= {"face_encoder_num_heads": 2, "inject_face_latents_blocks": 1}
    inputs = {
        "encoder_hidden_states": words(6),
        "pose_hidden_states": numbers(B, C, 2, 8, 10),
        "face_pixel_values": numbers(B, 3, 5, 16, 16),
    }

    def thrice(latents: Tensor) -> Tensor:
        return latents.repeat(1, 3, 1, 1, 1)

    return subject("WanAnimateTransformer3DModel", config, VIDEO, (1, 2, 2), inputs, pack=thrice)


def helios(ahead: int = 0, **past: Any) -> Subject:
    config = {key: value for key, value in WAN.items() if key != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)}
    inputs = {"encoder_hidden_states": words(6), "indices_hidden_states": torch.arange(9, 12)[None].expand(B, -1)}
    return subject("HeliosTransformer3DModel", config, VIDEO, (1, 2, 2), inputs | past, ahead, ahead=ahead)


def helios_with_past() -> Subject:
    """Frames of the past before the others, in boxes that grow with their age."""
    past = {}
    for name, first, count in (("long", 0, 4), ("mid", 4, 3), ("short", 7, 2)):
        past[f"latents_history_{name}"] = numbers(B, C, count, 8, 10)
        past[f"indices_latents_history_{name}"] = torch.arange(first, first + count)[None].expand(B, -1)
    return helios(ahead=1 * 1 * 2 + 2 * 2 * 3 + 2 * 4 * 5, **past)


# The others.


def latte() -> Subject:
    """Blocks that see one frame, and blocks that see one place in all frames."""
    config = LAYERS | {"cross_attention_dim": 24, "sample_size": 10, "patch_size": 2, "caption_channels": D}
    config |= {"video_length": 3, "norm_type": "ada_norm_single", "num_embeds_ada_norm": 10}
    parts = ct.Grid(t=1, h=4, w=5), ct.Grid(t=3, h=1, w=1)
    inputs = {"encoder_hidden_states": words(6)}
    return subject("LatteTransformer3DModel", config, VIDEO, (1, 2, 2), inputs, parts=parts)


def framepack() -> Subject:
    """Frames of the past before those of the grid; an image and text behind them."""
    config = {"num_refiner_layers": 1, "text_embed_dim": D, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4)}
    config |= {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True}
    inputs = {
        "encoder_hidden_states": words(7),
        "encoder_attention_mask": mask(7, 5, 6),
        "pooled_projections": numbers(B, 8),
        "guidance": torch.full((B,), 6000.0),
        "image_embeds": words(3, 8),
        "indices_latents": torch.arange(9, 12),
    }
    for name, indices in (("clean", [0, 8]), ("history_2x", [6, 7]), ("history_4x", [1, 2, 3, 4, 5])):
        inputs[f"latents_{name}"] = numbers(B, C, len(indices), 8, 10)
        inputs[f"indices_latents_{name}"] = torch.tensor(indices)
    ahead = 2 * 4 * 5 + 1 * 2 * 3 + 2 * 1 * 2
    return subject(
        "HunyuanVideoFramepackTransformer3DModel",
        BOTH | config,
        VIDEO,
        (1, 2, 2),
        inputs,
        ahead + 3 + 7,
        after=True,
        hidden=6,
        ahead=ahead,
    )


def channels_last(latents: Tensor) -> Tensor:
    return latents.movedim(1, -1)


KANDINSKY = {"in_visual_dim": C, "out_visual_dim": C, "in_text_dim": D, "in_text_dim2": 8, "time_dim": 16}
KANDINSKY |= {"model_dim": 24, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4)}
KANDINSKY |= {"visual_cond": False}


def kandinsky5() -> Subject:
    """One block: queries and keys are rounded to bfloat16, in a second one not always to the same side."""
    inputs = {
        "encoder_hidden_states": words(6),
        "pooled_projections": numbers(B, 8),
        "visual_rope_pos": tuple(torch.arange(size) for size in VIDEO.shape),
        "text_rope_pos": torch.arange(6),
    }
    return subject(
        "Kandinsky5Transformer3DModel",
        KANDINSKY | {"num_visual_blocks": 1},
        VIDEO,
        (1, 2, 2),
        inputs,
        pack=channels_last,
    )


def kandinsky6() -> Subject:
    """Sound beside the video."""
    config = KANDINSKY | {"in_audio_dim": 4, "out_audio_dim": 4}
    inputs = {
        "encoder_hidden_states": words(6),
        "pooled_projections": numbers(B, 8),
        "audio_hidden_states": words(9, 4),
    }
    return subject("Kandinsky6Transformer3DModel", config, VIDEO, (1, 2, 2), inputs, pack=channels_last)


def motif(**more: Any) -> Subject:
    """Text in joint attention, and once more by cross-attention."""
    config = {"text_embed_dim": D, "image_embed_dim": 8, "rope_axes_dim": (4, 4, 4)}
    config |= {"enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True}
    inputs = {
        "encoder_hidden_states": words(7),
        "encoder_attention_mask": mask(7, 5, 6),
        "image_embeds": words(3, 8),
    }
    return subject(
        "MotifVideoTransformer3DModel", BOTH | config | more, VIDEO, (1, 2, 2), inputs, 10, after=True, hidden=6
    )


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


def ltx2(**more: Any) -> Subject:
    """Sound beside the video: each sees itself, text, and the other."""
    config = LAYERS | {"cross_attention_dim": 24, "caption_channels": D, "rope_double_precision": False}
    config |= {"audio_in_channels": C, "audio_out_channels": C, "audio_num_attention_heads": 2}
    config |= {"audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
    inputs = {
        "encoder_hidden_states": words(6),
        "audio_encoder_hidden_states": words(6),
        "encoder_attention_mask": mask(6, 4, 5),
        "audio_encoder_attention_mask": mask(6, 4, 5),
        "audio_hidden_states": words(9, C),
        "audio_num_frames": 9,
        "num_frames": 3,
        "height": 4,
        "width": 5,
    }
    pack = diffusers.LTXPipeline._pack_latents
    return subject("LTX2VideoTransformer3DModel", config, VIDEO, (1, 1, 1), inputs | more, pack=pack, hidden=5)


def ltx2_of_coordinates() -> Subject:
    """Every token's frame, row and column, from and to, in pixels and seconds."""
    t, h, w = torch.tensor([0, 1, 9]) / 25, torch.arange(4.0) * 32, torch.arange(5.0) * 32
    begin = torch.cartesian_prod(t, h, w).T.expand(B, -1, -1)
    coords = torch.stack([begin, begin + torch.tensor([8 / 25, 32, 32])[:, None]], dim=-1)
    return ltx2(num_frames=None, height=None, width=None, video_coords=coords)


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


def minimax() -> Subject:
    """Text, video and sound in one sequence."""
    config = LAYERS | {"hidden_size": 24, "num_refiner_layers": 1, "ffn_dim": 32, "audio_in_channels": 4}
    config |= {"text_dim": D, "freq_dim": 16, "time_embed_hidden_dim": 16, "time_embed_dim": 16, "rope_freq_dim": 2}
    config.pop("out_channels")
    text, sound = torch.arange(6.0), torch.arange(9.0)
    places = torch.cartesian_prod(*(torch.arange(float(size)) for size in VIDEO.shape))
    inputs = {
        "encoder_hidden_states": words(6),
        "audio_hidden_states": words(9, 4),
        "timestep": torch.full((1,), 500.0),
        "timestep_indices": torch.zeros(75, dtype=torch.long),
        "token_tags": torch.tensor([1] * 6 + [0] * 60 + [2] * 9),
        "position_ids": torch.cat([text[:, None].expand(-1, 3), 6 + places, 6 + sound[:, None].expand(-1, 3)]),
        "text_indices": torch.arange(6),
        "video_indices": torch.arange(6, 66),
        "audio_indices": torch.arange(66, 75),
    }

    def pack(latents: Tensor) -> Tensor:
        return diffusers.LTXPipeline._pack_latents(latents, 2)

    return subject("MiniMaxH3Transformer3DModel", config, VIDEO, (1, 2, 2), inputs, 15, after=True, pack=pack, ahead=6)
