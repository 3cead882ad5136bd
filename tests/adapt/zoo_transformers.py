"""Small random models of transformers, one for each way in which their attention may differ.

Every subject is in eval mode and float32, with 2 to 4 layers and weights large enough that attention is far
from uniform. Language models get one row that is padded on the left, encoders one that is padded on the right.
Text has 13 tokens, images 3 x 5 patches, videos 2 x 3 x 5, so that no two axes are equal and windows of 5 cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chronotope import Grid

VOCAB, LENGTH, WINDOW, PADDED = 61, 13, 5, 4
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SIZE, **SPECIAL, "vocab_size": VOCAB, "max_position_embeddings": 64}
GROUPED = {**DECODER, "num_key_value_heads": 2}
ALTERNATING = {
    **GROUPED,
    "num_hidden_layers": 4,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
IMAGE = {**SIZE, "image_size": [6, 10], "patch_size": 2, "num_channels": 3}
# Positions of 3 x 3 patches, which the model stretches over an image of 3 x 5.
SQUARE = {**IMAGE, "image_size": 6}
VIDEO = {**IMAGE, "num_frames": 4, "tubelet_size": 2}


@dataclass(frozen=True)
class Subject:
    """A model and one call of it: `model(**inputs)`.

    generates: `model.generate(**inputs)` works. grid: where the tokens of its self-attention lie, if on one grid;
    prefix: how many tokens come before them. why: what it adds to the others.
    """

    model: nn.Module
    inputs: dict[str, Any]
    generates: bool
    grid: Grid | None
    prefix: int
    why: str


MODELS: dict[str, Callable[[], Subject]] = {}


def _stir(model: nn.Module) -> None:
    """Weights of a size that makes attention matter: initial ones leave the scores near zero."""
    for value in model.parameters():
        noise = torch.randn_like(value)
        value.data = 0.2 * noise if value.ndim > 1 else value.data + 0.1 * noise


def _text(side: str) -> dict[str, Tensor]:
    """Two rows of token ids; the second is padded on one side."""
    ids = torch.randint(3, VOCAB, (2, LENGTH))
    mask = torch.ones_like(ids)
    hidden = slice(0, PADDED) if side == "left" else slice(LENGTH - PADDED, None)
    ids[1, hidden], mask[1, hidden] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 6, 10)}


def _stretched() -> dict[str, Any]:
    """An image larger than the model's own, for models that stretch their positions when asked to."""
    return {**_image(), "interpolate_pos_encoding": True}


def _video(name: str = "pixel_values") -> dict[str, Tensor]:
    return {name: torch.randn(2, 4, 3, 6, 10)}


def _text_of_image() -> dict[str, Tensor]:
    """Two rows of text, each with the 9 tokens of an image of 3 x 3 patches; the second is padded on the left."""
    text = _text("left")
    ids, image = text["input_ids"], torch.full((2, 9), 3)
    return {
        "input_ids": torch.cat([ids[:, :PADDED], image, ids[:, PADDED:].clamp(min=4)], 1),
        "attention_mask": torch.cat([text["attention_mask"], torch.ones_like(image)], 1),
        "pixel_values": torch.randn(2, 3, 6, 6),
    }


def _to_and_from() -> dict[str, Tensor]:
    """An encoder's text, padded on the right, and the first tokens of the decoder."""
    return {**_text("right"), "decoder_input_ids": torch.randint(3, VOCAB, (2, 7))}


def subject(
    name: str,
    config: dict[str, Any],
    inputs: Callable[[], dict[str, Any]],
    why: str,
    grid: Grid | None = None,
    sub: dict[str, dict[str, Any]] | None = None,
) -> Callable[[], Subject]:
    """The recipe of one model by the name of its class in transformers; `sub`: values of its sub-configurations."""

    def make() -> Subject:
        import transformers

        kind = getattr(transformers, name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind(kind.config_class(**config, **(sub or {})))
            _stir(model)
            call = inputs()
        model.eval()
        generates = model.can_generate()
        if generates:
            # A sentence must not end before it has the length that was asked for.
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
        return Subject(model, call, generates, grid, 0 if grid is None else grid.prefix, why)

    return make


def language_model(name: str, config: dict[str, Any], why: str) -> Callable[[], Subject]:
    return subject(name, config, lambda: _text("left"), why)


# Language models through the interface.
MODELS["llama"] = language_model("LlamaForCausalLM", GROUPED, "grouped key and value heads, rotary positions")
MODELS["qwen3"] = language_model(
    "Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}, "norm of q and k; head size not C / H"
)
MODELS["mistral"] = language_model("MistralForCausalLM", {**GROUPED, "sliding_window": WINDOW}, "every layer slides")
MODELS["gemma2"] = language_model(
    "Gemma2ForCausalLM",
    {**ALTERNATING, "head_dim": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "soft-cap; a scale of its own; sliding and full layers in turn; its own implementation is eager",
)
MODELS["gemma3"] = language_model(
    "Gemma3ForCausalLM",
    {**ALTERNATING, "head_dim": 8, "query_pre_attn_scalar": 16},
    "sliding and full layers in turn, each with rotary positions of its own; norm of q and k",
)
MODELS["gpt_oss"] = language_model(
    "GptOssForCausalLM",
    {
        **ALTERNATING,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "a learned sink per head; sliding and full layers in turn; mixture of experts",
)
MODELS["phi3"] = language_model("Phi3ForCausalLM", GROUPED, "q, k and v of one projection; a window that is None")
MODELS["deepseek_v3"] = language_model(
    "DeepseekV3ForCausalLM",
    {
        **DECODER,
        "num_key_value_heads": 4,
        "kv_lora_rank": 12,
        "q_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "first_k_dense_replace": 2,
    },
    "heads of values of another size than those of keys; q and k of low rank",
)
MODELS["gpt2"] = language_model(
    "GPT2LMHeadModel",
    {**SPECIAL, "vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.1},
    "learned positions; dropout of probabilities while training; one projection for q, k and v",
)

# Language models that compute attention by themselves.
MODELS["falcon"] = language_model(
    "FalconForCausalLM",
    {**DECODER, "alibi": True, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": False},
    "alibi; one key head; calls scaled_dot_product_attention itself",
)
MODELS["falcon_rotary"] = language_model(
    "FalconForCausalLM",
    {**DECODER, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "rotary positions; calls scaled_dot_product_attention itself",
)
MODELS["bloom"] = language_model(
    "BloomForCausalLM",
    {**SPECIAL, "vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "alibi by baddbmm and softmax",
)
MODELS["mpt"] = language_model(
    "MptForCausalLM",
    {**SPECIAL, "vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "alibi by matmul and softmax",
)

# Encoders, and encoders with decoders.
MODELS["bert"] = subject("BertModel", DECODER, lambda: _text("right"), "bidirectional; padding mask")
MODELS["modernbert"] = subject(
    "ModernBertModel",
    {
        **DECODER,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "num_hidden_layers": 4,
        "local_attention": 2 * WINDOW,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    lambda: _text("right"),
    "bidirectional; sliding and full layers in turn",
)
MODELS["t5"] = subject(
    "T5ForConditionalGeneration",
    {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
    },
    _to_and_from,
    "learned bias of relative positions, made by the first layer; no scale; cross-attention",
)
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **SPECIAL,
}
MODELS["bart"] = subject(
    "BartForConditionalGeneration",
    {**BART, "max_position_embeddings": 64},
    _to_and_from,
    "encoder, decoder and cross-attention through the interface",
)
MODELS["whisper"] = subject(
    "WhisperForConditionalGeneration",
    {**BART, "num_mel_bins": 8, "max_source_positions": 15, "max_target_positions": 64, "begin_suppress_tokens": None},
    lambda: {
        "input_features": torch.randn(2, 8, 30),
        "decoder_input_ids": torch.randint(3, VOCAB, (2, 7)),
    },
    "scaled queries and a scale of 1; sound in the encoder",
)

# Images and videos.
MODELS["vit"] = subject("ViTModel", IMAGE, _image, "one class token", Grid(prefix=1, h=3, w=5))
MODELS["vit_classifier"] = subject("ViTForImageClassification", IMAGE, _image, "a head", Grid(prefix=1, h=3, w=5))
MODELS["deit"] = subject("DeiTModel", IMAGE, _image, "a class and a distillation token", Grid(prefix=2, h=3, w=5))
MODELS["ijepa"] = subject("IJepaModel", IMAGE, _image, "no prefix", Grid(h=3, w=5))
MODELS["dinov2"] = subject("Dinov2Model", SQUARE, _image, "layer scale", Grid(prefix=1, h=3, w=5))
MODELS["dinov2_registers"] = subject(
    "Dinov2WithRegistersModel",
    {**SQUARE, "num_register_tokens": 3},
    _image,
    "a class token and registers",
    Grid(prefix=4, h=3, w=5),
)
MODELS["dinov3"] = subject(
    "DINOv3ViTModel",
    {**IMAGE, "num_register_tokens": 2},
    _image,
    "rotary positions of patches but not of the prefix",
    Grid(prefix=3, h=3, w=5),
)
MODELS["videomae"] = subject("VideoMAEModel", VIDEO, _video, "video without prefix", Grid(t=2, h=3, w=5))
MODELS["vivit"] = subject(
    "VivitModel", {**VIDEO, "tubelet_size": [2, 2, 2]}, _video, "video, one class token", Grid(prefix=1, t=2, h=3, w=5)
)
JEPA = {
    **SIZE,
    "mlp_ratio": 1.5,
    "crop_size": 6,
    "frames_per_clip": 4,
    "tubelet_size": 2,
    "patch_size": 2,
    "pred_hidden_size": 24,
    "pred_num_hidden_layers": 2,
    "pred_num_attention_heads": 2,
    "num_pooler_layers": 1,
}
del JEPA["intermediate_size"]
MODELS["vjepa2"] = subject(
    "VJEPA2Model",
    JEPA,
    lambda: {**_video("pixel_values_videos"), "skip_predictor": True},
    "video, rotary positions along three axes",
    Grid(t=2, h=3, w=5),
)
MODELS["vjepa2_classifier"] = subject(
    "VJEPA2ForVideoClassification",
    JEPA,
    lambda: _video("pixel_values_videos"),
    "a pooler that attends too: to the grid, from the grid and from one query",
    Grid(t=2, h=3, w=5),
)
MODELS["timesformer"] = subject(
    "TimesformerModel",
    {**SIZE, "image_size": 6, "patch_size": 2, "num_channels": 3, "num_frames": 4},
    lambda: {"pixel_values": torch.randn(2, 4, 3, 6, 6)},
    "divided attention, along time and then over each frame, by matmul and softmax",
)
MODELS["videomae_pretraining"] = subject(
    "VideoMAEForPreTraining",
    {
        **VIDEO,
        "decoder_hidden_size": 24,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    },
    lambda: {**_video(), "bool_masked_pos": (torch.arange(30) % 3 > 0).expand(2, -1)},
    "drops two patches of three: no grid; a decoder with a copy of the configuration",
)
TOWER = {**SQUARE, "projection_dim": 16}
CLIP_TEXT = {**SIZE, **SPECIAL, "projection_dim": 16, "vocab_size": VOCAB, "max_position_embeddings": 64}
MODELS["clip"] = subject(
    "CLIPModel",
    {"projection_dim": 16},
    lambda: {**_text("right"), **_stretched()},
    "two towers, each with a configuration of its own: a causal one of text and one of images",
    sub={"text_config": CLIP_TEXT, "vision_config": TOWER},
)
MODELS["clip_vision"] = subject("CLIPVisionModel", TOWER, _stretched, "a tower", Grid(prefix=1, h=3, w=5))
MODELS["clip_classifier"] = subject(
    "CLIPForImageClassification",
    {"num_labels": 3},
    lambda: {"pixel_values": torch.randn(2, 3, 6, 6)},
    "a head on a tower that is not its base model",
    Grid(prefix=1, h=3, w=3),
    sub={"vision_config": TOWER},
)
MODELS["siglip_vision"] = subject(
    "SiglipVisionModel", {**SQUARE, "vision_use_head": False}, _stretched, "a tower without prefix", Grid(h=3, w=5)
)
MODELS["llava"] = subject(
    "LlavaForConditionalGeneration",
    {"image_token_index": 3, "vision_feature_layer": -1, "vision_feature_select_strategy": "default"},
    _text_of_image,
    "images among the tokens of a language model: a configuration with two configurations inside",
    sub={"text_config": GROUPED, "vision_config": TOWER},
)
