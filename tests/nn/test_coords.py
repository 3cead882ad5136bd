"""Coordinates of tokens through layers: irregular events, continuous places, steps, and who gets which axis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope import Grid, Rope
from chronotope.errors import ChronotopeError
from chronotope.nn import Attention, Block, Cross, Recurrence, Sinusoidal, Stack
from stepping import tokens

EVENTS = Grid(n=7)


def stamps(batch=2, n=7, seed=1):
    """Sorted times, others for each example."""
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(40).sort(1)[0]


def event_model(depth=2):
    """Attention over events, whose code is over their order and their time."""
    torch.manual_seed(0)
    layers = [Attention(12, 2, where=ct.causal(), position=Rope(("n", "time"))) for _ in range(depth)]
    return Stack([Block([layer]) for layer in layers]).double()


def stepped(layer, x, grid, coords):
    """Slice by slice; coords are cut into slices too."""
    one = grid.replace(**{grid.axes[0]: 1})
    state, out = layer.init_state(x.shape[0], one), []
    for i, part in enumerate(x.split(one.size, 1)):
        own = slice(i * one.size, (i + 1) * one.size)
        given = {axis: c[..., own] for axis, c in coords.items()} if isinstance(coords, dict) else coords[..., own, :]
        y, state = layer.step(part, state, coords=given)
        out.append(y)
    return torch.cat(out, 1)


@settings(max_examples=20, deadline=None)
@given(move=st.floats(-1e4, 1e4), seed=st.integers(0, 99))
def test_moving_all_timestamps_changes_nothing(move, seed):
    model, x, when = event_model(), tokens(EVENTS, seed=seed), stamps(seed=seed)
    out = model(x, EVENTS, coords={"time": when})
    torch.testing.assert_close(model(x, EVENTS, coords={"time": when + move}), out, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(model(x, EVENTS, coords={"time": when * 1.1}), out)


def test_regular_timestamps_are_the_grid():
    layer, x, grid = Attention(12, 2, position=Rope(("t", "h"))).double(), tokens(Grid(t=4, h=3)), Grid(t=4, h=3)
    own = layer(x, grid)
    for places in (
        {"t": torch.arange(4).repeat_interleave(3)},
        {"t": torch.arange(4).repeat_interleave(3) + 0.5, "h": torch.arange(3).repeat(4).expand(2, -1)},
        grid.coords().double(),
        grid.coords().double().expand(2, -1, -1),
    ):
        torch.testing.assert_close(layer(x, grid, coords=places), own)


def test_each_example_has_its_own_times():
    model, x, when = event_model(1), tokens(EVENTS), stamps()
    out = model(x, EVENTS, coords={"time": when})
    for i in range(2):
        torch.testing.assert_close(out[i : i + 1], model(x[i : i + 1], EVENTS, coords={"time": when[i]}))


def test_stepping_with_coords_equals_forward():
    model, x, when = event_model(), tokens(EVENTS), stamps()
    with torch.no_grad():
        out = model(x, EVENTS, coords={"time": when})
        torch.testing.assert_close(stepped(model, x, EVENTS, {"time": when}), out)
        both = torch.stack([torch.arange(7.0).double().expand(2, -1), when], -1)
        torch.testing.assert_close(stepped(model, x, EVENTS, both), out)


def test_each_mixer_gets_the_axes_of_its_code():
    grid = Grid(t=3, h=2, w=2)
    rng = torch.Generator().manual_seed(5)
    coords = {axis: torch.rand(grid.size, generator=rng, dtype=torch.float64) for axis in ("t", "h", "time")}
    time = Attention(12, 2, where=ct.along("t") & ct.causal("t"), position=Rope(("t", "time")))
    space = Attention(12, 2, where=ct.along("h", "w"), position=Rope(("h", "w")))
    mute = Recurrence(12, 2, along="t")
    model = Stack([Sinusoidal(12, "time"), Block([time, space, mute], mlp=None)]).double()
    x = tokens(grid)
    y = model.blocks[0](x, grid, coords={"time": coords["time"]})
    norms = model.blocks[1].norms
    y = y + time(norms[0](y), grid, coords={axis: coords[axis] for axis in ("t", "time")})
    y = y + space(norms[1](y), grid, coords={"h": coords["h"]})
    y = y + mute(norms[2](y), grid)
    torch.testing.assert_close(model(x, grid, coords=coords), model.norm(y))
    torch.testing.assert_close(stepped(model, x, grid, coords), model.norm(y))
    assert model.placed == ("time", "t", "h", "w")


def test_pages_of_keys_take_coords():
    grid = Grid(n=24)
    layer = Attention(
        12, 2, where=ct.causal() & ct.route.top_blocks(keep=2, n=4), position=Rope(("n", "time"))
    ).double()
    x, when = tokens(grid), stamps(n=24)
    with torch.no_grad():
        torch.testing.assert_close(stepped(layer, x, grid, {"time": when}), layer(x, grid, coords={"time": when}))


def test_gradients_reach_the_timestamps():
    model, x, when = event_model(), tokens(EVENTS), stamps().requires_grad_()
    model(x, EVENTS, coords={"time": when}).square().sum().backward()
    assert when.grad is not None and bool(when.grad.ne(0).all())


def test_prefix_tokens_have_no_place():
    grid, when = Grid(n=7, prefix=1), stamps()
    layer, x = Attention(12, 2, position=Rope(("n", "time"))).double(), tokens(Grid(n=8))
    q, k, _ = layer.project(x, grid, coords={"time": when})
    own, other, _ = layer.project(x[:, 1:], EVENTS, coords={"time": when})
    torch.testing.assert_close(q[:, :, 1:], own)
    torch.testing.assert_close(k[:, :, 1:], other)
    with pytest.raises(ChronotopeError, match="numbers of tokens differ"):
        layer(x, grid, coords={"time": stamps(n=8)})


def test_what_nobody_would_hear_is_refused():
    x, when = tokens(EVENTS), {"time": stamps()}
    model = event_model()
    plain = Block([Attention(12, 2, where=ct.causal())]).double()
    with pytest.raises(ChronotopeError, match=r"coords for \['tiem'\].*\['n', 'time'\]"):
        model(x, EVENTS, coords={"tiem": stamps()})
    with pytest.raises(ChronotopeError, match=r"position=ct\.Rope"):
        plain(x, EVENTS, coords=when)
    with pytest.raises(ChronotopeError, match="over the axes"):
        plain.step(x[:, :1], plain.init_state(2, Grid(n=1)), coords=when)
    with pytest.raises(ChronotopeError, match="names 'time'"):
        model(x, EVENTS)
    with pytest.raises(ChronotopeError, match="over the axes"):
        Block([Cross(Attention(12, 2, position=Rope("n")))]).double()(x, EVENTS, (x, EVENTS), coords={"n": stamps()})
    with pytest.raises(ChronotopeError, match="with a context"):
        Attention(12, 2, position=Rope("n")).double()(x, EVENTS, (x, EVENTS), coords={"n": stamps()})
