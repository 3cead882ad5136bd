"""Where tokens lie in diffusers' transformers: what is read, against the rows that the models themselves move.

The proof does not read: one patch of a latent is disturbed, and the row of q and k that changes in the model's
attention must be the patch's place in row-major order, before or after the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("diffusers")

import diffusers
from zoo_diffusers import MODELS, WARNINGS, Subject
from zoo_diffusers_parts import whole

import chronotope as ct
from chronotope.adapt.places import TABLE, Place, read_place

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]
every_subject = pytest.mark.parametrize("name", MODELS)
TEXTLESS = ("DiTTransformer2DModel", "OmniGenTransformer2DModel")
APART = ("LatteTransformer3DModel",)  # no layer sees the grid as a whole
AHEAD = ("Ideogram4Transformer2DModel",)  # all of its text
ONCE = ("Kandinsky5Transformer3DModel",)
every_whole = pytest.mark.parametrize("name", [name for name in MODELS if name not in APART])
made = cache(lambda name: MODELS[name]())


class Call(NamedTuple):
    """One call of scaled_dot_product_attention, and the submodules that it came from, outermost first."""

    q: Tensor
    k: Tensor
    path: tuple[str, ...]


def calls(subject: Subject, inputs: dict[str, Any] | None = None) -> list[Call]:
    """All calls of scaled_dot_product_attention that the model makes."""
    found: list[Call] = []
    running: list[str] = []
    attention = F.scaled_dot_product_attention

    def watch(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(Call(query.clone(), key.clone(), tuple(running)))
        return attention(query, key, *args, **kwargs)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch, names_on(subject.model, running):
        patch.setattr(F, "scaled_dot_product_attention", watch)
        subject.model(**(inputs or subject.inputs))
    return found


@contextmanager
def names_on(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keeps the names of the submodules that run in a list."""
    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def on_grid(subject: Subject, found: list[Call]) -> list[Call]:
    """The calls in which the tokens of the grid look at each other. (No text of the zoo is as long as a grid.)"""
    return [call for call in found if call.q.shape[2] == call.k.shape[2] >= subject.grid.size]


def changed_rows(call: Call, other: Call) -> tuple[list[int], list[int]]:
    """The rows of q and of k in which two calls differ."""
    pairs = ((call.q, other.q), (call.k, other.k))
    q, k = (((x - y).abs().amax(dim=(0, 1, 3)) > 1e-6).nonzero().flatten().tolist() for x, y in pairs)
    return q, k


def first_row(subject: Subject, call: Call) -> int:
    """The row of the grid's first token, as the zoo has it."""
    if call.q.shape[2] == subject.grid.size:
        return 0
    return subject.ahead if subject.after else subject.text


def spots(grid: ct.Grid) -> list[dict[str, int]]:
    """The first place, the next one on each axis, a middle one, the last one."""
    first = dict.fromkeys(grid.axes, 0)
    middle = {axis: size // 2 for axis, size in grid.sizes.items()}
    last = {axis: size - 1 for axis, size in grid.sizes.items()}
    return [first, *(first | {axis: 1} for axis in grid.axes), middle, last]


def disturbed(subject: Subject, spot: dict[str, int]) -> dict[str, Any]:
    """The inputs with other numbers in all pixels of one patch."""
    latents = subject.latents.clone()
    sizes = [whole // count for whole, count in zip(latents.shape[2:], subject.grid.shape, strict=True)]
    box = [slice(x * size, (x + 1) * size) for x, size in zip(spot.values(), sizes, strict=True)]
    latents[:, :, *box] += torch.linspace(-1, 2, latents[:, :, *box].numel()).view_as(latents[:, :, *box])
    return subject.with_latents(latents)


def text_input(subject: Subject) -> str:
    names = ("encoder_hidden_states", "encoder_hidden_states_t5", "text_bth", "cap_feats")
    return next(name for name in names if name in subject.inputs)


def other_text(subject: Subject, token: int) -> dict[str, Any]:
    """The inputs with other numbers in one token of the text."""
    name = text_input(subject)
    given = subject.inputs[name]
    texts = [text.clone() for text in given]
    for text in texts:
        text[token] += torch.linspace(-1, 2, text.shape[-1])
    return subject.inputs | {name: texts if isinstance(given, list) else torch.stack(texts)}


def output(subject: Subject, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return whole(subject.model(**inputs).sample)


@every_subject
def test_grid_and_text_are_read_from_the_call(name):
    subject = made(name)
    place = read_place(subject.model, (), subject.inputs)
    assert place is not None
    assert place.grid == subject.grid
    if subject.text:
        assert place.text == ("after" if subject.after else "before")
        assert place.ahead == (subject.ahead if subject.after else 0)
    assert tuple(place.parts.values()) == subject.parts
    # Arguments by position mean the same.
    rest = {key: value for key, value in subject.inputs.items() if key != subject.into}
    assert read_place(subject.model, (subject.inputs[subject.into],), rest) == place


def test_every_class_is_proved_by_a_subject():
    assert set(TABLE) == {name.partition(" ")[0] for name in MODELS}
    assert all(type(made(name).model).__name__ == name.partition(" ")[0] for name in MODELS)


@every_whole
def test_attention_over_the_grid_has_its_tokens_and_those_of_the_text(name):
    subject = made(name)
    place = read_place(subject.model, (), subject.inputs)
    found = calls(subject)
    count = subject.grid.size + subject.text
    assert {call.q.shape[2] for call in on_grid(subject, found)} <= {subject.grid.size, count}
    assert sum(call.q.shape[2] == call.k.shape[2] == count for call in found) >= (1 if name in ONCE else 2)
    for call in found:
        if any(fnmatchcase(f"{module}.", f"{name}.*") for module in call.path for name in place.elsewhere):
            assert max(call.q.shape[2], call.k.shape[2]) < subject.grid.size
        else:
            # The rest: the grid's tokens look at each other, or at the text; or sound looks at others.
            assert call.q.shape[2] in (subject.grid.size, count) or call.q.shape[2] != call.k.shape[2]


@every_subject
def test_elsewhere_names_submodules(name):
    subject = made(name)
    place = read_place(subject.model, (), subject.inputs)
    known = {module for module, _ in subject.model.named_modules()}
    # ConsisID has an extractor of faces only where it takes one.
    for part in (*place.elsewhere, *place.parts):
        assert any(fnmatchcase(name, part) for name in known), part


@every_whole
def test_one_patch_is_one_row_in_row_major_order(name):
    subject = made(name)
    before = on_grid(subject, calls(subject))
    joint = next(i for i, call in enumerate(before) if call.q.shape[2] == subject.grid.size + subject.text)
    for spot in spots(subject.grid):
        after = on_grid(subject, calls(subject, disturbed(subject, spot)))
        row = first_row(subject, before[0]) + subject.grid.index(**spot)
        assert changed_rows(before[0], after[0]) == ([row], [row]), spot
        # Where the grid's tokens have met before they meet the text, any of them may have changed, and none else.
        start = first_row(subject, before[joint])
        rows = changed_rows(before[joint], after[joint])[0]
        assert start + subject.grid.index(**spot) in rows
        assert set(rows) <= set(range(start, start + subject.grid.size))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in TEXTLESS + APART])
def test_text_lies_outside_the_grid(name):
    """Where it comes in by cross-attention, it moves no row of the first attention over the grid."""
    subject = made(name)
    before = calls(subject)
    hooks = []
    if subject.pooled:
        # What is pooled from the text moves every token: here it stays as it was.
        module = subject.model.get_submodule(subject.pooled)
        kept: list[Tensor] = []
        with torch.no_grad():
            hook = module.register_forward_hook(lambda _, __, out: kept.append(out))
            subject.model(**subject.inputs)
            hook.remove()
        hooks.append(module.register_forward_hook(lambda *_: kept[0]))
    after = calls(subject, other_text(subject, 0))
    for hook in hooks:
        hook.remove()
    count = subject.grid.size + subject.text
    pairs = zip(before, after, strict=True)
    one, two = next(pair for pair in pairs if pair[0].q.shape[2] == pair[0].k.shape[2] == count)
    start = first_row(subject, one)
    for rows in changed_rows(one, two):
        assert bool(rows) == (subject.text > subject.ahead or name in AHEAD)
        assert not set(rows) & set(range(start, start + subject.grid.size))


@every_subject
def test_tokens_of_the_zoo_move_each_other(name):
    """Gates that start at zero are open: attention matters to the output."""
    subject = made(name)
    out = output(subject, subject.inputs)
    assert out.isfinite().all()
    moved = output(subject, disturbed(subject, dict.fromkeys(subject.grid.axes, 0))) - out
    far = moved[:, -1] if moved.ndim == 3 else moved[..., -1, -1]
    assert far.abs().max() > 1e-3
    if name not in TEXTLESS:
        assert (output(subject, other_text(subject, 0)) - out).abs().max() > 1e-3
    if subject.hidden is not None:
        assert torch.equal(output(subject, other_text(subject, subject.hidden)), out)


def test_cogview4_hides_no_text():
    """The mask that diffusers builds there is added to the scores, 1 or 0, whence the zoo names no hidden token."""
    subject = made("CogView4Transformer2DModel")
    assert subject.inputs["attention_mask"][:, 5].sum() == 0
    moved = output(subject, other_text(subject, 5)) - output(subject, subject.inputs)
    assert moved.abs().max() > 1e-3


@every_subject
def test_sampling(name):
    subject = made(name)
    assert subject.sample is not None
    noise = subject.noise
    out = subject.sample(subject.model, noise)
    assert out.shape == noise.shape
    assert out.isfinite().all()
    assert torch.equal(out, subject.sample(subject.model, noise))
    assert not torch.allclose(out, subject.sample(subject.model, noise.flip(0)))


CUT = (
    "AllegroTransformer3DModel",
    "ChronoEditTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "MochiTransformer3DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "WanTransformer3DModel (boxes)",
)


@pytest.mark.parametrize("name", CUT)
def test_pixels_that_fill_no_patch_are_cut(name):
    subject = made(name)
    more = F.pad(subject.latents, (0, 1, 0, 0))
    if subject.latents.shape[2] > subject.grid.shape[0]:
        more = F.pad(more, (0, 0, 0, 0, 0, 1) if more.ndim == 5 else (0, 0, 0, 1))
    inputs = subject.with_latents(more)
    lengths: list[int] = []
    attention = F.scaled_dot_product_attention

    def watch(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append(query.shape[2])
        return attention(query, key, *args, **kwargs)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watch)
        # Some put the output together at the size of the input, which fails after all layers.
        with suppress(RuntimeError):
            subject.model(**inputs)
    assert subject.grid.size + subject.text in lengths
    place = read_place(subject.model, (), inputs)
    assert place.grid == subject.grid


def ids(*sizes: int) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(float(size)) for size in sizes))


LTX, FLUX, QWEN = "LTXVideoTransformer3DModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel"
REFUSED = [
    (LTX, {"num_frames": None}, "num_frames not given, nor video_coords"),
    (LTX, {"width": 6}, r"shape \[2, 60, 4\]; expected \[B, 72, C\]"),
    (LTX, {"video_coords": ids(3, 4, 5).T.repeat(2, 1, 1) * torch.tensor([1.0, 2.0])[:, None, None]}, "differ between"),
    (LTX, {"video_coords": ids(3, 4, 5)[torch.arange(60).roll(1)].T.expand(2, -1, -1)}, "no grid in row-major"),
    (FLUX, {"img_ids": None}, "img_ids not given"),
    (FLUX, {"img_ids": ids(1, 7, 5)[torch.arange(35).flip(0)]}, "no grid in row-major"),
    (FLUX, {"img_ids": torch.cat([ids(1, 5, 5), ids(1, 2, 5) + 1])}, "no grid in row-major"),
    (FLUX, {"img_ids": ids(1, 4, 7)}, r"shape \[2, 35, 16\]; expected \[B, 28, C\]"),
    ("Flux2Transformer2DModel", {"img_ids": ids(1, 1, 5, 7)}, "expected t, h and w"),
    ("Flux2Transformer2DModel", {"kv_cache_mode": "cached"}, "kv_cache_mode='cached'"),
    (QWEN, {"img_shapes": None}, "img_shapes not given"),
    (QWEN, {"img_shapes": [[(1, 5, 7)], [(1, 7, 5)]]}, "samples of the batch differ"),
    (QWEN, {"img_shapes": [[(1, 5, 5), (1, 2, 5)]] * 2}, "share no grid"),
    (QWEN, {"img_shapes": [(1, 5, 6)] * 2}, r"expected \[B, 30, C\]"),
    (
        "Lumina2Transformer2DModel",
        {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])},
        r"texts have \[3, 4\] tokens",
    ),
    (
        "HiDreamImageTransformer2DModel",
        {"hidden_states_masks": torch.ones(2, 64), "img_sizes": torch.tensor([[5, 7], [7, 5]])},
        "samples of the batch differ",
    ),
    ("WanTransformer3DModel", {"hidden_states": torch.zeros(2, 4, 8, 10)}, r"expected \[B, C, T, H, W\]"),
    ("WanTransformer3DModel", {"hidden_states": torch.zeros(2, 4, 3, 1, 10)}, "Grid axis h=0"),
]


@pytest.mark.parametrize(("name", "given", "why"), REFUSED)
def test_inputs_that_contradict_each_other_are_refused(name, given, why):
    subject = made(name)
    with pytest.raises(ct.ChronotopeError, match=why) as error:
        read_place(subject.model, (), subject.inputs | given)
    assert str(error.value).startswith(f"{name}: ")


def test_images_that_come_as_padded_tokens():
    """HiDream's caller may cut images by itself."""
    subject = made("HiDreamImageTransformer2DModel")
    tokens, masks, sizes, places = subject.model.patchify(subject.latents)
    given = {"hidden_states": tokens, "hidden_states_masks": masks, "img_sizes": sizes, "img_ids": places}
    assert read_place(subject.model, (), subject.inputs | given) == Place(ct.Grid(h=5, w=7), "after")
    assert torch.equal(output(subject, subject.inputs | given), output(subject, subject.inputs))


def test_coordinates_at_any_distance_in_low_precision():
    """Ids as pipelines give them: for the batch, in bfloat16, shifted."""
    subject = made(FLUX)
    shifted = (subject.inputs["img_ids"] * 3 - 7).bfloat16().expand(2, -1, -1)
    assert read_place(subject.model, (), subject.inputs | {"img_ids": shifted}).grid == ct.Grid(h=5, w=7)


def test_a_video_of_one_frame_keeps_its_axes():
    """Patterns that name t stay valid; an image has no t."""
    subject = made(LTX)
    coords = ids(1, 12, 5).T.expand(2, -1, -1)
    assert read_place(subject.model, (), subject.inputs | {"video_coords": coords}).grid == ct.Grid(t=1, h=12, w=5)
    subject = made("WanTransformer3DModel")
    still = subject.with_latents(subject.latents[:, :, :1])
    assert read_place(subject.model, (), still).grid == ct.Grid(t=1, h=4, w=5)


def test_classes_that_are_not_known():
    class WanTransformer3DModel(nn.Linear):
        pass

    class Mine(diffusers.WanTransformer3DModel):
        pass

    assert read_place(nn.Linear(2, 2), (torch.zeros(2),), {}) is None
    assert read_place(WanTransformer3DModel(2, 2), (torch.zeros(2),), {}) is None
    subject = made("WanTransformer3DModel")
    mine = Mine.from_config(subject.model.config)
    assert read_place(mine, (), subject.inputs) == Place(subject.grid)


def test_spots_tell_all_orders_of_axes_apart():
    """No two orders of axes, and no two places, agree on the rows of all spots."""
    grid = ct.Grid(t=3, h=4, w=5)
    for order in itertools.permutations(grid.axes):
        other = ct.Grid(**{axis: grid.sizes[axis] for axis in order})
        same = [grid.index(**spot) == other.index(**spot) for spot in spots(grid)]
        assert all(same) == (order == grid.axes)
