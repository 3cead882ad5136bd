"""Laws of moving_digits: range, seed, motion, occlusion, speed, errors."""

import sys
import time

import pytest
import torch

from chronotope.data import digits
from chronotope.data.digits import moving_digits
from chronotope.errors import ChronotopeError


@pytest.mark.parametrize(("clips", "frames", "size", "count"), [(3, 5, 64, 2), (1, 1, 8, 1), (70, 2, 17, 3)])
def test_shape_and_range(clips, frames, size, count):
    out = moving_digits(clips, frames, size, digits=count)
    assert out.shape == (clips, frames, 1, size, size)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert out.min() == 0
    assert 0.3 < out.max() <= 1


def test_every_frame_shows_ink_on_a_dark_ground():
    share = (moving_digits(64, 16, 32) > 0.1).float().mean((2, 3, 4))
    assert share.min() > 0.01
    assert share.max() < 0.7


def test_seed_decides():
    assert torch.equal(moving_digits(4, 3, 16, seed=7), moving_digits(4, 3, 16, seed=7))
    assert not torch.equal(moving_digits(4, 3, 16, seed=7), moving_digits(4, 3, 16, seed=8))


def test_global_generator_is_untouched():
    before = torch.get_rng_state()
    moving_digits(2, 2, 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_chunks_do_not_show(monkeypatch):
    whole = moving_digits(9, 3, 16)
    monkeypatch.setattr(digits, "CHUNK", 4)
    torch.testing.assert_close(moving_digits(9, 3, 16), whole)


def test_clips_differ_and_frames_move():
    out = moving_digits(16, 8, 32)
    assert (out[1:] - out[:-1]).abs().amax((1, 2, 3, 4)).min() > 0.2
    assert (out[:, 1:] - out[:, :-1]).abs().amax((2, 3, 4)).min() > 0.05


def test_digits_bounce_and_stay_inside():
    generator = torch.Generator().manual_seed(0)
    theta = digits._motion(torch.rand(32, digits.DRAWS, generator=generator), 200)
    # A map sends a place p to A p + b; the digit's centre is where that is 0.
    place = torch.linalg.solve(theta[..., :2], -theta[..., 2:])[..., 0]
    radius = theta[..., :2].det().rsqrt()
    assert (place.abs() + radius[..., None]).max() < 1.001
    step = place.diff(dim=1)
    assert (step.abs() < 0.3).all()
    assert (step[:, 1:].sign() != step[:, :-1].sign()).any(1).all()


def test_the_front_digit_hides_the_one_behind():
    draws = torch.full((1, 2, digits.DRAWS), 0.5)
    draws[:, 0, 10], draws[:, 1, 10] = 1.0, 0.0
    bar = torch.zeros(2, 32, 32)
    bar[:, 4:28, 12:20] = 1
    picture = digits._draw(draws, bar, 1, 64)
    assert picture.max() <= 0.5 + 1e-6, "the bright bar lies exactly behind the dim one"


def test_a_training_set_takes_seconds():
    moving_digits(1, 1, 8)
    start = time.perf_counter()
    assert moving_digits(512, 8, 64).shape == (512, 8, 1, 64, 64)
    assert time.perf_counter() - start < 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 8), "moving_digits: clips=0, expected at least 1: give a larger clips"),
        ((1, 0, 8), "moving_digits: frames=0, expected at least 1"),
        ((1, 1, 7), "moving_digits: size=7, expected at least 8"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ChronotopeError, match=message):
        moving_digits(*arguments)


def test_error_without_digits():
    with pytest.raises(ChronotopeError, match="digits=0, expected at least 1"):
        moving_digits(1, 1, 8, digits=0)


def test_error_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ChronotopeError, match=r"scikit-learn, which is not installed: pip install chronotope\[train\]"):
        moving_digits(1, 1, 8)
