"""Law: stepping attention over slices of the first axis equals forward; what cannot be stepped says why."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope import Grid
from chronotope.errors import ChronotopeError
from chronotope.nn import Attention
from chronotope.nn.stepping import keeps_place
from chronotope.position import Rope
from stepping import stepped, tokens


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


PATTERNS = [
    ct.full(),
    ct.along("t"),
    ct.along("h", "w"),
    ct.along("t", "w"),
    ct.window(h=3),
    ct.window(h=3, w=(1, 0)),
    ct.window(h=1, w=1, edge="shift"),
    ct.blocks(h=2, w=2),
    ct.blocks(t=3, w=2, shift={"t": 1}),
    ct.strided(h=2),
    ct.strided(t=2),
    ct.window(t=5, w=3, dilation={"t": 2}),
    ct.sinks(3),
    ct.graph([[0], [0]], axis="h"),
    ct.predicate(lambda q, k: (q.h + k.w) % 2 == 0),
    ct.nothing(),
]
ORDERS = [
    ct.causal("t"),
    ct.causal(),
    ct.causal("t", strict=True),
    ct.window(t=(0, 0)),
    ct.window(t=(2, 0)),
    ct.window(t=(1, 0), dilation=2),
]
# Trees of indices: type-checked constructors draw random numbers, which a strategy must not.
TREES = st.recursive(
    st.sampled_from(range(len(PATTERNS))),
    lambda s: st.one_of(st.tuples(st.sampled_from("&|"), s, s), st.tuples(st.just("~"), s)),
    max_leaves=3,
)
CAUSAL = st.tuples(TREES, st.sampled_from(range(len(ORDERS))))


def pattern(tree):
    match tree:
        case int():
            return PATTERNS[tree]
        case ("~", a):
            return ~pattern(a)
        case ("&", a, b):
            return pattern(a) & pattern(b)
        case ("|", a, b):
            return pattern(a) | pattern(b)


def causal(drawn):
    """A pattern joined with an order; of a list, one for each head."""
    if isinstance(drawn, list):
        return ct.per_head([causal(one) for one in drawn])
    return pattern(drawn[0]) & ORDERS[drawn[1]]


CASES = {
    "shape": st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)),
    "where": st.one_of(CAUSAL, st.lists(CAUSAL, min_size=4, max_size=4)),
    "kv_heads": st.sampled_from([1, 2, 4]),
    "rope": st.booleans(),
    "qk_norm": st.booleans(),
    "biased": st.booleans(),
    "softcap": st.sampled_from([None, 2.0]),
    "seed": st.integers(0, 1000),
}


def check_stepping(shape, where, kv_heads, rope, qk_norm, biased, softcap, seed):
    grid, where = Grid(**dict(zip("thw", shape, strict=True))), causal(where)
    torch.manual_seed(seed)
    bias = ct.RelativeBias(4, t=3, h=1) if biased else None
    position = Rope(base=30.0) if rope else None
    layer = Attention(
        12,
        4,
        where=where,
        kv_heads=kv_heads,
        head_dim=7,
        position=position,
        qk_norm=qk_norm,
        bias=bias,
        softcap=softcap,
    ).double()
    if bias is not None:
        torch.nn.init.normal_(bias.table)
    x = tokens(grid, seed=seed)
    with torch.no_grad():
        out, state = stepped(layer, x, grid)
        close(out, layer(x, grid))
    assert state.time == grid.shape[0]


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_stepping_equals_forward(**case):
    check_stepping(**case)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(**CASES)
def test_stepping_equals_forward_at_length(**case):
    check_stepping(**case)


@pytest.mark.parametrize(
    ("where", "own_place"),
    [
        (ct.along("t") & ct.causal("t"), True),
        (ct.along("t") & ct.window(t=(1, 0), h=3), True),
        (ct.window(t=(2, 0), h=1, w=1), True),
        (ct.along("t") & ct.causal("t") & ct.causal("h", strict=True), True),
        (ct.along("t", "w") & ct.causal("t"), False),
        (ct.window(t=(2, 0), h=(1, 0)), False),
        (ct.strided(h=2, w=2) & ct.causal("t"), False),
        (ct.along("h", "w"), False),
        ((ct.along("t") | ct.along("h")) & ct.causal("t"), False),
        (ct.per_head([ct.along("t") & ct.causal("t")] * 2), False),
    ],
)
def test_place_by_place_where_no_other_place_is_seen(where, own_place):
    grid = Grid(t=4, h=3, w=2)
    assert keeps_place(where, grid.replace(t=1)) is own_place
    layer = Attention(12, 2, where=where, kv_heads=1, position=Rope(), bias=ct.Alibi(2)).double()
    x = tokens(grid)
    close(stepped(layer, x, grid)[0], layer(x, grid))


@pytest.mark.parametrize("axes", [("n",), ("y", "x"), ("a", "b", "c", "d")])
def test_any_axes_stream_on_the_first(axes):
    grid = Grid(**dict(zip(axes, (5, 2, 3, 2), strict=False)))
    layer = Attention(12, 3, where=ct.causal(axes[0]) & ct.window(**{axes[0]: 5}), position=Rope(axes[:2])).double()
    x = tokens(grid)
    close(stepped(layer, x, grid)[0], layer(x, grid))


@pytest.mark.parametrize(
    "where", [ct.along("t") & ct.causal("t"), ct.window(t=(2, 0), h=3), ct.causal("t", strict=True)]
)
def test_gradients_of_stepping_are_those_of_forward(where):
    grid = Grid(t=4, h=2, w=3)
    layer = Attention(12, 2, where=where, position=Rope(), bias=ct.RelativeBias(2, t=2), head_dim=6).double()
    x = tokens(grid).requires_grad_()
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x, grid).square().sum(), inputs)
    for a, b in zip(torch.autograd.grad(stepped(layer, x, grid)[0].square().sum(), inputs), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("where", "slices"),
    [
        (ct.window(t=(3, 0), h=3), 3),
        (ct.window(t=(2, 0), dilation=2), 4),
        (ct.along("h", "w"), 0),
        (ct.blocks(t=3) & ct.causal("t"), 2),
        (ct.per_head([ct.window(t=(1, 0)), ct.window(t=(2, 0))]), 2),
        (ct.causal("t"), 13),
        (ct.sinks(2) | ct.window(t=(1, 0)), 13),
    ],
)
def test_memory_is_bounded_by_the_horizon(where, slices):
    grid = Grid(t=13, h=2, w=2)
    layer = Attention(12, 2, where=where, position=Rope(), head_dim=6).double()
    x = tokens(grid)
    out, state = stepped(layer, x, grid)
    close(out, layer(x, grid))
    assert state.nbytes == 2 * (2 * 2 * 6 * 8) * slices * 4
    assert state.k.untyped_storage().nbytes() == state.nbytes // 2


def test_a_state_is_a_value():
    grid, one = Grid(t=4, h=2, w=2), Grid(t=1, h=2, w=2)
    layer = Attention(12, 2, where=ct.causal("t"), position=Rope()).double()
    first, second, third, fourth = tokens(grid).split(4, 1)
    _, state = layer.step(first, layer.init_state(2, one))
    once, after = layer.step(second, state)
    again, _ = layer.step(second, state)
    assert torch.equal(once, again) and state.time == 1 and after.time == 2
    twice, _ = layer.step(third.repeat_interleave(3, 0), after.repeat(3))
    single, _ = layer.step(third, after)
    close(twice, single.repeat_interleave(3, 0))
    swapped, _ = layer.step(fourth.flip(0), after.select(torch.tensor([1, 0])))
    close(swapped, layer.step(fourth, after)[0].flip(0))
    assert after.to("cpu").nbytes == after.nbytes == 2 * 2 * 2 * 8 * 6 * 8


@pytest.mark.parametrize("where", [ct.strided(t=2) & ct.causal("t"), ct.strided(t=2) & ct.along("t") & ct.causal("t")])
def test_what_is_not_seen_does_not_leak(where):
    grid = Grid(t=3, h=2, w=2)
    layer = Attention(12, 2, where=where).double()
    x = tokens(grid)
    clean, _ = stepped(layer, x, grid)
    x[:, 4:8] = torch.nan
    out, _ = stepped(layer, x, grid)
    assert out[:, 4:8].isnan().all()
    assert torch.equal(out[:, :4], clean[:, :4]) and torch.equal(out[:, 8:], clean[:, 8:])


def test_low_precision_steps():
    grid = Grid(t=3, h=2, w=2)
    layer = Attention(16, 2, where=ct.causal("t"), position=Rope(), qk_norm=True).bfloat16()
    x = tokens(grid, 16).bfloat16()
    out, _ = stepped(layer, x, grid)
    exact = layer.double()(x.double(), grid)
    error = (out.double() - exact).abs().max()
    whole = layer.bfloat16()(x, grid)
    assert out.dtype == torch.bfloat16
    assert error <= 2 * (whole.double() - exact).abs().max()


def test_stepping_under_autocast():
    grid = Grid(t=3, h=2, w=2)
    layer = Attention(16, 2, where=ct.window(t=(1, 0)), position=Rope())
    x = tokens(grid, 16).float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out, state = stepped(layer, x, grid)
        assert out.dtype == state.k.dtype == torch.bfloat16
        torch.testing.assert_close(out, layer(x, grid), rtol=0.02, atol=0.02)


def refusal(where, grid=None, **options):
    layer = Attention(12, 2, where=where, **options)
    with pytest.raises(ChronotopeError) as caught:
        layer.init_state(1, grid or Grid(t=1, h=4, w=4))
    return str(caught.value)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (None, "t=0 sees t=1"),
        (ct.along("t"), "t=0 sees t=1"),
        (ct.window(t=5, h=3), "causal('t')"),
        (ct.window(t=(0, 1), dilation=20), "t=0 sees t=20"),
        (ct.window(t=(0, 1), dilation=777), "t=0 sees t=777"),
        (ct.sinks(17) | ct.window(t=(2, 0)), "t=0 sees t=1"),
        (ct.blocks(t=40), "comes after"),
        (~ct.causal("t"), "comes after"),
        (ct.per_head([ct.causal("t"), ct.window(t=3)]), "window(t=3)"),
        (ct.window(t=5, edge="shift") & ct.causal("t"), "first 1 alone"),
        (ct.segments([0] * 48) & ct.causal("t"), "first 1 alone"),
        (ct.graph([[0], [2]], axis="t"), "outside the axis t=1"),
        (ct.predicate(lambda q, k: (k.t <= q.t) & (2 * k.t < k.grid.sizes["t"])), "depends on the length"),
        (ct.predicate(lambda q, k: k.t <= q.t + 1), "t=0 sees t=1"),
        (ct.predicate(lambda q, k: (k.t <= q.t) | (q.t == 1000)), "t=1000 sees"),
        (ct.window(x=3), "names 'x'"),
    ],
)
def test_patterns_that_cannot_be_stepped_say_why(where, words):
    message = refusal(where)
    assert words in message and "cannot be stepped" in message


def test_grids_and_layers_that_cannot_be_stepped_say_why():
    assert "Grid(t=1, h=2)" in refusal(ct.causal("t"), Grid(t=3, h=2))
    assert "prefix" in refusal(ct.causal("t"), Grid(t=1, h=2, prefix=1))
    layer = Attention(12, 2, where=ct.causal("t"))
    state = layer.init_state(1, Grid(t=1, h=2))
    with pytest.raises(ChronotopeError, match=r"expected \[B, 2, 12\]"):
        layer.step(torch.zeros(1, 3, 12), state)
    layer.where = ct.window(t=(1, 0))
    with pytest.raises(ChronotopeError, match="init_state again"):
        layer.step(torch.zeros(1, 2, 12), state)
