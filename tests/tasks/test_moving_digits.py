"""Moving digits: the generator's laws, digits apart, metrics by brute force, models of equal size, floors, training."""

import gzip
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.data.moving_digits import PACE, bouncing, parts_of, places, read_digits, smaller
from chronotope.tasks.learning import VALID, settle
from chronotope.tasks.learning.order import generator
from chronotope.tasks.moving_digits import PLANS, MovingDigits, errors, similarity
from chronotope.tasks.registry import task

DATA = Path(os.environ.get("CHRONOTOPE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "digits_mnist_10k"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def write(path, digits, packed=True):
    """An idx file."""
    head = b"".join(n.to_bytes(4, "big") for n in (2051, *digits.shape))
    data = head + digits.numpy().tobytes()
    path.write_bytes(gzip.compress(data) if packed else data)


def drawn(count=12, side=4, seed=0):
    """Images whose corners have ink, each of one brightness of its own."""
    shade = torch.arange(1, count + 1, dtype=torch.uint8) * 20
    ink = torch.randint(2, (count, side, side), generator=rng(seed), dtype=torch.uint8)
    ink[:, 0, 0] = ink[:, -1, -1] = 1
    return ink * shade[:, None, None]


@pytest.fixture
def small(tmp_path):
    write(tmp_path / "some-images.gz", drawn())
    return MovingDigits(
        data=tmp_path, canvas=8, shrink=1, seen=3, ahead=2, train=6, valid=3, test=3, checked=7, clips=9
    )


def test_images_are_read_packed_or_not_from_a_file_or_a_folder(tmp_path):
    digits = drawn()
    write(tmp_path / "a-images.gz", digits)
    write(tmp_path / "b", digits, packed=False)
    for path in (tmp_path, tmp_path / "a-images.gz", tmp_path / "b"):
        assert torch.equal(read_digits(path), digits)
    write(tmp_path / "c-images", digits)
    (tmp_path / "b").write_bytes(b"1234567890123456789")
    with pytest.raises(ct.ChronotopeError, match="2 files of images"):
        read_digits(tmp_path)
    with pytest.raises(ct.ChronotopeError, match="0 files of images"):
        read_digits(tmp_path / "absent")
    with pytest.raises(ct.ChronotopeError, match="not an idx file"):
        read_digits(tmp_path / "b")


def test_smaller_digits_are_means_of_squares():
    digits = drawn(3, 6)
    found = smaller(digits, 3)
    for n in range(3):
        for i in range(2):
            for j in range(2):
                mean = digits[n, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].double().mean() / 255
                assert float(found[n, i, j]) == pytest.approx(float(mean), abs=1e-6)
    with pytest.raises(ct.ChronotopeError, match="not multiples of 4"):
        smaller(digits, 4)


@settings(max_examples=40, deadline=None)
@given(frames=st.integers(1, 60), seed=st.integers(0, 999))
def test_digits_go_straight_at_one_pace_and_turn_at_borders(frames, seed):
    start = torch.rand(3, 2, 2, generator=rng(seed), dtype=torch.float64)
    angle = 2 * math.pi * torch.rand(3, 2, generator=rng(seed + 1), dtype=torch.float64)
    place = places(start, angle, frames)
    assert (place >= 0).all() and (place <= 1).all()
    moved = torch.cat((start[:, None], place), 1).diff(dim=1).abs()
    pace = PACE * torch.stack((angle.sin(), angle.cos()), -1).abs()[:, None]
    at_border = (place == 0) | (place == 1)
    assert (moved <= pace + 1e-12).all()
    assert ((moved - pace).abs() <= 1e-12).logical_or(at_border).all()
    # The direction of an axis changes after a border and nowhere else.
    way = torch.cat((start[:, None], place), 1).diff(dim=1)
    turns = (way[:, 1:] * way[:, :-1]) < -1e-18
    assert (turns <= at_border[:, :-1]).all()


@settings(max_examples=25, deadline=None)
@given(canvas=st.integers(4, 11), each=st.integers(1, 3), frames=st.integers(1, 6), seed=st.integers(0, 999))
def test_frames_by_brute_force(canvas, each, frames, seed):
    digits = smaller(drawn(seed=seed), 1)
    clips = bouncing(digits, 2, frames, canvas, rng(seed), each)
    again = rng(seed)
    which = torch.randint(len(digits), (2, each), generator=again)
    start = torch.rand(2, each, 2, generator=again, dtype=torch.float64)
    angle = 2 * math.pi * torch.rand(2, each, generator=again, dtype=torch.float64)
    place = places(start, angle, frames)
    expected = torch.zeros(2, frames, 1, canvas, canvas)
    for b in range(2):
        for t in range(frames):
            for d in range(each):
                y, x = (int(p * (canvas - 4)) for p in place[b, t, d])
                part = expected[b, t, 0, y : y + 4, x : x + 4]
                part.copy_(torch.maximum(part, digits[which[b, d]]))
    assert torch.equal(clips, expected)
    assert torch.equal(bouncing(digits, 2, frames, canvas, rng(seed), each), clips)


def test_clips_are_of_the_digits_of_their_part(small):
    shades = {part: set() for part in ("train", "valid", "test")}
    for part in shades:
        for clips in small.made(part, 60, rng()):
            shades[part] |= set((clips * 255).round().int().unique().tolist()) - {0}
    assert shades == {"train": {20, 40, 60, 80, 100, 120}, "valid": {140, 160, 180}, "test": {200, 220, 240}}
    assert [x.tolist() for x in parts_of(torch.arange(7), (3, 2))] == [[0, 1, 2], [3, 4]]
    with pytest.raises(ct.ChronotopeError, match="7 digits for parts of 6, 2"):
        parts_of(torch.arange(7), (6, 2))


def test_batches_are_functions_of_their_generator_and_parts_stay(small):
    one, other = small.batch(torch.arange(5), generator(0, 3)), small.batch(torch.arange(5), generator(0, 3))
    assert one[0].shape == (5, 3, 1, 8, 8) and one[1].shape == (5, 2, 1, 8, 8)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert not torch.equal(one[0], small.batch(torch.arange(5), generator(0, 4))[0])
    whole = torch.cat(small.made(VALID, 4, rng(5)), 1)
    assert torch.equal(whole, bouncing(small.parts[VALID], 4, 5, 8, rng(5)))


def test_errors_by_brute_force():
    told, came = (torch.rand(5, 3, 1, 9, 8, generator=rng(i)) for i in (1, 2))
    found = errors(iter([(told[:2], came[:2]), (told[2:], came[2:])]))
    frames = [sum((told[b, t] - came[b, t]).double().square().flatten().tolist()) for b in range(5) for t in range(3)]
    assert found["MSE"] == pytest.approx(sum(frames) / 15)
    assert found["MSE per pixel"] == pytest.approx(sum(frames) / 15 / 72)
    assert found["MSE, last frame"] == pytest.approx(sum(frames[2::3]) / 5)
    alike = []
    for b in range(5):
        for t in range(3):
            x, y, parts = told[b, t, 0].double(), came[b, t, 0].double(), []
            for i in range(3):
                for j in range(2):
                    both = torch.stack((x[i : i + 7, j : j + 7].flatten(), y[i : i + 7, j : j + 7].flatten()))
                    (vx, vxy), (_, vy) = torch.cov(both).tolist()
                    mx, my = both.mean(1).tolist()
                    top = (2 * mx * my + 1e-4) * (2 * vxy + 9e-4)
                    parts.append(top / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
            alike.append(sum(parts) / 6)
    assert found["SSIM"] == pytest.approx(sum(alike) / 15)
    assert similarity(told[0], told[0]).tolist() == pytest.approx([1.0] * 3)


def test_measuring_and_floors_are_the_same_code(small):
    class Last(torch.nn.Module):
        def forward(self, seen):
            return seen[:, -1:].expand(-1, 2, -1, -1, -1)

    floors = small.floors()
    assert small.measure(Last(), "test") == floors["last frame"]
    assert small.measure(Last(), "valid") != floors["last frame"]
    seen, came = small.made("test", 9, rng(12))  # fewer than are asked at once
    energy = float(came.double().square().sum()) / 18
    assert floors["black"]["MSE"] == pytest.approx(energy)
    off = came.double() - seen.double().mean(1, keepdim=True)
    assert floors["mean of the frames seen"]["MSE"] == pytest.approx(float(off.square().sum()) / 18, rel=1e-5)
    assert floors["mean frame"]["MSE"] < energy


def test_models_are_of_one_size(tmp_path):
    assert task("moving-digits") is MovingDigits
    sizes = {}
    for name in MovingDigits.models:
        sizes[name] = sum(p.numel() for p in settle(MovingDigits, tmp_path, name).make().parameters())
    assert len({sizes[name] for name in PLANS if name != "divided"}) == 1
    assert max(sizes.values()) <= 1.03 * min(sizes.values()), sizes


@pytest.mark.parametrize("name", ["interleaved", "convlstm", "convspace", "causal"])
def test_a_short_training_learns(small, name):
    least = ["canvas=8", "shrink=1", "seen=2", "ahead=2", "train=6", "valid=3", "test=3", "checked=40", "dim=16"]
    depth = ["blocks=4"] if name in PLANS else ["layers=1"]
    settled = settle(MovingDigits, small.data, name, [*least, *depth])
    torch.manual_seed(0)
    model, own = settled.make(), settled.task
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    with torch.no_grad():
        before = own.measure(model, VALID)["MSE"]
    for step in range(25):
        opt.zero_grad()
        own.loss(model, own.batch(torch.arange(16), generator(0, step))).backward()
        opt.step()
    with torch.no_grad():
        assert own.measure(model, VALID)["MSE"] < 0.8 * before


def test_published_numbers_stand_beside_their_own_setting_only(tmp_path):
    assert MovingDigits(data=tmp_path).published == ()
    full = MovingDigits(data=tmp_path, canvas=64, shrink=1)
    assert full.published[0].numbers == {"MSE": 103.3} and "64 x 64" in full.protocol


def test_the_real_digits():
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is absent: set CHRONOTOPE_DATA")
    one = MovingDigits(data=DATA, clips=40)
    assert {part: len(x) for part, x in one.parts.items()} == {"train": 8000, "valid": 1000, "test": 1000}
    assert one.parts["train"].shape[1:] == (7, 7)
    floors = {name: numbers["MSE"] for name, numbers in one.floors().items()}
    assert floors["mean frame"] < floors["black"] < floors["last frame"]
