"""Swapped cross-attention: windows against a dense mask, roles, cost, and what each stream learns of the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.errors import ChronotopeError
from chronotope.papers.spacetime.swap import SwapCrossAttention, SwapStack

AXES = ("t", "h", "w")


def _streams(grid: ct.Grid, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 2, grid.size, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _dense(layer: SwapCrossAttention, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The formula with one matrix of scores."""
    inner = layer.attention
    heads = [
        part.unflatten(2, (2, 8)).transpose(1, 2)
        for source, index in ((layer.asks(x), 0), (layer.answers(y), 1), (layer.answers(y), 2))
        for part in [inner.qkv(source).chunk(3, 2)[index]]
    ]
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
    x = x + inner.out(out)
    return x + layer.mlp(layer.mlp_norm(x))


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    window=st.tuples(*[st.integers(1, 4)] * 3),
    shift=st.tuples(*[st.integers(0, 2)] * 3),
)
def test_windows_are_dense_attention_under_their_mask(
    shape: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    grid = ct.Grid(**dict(zip(AXES, shape, strict=True)))
    layer = SwapCrossAttention(16, 2, window, shift).double()
    space, time = _streams(grid)
    block = (grid.coords() + torch.tensor(shift)) // torch.tensor(window)
    mask = (block[:, None] == block[None]).all(-1)
    torch.testing.assert_close(layer(space, time, grid), _dense(layer, space, time, mask), rtol=0, atol=1e-5)


def test_one_window_over_the_grid_is_full_attention() -> None:
    grid, layer = ct.Grid(t=3, h=2, w=5), SwapCrossAttention(16, 2, (3, 2, 5)).double()
    space, time = _streams(grid)
    torch.testing.assert_close(layer(space, time, grid), _dense(layer, space, time, None))


def test_swapping_the_streams_and_the_query_is_the_same() -> None:
    grid, layer = ct.Grid(t=3, h=4, w=5), SwapCrossAttention(16, 2, (2, 2, 2)).double()
    space, time = _streams(grid)
    assert torch.equal(layer(space, time, grid, "space"), layer(time, space, grid, "time"))
    with pytest.raises(ChronotopeError, match="'space' or 'time'"):
        layer(space, time, grid, "both")


def test_equal_streams_are_windowed_self_attention() -> None:
    grid, layer = ct.Grid(t=3, h=4, w=5), SwapCrossAttention(16, 2, (2, 2, 2)).double()
    layer.answers = layer.asks
    x = _streams(grid)[0]
    own = x + layer.attention(layer.asks(x), grid)
    torch.testing.assert_close(layer(x, x, grid), own + layer.mlp(layer.mlp_norm(own)))


@pytest.mark.parametrize("alternate", [True, False])
def test_roles_alternate_and_what_streams_do_alone_comes_before(alternate: bool) -> None:
    torch.manual_seed(0)
    grid = ct.Grid(t=2, h=4, w=4)
    layers = [SwapCrossAttention(16, 2, (2, 2, 2)) for _ in range(3)]
    own = [
        (ct.nn.Attention(16, 2, where=ct.along("h", "w")), ct.nn.Attention(16, 2, where=ct.along("t"))) for _ in layers
    ]
    stack = SwapStack(layers, alternate, own).double()
    space, time = _streams(grid)
    found = stack(space, time, grid)
    for index, (layer, (first, second)) in enumerate(zip(layers, own, strict=True)):
        space, time = space + first(space, grid), time + second(time, grid)
        if alternate and index == 1:
            time = layer(space, time, grid, "time")
        else:
            space = layer(space, time, grid)
    torch.testing.assert_close(found, (space, time))
    with pytest.raises(ChronotopeError, match="one for each"):
        SwapStack(layers, own=own[:1])


def test_pairs_are_linear_in_tokens() -> None:
    where = SwapCrossAttention(16, 2, (2, 4, 4)).attention.where
    pairs = [ct.plan(where, ct.Grid(t=t, h=16, w=16)).flops(8) for t in (4, 8, 16)]
    assert pairs[1] == 2 * pairs[0] and pairs[2] == 4 * pairs[0]


@pytest.mark.slow
def test_time_is_linear_in_tokens(one_thread: None) -> None:
    import time as clock

    layer = SwapCrossAttention(32, 2, (2, 4, 4))
    tokens, seconds = [], []
    for t in (32, 64, 128):
        grid = ct.Grid(t=t, h=16, w=16)
        x = torch.randn(2, 1, grid.size, 32)
        with torch.inference_mode():
            layer(x[0], x[1], grid)
            runs = []
            for _ in range(9):
                before = clock.process_time()
                layer(x[0], x[1], grid)
                runs.append(clock.process_time() - before)
        tokens.append(float(grid.size))
        seconds.append(sorted(runs)[4])
    x, y = torch.tensor(tokens).log(), torch.tensor(seconds).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert abs(slope.item() - 1) <= 0.2, slope


@pytest.mark.slow
def test_only_by_turns_both_streams_learn_what_the_other_knows() -> None:
    """Space holds what, time holds when; each is to keep its own and to know the mean of the other in its window."""
    grid, errors = ct.Grid(t=4, h=4, w=4), {}
    where = ct.plan(ct.blocks(t=2, h=2, w=2), grid).mask().float()
    mean = where / where.sum(1, keepdim=True)
    for alternate in (True, False):
        torch.manual_seed(0)
        enter = nn.ModuleList(nn.Linear(3, 16) for _ in range(2))
        stack = SwapStack([SwapCrossAttention(16, 2, (2, 2, 2)) for _ in range(4)], alternate)
        leave = nn.ModuleList(nn.Linear(16, 6) for _ in range(2))
        parameters = [*enter.parameters(), *stack.parameters(), *leave.parameters()]
        optimizer, rng = torch.optim.Adam(parameters, lr=2e-3), torch.Generator().manual_seed(0)
        for _ in range(600):
            what, when = torch.randn(2, 16, grid.size, 3, generator=rng)
            targets = torch.cat((what, mean @ when), 2), torch.cat((when, mean @ what), 2)
            streams = stack(enter[0](what), enter[1](when), grid)
            losses = [F.mse_loss(end(x), y) for end, x, y in zip(leave, streams, targets, strict=True)]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
        errors[alternate] = [loss.item() for loss in losses]
    nothing = 1 / 16  # the error of who knows nothing of the other: half of that of a mean of eight numbers
    assert max(errors[True]) < 0.2 * nothing and errors[False][0] < 0.2 * nothing, errors
    assert errors[False][1] >= 2 * errors[True][1] and errors[False][1] > 0.8 * nothing, errors
