"""Forecasters of frames: one by one equals all at once, what is carried, whose states go where."""

from itertools import islice

import pytest
import torch

import chronotope as ct
from chronotope.models import Continuation, EncoderForecaster


def clips(seed=0, frames=3):
    return torch.rand(2, frames, 1, 8, 12, generator=torch.Generator().manual_seed(seed))


def made(over="space", **options):
    torch.manual_seed(0)
    return Continuation(over, **{"patch": 4, "dim": 16, "layers": 2, "states": 8, "heads": 2, **options})


@pytest.mark.parametrize("over", ["space", "attention"])
def test_told_one_by_one_equals_all_at_once(over):
    model, seen = made(over), clips()
    with torch.no_grad():
        whole = model(seen, 6)
        told = torch.stack([frame for frame, _ in islice(model.tell(seen), 6)], 1)
        assert (told - whole).abs().max() < 1e-5
        assert (model(seen, 2) - whole[:, :2]).abs().max() < 1e-5
        assert model(seen).shape == seen.shape
    other = seen.clone()
    other[:, 0] += 1
    assert (model(other) - model(seen)).abs().max() > 1e-4


def test_a_space_carries_the_same_and_attention_a_frame_more_each_time():
    sizes = {}
    for over in ("space", "attention"):
        with torch.no_grad():
            sizes[over] = [state.nbytes for _, state in islice(made(over).tell(clips()), 5)]
    assert len(set(sizes["space"])) == 1
    # Keys and values of a frame of 6 tokens, two layers, two examples; space within a frame keeps nothing.
    assert sizes["attention"] == [(3 + i) * 2 * 2 * 2 * 6 * 16 * 4 for i in range(1, 6)]


def test_the_forecasting_layers_go_on_from_the_states_of_the_reading_ones_in_reverse():
    torch.manual_seed(0)
    model, seen = EncoderForecaster(4, 1, 6, layers=2), clips()
    with torch.no_grad():
        out = model(seen, 4)
        x, grid = model.embed(seen)
        first, one = model.reads[0].run(x, grid)
        _, two = model.reads[1].run(first, grid)
        said, coming = [], torch.zeros(2, 6, 6)
        for _ in range(4):
            a, two = model.tells[0].step(coming, two)
            b, one = model.tells[1].step(a, one)
            said.append(torch.cat((a, b), 2))
        assert (model.head(torch.cat(said, 1), grid.replace(t=4)) - out).abs().max() < 1e-6


@pytest.mark.parametrize("make", [made, lambda: made("attention"), lambda: EncoderForecaster(4, 1, 6)])
def test_every_parameter_learns_and_models_are_saved(make, tmp_path):
    model = make()
    model.loss(clips(1), clips(2, frames=2)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path)(clips()), model(clips()))


def test_refusals():
    with pytest.raises(ct.ChronotopeError, match="layers=0"):
        Continuation(layers=0)
    with pytest.raises(ct.ChronotopeError, match="layers=0"):
        EncoderForecaster(layers=0)
    with pytest.raises(ct.ChronotopeError, match="not a multiple of the patch size"):
        made()(torch.zeros(1, 2, 1, 6, 8))
