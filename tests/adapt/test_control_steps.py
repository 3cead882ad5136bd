"""When controls act: steps of a sampling, told by noise levels or counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import GRID, WHERE, C, Edit, N, Out, Own, Stack, masked, near, nothing_is_left, shown_by  # noqa: F401
from torch import Tensor, nn

from chronotope.adapt import control
from chronotope.adapt.control import Clock


@pytest.mark.parametrize("levels", [[999.0, 750.0, 500.0, 1.0], [0.0, 0.25, 0.5, 1.0]])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_steps_of_samplings(levels: list[float], calls: int) -> None:
    """Levels that fall or rise, each called once or several times for guidance; then again from the start."""
    clock, model = Clock(), nn.Identity()
    for _ in range(3):
        for step, level in enumerate(levels):
            for _ in range(calls):
                clock.tick(model, (), {"timestep": torch.full((2,), level)})
                assert (clock.step, clock.time) == (step, level)


@pytest.mark.parametrize("levels", [[999.0, 750.0, 500.0, 1.0], [0.0, 0.25, 0.5, 1.0]])
def test_a_call_before_a_sampling_moves_its_first_step_alone(levels: list[float]) -> None:
    clock, model = Clock(), nn.Identity()
    clock.tick(model, (), {"timestep": (levels[0] + levels[-1]) / 2.1})
    steps = []
    for level in levels * 2:
        clock.tick(model, (), {"timestep": level})
        steps.append(clock.step)
    assert steps == [1, 1, 2, 3, 0, 1, 2, 3]


def test_a_model_without_levels_counts_its_calls() -> None:
    model, x, look = Own(), torch.randn(1, N, C), Out()
    with control(model, look, steps=[1, 3]):
        outs = [model(x) for _ in range(5)]
    assert [at.step for at in look.met] == [1, 3]
    near(outs[0], outs[2])
    near(outs[1], outs[3])
    near(outs[4], model(x))
    with control(model, Out(), steps=lambda step: step > 1):
        assert [bool(torch.equal(model(x), outs[4])) for _ in range(3)] == [True, True, False]


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Own()

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return self.attn(x)


@pytest.mark.parametrize("kind", [float, int, lambda t: torch.tensor(t), lambda t: torch.tensor([[0, t, t]] * 2)])
def test_levels_are_read_from_the_inputs(kind: Any) -> None:
    """Numbers, tensors, and those where tokens that are given are at level 0."""
    model, x, look = Denoiser(), torch.randn(1, N, C), Out()
    with control(model, look, steps=range(1, 3)):
        for level in (900, 600, 300, 1):
            model(x, kind(level))
    assert [(at.step, at.time) for at in look.met] == [(1, 600.0), (2, 300.0)]
