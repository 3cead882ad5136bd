"""The layer around a memory: stepping equals forward, a step costs the same at any time, every weight learns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.memories import (
    L2,
    Decay,
    Descent,
    Keep,
    Lp,
    Lq,
    Matrix,
    Memory,
    Mlp,
    Momentum,
    Residual,
    Softmax,
    Switch,
)
from chronotope.nn.memory import DeepMemory, MemoryGates

MEMORIES = [
    None,
    Memory(Matrix(), L2(), Keep(), Descent()),
    Memory(Residual(Mlp(2)), Lp(3), Lq(4), Descent()),
    Memory(Mlp(2), Switch(), Softmax(2.0), Momentum()),
]


def layer(memory=None, seed=0, **options):
    torch.manual_seed(seed)
    return DeepMemory(16, 2, memory=memory, **options).double()


def stepped(module, x, grid):
    state, outs = module.init_state(len(x), grid.replace(**{grid.axes[0]: 1})), []
    for part in x.unflatten(1, (grid.shape[0], -1)).unbind(1):
        kept = state
        values = [y.clone() for y in state.tensors()]
        y, state = module.step(part, state)
        outs.append(y)
        assert all(torch.equal(a, b) for a, b in zip(values, kept.tensors(), strict=True))
    return torch.cat(outs, 1), state


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(MEMORIES), st.integers(1, 5), st.integers(1, 4), st.integers(1, 7), st.sampled_from([None, 1, 4])
)
def test_steps_equal_forward(memory, times, places, chunk, conv):
    grid = ct.Grid(t=times, h=places)
    module = layer(memory, chunk=chunk, conv=conv)
    x = torch.randn(2, grid.size, 16, dtype=torch.float64)
    assert (stepped(module, x, grid)[0] - module(x, grid)).abs().max() < 1e-10


def test_nothing_comes_from_the_future_or_from_other_sequences():
    module, grid = layer(chunk=4), ct.Grid(n=15)
    x = torch.randn(3, 15, 16, dtype=torch.float64)
    y = module(x, grid)
    changed = x.clone()
    changed[:, 9:] += 1
    assert torch.equal(module(changed, grid)[:, :9], y[:, :9])
    assert (module(changed, grid)[:, 9:] - y[:, 9:]).abs().amin((0, 2)).gt(0).all()
    order = torch.tensor([2, 0, 1])
    assert (module(x[order], grid) - y[order]).abs().max() < 1e-12


def test_states_do_not_grow():
    module = layer(chunk=4)
    x = torch.randn(1, 64, 16, dtype=torch.float64)
    sizes = {n: stepped(module, x[:, :n], ct.Grid(n=n))[1].nbytes for n in (1, 7, 64)}
    assert len(set(sizes.values())) == 1


@pytest.mark.parametrize("memory", MEMORIES, ids=repr)
@pytest.mark.parametrize("channels", [None, 8])
def test_every_weight_gets_a_gradient(memory, channels):
    module = layer(memory, chunk=3)
    module.gates = MemoryGates(16, 2, module.memory, channels=channels, rank=4).double()
    module(torch.randn(2, 10, 16, dtype=torch.float64), ct.Grid(n=10)).square().sum().backward()
    for name, weight in module.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


def test_recall_reads_what_the_next_token_would_read_if_it_taught_nothing():
    module = layer(Memory(Mlp(2), L2(), Decay(), Descent()), chunk=4)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    _, state = stepped(module, x[:, :6], ct.Grid(n=6))
    with torch.no_grad():
        module.gates.project.bias[:2] = -torch.inf  # the rate
        module.gates.project.weight[:2] = 0
        module.gates.project.bias[2:] = 100  # all is kept
    assert (module.step(x[:, 6:], state)[0] - module.recall(x[:, 6:], state)).abs().max() < 1e-12


def test_gates_start_where_they_say():
    memory = Memory(Mlp(2), Switch(), Decay(), Momentum())
    gates = MemoryGates(16, 2, memory, rate=0.5, threshold=3.0)(torch.zeros(1, 3, 16))
    assert (gates.rate - 0.5 * 0.25).abs().max() < 1e-6
    assert (gates.decay.exp() - 0.9999).abs().max() < 1e-4
    assert (gates.momentum.exp() - 0.5).abs().max() < 1e-6
    assert (gates.threshold - 3).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["same", "alike", "random"])
def test_long_sequences_stay_finite_as_the_layer_begins(kind):
    torch.manual_seed(0)
    module = DeepMemory(64, 4)
    x = torch.randn(1, 16384, 64)
    x = {"same": x[:, :1].expand_as(x), "alike": x[:, :1] + 0.3 * x, "random": x}[kind]
    with torch.no_grad():
        y = module(x, ct.Grid(n=16384))
    assert y.isfinite().all()
    assert y.abs().max() < 100


def test_refusals():
    with pytest.raises(ct.ChronotopeError, match="dim=16 is not a multiple of heads=3"):
        DeepMemory(16, 3)
    module, grid, x = layer(), ct.Grid(n=4), torch.zeros(1, 4, 16, dtype=torch.float64)
    with pytest.raises(ct.ChronotopeError, match="takes no context"):
        module(x, grid, x)
    with pytest.raises(ct.ChronotopeError, match="x has shape"):
        module(x[:, :3], grid)
    with pytest.raises(ct.ChronotopeError, match="4 slices"):
        module.init_state(1, grid)
