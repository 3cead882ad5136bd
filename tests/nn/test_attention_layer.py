"""The attention layer against attention written out."""

import pytest
import torch
from torch.nn import functional as F

import chronotope as ct
from chronotope import Grid
from chronotope.errors import ChronotopeError
from chronotope.nn import Attention
from chronotope.position import Rope
from stepping import tokens


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def written_out(layer, x, mask, source=None, q_places=None, k_places=None):
    """Separate projections, heads in a loop, a dense mask."""
    source = x if source is None else source
    d, heads, kv = layer.head_dim, layer.heads, layer.kv_heads
    sizes = [heads * d, kv * d, kv * d]
    w_q, w_k, w_v = layer.qkv.weight.split(sizes)
    b_q, b_k, b_v = (layer.qkv.bias if layer.qkv.bias is not None else layer.qkv.weight.new_zeros(sum(sizes))).split(
        sizes
    )
    outs = []
    for head in range(heads):
        own = head // (heads // kv)
        mine, theirs = slice(head * d, (head + 1) * d), slice(own * d, (own + 1) * d)
        q = x @ w_q[mine].T + b_q[mine]
        k, v = (source @ w[theirs].T + b[theirs] for w, b in ((w_k, b_k), (w_v, b_v)))
        if layer.q_norm is not None:
            q, k = rms(q, layer.q_norm.weight), rms(k, layer.k_norm.weight)
        if layer.position is not None:
            q = layer.position(q[:, None], coords=q_places)[:, 0]
            k = layer.position(k[:, None], coords=k_places)[:, 0]
        scores = q @ k.transpose(1, 2) / d**0.5
        outs.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v)
    return F.linear(torch.cat(outs, -1), layer.out.weight, layer.out.bias)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("qk_norm", "biases"), [(False, False), (True, False), (False, True)])
def test_forward_is_the_formula(kv_heads, qk_norm, biases):
    grid = Grid(t=3, h=4, w=2)
    where = ct.window(t=3, h=3) & ct.causal("t")
    layer = Attention(
        12, 4, where=where, kv_heads=kv_heads, head_dim=8, position=Rope(), qk_norm=qk_norm, biases=biases
    ).double()
    if layer.q_norm is not None:
        torch.nn.init.normal_(layer.q_norm.weight)
        torch.nn.init.normal_(layer.k_norm.weight)
    x = tokens(grid)
    places = grid.coords().double()
    expected = written_out(layer, x, ct.plan(where, grid).mask(), q_places=places, k_places=places)
    torch.testing.assert_close(layer(x, grid), expected)
    q, k, v = layer.project(x, grid)
    assert q.shape == (2, 4, 24, 8) and k.shape == v.shape == (2, kv_heads, 24, 8)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(layer.qk(x, grid), (q, k), strict=True))
    out = ct.attention(q, k, v, grid=grid, where=where)
    torch.testing.assert_close(layer.out(out.transpose(1, 2).flatten(2)), expected)
    assert (layer.qkv.bias is not None) == (layer.out.bias is not None) == biases


def test_without_a_pattern_it_is_dense_attention():
    grid = Grid(h=4, w=5, prefix=2)
    layer = Attention(12, 3).double()
    x = tokens(grid)
    q, k, v = (y.unflatten(2, (3, 4)).transpose(1, 2) for y in layer.qkv(x).chunk(3, -1))
    dense = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ layer.out.weight.T
    torch.testing.assert_close(layer(x, grid), dense)


@pytest.mark.parametrize("key_grid", [Grid(t=2, h=8), Grid(t=4, h=4), Grid(n=5), Grid(h=3)])
def test_context_is_looked_at_on_its_own_grid(key_grid):
    grid = Grid(t=4, h=4)
    where = ct.full() if key_grid.axes == ("n",) else ct.window(h=3)
    rope = Rope(("t", "h"))
    layer = Attention(12, 3, where=where, kv_heads=1, position=rope, qk_norm=True, biases=True).double()
    x, source = tokens(grid), tokens(key_grid, seed=1)
    places, key_places = rope.between(grid, key_grid)
    mask = ct.plan(where, grid, key_grid).mask()
    expected = written_out(layer, x, mask, source, places, key_places)
    torch.testing.assert_close(layer(x, grid, (source, key_grid)), expected)


def test_context_without_a_grid_lies_on_the_same_one():
    grid = Grid(t=3, h=2)
    layer = Attention(12, 3, where=ct.causal("t"), position=Rope(("t", "h"))).double()
    x, source = tokens(grid), tokens(grid, seed=1)
    torch.testing.assert_close(layer(x, grid, source), layer(x, grid, (source, grid)))
    torch.testing.assert_close(layer(x, grid, x), layer(x, grid))


def test_another_pattern_with_the_same_weights():
    grid = Grid(t=3, h=4)
    layer = Attention(12, 3, where=ct.full()).double()
    x = tokens(grid)
    dense = layer(x, grid)
    layer.where = ct.window(h=1)
    assert not torch.allclose(layer(x, grid), dense)
    layer.where = ct.full()
    torch.testing.assert_close(layer(x, grid), dense)


def test_batches_permute_and_gradients_reach_every_weight():
    grid = Grid(t=3, h=2)
    bias = ct.RelativeBias(3, t=1)
    layer = Attention(12, 3, where=ct.causal("t"), position=Rope(("t",)), qk_norm=True, bias=bias, softcap=3.0).double()
    x = tokens(grid, batch=3)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(layer(x[order], grid), layer(x, grid)[order])
    layer(x, grid).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_a_backend_by_name_runs_or_refuses():
    grid = Grid(t=3, h=2)
    x = tokens(grid)
    layer = Attention(12, 3, where=ct.causal("t"), backend="reference").double()
    named = layer(x, grid)
    layer.backend = "auto"
    torch.testing.assert_close(layer(x, grid), named)
    layer.backend = "abacus"
    with pytest.raises(ChronotopeError, match="abacus"):
        layer(x, grid)


def test_what_is_refused():
    grid = Grid(t=2, h=3)
    layer = Attention(12, 3)
    for call, words in [
        (lambda: Attention(12, 5), "dim=12 is not a multiple of heads=5"),
        (lambda: Attention(12, 4, kv_heads=3), "heads=4 is not a multiple of kv_heads=3"),
        (lambda: Attention(12, 4, position=Rope()), "head of size 3"),
        (lambda: layer(torch.zeros(1, 7, 12), grid), r"expected \[B, 6, 12\]"),
        (lambda: layer(torch.zeros(1, 6, 13), grid), r"expected \[B, 6, 12\]"),
        (lambda: layer(torch.zeros(1, 6, 12), grid, torch.zeros(1, 5, 12)), "context has shape"),
        (lambda: layer(torch.zeros(1, 6, 12), grid, (torch.zeros(1, 5, 12), Grid(n=4))), "context has shape"),
    ]:
        with pytest.raises(ChronotopeError, match=words):
            call()
