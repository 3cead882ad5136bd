"""Two streams: joint attention over both, exchange by cross-attention, and who sees what."""

import pytest
import torch
from torch.nn import functional as F

import chronotope as ct
from chronotope import Grid, Rope
from chronotope.errors import ChronotopeError
from chronotope.nn import Attention, Block, Cross, Exchange, JointBlock, Streams

VIDEO, TEXT = Grid(t=3, h=2, w=2), Grid(n=5)


def tokens(grid, dim, seed=0):
    return torch.randn(2, grid.size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def joint(where=None, position=None, **drops):
    torch.manual_seed(0)
    video = Attention(12, 2, where=where, position=position)
    return JointBlock(video, Attention(8, 2, head_dim=6, position=Rope("n")), **drops).double()


def by_hand(block, x, y, mask=None):
    """Softmax over all tokens of both streams, text first."""
    parts = []
    for layer, norm, stream, grid in zip(block.layers, block.norms, (x, y), (VIDEO, TEXT), strict=True):
        parts.append(layer.project(norm(stream), grid))
    q, k, v = (torch.cat((b, a), 2) for a, b in zip(*parts, strict=True))
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    out = []
    for i, (stream, part) in enumerate(((x, seen[:, 5:]), (y, seen[:, :5]))):
        stream = stream + block.layers[i].out(part)
        out.append(stream + block.mlps[i](block.mlp_norms[i](stream)))
    return out


def test_joint_attention_is_one_softmax_over_both_streams():
    block, x, y = joint(position=Rope()), tokens(VIDEO, 12), tokens(TEXT, 8, 1)
    for got, expected in zip(block(x, VIDEO, y, TEXT), by_hand(block, x, y), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_pattern_holds_among_tokens_of_the_first_stream():
    block, x, y = joint(ct.along("h", "w")), tokens(VIDEO, 12), tokens(TEXT, 8, 1)
    mask = torch.ones(17, 17, dtype=torch.bool)
    frame = VIDEO.coords()[:, 0]
    mask[5:, 5:] = frame[:, None] == frame
    for got, expected in zip(block(x, VIDEO, y, TEXT), by_hand(block, x, y, mask), strict=True):
        torch.testing.assert_close(got, expected)


def test_places_of_both_streams_lie_on_the_grid_of_the_first():
    sound = Grid(t=6)
    block = JointBlock(*(Attention(12, 2, position=Rope("t")) for _ in range(2))).double()
    x, y = tokens(Grid(t=3), 12), tokens(sound, 12, 1)
    x_first, _ = block(x, Grid(t=3), y, sound)
    layers, norms = block.layers, block.norms
    q, k, v = layers[0].project(norms[0](x), Grid(t=3))
    at = (torch.arange(6.0) + 0.5) / 2 - 0.5
    _, k_sound, v_sound = layers[1].project(norms[1](y), sound, coords={"t": at})
    seen = F.scaled_dot_product_attention(q, torch.cat((k_sound, k), 2), torch.cat((v_sound, v), 2))
    expected = x + layers[0].out(seen.transpose(1, 2).flatten(2))
    torch.testing.assert_close(x_first, expected + block.mlps[0](block.mlp_norms[0](expected)))


def test_prefix_tokens_of_the_first_stream_stay_with_it():
    grid = Grid(t=2, h=2, prefix=1)
    block = joint(ct.along("t"))
    x, y = tokens(grid, 12), tokens(TEXT, 8, 1)
    out = block(x, grid, y, TEXT)
    moved = x.clone()
    moved[:, 0, 0] += 1
    changed = block(moved, grid, y, TEXT)
    assert bool((changed[0] != out[0]).any(-1).all()) and bool((changed[1] != out[1]).any(-1).all())


def crossing(seed=0, dims=(12, 12)):
    torch.manual_seed(seed)
    return [Block([Cross(Attention(dim, 2))]).double() for dim in dims]


def test_an_exchange_shows_each_stream_the_other_as_it_came_in():
    first, second = crossing()
    x, y, other = tokens(VIDEO, 12), tokens(TEXT, 12, 1), TEXT
    got = Streams([Exchange(first, second)])(x, VIDEO, y, other)
    torch.testing.assert_close(got[0], first(x, VIDEO, (y, other)))
    torch.testing.assert_close(got[1], second(y, other, (x, VIDEO)))
    turns = Streams([Exchange(first, None), Exchange(None, second)])(x, VIDEO, y, other)
    torch.testing.assert_close(turns[0], got[0])
    torch.testing.assert_close(turns[1], second(y, other, (got[0], VIDEO)))
    assert not torch.allclose(turns[1], got[1])


def test_queries_swapped_between_space_and_time_within_windows():
    """Both streams on one grid; each asks the other inside of its window: no further token has a part in it."""
    near = ct.blocks(t=2, h=1)
    first, second = (Block([Cross(Attention(12, 2, where=near))]).double() for _ in range(2))
    space, time = tokens(VIDEO, 12), tokens(VIDEO, 12, 1)
    layer = Streams([Exchange(first, None), Exchange(None, second)])
    out = layer(space, VIDEO, time, VIDEO)
    moved = time.clone()
    moved[:, VIDEO.index(t=2, h=0, w=0), 0] += 1
    after = layer(space, VIDEO, moved, VIDEO)
    changed = (after[0] != out[0]).any(-1)[0].view(VIDEO.shape)
    assert changed[2, 0].all() and int(changed.sum()) == 2


def test_gradients_cross_over():
    streams = Streams([joint()])
    x, y = tokens(VIDEO, 12).requires_grad_(), tokens(TEXT, 8, 1).requires_grad_()
    for stream, other in ((0, y), (1, x)):
        (grad,) = torch.autograd.grad(streams(x, VIDEO, y, TEXT)[stream].square().sum(), other)
        assert bool(grad.ne(0).any(-1).all())


def test_drops_are_those_of_a_block():
    block, x, y = joint(dropout=0.5, drop_path=0.5), tokens(VIDEO, 12), tokens(TEXT, 8, 1)
    assert not torch.equal(block.train()(x, VIDEO, y, TEXT)[0], block(x, VIDEO, y, TEXT)[0])
    for a, b in zip(block.eval()(x, VIDEO, y, TEXT), joint()(x, VIDEO, y, TEXT), strict=True):
        torch.testing.assert_close(a, b)


def test_heads_that_differ_are_refused():
    with pytest.raises(ChronotopeError, match=r"\(2, 2, 6\) and \(2, 2, 4\)"):
        JointBlock(Attention(12, 2), Attention(8, 2))
