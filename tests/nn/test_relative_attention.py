"""Relative attention is its formula: written out over all pairs, stepped, in chunks of any size, in linear memory."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope import Grid
from chronotope.errors import ChronotopeError
from chronotope.nn import RelativeAttention, relative
from chronotope.nn.relative import Offsets, relative_attention

PATTERNS = [
    None,
    ct.causal(),
    ct.causal("t"),
    ct.window(t=(2, 0)),
    ct.window(t=3, h=3),
    ct.along("t") & ct.causal("t", strict=True),
    ct.blocks(t=2, w=2),
    ct.along("h", "w"),
    ct.strided(t=2) & ct.causal(),
    ct.nothing(),
]


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def written(q, k, v, offsets, grid, where):
    """The formula, with the vectors of all pairs at once."""
    score, places = q @ k.transpose(2, 3), grid.coords()
    for axis, one in offsets.items():
        x = places[:, grid.axes.index(axis)]
        entry = (x[None] - x[:, None] + one.before).clamp(0, one.vectors.shape[1] - 1)
        vectors = one.vectors[:, entry].expand(q.shape[1], -1, -1, -1)
        score = score + torch.einsum("bhid,hijd->bhij", q, vectors)
    mask = ct.plan(where, grid).mask()
    weights = (score / math.sqrt(q.shape[3])).masked_fill(~mask, -1e300).softmax(-1)
    return torch.where(mask.any(1)[:, None], weights @ v, 0.0)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4)),
    st.sampled_from(range(len(PATTERNS))),
    st.dictionaries(st.sampled_from("thw"), st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1),
    st.booleans(),
    st.sampled_from([1, 300, 1 << 20]),
    st.integers(0, 99),
)
def test_it_is_its_formula(shape, number, extent, shared, scored, seed):
    grid, where = Grid(**dict(zip("thw", shape, strict=True))), PATTERNS[number]
    q, k = (random(2, 3, grid.size, 5, seed=seed + i) for i in range(2))
    v = random(2, 3, grid.size, 4, seed=seed + 2)
    tables = {
        axis: random(1 if shared else 3, before + after + 1, 5, seed=seed + 3)
        for axis, (before, after) in extent.items()
    }
    offsets = {axis: Offsets(table, extent[axis][0]) for axis, table in tables.items()}
    expected = written(q, k, v, offsets, grid, where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relative, "SCORED", scored)
        out = relative_attention(q, k, v, offsets, grid=grid, where=where)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        wanted = [q, k, v, *tables.values()]
        dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for new, old in zip(
            torch.autograd.grad(out, wanted, dout), torch.autograd.grad(expected, wanted, dout), strict=True
        ):
            torch.testing.assert_close(new, old, rtol=1e-11, atol=1e-11)


def test_gradients_of_gradients():
    grid = Grid(t=3, v=2)
    q, k, v = (random(1, 1, 6, 2, seed=i) for i in range(3))
    table, other = random(1, 3, 2, seed=3), random(1, 3, 2, seed=4)

    def out(q, k, v, table, other):
        offsets = {"t": Offsets(table, 2), "v": Offsets(other, 1)}
        return relative_attention(q, k, v, offsets, grid=grid, where=ct.causal())

    assert torch.autograd.gradcheck(out, (q, k, v, table, other))
    assert torch.autograd.gradgradcheck(out, (q, k, v, table, other))


def test_where_keys_say_nothing_weights_depend_on_the_offset_alone():
    grid = Grid(t=12)
    q = torch.randn(1, 2, 1, 8).expand(1, 2, 12, 8)
    k, v = torch.zeros(1, 2, 12, 8), torch.eye(12).expand(1, 2, 12, 12)
    offsets = {"t": Offsets(torch.randn(2, 12, 8), 11)}
    score = relative_attention(q, k, v, offsets, grid=grid, where=ct.causal()).log()
    for lag in range(1, 12):  # of a row only differences of scores are known
        step = score.diagonal(-lag, 2, 3) - score.diagonal(0, 2, 3)[..., lag:]
        torch.testing.assert_close(step, step[..., :1].expand_as(step), rtol=1e-4, atol=1e-5)


def test_with_vectors_of_zero_it_is_attention():
    grid = Grid(t=20, v=4)
    q, k, v = torch.randn(3, 2, 4, 80, 16).unbind()
    offsets = {"t": Offsets(torch.zeros(4, 9, 16), 8)}
    out = relative_attention(q, k, v, offsets, grid=grid, where=ct.causal())
    torch.testing.assert_close(out, ct.attention(q, k, v, grid=grid, where=ct.causal()))


@pytest.mark.parametrize("where", [ct.causal("t", strict=True), ct.causal("t", strict=True) & ct.strided(t=2)])
def test_what_nobody_sees_cannot_leak(where):
    grid = Grid(t=5, v=2)
    mask = ct.plan(where, grid).mask()
    q, k, v = (random(1, 2, 10, 4, seed=i) for i in range(3))
    table = random(2, 5, 4, seed=3)
    offsets = {"t": Offsets(table, 4)}
    clean = relative_attention(q, k, v, offsets, grid=grid, where=where)
    grads = torch.autograd.grad(clean.sum(), [q, k, v, table])
    blind, unseen = ~mask.any(1), ~mask.any(0)
    assert blind.any() and unseen.any()
    with torch.no_grad():
        q[:, :, blind] = torch.nan
        k[:, :, unseen] = v[:, :, unseen] = torch.nan
    out = relative_attention(q, k, v, offsets, grid=grid, where=where)
    assert torch.equal(out, clean)
    assert (out[:, :, blind] == 0).all()
    for new, old in zip(torch.autograd.grad(out.sum(), [q, k, v, table]), grads, strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_its_inputs(dtype):
    grid = Grid(t=20, v=4)
    q, k, v = torch.randn(3, 2, 4, 80, 16).to(dtype).unbind()
    table = torch.randn(4, 21, 16).to(dtype)
    out = relative_attention(q, k, v, {"t": Offsets(table, 20)}, grid=grid, where=ct.causal())
    exact = written(*(x.double() for x in (q, k, v)), {"t": Offsets(table.double(), 20)}, grid=grid, where=ct.causal())
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= 2 * (exact.to(dtype).double() - exact).abs().max() + 1e-6


def test_it_learns_under_autocast():
    layer = RelativeAttention(16, 2, {"t": 4})
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 10, 16), Grid(t=10)).sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in layer.parameters())


STREAMING = [ct.causal("t"), ct.causal(), ct.window(t=(2, 0)), ct.along("t") & ct.causal("t"),
             ct.window(t=(1, 0), v=3), ct.causal("t", strict=True)]  # fmt: skip


@pytest.mark.parametrize("where", STREAMING, ids=repr)
@pytest.mark.parametrize("extent", [{"t": (3, 0)}, {"t": 9, "v": (0, 2)}], ids=repr)
def test_stepping_equals_forward(where, extent):
    grid = Grid(t=8, v=3)
    layer = RelativeAttention(12, 2, extent, where=where).double()
    x = torch.randn(2, grid.size, 12, dtype=torch.float64)
    state, out = layer.init_state(2, Grid(t=1, v=3)), []
    with torch.no_grad():
        for part in x.split(3, 1):
            before = {name: value.clone() for name, value in state.to_dict().items()}
            y, after = layer.step(part, state)
            assert all(torch.equal(value, before[name]) for name, value in state.to_dict().items())
            state = after
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), layer(x, grid), rtol=1e-10, atol=1e-10)
    horizon = where.horizon("t")
    assert state.k.shape[2] == 3 * min(8, 8 if horizon is None else horizon)


def test_a_look_ahead_cannot_be_stepped():
    with pytest.raises(ChronotopeError, match="cannot be stepped"):
        RelativeAttention(12, 2, {"t": 3}, where=ct.window(t=3)).init_state(1, Grid(t=1))
    with pytest.raises(ChronotopeError, match="'t'"):
        RelativeAttention(12, 2, {"t": 3}, where=ct.causal()).init_state(1, Grid(n=1))


def test_what_does_not_fit_is_refused():
    x, grid = torch.randn(1, 2, 6, 4), Grid(t=6)
    offsets = {"t": Offsets(torch.randn(2, 5, 4), 4)}
    with pytest.raises(ChronotopeError, match="'v'"):
        relative_attention(x, x, x, {"v": offsets["t"]}, grid=grid)
    with pytest.raises(ChronotopeError, match="give vectors of at least one axis"):
        relative_attention(x, x, x, {}, grid=grid)
    with pytest.raises(ChronotopeError, match="no prefix"):
        relative_attention(x, x, x, offsets, grid=Grid(t=5, prefix=1))
    with pytest.raises(ChronotopeError, match="2 heads of queries and 1 of keys"):
        relative_attention(x, x[:, :1], x[:, :1], offsets, grid=grid)
    with pytest.raises(ChronotopeError, match="one pattern of coordinates for all heads"):
        relative_attention(x, x, x, offsets, grid=grid, where=ct.per_head([ct.full(), ct.causal()]))
    for shape in ((3, 5, 4), (2, 5, 3)):
        with pytest.raises(ChronotopeError, match="vectors of 't' have shape"):
            relative_attention(x, x, x, {"t": Offsets(torch.randn(shape), 4)}, grid=grid)
    for extent in ({}, {"t": -1}, {"t": (2, -1)}):
        with pytest.raises(ChronotopeError, match="RelativeAttention\\(extent="):
            RelativeAttention(12, 2, extent)
    with pytest.raises(ChronotopeError, match="takes no context"):
        RelativeAttention(12, 2, {"t": 3})(torch.randn(1, 6, 12), grid, torch.randn(1, 6, 12))


SCRIPT = """
import sys, torch, chronotope as ct
from chronotope.nn.relative import Offsets, relative_attention
torch.set_num_threads(1)

def status(key):  # in bytes
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

def step(tokens):
    grid = ct.Grid(t=tokens // 4, v=4)
    q, k, v = (torch.randn(1, 4, grid.size, 64, requires_grad=True) for _ in range(3))
    t = torch.randn(4, grid.shape[0], 64, requires_grad=True)
    v4 = torch.randn(4, 7, 64, requires_grad=True)
    offsets = {"t": Offsets(t, grid.shape[0] - 1), "v": Offsets(v4, 3)}
    relative_attention(q, k, v, offsets, grid=grid, where=ct.causal()).sum().backward()

step(256)  # libraries loaded, buffers made
before = status("VmRSS")
step(int(sys.argv[1]))
print(status("VmHWM") - before)
"""


def peak(tokens):
    """Bytes above what the process held before forward and backward of so many tokens."""
    command = [sys.executable, "-c", SCRIPT, str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_peak_memory_grows_with_the_tokens():
    found = {tokens: peak(tokens) for tokens in (1024, 2048, 4096, 8192)}
    print("peak above the start:", {tokens: f"{size / 2**20:.0f} MiB" for tokens, size in found.items()})
    for tokens in (1024, 2048):  # of pairs there are 64 and 16 times as many
        assert found[8192] < 1.3 * 8192 / tokens * found[tokens]
    # One float for each pair of tokens, for one head of the four, would be more.
    assert found[8192] < 4 * 8192**2
