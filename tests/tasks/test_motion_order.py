"""Motion: frames alone, and frames as a set, tell nothing; their order tells all."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from chronotope.errors import ChronotopeError
from chronotope.models import ClipClassifier
from chronotope.tasks.learning import learn, settle
from chronotope.tasks.motion_order import Motion
from chronotope.tasks.registry import task

HERE = Path(__file__)
ORDERED = ("time", "token")
SIZES = {"size": st.sampled_from((3, 5, 7)), "classes": st.integers(2, 4), "dots": st.integers(1, 5)}


def motion(**fields: int) -> Motion:
    return Motion(data=HERE, **fields)


@given(**SIZES, seed=st.integers(0, 99))
def test_dots_shift_by_the_step_of_their_label(size, classes, dots, seed):
    own = motion(size=size, classes=min(classes, size - 1), dots=dots)
    clips, labels = own.made(6, torch.Generator().manual_seed(seed))
    assert clips.shape == (6, size, 1, size, size)
    assert torch.equal(clips.sum((2, 3, 4)), torch.full((6, size), float(dots)))
    for clip, label in zip(clips, labels.tolist(), strict=True):
        step = (1, -1, 2, -2)[label]
        for t in range(size):
            assert torch.equal(clip[t], clip[0].roll(t * step, -1))


@given(**SIZES, seed=st.integers(0, 99))
def test_clips_of_all_labels_have_the_same_frames(size, classes, dots, seed):
    """For each clip there is, under each other label, one with the same frames in another order."""
    own = motion(size=size, classes=min(classes, size - 1), dots=dots)
    clips, _ = own.made(2, torch.Generator().manual_seed(seed))
    for clip in clips:
        shifts = {frame.numpy().tobytes() for frame in clip}
        for step in own.steps.tolist():
            other = [clip[0].roll(t * step, -1) for t in range(size)]
            assert {frame.numpy().tobytes() for frame in other} == shifts


def test_every_frame_is_uniform_whatever_the_label():
    own = motion(size=5, classes=4, dots=2)
    clips, labels = own.made(20_000, torch.Generator().manual_seed(0))
    for label in range(4):
        mine = clips[labels == label]
        share, error = 2 / 25, (0.08 * 0.92 / len(mine)) ** 0.5
        assert float((mine.mean(0) - share).abs().max()) < 5 * error


@pytest.mark.parametrize("patch", [1, 5])
@pytest.mark.parametrize("model", list(Motion.models))
def test_who_knows_the_order_of_frames(model, patch):
    torch.manual_seed(0)
    own = settle(Motion, HERE, model, ["size=5", "dim=24", "heads=2", f"patch={patch}"])
    net = own.make().double()
    clips, _ = own.task.made(3, torch.Generator().manual_seed(0))
    clips = clips.double()
    shuffled = net(clips[:, [3, 1, 4, 0, 2]])
    assert torch.allclose(net(clips), shuffled, atol=1e-12) == (model not in ORDERED)
    if model == "frames":
        apart = torch.stack([net(clips[:, [t]]) for t in range(5)]).mean(0)
        torch.testing.assert_close(net(clips), apart, rtol=1e-9, atol=1e-9)


def test_batches_are_a_function_of_the_generator():
    own = motion()
    first, again = (own.batch(torch.arange(5), torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], own.batch(torch.arange(5), torch.Generator().manual_seed(4))[0])


@pytest.mark.parametrize("fields", [{"size": 6}, {"classes": 7}, {"classes": 1}, {"dots": 0}, {"dots": 50}])
def test_sizes_that_do_not_fit_are_told(fields):
    with pytest.raises(ChronotopeError, match="expected a prime n"):
        motion(**fields)


def test_a_model_that_does_not_fit_is_told():
    for options in ({"order": "t x"}, {"order": " "}, {"layers": 0}):
        with pytest.raises(ChronotopeError, match="groups of the axes"):
            ClipClassifier(4, **options)


def test_a_model_is_kept(tmp_path):
    own = settle(task("motion"), HERE, None, ["dim=24", "heads=2"])
    model = own.make()
    model.save_pretrained(tmp_path)
    clips, _ = own.task.made(2, torch.Generator().manual_seed(0))
    assert torch.equal(ClipClassifier.from_pretrained(tmp_path)(clips), model(clips))


def taught(model: str, out: Path, *texts: str):
    own = settle(Motion, HERE, model, texts)
    return learn(own, out, Console(file=io.StringIO()))


def all_clips(own: Motion) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one dot, wherever it starts, with each label."""
    n = own.size
    first = torch.eye(n * n).view(n * n, n, n)
    clips = [torch.stack([first.roll(t * step, -1) for t in range(n)], 1) for step in own.steps.tolist()]
    return torch.cat(clips)[:, :, None], torch.arange(own.classes).repeat_interleave(n * n)


@pytest.mark.parametrize("model", ["frames", "unordered"])
def test_without_order_no_training_beats_a_guess(model):
    """On clips that differ in nothing but the order of their frames, the loss stays at log 4 or above."""
    torch.manual_seed(0)
    own = settle(Motion, HERE, model, ["size=5", "dots=1", "dim=32", "heads=2"])
    net, losses = own.make(), []
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(15):
        losses.append(own.task.loss(net, all_clips(own.task)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert float((losses[0] - losses[-1]).detach()) > 0
    assert min(float(x.detach()) for x in losses) > math.log(4) - 1e-5


@pytest.mark.parametrize("model", list(Motion.models))
def test_a_linear_map_of_what_an_untrained_model_sees(model):
    """Solves all labels where the order is seen; where it is not, the best map is a guess."""
    torch.manual_seed(0)
    own = settle(Motion, HERE, model, ["size=5", "dots=1", "dim=120"])
    net, (clips, labels) = own.make().double(), all_clips(own.task)
    with torch.no_grad():
        seen = net.features(clips.double())
    seen = torch.cat((seen, torch.ones(len(seen), 1)), 1)
    wanted = torch.nn.functional.one_hot(labels).double()
    error = (seen @ torch.linalg.pinv(seen, rtol=1e-10) @ wanted - wanted).square().sum(1).mean()
    assert error < 1e-2 if model in ORDERED else error == pytest.approx(0.75, abs=1e-4)


@pytest.mark.slow
def test_order_is_solved_by_time_and_by_nothing_else(tmp_path):
    found = {model: taught(model, tmp_path / model).test for model in Motion.models}
    for model in ORDERED:
        assert found[model]["accuracy"] > 0.98
    for model in ("frames", "unordered"):
        assert abs(found[model]["accuracy"] - 0.25) < 4 * found[model]["standard error"]
