"""Motion capture: the reader, rotations, the model's laws, the metric, the floor, and that it learns."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from chronotope.data.mocap import euler, read_motions, rotation
from chronotope.errors import ChronotopeError
from chronotope.models.motion import Motion
from chronotope.tasks.learning import TEST, VALID, learn, settle
from chronotope.tasks.mocap import AHEAD, TIMES, Mocap, errors

REAL = Path(os.environ.get("CHRONOTOPE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "mocap_cmu"
FILE = "cmu_mocap_expmap.npz"
seeds = st.integers(0, 2**30)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def awake(joints: int) -> Motion:
    """A model whose last matrix is not 0: what it looks at shows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Motion(joints, dim=16, heads=2).double().eval()
        torch.nn.init.normal_(model.head.weight)
    return model


def films(at: Path) -> Path:
    """Two actions of 6 joints that swing, the body and joint 4 apart, which stay; one action without a test."""
    drawn, arrays = np.random.default_rng(0), {}
    for part, action, count in (("train", "wave", 3), ("test", "wave", 1), ("train", "nod", 2), ("test", "nod", 1),
                                ("train", "sit", 2), ("test", "stand", 1)):  # fmt: skip
        for number in range(count):
            phase = drawn.random(18) * 2 * math.pi
            film = 0.5 * np.sin(0.15 * np.arange(80)[:, None] + phase)
            film[:, 12:15] = 0.3
            arrays[f"{part}/{action}/{action}_{number}"] = film.astype(np.float32)
    np.savez(at / "motions.npz", **arrays)
    return at / "motions.npz"


def test_the_reader(tmp_path: Path) -> None:
    found = read_motions(films(tmp_path))
    assert {key: len(value) for key, value in found.items()} == {
        ("train", "wave"): 3, ("test", "wave"): 1, ("train", "nod"): 2, ("test", "nod"): 1, ("train", "sit"): 2,
        ("test", "stand"): 1,
    }  # fmt: skip
    with np.load(tmp_path / "motions.npz") as file:
        np.testing.assert_array_equal(found["train", "wave"][1].flatten(1).numpy(), file["train/wave/wave_1"])


def test_the_reader_refuses(tmp_path: Path) -> None:
    with pytest.raises(ChronotopeError, match="no such file"):
        read_motions(tmp_path / "a.npz")
    for name, shape in (("train/wave", (4, 6)), ("train/wave/one", (4, 7)), ("train/wave/one", (4, 2, 3))):
        np.savez(tmp_path / "a.npz", **{name: np.zeros(shape)})
        with pytest.raises(ChronotopeError, match=r"expected part/action/file, frames x \(3 \* joints\)"):
            read_motions(tmp_path / "a.npz")


@settings(max_examples=30, deadline=None)
@given(seed=seeds, size=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 3.0]))
def test_a_rotation_is_the_exponential_of_its_cross_product(seed: int, size: float) -> None:
    v = torch.nn.functional.normalize(torch.randn(3, generator=rng(seed), dtype=torch.float64), dim=0) * size
    cross = torch.linalg.cross(v.expand(3, 3), torch.eye(3, dtype=torch.float64)).T
    torch.testing.assert_close(rotation(v), torch.linalg.matrix_exp(cross), rtol=1e-9, atol=1e-9)
    a, b, c = euler(v)
    x, y, z = (rotation(axis * angle) for axis, angle in zip(torch.eye(3, dtype=torch.float64), (a, b, c), strict=True))
    torch.testing.assert_close(z @ y @ x, rotation(v).T, rtol=1e-9, atol=1e-9)


@settings(max_examples=8, deadline=None)
@given(joints=st.integers(1, 4), frames=st.integers(1, 6), seed=seeds)
def test_an_untrained_model_keeps_the_pose(joints: int, frames: int, seed: int) -> None:
    x = torch.randn(2, frames, joints, 3, generator=rng(seed))
    with torch.inference_mode():
        assert Motion(joints, dim=16, ahead=4)(x).equal(x[:, -1:].expand(-1, 4, -1, -1))


def test_every_joint_and_frame_counts() -> None:
    model, x = awake(4), torch.randn(2, 6, 4, 3, generator=rng(0), dtype=torch.float64)
    with torch.inference_mode():
        out = model(x)
        torch.testing.assert_close(model(x[1:]), out[1:])
        for frame in range(6):
            for joint in range(4):
                moved = x.clone()
                moved[0, frame, joint] += 1
                off = (model(moved) - out).abs().amax((1, 3))
                assert (off[0] > 0).all() and (off[1] < 1e-12).all()


def test_a_model_is_what_was_saved(tmp_path: Path) -> None:
    model = awake(3).float()
    model.save_pretrained(tmp_path)
    read = Motion.from_pretrained(tmp_path)
    assert read.config == model.config
    assert all(read.state_dict()[name].equal(value) for name, value in model.state_dict().items())


def test_what_is_trained_on_validated_and_tested(tmp_path: Path) -> None:
    task = Mocap(data=films(tmp_path))
    assert task.actions == ["nod", "wave"] and task.joints == [2, 3, 5]
    given, size = read_motions(task.data), task.observed + AHEAD
    kept = {("wave", 0), ("wave", 1), ("nod", 0), ("sit", 0)}
    expected = [given["train", action][number][::2, [2, 3, 5]] for action, number in sorted(kept)]
    assert sorted(float(film.sum()) for film in task._train) == sorted(float(film.sum()) for film in expected)
    for part, film in ((VALID, given["train", "wave"][-1]), (TEST, given["test", "wave"][0])):
        found = task.windows(part)["wave"]
        assert len(found) == 40 - size + 1
        assert all(found[i].equal(film[::2, [2, 3, 5]][i : i + size]) for i in range(len(found)))
    batch = task.batch(torch.arange(4), rng(0))
    assert batch.equal(task.batch(torch.arange(4), rng(0))) and not batch.equal(task.batch(torch.arange(4), rng(1)))
    for film, x in zip(task._train, batch, strict=True):
        assert any(x.equal(film[i : i + size]) for i in range(len(film) - size + 1))


def test_the_metric_is_the_mean_norm_of_what_euler_angles_are_off() -> None:
    windows = {name: torch.randn(5, 7 + AHEAD, 2, 3, generator=rng(i)) for i, name in enumerate("ab")}
    found = errors(windows, 7, lambda x: x[:, -1:].expand(-1, AHEAD, -1, -1))
    for name, x in windows.items():
        for at, frame in TIMES.items():
            off = [(euler(one[6]) - euler(one[6 + frame])).flatten().norm().item() for one in x]
            assert found[f"{name} {at}"] == pytest.approx(np.mean(off), rel=1e-5)
    assert found["mean"] == pytest.approx(np.mean([found[f"{name} {at}"] for name in "ab" for at in TIMES]))


def test_it_learns_to_swing(tmp_path: Path) -> None:
    texts = ["dim=16", "heads=2", "layers=1", "steps=80", "batch=16", "every=40", "rate=0.01"]
    result = learn(settle(Mocap, films(tmp_path), None, texts), tmp_path / "run", Console(quiet=True))
    assert result.test["mean"] < 0.6 * result.floors["zero velocity"]["mean"]


def test_the_real_films() -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent: set CHRONOTOPE_DATA")
    task = Mocap(data=REAL / FILE)
    assert task.actions == ["basketball", "jumping", "running", "soccer", "walking"]
    assert len(task.joints) == 26 and task.examples == 25
    still = task.floors()["zero velocity"]
    # Errors of a pose that is kept grow with time, and a walk is less sudden than a run.
    for action in task.actions:
        numbers = [still[f"{action} {at}"] for at in TIMES]
        assert numbers == sorted(numbers)
    assert still["walking 400 ms"] < still["running 400 ms"]
    assert round(still["mean"], 3) == 0.872


@pytest.mark.slow
def test_of_every_action_and_at_every_time_it_is_nearer_than_the_last_pose(tmp_path: Path) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent: set CHRONOTOPE_DATA")
    result = learn(settle(Mocap, REAL / FILE, None), tmp_path, Console(quiet=True))
    assert all(result.test[key] < still for key, still in result.floors["zero velocity"].items())
