"""Routes: what is chosen, that it is what is computed, and what must not influence it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import brute_force
import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, composite
from torch import Tensor

import chronotope as ct
from attend import on_cpu
from chronotope.grid import Coords
from chronotope.planning import resolve
from chronotope.planning.arrow import arrow
from strategies import build, grid_pairs, grids

pytestmark = pytest.mark.usefixtures("poisoned")
LAW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
JOIN: dict[str, Callable[[ct.Pattern, ct.Pattern], ct.Pattern]] = {
    "r": lambda r, p: r,
    "r & p": lambda r, p: r & p,
    "r | p": lambda r, p: r | p,
    "(r & p) | sinks": lambda r, p: (r & p) | ct.sinks(2),
    "~r": lambda r, p: ~r,
    "~r & p": lambda r, p: ~r & p,
    "two routes": lambda r, p: (r & p) | ct.route.top_blocks(1, **dict.fromkeys(("t",), 2)),
}


@composite
def sizes(draw: DrawFn, grid: ct.Grid) -> dict[str, int]:
    """A block on some axes."""
    some = draw(st.lists(st.sampled_from(grid.axes), min_size=1, max_size=3, unique=True))
    return {axis: draw(st.integers(1, 5)) for axis in some}


@composite
def beside(draw: DrawFn, grid: ct.Grid, key_grid: ct.Grid) -> str:
    """A primitive pattern."""
    axis = draw(st.sampled_from([axis for axis in grid.axes if axis in key_grid.axes] or list(grid.axes)))
    size = draw(st.sampled_from([3, 5, (2, 0), (1, 2)]))
    return draw(
        st.sampled_from(
            ["full()", "causal()", f"causal({axis!r})", f"along({axis!r})", f"window({axis}={size})", "sinks(4)"]
        )
    )


@dataclass(frozen=True)
class Spec:
    """What a route is made of."""

    kind: str
    keep: float | int
    block: dict[str, int]
    queries: dict[str, int] | None

    def make(self) -> ct.Pattern:
        cut = ct.route.Cut.of("test", self.block, self.queries)
        match self.kind:
            case "best":
                return ct.route.top_blocks(self.keep, queries=self.queries, **self.block)
            case "mass":
                return ct.route.top_blocks(mass=0.5, queries=self.queries, **self.block)
            case "max":
                return ct.route.Blockwise(cut, ct.route.TopK(self.keep), ct.route.Max(), ct.route.Cosine())
            case "hashed":
                few = ct.route.Mass(0.7, self.keep)
                return ct.route.Blockwise(cut, few, ct.route.Mean(normalized=True), ct.route.Hashed(16))
            case _:
                return ct.route.Blockwise(cut, ct.route.Sampled(self.keep, seed=3), ct.route.Middle())


@composite
def routes(draw: DrawFn, grid: ct.Grid, key_grid: ct.Grid) -> Spec:
    """Some route."""
    block = draw(sizes(key_grid if set(key_grid.axes) <= set(grid.axes) else grid))
    kind = draw(st.sampled_from(["best", "mass", "max", "hashed", "sampled"]))
    return Spec(kind, draw(st.sampled_from([1, 2, 0.3, 0.6, 1.0])), block, draw(st.one_of(st.none(), sizes(grid))))


def numbers(
    grid: ct.Grid, key_grid: ct.Grid, seed: int, heads: tuple[int, int] = (4, 2), **kwargs: Any
) -> list[Tensor]:
    """q, k, v of two batch elements."""
    rng = torch.Generator().manual_seed(seed)
    shapes = ((heads[0], grid.size, 6), (heads[1], key_grid.size, 6), (heads[1], key_grid.size, 3))
    return [torch.randn(2, *shape, generator=rng, **({"dtype": torch.float64} | kwargs)) for shape in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """(out, lse) by the formula."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]) @ v, lse


@LAW
@given(st.data())
def test_every_backend_computes_what_was_chosen(data: st.DataObject) -> None:
    grid, key_grid = data.draw(grid_pairs(36))
    route, pattern = data.draw(routes(grid, key_grid)).make(), build(data.draw(beside(grid, key_grid)))
    join = data.draw(st.sampled_from(sorted(JOIN)))
    where = JOIN[join](route, pattern)
    try:
        where.check(grid, key_grid)
    except ct.ChronotopeError:  # an axis that one of the grids lacks
        return
    x = numbers(grid, key_grid, data.draw(st.integers(0, 99)))
    mask = where.select(*x[:2], grid, key_grid)
    exact = [y.requires_grad_() for y in x]
    out, lse = dense(*exact, mask)
    seen = lse != -torch.inf
    dout, dlse = torch.randn_like(out), torch.where(seen, torch.randn_like(lse), 0.0)
    expected = torch.autograd.grad([out, torch.where(seen, lse, 0.0)], exact, [dout, dlse])
    for backend in on_cpu():
        dtype, bound = (torch.float32, 2e-4) if backend == "native" else (torch.float64, 1e-9)
        own = [y.detach().to(dtype).requires_grad_() for y in x]
        if dtype == torch.float32 and not torch.equal(where.select(*own[:2], grid, key_grid), mask):
            continue  # two scores closer than float32 can tell
        found = ct.attention(*own, grid=grid, key_grid=key_grid, where=where, return_lse=True, backend=backend)
        grads = torch.autograd.grad(found, own, [dout.to(dtype), dlse.to(dtype)])
        for got, want in zip((*found, *grads), (out, lse, *expected), strict=True):
            assert torch.allclose(got.double(), want, atol=bound, rtol=bound), backend


class Nearness(ct.Bias):
    """A bias that gives no tables."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.weight = heads, torch.nn.Parameter(torch.arange(1.0, heads + 1).double())

    def check(self, axes: tuple[str, ...]) -> None:
        return None

    def score(self, q: Coords, k: Coords) -> Tensor:
        apart = (k.axes[k.grid.axes[0]] - q.axes.get(k.grid.axes[0], q.place)).double()
        return self.weight.view(-1, *[1] * apart.ndim) / (1 + apart.abs())


def some_bias(kind: str, grid: ct.Grid, key_grid: ct.Grid, rng: torch.Generator) -> ct.Bias | Tensor:
    """A bias for four heads."""
    shared = [axis for axis in grid.axes if axis in key_grid.axes]
    if kind == "relative" and shared:
        out = ct.RelativeBias(4, **dict.fromkeys(shared[:2], 2)).double()
        torch.nn.init.normal_(out.table, generator=rng)
        return out
    if kind == "alibi" and shared:
        return ct.Alibi(4, axes=shared[0], learned=True).double()
    if kind == "no tables":
        return Nearness(4)
    shape = [size if torch.rand((), generator=rng) < 0.6 else 1 for size in (2, 4, grid.size, key_grid.size)]
    return torch.randn(shape[int(shape[0] == 1) :], generator=rng, dtype=torch.float64, requires_grad=True)


@LAW
@given(st.data(), st.sampled_from(["relative", "alibi", "no tables", "tensor"]))
def test_a_bias_joins_what_was_chosen(data: st.DataObject, kind: str) -> None:
    grid, key_grid = data.draw(grid_pairs(30))
    route = data.draw(routes(grid, key_grid)).make()
    where = ct.per_head([route, route | ct.sinks(1), route, ct.causal()]) if data.draw(st.booleans()) else route
    try:
        where.check(grid, key_grid)
    except ct.ChronotopeError:  # an axis that one of the grids lacks
        return
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    bias = some_bias(kind, grid, key_grid, rng)
    x = [y.requires_grad_() for y in numbers(grid, key_grid, 1)]
    given_ = [bias] if isinstance(bias, Tensor) else list(bias.parameters())
    places = torch.arange(grid.size)[:, None], torch.arange(key_grid.size)[None]
    added = bias if isinstance(bias, Tensor) else bias(Coords.of(grid, places[0]), Coords.of(key_grid, places[1]))
    out, lse = dense(*x, where.select(*x[:2], grid, key_grid), added)
    dout = torch.randn(out.shape, generator=rng, dtype=torch.float64)
    expected = torch.autograd.grad(out, [*x, *given_], dout)
    for backend in ("torch", "reference"):
        found = ct.attention(*x, grid=grid, key_grid=key_grid, where=where, bias=bias, return_lse=True, backend=backend)
        grads = torch.autograd.grad(found[0], [*x, *given_], dout)
        for got, want in zip((*found, *grads), (out, lse, *expected), strict=True):
            assert torch.allclose(got, want, atol=1e-9, rtol=1e-9), backend


def test_a_kernel_that_cannot_add_the_bias_says_so() -> None:
    grid = ct.Grid(n=8)
    x = numbers(grid, grid, 0, dtype=torch.float32)
    with pytest.raises(ct.UnsupportedError, match="RelativeBias beside a route gives no table"):
        bias = ct.RelativeBias(4, n=2)
        ct.attention(*x, grid=grid, where=ct.route.top_blocks(1, n=2), bias=bias, backend="native")


@LAW
@given(st.data())
def test_top_blocks_chooses_the_best(data: st.DataObject) -> None:
    grid, key_grid = data.draw(grid_pairs(30))
    block, queries = data.draw(sizes(key_grid)), data.draw(sizes(grid))
    pattern, keep = build(data.draw(beside(grid, key_grid))), data.draw(st.sampled_from([1, 2, 0.3, 0.6, 1.0]))
    q, k, _ = numbers(grid, key_grid, data.draw(st.integers(0, 99)))
    where = ct.route.top_blocks(keep, queries=queries, **block) & pattern
    try:
        where.check(grid, key_grid)
    except ct.ChronotopeError:
        return
    order = arrow(pattern, grid, key_grid)
    visible = brute_force.mask_of(pattern, grid, key_grid)
    found = where.select(q, k, grid, key_grid)
    for batch, head in ((0, 0), (1, 3)):
        chosen = brute_force.top_blocks(
            q[batch, head], k[batch, head // 2], grid, key_grid, pattern, order, keep, block, queries
        )
        assert torch.equal(found[batch, head], chosen & visible)


@LAW
@given(st.data())
def test_nothing_from_the_future_influences_a_choice(data: st.DataObject) -> None:
    grid = data.draw(grids(40, ("t", "h"))).replace(prefix=0)
    route = data.draw(routes(grid, grid)).make()
    causal = [
        route & ct.causal("t"),
        route & ct.causal(),
        route & ct.window(t=(2, 0)),
        (route & ct.causal("t")) | ct.window(t=(1, 0)),
        route & ct.causal("t") & ct.window(h=3),
        ~route & ct.causal("t"),
    ]
    where = causal[data.draw(st.integers(0, len(causal) - 1))]
    cut = data.draw(st.integers(0, grid.sizes["t"]))
    past = grid.coords()[:, 0] < cut
    before = numbers(grid, grid, 0)
    after = [torch.where(past[:, None], x, 7 * torch.randn_like(x)) for x in before]
    old, new = (where.select(*x[:2], grid) for x in (before, after))
    assert torch.equal(old[:, :, past], new[:, :, past])
    outs = [ct.attention(*x, grid=grid, where=where) for x in (before, after)]
    assert torch.allclose(outs[0][:, :, past], outs[1][:, :, past], atol=1e-12)


@LAW
@given(st.data())
def test_keep_all_is_the_pattern(data: st.DataObject) -> None:
    grid, key_grid = data.draw(grid_pairs(36))
    pattern, block = build(data.draw(beside(grid, key_grid))), data.draw(sizes(key_grid))
    route = ct.route.top_blocks(1.0, **block)
    try:
        (route & pattern).check(grid, key_grid)
    except ct.ChronotopeError:
        return
    q, k, v = numbers(grid, key_grid, 1)
    found = ct.attention(q, k, v, grid=grid, key_grid=key_grid, where=route & pattern)
    assert torch.allclose(found, ct.attention(q, k, v, grid=grid, key_grid=key_grid, where=pattern), atol=1e-12)
    visible = brute_force.mask_of(pattern, grid, key_grid)
    few = (ct.route.top_blocks(1, **block) & pattern).select(q, k, grid, key_grid)
    assert not (few & ~visible).any()
    assert grid != key_grid or few.diagonal(dim1=2, dim2=3).equal(visible.diagonal().expand(2, 4, -1))


def test_each_batch_element_and_head_chooses_for_itself() -> None:
    grid, where = ct.Grid(t=4, h=5, w=3), ct.route.top_blocks(2, t=2, h=2) & ct.causal("t")
    q, k, v = numbers(grid, grid, 2)
    out = ct.attention(q, k, v, grid=grid, where=where)
    for batch in range(2):
        for head in range(4):
            one = (q[batch, head], k[batch, head // 2], v[batch, head // 2])
            alone = ct.attention(*(x[None, None] for x in one), grid=grid, where=where)
            assert torch.allclose(out[batch, head], alone[0, 0], atol=1e-12)


def test_heads_may_have_routes_and_patterns_of_their_own() -> None:
    grid = ct.Grid(t=4, h=6)
    route = ct.route.top_blocks(1, t=2, h=3)
    where = ct.per_head([route, ct.window(t=3), route & ct.causal("t"), ct.full()])
    q, k, v = numbers(grid, grid, 3)
    mask = where.select(q, k, grid)
    assert torch.allclose(ct.attention(q, k, v, grid=grid, where=where), dense(q, k, v, mask)[0], atol=1e-12)
    assert mask[:, 3].all() and mask[0, 1].equal(brute_force.mask_of(ct.window(t=3), grid, grid))


def test_the_same_seed_draws_the_same() -> None:
    grid = ct.Grid(n=64)
    q, k, _ = numbers(grid, grid, 4)

    def drawn(seed: int) -> Tensor:
        cut = ct.route.Cut.of("test", {"n": 4})
        return ct.route.Blockwise(cut, ct.route.Sampled(4, seed=seed)).select(q, k, grid)

    assert drawn(0).equal(drawn(0)) and not drawn(0).equal(drawn(1))


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_nan_in_what_nobody_may_see_changes_nothing(backend: str) -> None:
    if backend not in on_cpu():
        pytest.skip("not on this machine")
    grid, where = ct.Grid(t=4, h=8), ct.route.top_blocks(2, t=2, h=4) & ct.causal("t", strict=True)
    q, k, v = numbers(grid, grid, 5, dtype=torch.float32)
    last = grid.coords()[:, 0] == 3  # no later frame looks at it
    spoiled = [torch.where(last[:, None], torch.nan, x) for x in (k, v)]
    clean = [torch.where(last[:, None], 0.0, x) for x in (k, v)]
    results = [ct.attention(q, *x, grid=grid, where=where, backend=backend) for x in (spoiled, clean)]
    assert torch.equal(*results) and not results[0].isnan().any()


def test_a_gradient_of_gradients() -> None:
    grid, where = ct.Grid(n=10), ct.route.top_blocks(2, n=3) & ct.causal()
    q, k, v = (x[:1, :2].requires_grad_() for x in numbers(grid, grid, 6, heads=(2, 2)))
    assert torch.autograd.gradgradcheck(lambda *x: ct.attention(*x, grid=grid, where=where, backend="torch"), (q, k, v))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler itself, where the graph breaks
def test_in_a_compiled_model() -> None:
    grid = ct.Grid(t=4, h=4)
    layer = ct.nn.Attention(16, 2, where=ct.route.top_blocks(2, t=2, h=2) & ct.causal("t"))
    x = torch.randn(2, grid.size, 16)
    # What checks the types of arguments in tests is no part of what is compiled.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        compiled = torch.compile(layer, backend="eager")
        assert torch.allclose(compiled(x, grid), layer(x, grid), atol=1e-6)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_one_block_is_not_all_of_them() -> None:
    grid = ct.Grid(n=12)
    q, k, _ = numbers(grid, grid, 10)
    one, every = ct.route.top_blocks(1, n=3), ct.route.top_blocks(1.0, n=3)
    assert one != every and len({one, every}) == 2
    assert (one | every).select(q, k, grid).all() and not (one & every).select(q, k, grid).all()
    assert ct.route.top_blocks(mass=0.5, keep=1, n=3) != ct.route.top_blocks(mass=0.5, keep=1.0, n=3)


def test_given_choices() -> None:
    grid = ct.Grid(n=12)
    q, k, v = numbers(grid, grid, 7, heads=(2, 2))
    table = torch.rand(2, 2, 4, 4) < 0.5
    index = torch.where(table, torch.arange(4).expand_as(table), -1)
    by_table, by_index = ct.route.chosen(table, n=3), ct.route.chosen(index, n=3)
    expected = table.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert by_table.select(q, k, grid).equal(expected) and by_index.select(q, k, grid).equal(expected)
    tokens = ct.route.by(lambda q, k, sight: (q @ k.transpose(-1, -2)).topk(3, dim=-1).indices, n=1)
    assert tokens.select(q, k, grid).sum(-1).eq(3).all()
    out, _ = dense(q, k, v, tokens.select(q, k, grid))
    assert torch.allclose(ct.attention(q, k, v, grid=grid, where=tokens), out, atol=1e-12)


def test_pairs_held_grow_with_what_is_kept() -> None:
    held = []
    for n in (1024, 2048, 4096):
        grid = ct.Grid(n=n)
        q, k, _ = numbers(grid, grid, 8, heads=(1, 1), dtype=torch.float32)
        held.append(len(resolve(ct.route.top_blocks(4, n=32), q, k, grid, grid).pair))
    assert held[1] == 2 * held[0] and held[2] == 4 * held[0]


GRID = ct.Grid(t=4, h=4)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no block": (lambda: ct.route.top_blocks(), "name the blocks"),
    "a block of 0": (lambda: ct.route.top_blocks(t=0), "t=0"),
    "keep of 0": (lambda: ct.route.top_blocks(0, t=2), "keep=0"),
    "keep of 1.5": (lambda: ct.route.top_blocks(1.5, t=2), "keep=1.5"),
    "mass of 2": (lambda: ct.route.top_blocks(mass=2, t=2), "mass=2"),
    "an unknown axis": (lambda: attend(ct.route.top_blocks(x=2)), "'x'"),
    "a plan": (lambda: ct.plan(ct.route.top_blocks(t=2), GRID), "without them"),
    "other heads": (lambda: attend(ct.per_head([ct.route.top_blocks(t=2)] * 3)), "3 heads"),
    "a wrong table": (lambda: attend(ct.route.chosen(torch.ones(2, 2, 3, 2, dtype=torch.bool), t=2)), "expected"),
    "wrong numbers": (lambda: attend(ct.route.chosen(torch.full((1, 1, 2, 1), 7), t=2)), "0 to 1"),
}


def attend(where: ct.Pattern, **kwargs: Any) -> Tensor:
    q, k, v = numbers(GRID, GRID, 0, heads=(2, 2), dtype=torch.float32)
    return ct.attention(q, k, v, grid=GRID, where=where, **kwargs)


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_named(name: str) -> None:
    make, text = WRONG[name]
    with pytest.raises(ct.ChronotopeError, match=text):
        make()
