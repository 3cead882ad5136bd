"""The dense training: its end, its resumption, its checkpoint; and the tuning of a row."""

import io

import pytest
import torch
from rich.console import Console

import chronotope as ct
from chronotope.tasks.clips import Clips, load
from chronotope.tasks.training import Clock, Recipe, check, train, tune

GRID = ct.Grid(t=2, h=4, w=4)


class Killed(Exception):
    """Stands for a kill between two steps."""


@pytest.fixture(scope="module")
def clips():
    whole = load(None, GRID, patch=2, channels=1, seed=0)
    return Clips(whole.name, whole.train[:32], whole.valid[:4])


def recipe(**options):
    return Recipe(GRID, 2, 1, dim=24, heads=2, layers=2, **options)


def run(recipe, clips, folder):
    console = Console(file=io.StringIO())
    trained = train(recipe, clips, folder, console)
    return trained, console.file.getvalue()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_steps_train_and_a_finished_training_is_not_repeated(clips, tmp_path):
    first, told = run(recipe(steps=6), clips, tmp_path)
    assert (first.steps, first.reused) == (6, False) and "training" in told
    again, told = run(recipe(steps=6), clips, tmp_path)
    assert (again.steps, again.reused) == (6, True) and "training" not in told
    assert same(first.model, again.model) and not same(first.model, recipe().model())
    assert [path.suffix for path in tmp_path.iterdir()] == [".ckpt"]


def test_interrupted_training_equals_the_whole_to_the_bit(clips, tmp_path, monkeypatch):
    whole, _ = run(recipe(steps=8), clips, tmp_path / "whole")
    counted = Clock.on_train_batch_end

    def killed(self, trainer, *rest):
        self.every = 0.0
        counted(self, trainer, *rest)
        if self.done == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Clock, "on_train_batch_end", killed)
        with pytest.raises(Killed):
            run(recipe(steps=8), clips, tmp_path / "cut")
    cut, told = run(recipe(steps=8), clips, tmp_path / "cut")
    assert "going on from step 5" in told and cut.steps == 8
    assert same(whole.model, cut.model)


def test_minutes_end_the_training_and_add_up_over_runs(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(Clock, "load_state_dict", lambda self, state: vars(self).update(state, seconds=59.9))
    timed = recipe(minutes=0.005)
    first, _ = run(timed, clips, tmp_path / "a")
    assert first.steps >= 1
    with monkeypatch.context() as patch:
        patch.setattr(Clock, "fraction", lambda self: 1.0 if self.done >= 2 else 0.5)
        run(recipe(minutes=1.0), clips, tmp_path / "b")
    later, told = run(recipe(minutes=1.0), clips, tmp_path / "b")
    assert "going on from step 2" in told and later.steps >= 3


def test_other_recipes_and_clips_have_other_keys(clips):
    other = Clips(clips.name, clips.train + 0.1, clips.valid)
    keys = {recipe().key(clips), recipe(seed=1).key(clips), recipe(minutes=2.0).key(clips), recipe().key(other)}
    assert len(keys) == 4 and recipe().key(clips) in keys


def test_training_lowers_the_loss(clips, tmp_path):
    trained, _ = run(recipe(steps=60), clips, tmp_path)
    with torch.no_grad():
        assert trained.model.loss(clips.train) < 0.98 * recipe().model().loss(clips.train)


def test_tuning_is_the_same_for_the_same_weights(clips):
    models = [recipe().model() for _ in range(2)]
    for model in models:
        tune(model, clips, recipe(), 3)
    assert same(*models) and not same(models[0], recipe().model())


def test_a_model_does_not_touch_the_random_numbers_of_the_caller():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    recipe().model()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"minutes": 0.0}, r"minutes=0.0: expected a positive number of minutes"),
        ({"minutes": float("nan")}, r"minutes=nan: expected a positive number"),
        ({"steps": 0}, "steps=0: expected 1 or more steps"),
    ],
)
def test_bad_lengths(options, text):
    with pytest.raises(ct.ChronotopeError, match=text):
        check(recipe(**options))
