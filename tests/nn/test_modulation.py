"""Modulation: the identity at first, its formula on any pieces; embeddings of times and labels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.nn import FeedForward, LabelEmbedding, Modulation, TimeEmbedding


def lively(dim, condition_dim, gate):
    module = Modulation(dim, condition_dim, gate).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 10**6))
def test_it_is_its_formula(batch, pieces, each, gate, seed):
    torch.manual_seed(seed)
    module, layer = lively(6, 4, gate), torch.nn.Linear(6, 6).double()
    x, c = torch.randn(batch, pieces * each, 6).double(), torch.randn(batch, pieces, 4).double()
    out = module(x, c, layer)
    for b in range(batch):
        for n in range(pieces * each):
            own = c[b, n // each]
            parts = module.modulation.weight @ (own * own.sigmoid()) + module.modulation.bias
            shift, scale, *rest = parts.split(6)
            mean, variance = x[b, n].mean(), x[b, n].var(unbiased=False)
            y = layer((1 + scale) * (x[b, n] - mean) / (variance + 1e-6).sqrt() + shift)
            expected = x[b, n] + rest[0] * y if gate else y
            assert (out[b, n] - expected).abs().max() < 1e-12


def test_it_begins_as_the_identity_and_learns_from_there():
    module, mlp = Modulation(8, 5), FeedForward(8)
    x, c = torch.randn(2, 6, 8), torch.randn(2, 5)
    assert torch.equal(module(x, c, mlp), x)
    module(x, c, mlp).square().sum().backward()
    assert module.modulation.weight.grad.abs().max() > 0
    plain = Modulation(8, gate=False)
    steered = plain(x, torch.randn(2, 8), lambda y: y)
    assert torch.allclose(steered, torch.nn.functional.layer_norm(x, (8,), eps=1e-6), atol=1e-6)
    head = torch.nn.Linear(8, 3)
    assert plain(x, torch.randn(2, 8), head).shape == (2, 6, 3)


def test_one_condition_is_one_for_all():
    module = lively(6, 4, True)
    x, c = torch.randn(2, 12, 6).double(), torch.randn(2, 4).double()
    assert torch.equal(module(x, c, torch.sin), module(x, c[:, None], torch.sin))
    assert torch.allclose(module(x, c, torch.sin), module(x, c[:, None].expand(2, 3, 4), torch.sin))
    with pytest.raises(ct.ChronotopeError, match="12 tokens are not a multiple of 5"):
        module(x, torch.randn(2, 5, 4).double(), torch.sin)


def test_times_and_labels():
    embed = TimeEmbedding(8, waves=4, scale=1000)
    t, seen = torch.rand(2, 3), []
    embed.net[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert embed(t).shape == (2, 3, 8)
    angles = torch.stack((1000 * t, 1000 * t / math.sqrt(10000)), -1)
    assert torch.allclose(seen[0], torch.cat((angles.cos(), angles.sin()), -1), atol=1e-4)
    with pytest.raises(ct.ChronotopeError, match="even number"):
        TimeEmbedding(8, waves=3)
    labels = LabelEmbedding(8, 3, dropout=0.25)
    asked = torch.randint(0, 3, (4000,))
    out = labels(asked)
    left = (out == labels.table.weight[3]).all(1)
    assert abs(float(left.float().mean()) - 0.25) < 0.03
    assert torch.equal(out[~left], labels.table.weight[asked][~left])
    assert torch.equal(labels.eval()(asked), labels.table.weight[asked])
