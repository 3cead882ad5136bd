"""Pedestrians: the reader, who is around whom, the model's laws, the metrics, the floors, and that it learns."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from chronotope.data.trajectories import read_tracks, windows
from chronotope.errors import ChronotopeError
from chronotope.models.trajectory import Trajectory, constant_velocity
from chronotope.tasks.learning import TEST, learn, settle
from chronotope.tasks.trajectories import AHEAD, FILES, OBSERVED, SCENES, Pedestrians, around, errors, fitted_line

REAL = Path(os.environ.get("CHRONOTOPE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "trajectories_ethucy"
FLOORS = {  # people; ADE and FDE of constant velocity, then of the fitted line
    "eth": (181, 0.995, 2.234, 1.021, 2.184),
    "hotel": (1053, 0.323, 0.617, 0.256, 0.468),
    "univ": (24334, 0.524, 1.165, 0.737, 1.429),
    "zara1": (2253, 0.431, 0.960, 0.609, 1.192),
    "zara2": (5833, 0.326, 0.728, 0.458, 0.896),
}
STEPS = OBSERVED + AHEAD
seeds = st.integers(0, 2**30)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def awake(seed: int, **options: int) -> Trajectory:
    """A model whose last matrix is not 0: what it looks at shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Trajectory(dim=16, heads=2, **options).double().eval()
        torch.nn.init.normal_(model.head.weight)
    return model


def folder(at: Path, seed: int = 0, turn: float = 0.1) -> Path:
    """All files of the data: five people for 25 frames, who walk in circles; each file in a place of its own."""
    drawn, time = rng(seed), torch.arange(25) * turn
    for part, end in (("all_data", ""), ("train", "_train"), ("val", "_val")):
        (at / part).mkdir(parents=True)
        for number, name in enumerate(FILES):
            angle = torch.rand(5, generator=drawn)[:, None] * 2 * math.pi + time
            places = (0.4 / turn) * torch.stack([angle.sin(), -angle.cos()], 2) + 1000.0 * number
            rows = [
                f"{10 * t}\t{v}.0\t{x}\t{y}" for v, one in enumerate(places) for t, (x, y) in enumerate(one.tolist())
            ]
            (at / part / f"{name}{end}.txt").write_text("\n".join(rows))
    return at


def test_the_reader(tmp_path: Path) -> None:
    text = "780\t1.0\t8.46\t3.59\n800\t2.0\t13.64\t5.8\n800\t1.0\t10.67\t3.99\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    tracks = read_tracks(tmp_path / "a.txt")
    expected = torch.tensor([[[8.46, 3.59], [torch.nan] * 2], [[10.67, 3.99], [13.64, 5.8]]])
    torch.testing.assert_close(tracks, expected, equal_nan=True)
    torch.testing.assert_close(read_tracks(tmp_path / "a.txt.gz"), tracks, equal_nan=True)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("1 2 3 4\n1 2 3 x\n", "could not convert.*frame person x y"),
        ("1 2 3 4\n1 2 3\n", "frame person x y"),
        ("1 2 3\n1 2 3\n", r"shape \[2, 3\]; expected rows `frame person x y`"),
        ("", r"shape \[0\]; expected rows"),
        ("1 2 3 4\n1 2 5 4\n", "two rows of one frame"),
    ],
)
def test_the_reader_refuses(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ChronotopeError, match=reason):
        read_tracks(tmp_path / "a.txt")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ChronotopeError, match="no such file"):
        read_tracks(tmp_path / "b.txt")
    with pytest.raises(ChronotopeError, match=r"has no biwi_hotel_train\.txt"):
        Pedestrians(data=tmp_path).examples  # noqa: B018


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 9), people=st.integers(1, 5), steps=st.integers(1, 6), least=st.integers(1, 3), seed=seeds)
def test_windows_hold_who_is_seen_throughout(frames: int, people: int, steps: int, least: int, seed: int) -> None:
    tracks = torch.randn(frames, people, 2, generator=rng(seed))
    tracks[torch.rand(frames, people, generator=rng(seed + 1)) < 0.15] = torch.nan
    expected = []
    for start in range(frames - steps + 1):
        seen = [v for v in range(people) if all(not tracks[start + t, v, 0].isnan() for t in range(steps))]
        if len(seen) >= least:
            expected.append(tracks[start : start + steps, seen])
    found = windows(tracks, steps, least)
    assert len(found) == len(expected) and all(a.equal(b) for a, b in zip(found, expected, strict=True))


@settings(max_examples=30, deadline=None)
@given(people=st.integers(2, 6), others=st.integers(0, 7), seed=seeds)
def test_around_somebody_are_the_nearest_of_what_is_observed(people: int, others: int, seed: int) -> None:
    window = torch.randn(STEPS, people, 2, generator=rng(seed))
    out = around(window, others)
    last = window[OBSERVED - 1]
    for v in range(people):
        order = sorted((u for u in range(people) if u != v), key=lambda u: float((last[u] - last[v]).norm()))
        chosen = [v] + [order[i % len(order)] for i in range(others)]
        assert out[v].equal(window[:, chosen])
    future = window.clone()
    future[OBSERVED:] = torch.randn(AHEAD, people, 2, generator=rng(seed + 1))
    assert around(future, others)[:, :OBSERVED].equal(out[:, :OBSERVED])


def test_somebody_in_the_same_place_is_not_taken_for_oneself() -> None:
    window = torch.zeros(STEPS, 3, 2) + torch.arange(3.0)[:, None] * torch.linspace(1, 2, STEPS)[:, None, None]
    window[OBSERVED - 1] = 0
    assert around(window, 2)[:, 0, 0, 0].equal(torch.arange(3.0))


@settings(max_examples=8, deadline=None)
@given(people=st.integers(1, 4), steps=st.integers(2, 9), seed=seeds)
def test_an_untrained_model_keeps_the_velocity(people: int, steps: int, seed: int) -> None:
    x = torch.randn(3, steps, people, 2, generator=rng(seed))
    with torch.inference_mode():
        out = Trajectory(ahead=5, dim=16)(x)
    for k in range(5):
        torch.testing.assert_close(out[:, k], x[:, -1, 0] + (k + 1) * (x[:, -1, 0] - x[:, -2, 0]))


@settings(max_examples=8, deadline=None)
@given(people=st.integers(1, 4), angle=st.floats(0, 6.3), far=st.floats(-1000, 1000), seed=seeds)
def test_turning_and_moving_the_world_turns_and_moves_the_prediction(
    people: int, angle: float, far: float, seed: int
) -> None:
    model, x = awake(seed), torch.randn(3, OBSERVED, people, 2, generator=rng(seed), dtype=torch.float64)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    with torch.inference_mode():
        out = model(x)
        torch.testing.assert_close(model(x @ turn.T + far), out @ turn.T + far, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(out, constant_velocity(x[:, :, 0], AHEAD))


@settings(max_examples=8, deadline=None)
@given(people=st.integers(2, 5), seed=seeds)
def test_those_around_have_no_order_but_count(people: int, seed: int) -> None:
    model, x = awake(seed), torch.randn(2, OBSERVED, people, 2, generator=rng(seed), dtype=torch.float64)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(people - 1, generator=rng(seed))])
    moved = x.clone()
    moved[:, :, 1] += 1
    with torch.inference_mode():
        out = model(x)
        torch.testing.assert_close(model(x[:, :, order]), out)
        assert not torch.allclose(model(moved), out)
        torch.testing.assert_close(model(x[1:]), out[1:])


def test_somebody_who_stays_is_predicted_and_teaches() -> None:
    model = awake(0)
    out = model(torch.zeros(2, OBSERVED, 2, 2, dtype=torch.float64))
    out.norm(dim=2).mean().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)


def test_one_step_tells_no_velocity() -> None:
    with pytest.raises(ChronotopeError, match="2 steps or more"):
        Trajectory()(torch.zeros(1, 1, 2, 2))


def test_a_model_is_what_was_saved(tmp_path: Path) -> None:
    model = awake(3, layers=1).float()
    model.save_pretrained(tmp_path)
    read = Trajectory.from_pretrained(tmp_path)
    assert read.config == model.config
    assert all(read.state_dict()[name].equal(value) for name, value in model.state_dict().items())


def test_the_metrics_are_mean_distances() -> None:
    people = torch.randn(7, STEPS, 2, 2, generator=rng(0))
    guess = torch.randn(7, AHEAD, 2, generator=rng(1))
    off = [
        [math.dist(guess[i, k].tolist(), people[i, OBSERVED + k, 0].tolist()) for k in range(AHEAD)] for i in range(7)
    ]
    found = errors(people, lambda x: guess)
    assert found["ADE"] == pytest.approx(np.mean(off), rel=1e-6)
    assert found["FDE"] == pytest.approx(np.mean([row[-1] for row in off]), rel=1e-6)


def test_the_fitted_line_is_of_least_squares() -> None:
    x = torch.randn(3, OBSERVED, 2, generator=rng(0), dtype=torch.float64)
    out, time = fitted_line(x, AHEAD), np.arange(STEPS)
    for i in range(3):
        for c in range(2):
            line = np.polyval(np.polyfit(time[:OBSERVED], x[i, :, c].numpy(), 1), time[OBSERVED:])
            np.testing.assert_allclose(out[i, :, c].numpy(), line)


def test_what_is_predicted_is_never_shown(tmp_path: Path) -> None:
    task, shown = Pedestrians(data=folder(tmp_path)), []

    def model(x: Tensor) -> Tensor:
        shown.append(x)
        return constant_velocity(x[:, :, 0], AHEAD)

    batch = task.batch(torch.arange(8), rng(0))
    task.loss(model, batch)
    task.measure(model, TEST)
    assert batch.shape == (8, STEPS, 4, 2) and {tuple(x.shape[1:]) for x in shown} == {(OBSERVED, 4, 2)}


def test_a_batch_is_a_function_of_its_generator(tmp_path: Path) -> None:
    task = Pedestrians(data=folder(tmp_path), jitter=0.0, stretch=0.0)
    index = torch.arange(task.examples)
    batch = task.batch(index, rng(5))
    assert batch.equal(task.batch(index, rng(5))) and not batch.equal(task.batch(index, rng(6)))
    mirror = torch.tensor([1.0, -1.0])
    kinds = []
    for window, x in zip(task._train, batch, strict=True):
        kinds.append(next(i for i, y in enumerate((x, x * mirror)) if any(y.equal(one) for one in window)))
    assert set(kinds) == {0, 1}
    noisy = Pedestrians(data=tmp_path, jitter=0.1, stretch=0.0).batch(index, rng(5))
    assert noisy[:, OBSERVED:].equal(batch[:, OBSERVED:])
    off = (noisy - batch)[:, :OBSERVED].flatten(1).std(1)
    assert 0.2 < float((off > 0).float().mean()) < 0.8 and float(off.max()) < 0.15
    ratio = (Pedestrians(data=tmp_path, jitter=0.0, stretch=0.5).batch(index, rng(5)) / batch).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=0)
    assert math.exp(-0.5) < float(ratio.min()) < 1 < float(ratio.max()) < math.exp(0.5)


@pytest.mark.parametrize("scene", SCENES)
def test_a_scene_is_left_out_of_training_and_validation(scene: str, tmp_path: Path) -> None:
    task = settle(Pedestrians, folder(tmp_path), None, [f"scene={scene}"]).task
    assert isinstance(task, Pedestrians)
    left = {FILES.index(name) for name in SCENES[scene]}

    def files(x: Tensor) -> set[int]:
        return set((x[:, 0, 0, 0] / 1000).round().int().tolist())

    assert files(task._test) == left
    assert files(task._valid) == files(torch.cat(task._train)) == set(range(len(FILES))) - left


def test_it_learns_to_walk_in_circles(tmp_path: Path) -> None:
    texts = ["dim=16", "heads=2", "layers=1", "steps=80", "batch=32", "every=40", "rate=0.01", "scene=zara1"]
    settled = settle(Pedestrians, folder(tmp_path / "data"), "alone", texts)
    result = learn(settled, tmp_path / "run", Console(quiet=True))
    floor = result.floors["constant velocity"]
    assert result.test["ADE"] < 0.5 * floor["ADE"] and result.test["FDE"] < 0.5 * floor["FDE"]


@pytest.mark.parametrize("scene", SCENES)
def test_the_floors_of_the_real_scenes(scene: str) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent: set CHRONOTOPE_DATA")
    task = settle(Pedestrians, REAL, "alone", [f"scene={scene}"]).task
    found = task.floors()
    numbers = [found[name][metric] for name in ("constant velocity", "fitted line") for metric in ("ADE", "FDE")]
    people, *expected = FLOORS[scene]
    assert f"{people:,} people" in task.protocol
    assert [round(x, 3) for x in numbers] == expected


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_on_every_scene_it_is_nearer_than_constant_velocity(scene: str, tmp_path: Path) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent: set CHRONOTOPE_DATA")
    result = learn(settle(Pedestrians, REAL, "trajectory", [f"scene={scene}"]), tmp_path, Console(quiet=True))
    floor = result.floors["constant velocity"]
    assert result.test["ADE"] < floor["ADE"] and result.test["FDE"] < floor["FDE"]
