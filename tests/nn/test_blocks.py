"""Blocks, stacks, feed-forwards and patches: what they compose to, forwards and step by step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import chronotope as ct
from chronotope import Grid
from chronotope.errors import ChronotopeError
from chronotope.nn import Attention, Block, Cross, FeedForward, PatchEmbed, Stack, Unpatch
from chronotope.position import Rope

GRID = Grid(t=4, h=2, w=3)


def tokens(grid=GRID, dim=12, batch=2, seed=0):
    return torch.randn(batch, grid.size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divided(mlp="swiglu"):
    time = Attention(12, 2, where=ct.along("t") & ct.causal("t"), position=Rope(("t",)))
    space = Attention(12, 2, where=ct.along("h", "w"), position=Rope(("h", "w")))
    return Block([time, space], 12, mlp).double()


@pytest.mark.parametrize("mlp", ["swiglu", "geglu", "gelu", None])
def test_a_block_is_its_formula(mlp):
    block = divided(mlp)
    x = y = tokens()
    for norm, mixer in zip(block.norms, block.mixers, strict=True):
        y = y + mixer(F.layer_norm(y, (12,), norm.weight, norm.bias), GRID)
    if mlp:
        y = y + block.mlp(F.layer_norm(y, (12,), block.mlp_norm.weight, block.mlp_norm.bias))
    torch.testing.assert_close(block(x, GRID), y)


def test_divided_attention_sees_the_row_in_time_then_the_frame():
    block = divided(None)
    x = tokens(batch=1)
    moved = x.clone()
    moved[0, GRID.index(t=1, h=0, w=2), 0] += 1  # one channel: a norm takes out what all have in common
    changed = (block(moved, GRID) != block(x, GRID)).any(-1)[0].view(4, 6)
    assert not changed[0].any() and changed[1:].all()


def test_feed_forwards_are_their_formulas():
    x = tokens()
    swiglu, gelu = FeedForward(12, "swiglu").double(), FeedForward(12, "gelu", 2.5).double()
    gate, value = swiglu.enter.weight.chunk(2)
    torch.testing.assert_close(swiglu(x), (F.silu(x @ gate.T) * (x @ value.T)) @ swiglu.leave.weight.T)
    geglu = FeedForward(12, "geglu").double()
    geglu.load_state_dict(swiglu.state_dict())
    torch.testing.assert_close(geglu(x), (F.gelu(x @ gate.T) * (x @ value.T)) @ swiglu.leave.weight.T)
    torch.testing.assert_close(gelu(x), F.gelu(x @ gelu.enter.weight.T) @ gelu.leave.weight.T)
    assert gelu.leave.in_features == 30 and swiglu.leave.in_features == 32
    geglu = FeedForward(12, "geglu", biases=True).double()
    gate, value = geglu.enter(x).chunk(2, -1)
    torch.testing.assert_close(geglu(x), F.gelu(gate) * value @ geglu.leave.weight.T + geglu.leave.bias)
    assert geglu.leave.in_features == 32 and geglu.enter.bias is not None and swiglu.enter.bias is None


@pytest.mark.parametrize("depth", [1, 3])
def test_stepping_a_stack_equals_forward(depth):
    stack = Stack([divided() for _ in range(depth)], 12).double()
    x = tokens()
    state = stack.init_state(2, GRID.replace(t=1))
    out = []
    for part in x.split(6, 1):
        y, state = stack.step(part, state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), stack(x, GRID))
    one = 2 * 2 * 2 * 6 * 6 * 8
    assert state.nbytes == depth * 4 * one  # the spatial layer keeps nothing
    again = state.select(torch.tensor([0])).repeat(2).to("cpu")
    y, _ = stack.step(x[:1, :6].repeat(2, 1, 1), again)
    torch.testing.assert_close(y[:1], stack.step(x[:, :6], state)[0][:1])


def test_context_goes_to_cross_mixers_only():
    block = Block([Attention(12, 2), Cross(Attention(12, 2))], 12, mlp=None).double()
    x, text = tokens(), tokens(Grid(n=5), seed=1)
    y = x + block.mixers[0](block.norms[0](x), GRID)
    expected = y + block.mixers[1].mixer(block.norms[1](y), GRID, (text, Grid(n=5)))
    stack = Stack([block], 12).double()
    torch.testing.assert_close(block(x, GRID, (text, Grid(n=5))), expected)
    torch.testing.assert_close(stack(x, GRID, (text, Grid(n=5))), F.layer_norm(expected, (12,)))
    with pytest.raises(ChronotopeError, match="no context"):
        block(x, GRID)
    block.mixers[0].where = ct.causal("t")
    with pytest.raises(ChronotopeError, match="cannot be stepped"):
        block.init_state(1, GRID.replace(t=1))
    with pytest.raises(ChronotopeError, match="cannot be stepped"):
        block.mixers[1].step(x, None)


@settings(max_examples=25, deadline=None)
@given(grid=st.tuples(*[st.integers(1, 3)] * 3), patch=st.tuples(*[st.integers(1, 3)] * 3), channels=st.integers(1, 3))
def test_patches_come_back(grid, patch, channels):
    (t, h, w), (pt, ph, pw) = grid, patch
    dim = channels * pt * ph * pw
    clips = torch.randn(2, t * pt, channels, h * ph, w * pw)
    embed, unpatch = PatchEmbed(dim, patch, channels), Unpatch(dim, patch, channels)
    for layer in (embed.project, unpatch.project):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    x, where = embed(clips)
    assert where == Grid(t=t, h=h, w=w) and x.shape == (2, where.size, dim)
    assert torch.equal(unpatch(x, where), clips)
    first = clips[0, (t - 1) * pt :, :, :ph, (w - 1) * pw :].transpose(0, 1).flatten()
    assert torch.equal(x[0, where.index(t=t - 1, h=0, w=w - 1)], first)


def test_patches_between_two_norms():
    embed, clips = PatchEmbed(5, (2, 2, 3), 2, norm=True), torch.randn(1, 2, 2, 2, 3)
    before, matrix, after = embed.project
    for norm in (before, after):
        torch.nn.init.normal_(norm.weight)
    flat = F.layer_norm(clips.transpose(1, 2).flatten(), (24,), before.weight, before.bias)
    expected = F.layer_norm(matrix.weight @ flat + matrix.bias, (5,), after.weight, after.bias)
    torch.testing.assert_close(embed(clips)[0][0, 0], expected)


def test_what_is_refused():
    for call, words in [
        (lambda: Block([], 12), "at least one mixer"),
        (lambda: Block([Attention(12, 2)], 12, mlp="relu"), "swiglu, geglu, gelu"),
        (lambda: FeedForward(2, "gelu", 0.1), "dim \\* ratio"),
        (
            lambda: PatchEmbed(8, 4)(torch.zeros(1, 2, 1, 8, 9)),
            "w=9 is not a multiple of the patch size 4.*crop or pad to 8",
        ),
        (lambda: PatchEmbed(8, (2, 4, 4))(torch.zeros(1, 3, 1, 8, 8)), "t=3"),
        (lambda: PatchEmbed(8, 4, 3)(torch.zeros(1, 2, 1, 8, 8)), r"expected \[B, T, 3, H, W\]"),
        (lambda: PatchEmbed(8, 0), "1 or more"),
        (lambda: PatchEmbed(8, (1, 2, 0)), "1 or more"),
        (lambda: Unpatch(8, 2)(torch.zeros(1, 5, 8), GRID), "5 tokens"),
        (lambda: Unpatch(8, 2)(torch.zeros(1, 4, 8), Grid(n=4)), "three axes"),
    ]:
        with pytest.raises(ChronotopeError, match=words):
            call()
