"""Clips made from noise: distances by brute force and by laws, seeds, floors by the same measures, training."""

import io
import os
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from chronotope.errors import ChronotopeError
from chronotope.models import VideoDiT
from chronotope.models.diffusion import flow_loss
from chronotope.tasks.learning import TEST, VALID, learn, settle
from chronotope.tasks.learning.order import generator
from chronotope.tasks.registry import task
from chronotope.tasks.video_diffusion import VideoDiffusion, energy_distance, feature_distance, features, normal_flow

DATA = Path(os.environ.get("CHRONOTOPE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "digits_mnist_10k"
SMALL = {"canvas": 8, "shrink": 1, "frames": 3, "train": 6, "valid": 3, "test": 3, "checked": 40, "clips": 60}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def folder(tmp_path):
    """Twelve digits of 4 x 4, each of one brightness of its own."""
    shade = 130 + 10 * torch.arange(12, dtype=torch.uint8)
    ink = torch.randint(2, (12, 4, 4), generator=rng(), dtype=torch.uint8)
    ink[:, 0, 0] = ink[:, -1, -1] = 1
    head = b"".join(n.to_bytes(4, "big") for n in (2051, 12, 4, 4))
    (tmp_path / "some-images").write_bytes(head + (ink * shade[:, None, None]).numpy().tobytes())
    return tmp_path


@pytest.fixture
def small(folder):
    return VideoDiffusion(data=folder, samples=20, euler=4, **SMALL)


def test_the_distance_by_brute_force():
    x, y = torch.randn(4, 3, generator=rng(1)), torch.randn(5, 3, generator=rng(2))

    def far(a, b):
        return float((a - b).double().square().sum().sqrt())

    across = sum(far(a, b) for a in x for b in y) / 20
    own = [sum(far(*pair) for pair in permutations(z, 2)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    assert energy_distance(x, y) == pytest.approx(2 * across - sum(own))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 6), st.floats(0.1, 9), st.integers(0, 99))
def test_laws_of_the_distance(n, m, size, scale, seed):
    x = torch.randn(n, size, generator=rng(seed), dtype=torch.float64)
    y = 1 + torch.randn(m, size, generator=rng(seed + 1), dtype=torch.float64)
    found = energy_distance(x, y)
    turn = torch.linalg.qr(torch.randn(size, size, generator=rng(seed), dtype=torch.float64))[0]
    assert energy_distance(y, x) == pytest.approx(found, abs=1e-9)
    assert energy_distance(x[torch.randperm(n)], y) == pytest.approx(found, abs=1e-9)
    assert energy_distance(scale * x + 3, scale * y + 3) == pytest.approx(scale * found, abs=1e-8)
    assert energy_distance(x @ turn, y @ turn) == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("over", [1, 3])
def test_features_by_brute_force(over):
    clips = torch.randn(30, 4, 1, 6, 7, generator=rng())
    found = features(clips, over)
    w = torch.randn(64, over * 25, generator=rng())
    w = w - w.mean(1, keepdim=True)
    w = w / w.square().sum(1, keepdim=True).sqrt()
    for b in (0, 29):  # of the first clips at once, and of the last
        for f in (0, 63):
            answers = [
                max(0.0, float((clips[b, t : t + over, 0, i : i + 5, j : j + 5].flatten() * w[f]).sum()))
                for t in range(5 - over)
                for i in range(2)
                for j in range(3)
            ]
            assert float(found[b, f]) == pytest.approx(sum(answers) / len(answers), abs=1e-5)
            square = sum(a * a for a in answers) / len(answers)
            assert float(found[b, 64 + f]) == pytest.approx(square**0.5, abs=1e-5)
    assert (features(clips + 3, over) - found).abs().max() < 1e-4


def test_what_the_two_distances_tell(small):
    clips, other = small.whole("train", 120, rng(1)), small.whole("train", 120, rng(2))
    same = feature_distance(other, clips, 3)
    shuffled = other[:, torch.tensor([0, 2, 1])]
    assert feature_distance(shuffled, clips, 1) == pytest.approx(feature_distance(other, clips, 1), abs=1e-5)
    assert feature_distance(shuffled, clips, 3) > same + 0.02
    assert feature_distance(0.5 * other, clips, 1) > same + 0.5  # half of the ink


def test_the_distance_is_nothing_on_average_for_one_distribution_and_grows_with_what_differs():
    def mean(change):
        draws = [torch.randn(2, 30, 4, generator=rng(seed)) for seed in range(60)]
        found = torch.tensor([energy_distance(x, change(y)) for x, y in draws])
        return float(found.mean()), float(found.std()) / 60**0.5

    same, error = mean(lambda y: y)
    assert abs(same) < 3 * error
    for change in (lambda y: 1.5 * y, lambda y: y + 0.5, lambda y: y[:, :1].expand(-1, 4)):
        assert mean(change)[0] > 10 * error


def test_the_flow_of_values_that_are_normal_is_the_best_for_them():
    mean, deviation = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.2, 1.0, 0.0])
    data = mean + deviation * torch.randn(20_000, 3, generator=rng())
    best = normal_flow(mean, deviation.square())

    def loss(model):
        return float(flow_loss(model, data, generator=rng(1)))

    for change in (lambda y: 1.1 * y, lambda y: 0.9 * y, lambda y: y + 0.1):
        assert loss(lambda x, t, change=change: change(best(x, t))) > loss(best) + 0.001
    own = VideoDiffusion(data=Path(), euler=100)
    made = own.sampled(best, torch.randn(2000, 3, generator=rng(2)))
    assert (made.mean(0) - mean).abs().max() < 0.1
    assert (made.std(0) - deviation).abs().max() < 0.05


def test_clips_and_noise_of_a_part_are_the_same_each_time_and_parts_apart(small):
    for part, count in ((VALID, 40), (TEST, 60)):
        assert small.known(part).shape == (count, 3, 1, 8, 8) and small.noise(part).shape == (20, 3, 1, 8, 8)
        assert torch.equal(small.known(part), small.known(part)) and torch.equal(small.noise(part), small.noise(part))
    assert not torch.equal(small.noise(VALID), small.noise(TEST))
    shades = {
        part: set((small.whole(part, 60, rng()) * 255).round().int().unique().tolist()) - {0}
        for part in ("train", VALID, TEST)
    }
    assert shades == {"train": {130, 140, 150, 160, 170, 180}, "valid": {190, 200, 210}, "test": {220, 230, 240}}


def test_a_step_is_a_function_of_its_generator(small):
    torch.manual_seed(5)
    model = VideoDiT(dim=24, heads=2, layers=1)
    torch.nn.init.normal_(model.leave.project.bias)
    one, again, other = (small.batch(torch.arange(5), generator(0, step)) for step in (3, 3, 4))
    assert one[0].shape == (5, 3, 1, 8, 8) and torch.equal(one[0], again[0])
    assert not torch.equal(one[0], other[0])
    torch.manual_seed(6)
    with torch.no_grad():
        first = small.loss(model, one)
        torch.rand(3)
        assert torch.equal(first, small.loss(model, again))
        assert not torch.equal(first, small.loss(model, (one[0], other[1])))


def test_floors_are_told_by_the_measures_of_models(small):
    floors = small.floors()

    class Silent(torch.nn.Module):
        def forward(self, x, t):
            return torch.zeros_like(x)

    assert small.measure(Silent(), TEST) == floors["noise"]
    assert list(small.measure(Silent(), VALID)) == ["flow loss"]
    energy = float(small.known(TEST).double().square().mean())
    assert floors["noise"]["flow loss"] == pytest.approx(1 + energy, rel=0.03)
    assert floors["each pixel a normal on its own"]["flow loss"] < 0.6 * floors["noise"]["flow loss"]
    assert set(floors["mean clip"]) == {"distance of frames", "distance of motion"}
    assert floors["clips to learn from"] == small.distances(small.known("train")[:20], TEST)
    assert floors["noise"]["distance of motion"] > floors["mean clip"]["distance of motion"]


def test_training_by_the_command_of_all_tasks(folder, tmp_path):
    assert task("video-diffusion") is VideoDiffusion
    texts = [f"{key}={value}" for key, value in SMALL.items()]
    own = ["samples=10", "euler=3", "dim=24", "heads=2", "layers=1", "steps=40", "batch=16", "every=20", "rate=1e-2"]
    settled = settle(VideoDiffusion, folder, None, [*texts, *own])
    result = learn(settled, tmp_path / "run", Console(file=io.StringIO()), seed=1)
    assert result.test["flow loss"] < 0.7 * result.floors["noise"]["flow loss"]
    assert set(result.test) == {"flow loss", "distance of frames", "distance of motion"}
    read = VideoDiT.from_pretrained(tmp_path / "run" / "model").eval()
    with torch.inference_mode():
        assert settled.task.measure(read, TEST) == result.test


def test_a_training_starts_from_the_weights_of_another(folder, tmp_path):
    sizes = ["dim=24", "heads=2", "layers=1"]
    first = settle(VideoDiffusion, folder, None, [*sizes, f"start={tmp_path}"])
    with pytest.raises(ChronotopeError, match="has no config"):
        first.make()
    made = settle(VideoDiffusion, folder, None, sizes).make()
    made.save_pretrained(tmp_path)
    again = first.make().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in made.state_dict().items())
    with pytest.raises(ChronotopeError, match="'layers': 1"):
        settle(VideoDiffusion, folder, None, ["dim=24", "heads=2", "layers=2", f"start={tmp_path}"]).make()


def test_floors_on_the_real_digits():
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is absent: set CHRONOTOPE_DATA")
    floors = VideoDiffusion(data=DATA, samples=100, clips=200, euler=8).floors()
    near = floors.pop("clips to learn from")
    for metric in near:
        assert all(floor[metric] > near[metric] + 0.1 for floor in floors.values()), metric
    apart = floors["frames of different clips"]
    assert apart["distance of motion"] > 2 * apart["distance of frames"]
