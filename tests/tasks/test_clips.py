"""Clips and the order of batches."""

from itertools import islice

import pytest
import torch

import chronotope as ct
from chronotope.tasks.clips import TRAIN, VALID, Batches, load

GRID = ct.Grid(t=2, h=4, w=6)


def test_digits_on_a_grid_that_is_not_square():
    clips = load(None, GRID, patch=2, channels=3, seed=1)
    assert clips.train.shape == (TRAIN, 3, 3, 8, 12) and clips.valid.shape == (VALID, 3, 3, 8, 12)
    assert torch.equal(clips.train[:, :, 0], clips.train[:, :, 2])
    again, other = (load(None, GRID, patch=2, channels=3, seed=seed) for seed in (1, 2))
    assert clips.digest() == again.digest() != other.digest()
    assert not torch.equal(clips.train[:VALID], clips.valid)


def test_floor_is_the_error_of_the_last_frame_again():
    clips = load(None, GRID, patch=2, channels=1, seed=0)
    shift = clips.valid[:, 1:] - clips.valid[:, :-1]
    assert clips.floor() == pytest.approx(float((shift * shift).mean()))


def test_batches_go_on_anywhere():
    clips = torch.arange(40.0).view(40, 1, 1, 1, 1)
    whole = list(islice(iter(Batches(clips, 3, seed=5)), 6))
    later = list(islice(iter(Batches(clips, 3, seed=5, start=4)), 2))
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], later, strict=True))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], next(iter(Batches(clips, 3, seed=6))))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"patch": 0, "channels": 1}, "patch=0: expected the pixels of a patch, 1 or more"),
        ({"patch": 2, "channels": 2}, r"channels=2: expected 1 \(gray\) or 3"),
        ({"patch": 1, "channels": 1}, "moving_digits: size=6, expected at least 8"),
    ],
)
def test_bad_sizes(options, text):
    with pytest.raises(ct.ChronotopeError, match=text):
        load(None, GRID, seed=0, **options)
