"""Dropout from few bits: how often, how large, independent, the same from the same seed."""

import math

import pytest
import torch

from chronotope.errors import ChronotopeError
from chronotope.nn.dropout import STEPS, Dropout


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9])
def test_numbers_are_dropped_as_often_as_asked_and_the_mean_stays(p: float) -> None:
    torch.manual_seed(0)
    count = 400_003  # of a last draw only a part is used
    out = Dropout(p)(torch.ones(count, dtype=torch.float64))
    kept = out != 0
    assert kept.double().mean() == pytest.approx(1 - p, abs=4 * math.sqrt(p * (1 - p) / count) + 1 / STEPS)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], STEPS / (STEPS - round(p * STEPS))))
    for apart in (1, 2, 3, 4):  # four numbers share a draw
        both = (~kept[apart:] & ~kept[:-apart]).double().mean()
        assert both == pytest.approx(p * p, abs=5 * p * math.sqrt(1 / count) + 2e-5)


def test_every_bit_of_a_draw_counts() -> None:
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(100_000, 4)) != 0).double().mean(0)
    torch.testing.assert_close(kept, torch.full_like(kept, 0.5), rtol=0, atol=4 * 0.5 / math.sqrt(100_000))


def test_the_gradient_is_what_x_is_multiplied_by() -> None:
    x = torch.randn(5, 7, requires_grad=True)
    out = Dropout(0.3)(x)
    (slope,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(slope * x, out)


def test_the_same_seed_drops_the_same() -> None:
    x, drop = torch.randn(9, 11), Dropout(0.4)
    first, again, other = (torch.manual_seed(seed) and drop(x) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_in_use_and_at_probability_0_nothing_is_drawn() -> None:
    x, state = torch.randn(3, 4), torch.get_rng_state()
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2])
def test_other_probabilities_are_refused(p: float) -> None:
    with pytest.raises(ChronotopeError, match="expected a probability from 0 to below 1"):
        Dropout(p)
