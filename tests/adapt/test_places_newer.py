"""Places that are more than one grid of all tokens: blocks with axes of their own, frames of the past; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers
import zoo_diffusers_video as video
from plain import Edit
from test_places import calls, changed_rows, disturbed, made, spots
from zoo_diffusers import WARNINGS, Subject
from zoo_diffusers_parts import VIDEO, B, C, D, numbers, words

import chronotope as ct
from chronotope.adapt import attach, control
from chronotope.adapt.places import read_place

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]
WINDOW = ct.window(t=3, h=3, w=3)


def run(subject: Subject, where: ct.Pattern | None = None, **given: Any) -> tuple[Tensor, dict[str, str]]:
    """What a model gives under a pattern, and what was done to each layer, or why nothing was."""
    inputs = subject.inputs | given
    with torch.no_grad():
        if where is None:
            return subject.model(**inputs).sample, {}
        with attach(subject.model, where) as handle:
            out = subject.model(**inputs).sample
    return out, {layer.name: layer.done or layer.why for layer in handle.layers}


# Latte: blocks of one frame, blocks of one place.


def test_rows_of_blocks_that_see_some_axes():
    subject = made("LatteTransformer3DModel")
    before = calls(subject)
    space = next(i for i, call in enumerate(before) if call.path[0].startswith("transformer_blocks"))
    time = next(i for i, call in enumerate(before) if call.path[0].startswith("temporal_transformer_blocks"))
    place = read_place(subject.model, (), subject.inputs)
    assert place.parts == {
        "transformer_blocks": ct.Grid(t=1, h=4, w=5),
        "temporal_transformer_blocks": ct.Grid(t=3, h=1, w=1),
    }
    for spot in spots(VIDEO):
        after = calls(subject, disturbed(subject, spot))
        # One frame of each sample, one place in it; then all places of that frame.
        moved = (before[space].q - after[space].q).abs().amax(dim=(1, 3)) > 1e-6
        alone = torch.zeros(B, 3, 20, dtype=torch.bool)
        alone[:, spot["t"], ct.Grid(h=4, w=5).index(h=spot["h"], w=spot["w"])] = True
        assert torch.equal(moved.view(B, 3, 20), alone)
        assert changed_rows(before[time], after[time]) == ([spot["t"]], [spot["t"]])


def test_a_grid_of_the_user_is_what_some_blocks_see():
    subject = made("LatteTransformer3DModel")
    before = run(subject, WINDOW)[0]
    for grid, done in ((VIDEO, 4), (ct.Grid(h=4, w=5), 2), (ct.Grid(t=3), 2)):
        where = ct.window(**dict.fromkeys(grid.axes, 3))
        with torch.no_grad(), attach(subject.model, where, grid=grid) as handle:
            out = subject.model(**subject.inputs).sample
        assert sum(bool(layer.done) for layer in handle.layers) == done
        assert torch.equal(out, before) == (grid is VIDEO)


# Framepack and Helios: frames of the past.


@pytest.mark.parametrize("name", ["HunyuanVideoFramepackTransformer3DModel", "HeliosTransformer3DModel (past)"])
def test_frames_of_the_past_lie_before_the_grid(name):
    subject = made(name)
    before = next(call for call in calls(subject) if call.q.shape[2] >= subject.grid.size)
    rows: list[int] = []
    for past in [name for name in subject.inputs if name.startswith("latents_")]:
        other = subject.inputs | {past: subject.inputs[past] + 1}
        after = next(call for call in calls(subject, other) if call.q.shape[2] >= subject.grid.size)
        rows += changed_rows(before, after)[0]
    assert sorted(rows) == list(range(subject.ahead))


def test_past_that_fills_no_box_is_padded():
    subject = made("HunyuanVideoFramepackTransformer3DModel")
    inputs = subject.inputs | {
        "latents_history_2x": numbers(B, C, 3, 8, 10),
        "indices_latents_history_2x": torch.arange(3),
    }
    place = read_place(subject.model, (), inputs)
    assert place.ahead == subject.ahead + 6
    assert max(call.q.shape[2] for call in calls(subject, inputs)) == place.ahead + place.grid.size + 10


def test_the_user_may_count_past_and_text_in_the_prefix():
    subject = made("HunyuanVideoFramepackTransformer3DModel")
    expected = run(subject, WINDOW)[0]
    with torch.no_grad(), attach(subject.model, WINDOW, grid=VIDEO.replace(prefix=subject.text)):
        assert torch.equal(subject.model(**subject.inputs).sample, expected)


def test_weights_that_somebody_sees_are_those_of_the_pattern():
    """Computed explicitly, past and text are where they were."""
    subject = made("HunyuanVideoFramepackTransformer3DModel")
    expected = run(subject, WINDOW)[0]
    same = Edit(weights=lambda at, weights: weights * 1)
    with control(subject.model, same):
        found = run(subject, WINDOW)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


# Tokens beside those of the video.


def test_sound_as_long_as_the_video_is_left():
    """Each sees as many tokens as the grid has; only one of them lies on it."""
    subject = made("LTX2VideoTransformer3DModel")
    sound = {"audio_hidden_states": words(60, C), "audio_num_frames": 60}
    before = run(subject, **sound)[0]
    out, told = run(subject, WINDOW, **sound)
    assert not torch.allclose(out, before)
    done = {name for name, what in told.items() if what.startswith("window")}
    assert done == {f"transformer_blocks.{i}.attn1" for i in range(2)}
    assert told["transformer_blocks.0.audio_attn1"] == "its 60 tokens are not those of Grid(t=3, h=4, w=5)"
    assert "another sequence" in told["transformer_blocks.0.video_to_audio_attn"]

    subject = made("Kandinsky6Transformer3DModel")
    told = run(subject, WINDOW, audio_hidden_states=words(60, 4))[1]
    done = {name for name, what in told.items() if what.startswith("window")}
    assert done == {f"visual_transformer_blocks.{i}.video_dec_block.self_attention" for i in range(2)}


def test_layers_that_see_the_video_twice_are_left():
    subject = video.motif(num_single_layers=2, num_decoder_layers=1)
    out, told = run(subject, WINDOW)
    assert out.isfinite().all()
    assert told["single_transformer_blocks.0.attn"].startswith("window")
    assert told["single_transformer_blocks.1.attn"] == "its 120 tokens are not those of Grid(t=3, h=4, w=5)"


# What is refused.


def ids(*sizes: int) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(float(size)) for size in sizes))


COORDS = torch.cat([ids(3, 4, 5), ids(1, 4, 5) + 7]).T[None, ..., None].expand(B, -1, -1, 2)
JOY, ZIMAGE = "JoyImageEditPlusTransformer3DModel", "ZImageTransformer2DModel"
IDEOGRAM = "Ideogram4Transformer2DModel"
REFUSED = [
    ("LTX2VideoTransformer3DModel", {"height": None}, "height not given, nor video_coords"),
    ("LTX2VideoTransformer3DModel", {"video_coords": COORDS}, "no grid in row-major"),
    ("Kandinsky5Transformer3DModel", {"sparse_params": {"to_fractal": True}}, "sparse_params given"),
    (ZIMAGE, {"x": [[torch.zeros(C, 1, 8, 8)]]}, "several images to a sample"),
    (ZIMAGE, {"x": [torch.zeros(C, 1, 8, 8), torch.zeros(C, 1, 6, 8)]}, "samples differ"),
    (JOY, {"shape_list": None}, "shape_list not given"),
    (JOY, {"shape_list": [[(1, 5, 3), (1, 3, 5)]] * 2}, "share no grid"),
    (JOY, {"shape_list": [[(1, 5, 3)], [(1, 3, 5)]]}, "samples of the batch differ"),
    (JOY, {"shape_list": [[(1, 5, 7)]] * 2}, r"34 patches; shape_list says Grid\(h=5, w=7\)"),
    ("Krea2Transformer2DModel", {"position_ids": torch.zeros(41, 3)}, "no grid in row-major"),
    ("MiniMaxH3Transformer3DModel", {"video_indices": torch.arange(6, 126, 2)}, "does not put the tokens"),
    (IDEOGRAM, {"indicator": torch.full((B, 41), 3)}, "indicator does not put the tokens"),
    (IDEOGRAM, {"indicator": torch.stack([torch.full((41,), 3), torch.full((41,), 2)])}, "images of the batch differ"),
]


@pytest.mark.parametrize(("name", "given", "why"), REFUSED)
def test_inputs_without_a_grid_are_refused(name, given, why):
    subject = made(name)
    with pytest.raises(ct.ChronotopeError, match=why) as error:
        read_place(subject.model, (), subject.inputs | given)
    assert str(error.value).startswith(f"{name}: ")


def test_keys_kept_from_other_images_are_refused():
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    subject = made("GlmImageTransformer2DModel")
    caches = GlmImageKVCache(2)
    for mode in ("write", "skip"):
        caches.set_mode(mode)
        assert read_place(subject.model, (), subject.inputs | {"kv_caches": caches}).grid == subject.grid
    caches.set_mode("read")
    with pytest.raises(ct.ChronotopeError, match="kv_caches are read"):
        read_place(subject.model, (), subject.inputs | {"kv_caches": caches})


# Classes whose attention lies on no grid: each says so.


def prx() -> tuple[torch.nn.Module, dict[str, Any]]:
    """Its image looks at text and itself, and text at nothing: no square of tokens."""
    sizes = {"in_channels": C, "patch_size": 2, "context_in_dim": D, "hidden_size": 24, "num_heads": 2, "depth": 2}
    model = diffusers.PRXTransformer2DModel(**sizes, axes_dim=[6, 6])
    return model, {"hidden_states": numbers(B, C, 10, 14), "encoder_hidden_states": words(6)}


def sana_video() -> tuple[torch.nn.Module, dict[str, Any]]:
    """Linear attention, without weights."""
    sizes = {"in_channels": C, "out_channels": C, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
    sizes |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24}
    model = diffusers.SanaVideoTransformer3DModel(**sizes, caption_channels=D, patch_size=(1, 2, 2))
    return model, {"hidden_states": numbers(B, C, 3, 8, 10), "encoder_hidden_states": words(6)}


def qwen_image_21() -> tuple[torch.nn.Module, dict[str, Any]]:
    """Text and images by turns, each part a call of its own over what came before it."""
    sizes = {"in_channels": 4 * C, "out_channels": 4 * C, "num_layers": 2, "attention_head_dim": 12}
    model = diffusers.QwenImage21Transformer2DModel(
        **sizes, num_attention_heads=2, context_in_dim=D, axes_dims_rope=(4, 4, 4)
    )
    inputs = {"hidden_states": numbers(B, 24, 4 * C), "encoder_hidden_states": words(5)}
    inputs |= {"img_shapes": [[(1, 4, 6)]] * B, "img_mask": torch.tensor([[False] * 5 + [True] * 6] * B)}
    return model, inputs


@pytest.mark.parametrize(
    ("maker", "why"),
    [
        (prx, "blocks.0.attention: as it was: 35 queries look at 41 keys of another sequence"),
        (sana_video, "transformer_blocks.0.attn1: as it was: no call of scaled_dot_product_attention was seen in it"),
        (qwen_image_21, r"names 'h', 'w', but Grid\(n=5\) has the axes 'n'"),
    ],
)
def test_attention_on_no_grid_is_told(maker, why):
    model, inputs = maker()
    inputs |= {"timestep": torch.full((B,), 0.5)}
    assert read_place(model, (), inputs) is None
    with torch.no_grad():
        before = model(**inputs).sample
        with attach(model, ct.window(h=3, w=3)), pytest.raises(ct.ChronotopeError, match=why):
            model(**inputs)
        assert torch.equal(model(**inputs).sample, before)
