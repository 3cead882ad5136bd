"""Law: stepping a recurrent layer over slices of the first axis equals forward; nothing looks ahead; states fork."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stepping_law import close, stepped, tokens

import chronotope as ct
from chronotope import Grid, features
from chronotope.nn import Decay, Recurrence, ShortConv

DECAYS: dict[str, Any] = {
    "none": lambda: None,
    "fixed": lambda: torch.tensor([-0.1, -0.5]).double(),
    **{per: (lambda per=per: Decay(12, 2, per)) for per in ("head", "token", "channel")},
}
MAPS = {"none": lambda: None, "elu": features.Elu, "lrpe": lambda: features.Lrpe(2, 6), "taylor": features.Taylor}


def layer(decay: str = "none", maps: str = "none", **kwargs: Any) -> Recurrence:
    torch.manual_seed(0)
    return Recurrence(12, 2, decay=DECAYS[decay](), features=MAPS[maps](), **kwargs).double()


@settings(max_examples=60)
@given(
    decay=st.sampled_from(list(DECAYS)),
    maps=st.sampled_from(["none", "elu", "lrpe"]),
    delta=st.booleans(),
    along=st.sampled_from([None, "t", "h", "w"]),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)),
)
def test_stepping_equals_forward(decay, maps, delta, along, shape):  # type: ignore[no-untyped-def]
    if maps == "lrpe" and decay == "channel":
        maps = "none"  # twice as many features as the decay has channels
    grid = Grid(t=shape[0], h=shape[1], w=shape[2])
    mix = layer(decay, maps, delta=delta, along=along, normalize=maps == "elu" and not delta)
    x = tokens(grid)
    out, state = stepped(mix, x, grid)
    close(out, mix(x, grid))
    assert state.nbytes == mix.init_state(2, Grid(t=1, h=shape[1], w=shape[2])).nbytes


@pytest.mark.parametrize("along", [None, "t", "w"])
def test_along_an_axis_each_place_is_alone(along: str | None) -> None:
    grid = Grid(t=3, h=2, w=4)
    mix, x = layer("token", along=along), tokens(grid)
    changed = x.clone()
    changed[:, grid.index(t=1, h=1, w=2)] += 1
    differs = (mix(x, grid) != mix(changed, grid)).any(2)[0].view(grid.shape)
    seen = torch.zeros(grid.shape, dtype=torch.bool)
    if along is None:
        seen.flatten()[grid.index(t=1, h=1, w=2) :] = True
    elif along == "t":
        seen[1:, 1, 2] = True
    else:
        seen[1, 1, 2:] = True
    assert torch.equal(differs, seen)


def test_a_state_forks_and_is_kept() -> None:
    one = Grid(t=1, h=2)
    mix, x = layer("token"), tokens(Grid(t=4, h=2))
    _, state = mix.step(x[:, :2], mix.init_state(2, one))
    before = state.past.memory.clone()
    y, _ = mix.step(x[:, 2:4], state)
    assert torch.equal(state.past.memory, before) and state.time == 1
    forked, _ = mix.step(x[:, 2:4].repeat_interleave(2, 0), state.repeat(2))
    close(forked, y.repeat_interleave(2, 0))
    again, _ = mix.step(x[:, 2:4], mix.init_state(2, one).from_dict(state.to_dict()))
    close(again, y)
    some, _ = mix.step(x[1:, 2:4], state.select(torch.tensor([1])))
    close(some, y[1:])


def test_short_convolution() -> None:
    grid = Grid(t=5, h=3)
    conv, x = ShortConv(12, 4).double(), tokens(grid)
    close(stepped(conv, x, grid)[0], conv(x, grid))
    changed = x.clone()
    changed[:, 7:] = 0
    assert torch.equal(conv(x, grid)[:, :7], conv(changed, grid)[:, :7])
    for width in (1, 2, 9):
        conv = ShortConv(12, width).double()
        close(stepped(conv, x, grid)[0], conv(x, grid))


def test_blocks_of_recurrences_step() -> None:
    grid = Grid(t=4, h=2, w=3)
    torch.manual_seed(0)
    block = ct.nn.Block(
        [
            ShortConv(12),
            Recurrence(12, 2, decay=Decay(12, 2), along="t"),
            ct.nn.Attention(12, 2, where=ct.along("h", "w")),
        ]
    ).double()
    x = tokens(grid)
    close(stepped(block, x, grid)[0], block(x, grid))


def test_refusals() -> None:
    grid, x = Grid(t=2, h=2), tokens(Grid(t=2, h=2))
    with pytest.raises(ct.ChronotopeError, match="needs that axis and no prefix"):
        layer(along="v")(x, grid)
    with pytest.raises(ct.ChronotopeError, match="takes no context"):
        layer()(x, grid, x)
    with pytest.raises(ct.ChronotopeError, match="give both head sizes"):
        Recurrence(10, 3)
    with pytest.raises(ct.ChronotopeError, match="one of head, token, channel"):
        Decay(12, 2, "layer")
    with pytest.raises(ct.ChronotopeError, match="at least 1 token"):
        ShortConv(12, 0)
