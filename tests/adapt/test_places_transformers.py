"""Grids of transformers' vision models against their real attention: lengths, and which row one patch moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from chronotope import ChronotopeError, Grid
from chronotope.adapt.places_transformers import PLACES, TOWERS, read_grid

transformers = pytest.importorskip("transformers")
from zoo_transformers import MODELS, PADDED, Subject  # noqa: E402

PLACED = [name for name, make in MODELS.items() if make().grid is not None]
TEXT = [name for name, make in MODELS.items() if "attention_mask" in make().inputs]
PATCH, TUBE = 2, 2
NEW = 5


@contextmanager
def keys() -> Iterator[list[tuple[int, Tensor]]]:
    """Number of queries, and keys, of every call of attention: vision models of the zoo call SDPA by themselves."""
    seen: list[tuple[int, Tensor]] = []
    attend = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((query.shape[-2], key))
        return attend(query, key, *args, **kwargs)

    with patch.object(F, "scaled_dot_product_attention", watched), torch.no_grad():
        yield seen


def lengths(subject: Subject, **changes: Any) -> set[tuple[int, int]]:
    with keys() as seen:
        subject.model(**{**subject.inputs, **changes})
    return {(queries, key.shape[-2]) for queries, key in seen}


def floats(output: Any) -> list[Tensor]:
    """The tensors of numbers that a model returned."""
    return [value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point()]


def pixels(subject: Subject) -> str:
    return next(name for name in subject.inputs if name.startswith("pixel_values"))


@pytest.mark.parametrize("name", MODELS)
def test_subjects_run_forward_and_backward(name: str) -> None:
    subject = MODELS[name]()
    assert not subject.model.training
    outputs = floats(subject.model(**subject.inputs))
    assert outputs and all(value.dtype == torch.float32 and value.isfinite().all() for value in outputs)
    sum(value.square().sum() for value in outputs).backward()
    moved = [value.grad is not None and bool(value.grad.any()) for value in subject.model.parameters()]
    # Of V-JEPA 2 the predictor is idle; mask tokens of others are.
    assert sum(moved) > 0.4 * len(moved)


@pytest.mark.parametrize("name", MODELS)
def test_subjects_are_the_same_each_time(name: str) -> None:
    one, other = MODELS[name](), MODELS[name]()
    with torch.no_grad():
        results = [floats(subject.model(**subject.inputs)) for subject in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", [name for name, make in MODELS.items() if make().generates])
def test_subjects_generate(name: str) -> None:
    subject = MODELS[name]()
    told = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    cached, plain = (subject.model.generate(**subject.inputs, **told, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    asked = subject.inputs.get("decoder_input_ids", subject.inputs.get("input_ids"))
    start = cached.shape[1] - NEW
    # Whisper gives back the new tokens alone; encoder-decoders put a start token first.
    assert start in (0, asked.shape[1], asked.shape[1] + 1)


@pytest.mark.parametrize("name", TEXT)
def test_neighbours_matter_and_padding_does_not(name: str) -> None:
    """In a padded row, what a token is changes another one's output if it is seen, and nothing if it is padding."""
    subject = MODELS[name]()
    ids, mask = subject.inputs["input_ids"], subject.inputs["attention_mask"]
    assert mask[0].all() and (~mask[1].bool()).sum() == PADDED
    seen = int(mask[1].nonzero()[-2])
    padding = int((1 - mask[1]).nonzero()[0])

    def last(place: int) -> Tensor:
        changed = ids.clone()
        changed[1, place] = 7 if ids[1, place] != 7 else 8
        with torch.no_grad():
            output = subject.model(**{**subject.inputs, "input_ids": changed})
        # The decoder's last token, or the last one that is no padding.
        output = output.get("text_model_output", output)
        tokens = output.logits if "logits" in output else output.last_hidden_state
        return tokens[1, -1 if tokens.shape[1] != mask.shape[1] else int(mask[1].nonzero()[-1])]

    assert not torch.allclose(last(seen), last(int(mask[1].nonzero()[-3])))
    assert torch.equal(last(padding), last(int((1 - mask[1]).nonzero()[1])))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "videomae_pretraining"])
def test_grid_of_every_subject(name: str) -> None:
    subject = MODELS[name]()
    assert read_grid(subject.model, (), subject.inputs) == subject.grid
    assert subject.grid is None or subject.grid.prefix == subject.prefix


def test_every_class_is_in_the_zoo() -> None:
    """No entry without a model that proves it."""
    kinds = {type(part).__name__ for name in PLACED for part in MODELS[name]().model.modules()}
    assert set(PLACES) <= kinds
    assert set(TOWERS) - kinds == {"SiglipForImageClassification"}


@pytest.mark.parametrize("name", PLACED)
def test_attention_has_as_many_tokens_as_the_grid(name: str) -> None:
    subject = MODELS[name]()
    size = subject.grid.size
    # The pooler of V-JEPA 2 asks with one query.
    assert lengths(subject) == {(size, size)} | ({(1, size)} if name == "vjepa2_classifier" else set())


@pytest.mark.parametrize("name", PLACED)
def test_one_patch_moves_one_row(name: str) -> None:
    """Disturb the pixels of one patch: of the first layer's keys, row prefix + (t H + h) W + w alone is another."""
    subject = MODELS[name]()
    source = subject.inputs[pixels(subject)]
    video = source.ndim == 5
    high, wide = source.shape[-2] // PATCH, source.shape[-1] // PATCH
    with keys() as seen:
        subject.model(**subject.inputs)
        before = seen[0][1]
        row = subject.prefix
        for t in range(source.shape[1] // TUBE if video else 1):
            for h in range(high):
                for w in range(wide):
                    changed = source.clone()
                    frames = changed[:, TUBE * t : TUBE * (t + 1)] if video else changed
                    frames[..., PATCH * h : PATCH * (h + 1), PATCH * w : PATCH * (w + 1)] += 1
                    seen.clear()
                    subject.model(**{**subject.inputs, pixels(subject): changed})
                    moved = (seen[0][1] != before).any(-1).any(0).any(0)
                    assert moved.nonzero().flatten().tolist() == [row], (t, h, w)
                    row += 1
    assert row == before.shape[-2]


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers", "dinov3", "clip_vision", "siglip_vision", "vit"])
@settings(deadline=None, max_examples=15)
@given(height=st.integers(2, 11), width=st.integers(2, 11))
def test_images_of_any_size(name: str, height: int, width: int) -> None:
    """The grid follows the image and not the configuration; a rest that fills no patch makes no token."""
    subject = made(name)
    changes = {"pixel_values": torch.randn(1, 3, height, width)}
    inputs = {**subject.inputs, **changes}
    grid = read_grid(subject.model, (), inputs)
    assert grid == Grid(prefix=subject.prefix, h=height // PATCH, w=width // PATCH)
    assert lengths(subject, **changes) == {(grid.size, grid.size)}


@settings(deadline=None, max_examples=15)
@given(frames=st.integers(1, 7), height=st.integers(2, 9), width=st.integers(2, 9), tube=st.integers(1, 3))
def test_videos_of_any_size(frames: int, height: int, width: int, tube: int) -> None:
    """V-JEPA 2 repeats a clip that is shorter than one tube."""
    with torch.random.fork_rng(devices=[]):
        config = transformers.VJEPA2Config(**{**made("vjepa2").model.config.to_dict(), "tubelet_size": tube})
        model = transformers.VJEPA2Model(config).eval()
        clip = torch.randn(1, frames, 3, height, width)
    with keys() as seen:
        model(clip, skip_predictor=True)
    grid = read_grid(model, (clip,), {"skip_predictor": True})
    assert grid is not None and grid.prefix == 0
    assert grid.axes == ("t", "h", "w") and grid.shape[1:] == (height // PATCH, width // PATCH)
    assert {key.shape[-2] for _, key in seen} == {grid.size}


_MADE: dict[str, Subject] = {}


def made(name: str) -> Subject:
    """A subject for many random cases; a model with square positions where its own are not."""
    if name not in _MADE:
        _MADE[name] = MODELS[name]()
        if name == "vit":
            square = transformers.ViTConfig(**{**_MADE[name].model.config.to_dict(), "image_size": 6})
            inputs = {**_MADE[name].inputs, "interpolate_pos_encoding": True}
            _MADE[name] = Subject(transformers.ViTModel(square).eval(), inputs, False, None, 1, "square positions")
    return _MADE[name]


def test_positions_and_names_bind_alike() -> None:
    subject = MODELS["vit_classifier"]()
    image = subject.inputs["pixel_values"]
    assert read_grid(subject.model, (image,), {}) == read_grid(subject.model, (), {"pixel_values": image})


def test_subclasses_are_read_as_their_class() -> None:
    class Mine(transformers.ViTModel):
        pass

    subject = MODELS["vit"]()
    assert read_grid(Mine(subject.model.config), (), subject.inputs) == subject.grid


def test_a_siglip_head_is_read_through_its_tower() -> None:
    vision = MODELS["siglip_vision"]().model.config.to_dict()
    head = transformers.SiglipForImageClassification(transformers.SiglipConfig(vision_config=vision)).eval()
    image = torch.randn(1, 3, 6, 6)
    with keys() as seen:
        head(image)
    assert read_grid(head, (image,), {}) == Grid(h=3, w=3)
    assert {key.shape[-2] for _, key in seen} == {9}


@pytest.mark.parametrize("name", ["videomae", "videomae_pretraining", "classifier"])
def test_dropped_patches_lie_on_no_grid(name: str) -> None:
    inputs = MODELS["videomae_pretraining"]().inputs
    model = MODELS["videomae" if name == "classifier" else name]().model
    if name == "classifier":
        model = transformers.VideoMAEForVideoClassification(model.config).eval()
    with keys() as seen:
        model(**inputs)
    assert 10 in {key.shape[-2] for _, key in seen}
    with pytest.raises(ChronotopeError, match=r"VideoMAEModel drops the patches of bool_masked_pos.*Grid\(n=…\)"):
        read_grid(model, (), inputs)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (lambda: {}, "NoneType"),
        (lambda: {"pixel_values": torch.zeros(3, 6, 10)}, r"shape \[3, 6, 10\]"),
    ],
)
def test_pixels_that_are_no_pixels(given: Callable[[], dict[str, Tensor]], what: str) -> None:
    with pytest.raises(ChronotopeError, match=rf"ViTModel: pixel_values is {what}; .* of shape \[B C H W\]"):
        read_grid(MODELS["vit"]().model, (), given())
