"""The one call: the dense limit, what must not matter (batch, packing, tiles, layout), heads, backends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import chronotope as ct
from attend import close, on_cpu
from chronotope.kernels import BACKENDS as KERNELS
from strategies import build

BACKENDS = pytest.mark.parametrize("backend", on_cpu())
GRID = ct.Grid(t=3, h=5, w=4, prefix=1)
NEAR = ct.window(t=3, h=3, w=3) & ct.causal("t")


@pytest.fixture(autouse=True)
def as_exact_as_it_gets(request: pytest.FixtureRequest) -> Iterator[None]:
    """Numbers are float64, or float32 where the backend takes no more."""
    name = request.node.callspec.params.get("backend", "torch") if hasattr(request.node, "callspec") else "torch"
    able = torch.float64 in KERNELS[name].dtypes if name in KERNELS else True
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if able else torch.float32)
    yield
    torch.set_default_dtype(before)


def tensors(
    heads: int = 4, key_heads: int = 4, batch: int = 2, grid: ct.Grid = GRID, keys: ct.Grid | None = None, seed: int = 0
) -> list[Tensor]:
    torch.manual_seed(seed)
    n_key = (keys or grid).size
    shapes = [(heads, grid.size), (key_heads, n_key), (key_heads, n_key)]
    return [torch.randn(batch, h, n, 8, requires_grad=True) for h, n in shapes]


def same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Equal, with equal gradients."""
    close(found.detach(), expected.detach())
    dout = torch.randn_like(expected)
    for x, y in zip(torch.autograd.grad(found, inputs, dout), torch.autograd.grad(expected, inputs, dout), strict=True):
        close(x, y)


@BACKENDS
@pytest.mark.parametrize(
    "where", [None, ct.full(), ~ct.nothing(), ct.along("t", "h", "w"), ct.window(t=5, h=9, w=7), ct.sinks(60)], ids=str
)
def test_the_dense_limit(backend: str, where: ct.Pattern | None) -> None:
    q, k, v = tensors()
    found = ct.attention(q, k, v, grid=GRID, where=where, backend=backend)
    same(found, F.scaled_dot_product_attention(q, k, v), [q, k, v])


@BACKENDS
def test_causal_order_is_that_of_torch(backend: str) -> None:
    grid = ct.Grid(t=3, h=5)
    q, k, v = tensors(grid=grid)
    found = ct.attention(q, k, v, grid=grid, where=ct.causal(), backend=backend)
    same(found, F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v])


@BACKENDS
@pytest.mark.parametrize(
    "text",
    [
        "window(t=3, h=3)",
        "along('t')",
        "along('h', 'w')",
        "causal()",
        "blocks(t=2, h=2, w=2)",
        "~strided(h=2) | sinks(3)",
    ],
)
def test_any_pattern_is_its_mask(backend: str, text: str) -> None:
    q, k, v = tensors(key_heads=2)
    mask = ct.plan(build(text), GRID).mask()
    found = ct.attention(q, k, v, grid=GRID, where=build(text), scale=0.4, backend=backend)
    same(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.4, enable_gqa=True), [q, k, v])


@BACKENDS
def test_permuting_the_batch_permutes_the_result(backend: str) -> None:
    q, k, v = tensors(batch=5)
    order = torch.randperm(5)
    whole = ct.attention(q, k, v, grid=GRID, where=NEAR, backend=backend)
    same(ct.attention(q[order], k[order], v[order], grid=GRID, where=NEAR, backend=backend), whole[order], [q, k, v])


@BACKENDS
def test_packed_equals_separate(backend: str) -> None:
    lengths = [7, 1, 13, 4]
    grid = ct.Grid(n=sum(lengths))
    q, k, v = tensors(grid=grid, key_heads=2)
    ids = [i for i, n in enumerate(lengths) for _ in range(n)]
    packed = ct.attention(q, k, v, grid=grid, where=ct.segments(ids) & ct.causal(), backend=backend)
    parts = [
        ct.attention(*pieces, grid=ct.Grid(n=n), where=ct.causal(), backend=backend)
        for n, *pieces in zip(lengths, *(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    ]
    same(packed, torch.cat(parts, 2), [q, k, v])


@pytest.mark.parametrize(
    "tile", [{}, {"t": 1, "h": 1, "w": 1}, {"t": 2, "h": 3, "w": 4}, {"t": 3, "h": 2, "w": 3}, {"w": 1}], ids=str
)
@pytest.mark.parametrize("where", [NEAR, ct.along("t") | ct.along("h", "w"), ~ct.blocks(t=2, h=2)], ids=str)
def test_nothing_depends_on_the_tile(tile: dict[str, int], where: ct.Pattern) -> None:
    q, k, v = tensors()
    planned = ct.plan(where, GRID, heads=4, tile=tile)
    assert planned.tile == GRID.sizes | tile
    expected = ct.attention(q, k, v, grid=GRID, where=where, backend="reference")
    same(ct.attention(q, k, v, grid=GRID, where=planned, backend="torch"), expected, [q, k, v])


@BACKENDS
def test_a_plan_serves_any_number_of_heads(backend: str) -> None:
    q, k, v = tensors(key_heads=2)
    expected = ct.attention(q, k, v, grid=GRID, where=NEAR, backend=backend)
    for heads in (1, 2, 4, 8):
        found = ct.attention(q, k, v, grid=GRID, where=ct.plan(NEAR, GRID, heads=heads), backend=backend)
        assert torch.equal(found, expected)


@BACKENDS
def test_grouped_heads_share_keys_in_order(backend: str) -> None:
    q, k, v = tensors(heads=6, key_heads=2)
    expected = ct.attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), grid=GRID, where=NEAR, backend=backend
    )
    same(ct.attention(q, k, v, grid=GRID, where=NEAR, backend=backend), expected, [q, k, v])


@BACKENDS
def test_each_head_has_its_pattern(backend: str) -> None:
    each = [NEAR, ct.along("t"), NEAR, ct.nothing(), ct.causal(), ct.full()]
    q, k, v = tensors(heads=6, key_heads=2)
    table = ct.RelativeBias(6, t=1)
    torch.nn.init.normal_(table.table)
    whole = ct.attention(q, k, v, grid=GRID, where=ct.per_head(each), bias=table, backend=backend)
    parts = []
    for head, where in enumerate(each):
        own = ct.RelativeBias(1, t=1)
        own.table.data.copy_(table.table.data[head : head + 1])
        x, y, z = q[:, head : head + 1], k[:, head // 3][:, None], v[:, head // 3][:, None]
        parts.append(ct.attention(x, y, z, grid=GRID, where=where, bias=own, backend=backend))
    same(whole, torch.cat(parts, 1), [q, k, v])


@BACKENDS
def test_cross_grids(backend: str) -> None:
    text = ct.Grid(n=6)
    q, k, v = tensors(keys=text)
    found = ct.attention(q, k, v, grid=GRID, key_grid=text, backend=backend)
    same(found, F.scaled_dot_product_attention(q, k, v), [q, k, v])
    coarse = ct.Grid(t=3, h=2, w=2)
    q, k, v = tensors(keys=coarse)
    where = ct.window(h=1) & ct.along("h", "w")
    mask = ct.plan(where, GRID, coarse).mask()
    found = ct.attention(q, k, v, grid=GRID, key_grid=coarse, where=where, backend=backend)
    same(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), [q, k, v])


@BACKENDS
def test_memory_layout_does_not_matter(backend: str) -> None:
    """Views with tokens before heads, expanded batches, slices of a joint projection."""
    joint = torch.randn(2, GRID.size, 3, 4, 8, requires_grad=True)
    q, k, v = joint.permute(2, 0, 3, 1, 4)
    expected = ct.attention(q.contiguous(), k.contiguous(), v.contiguous(), grid=GRID, where=NEAR, backend=backend)
    same(ct.attention(q, k, v, grid=GRID, where=NEAR, backend=backend), expected, [joint])
    one = torch.randn(1, 1, GRID.size, 8, requires_grad=True)
    wide = one.expand(2, 4, GRID.size, 8)
    expected = ct.attention(
        wide.contiguous(), wide.contiguous(), wide.contiguous(), grid=GRID, where=NEAR, backend=backend
    )
    same(ct.attention(wide, wide, wide, grid=GRID, where=NEAR, backend=backend), expected, [one])


@BACKENDS
def test_inputs_are_left_as_they_were(backend: str) -> None:
    q, k, v = (x.detach() for x in tensors())
    before = [x.clone() for x in (q, k, v)]
    ct.attention(q, k, v, grid=GRID, where=ct.causal("t", strict=True), backend=backend)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@BACKENDS
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_of_some_inputs_only(backend: str, needs: tuple[bool, bool, bool]) -> None:
    inputs = [x.detach().requires_grad_(need) for x, need in zip(tensors(), needs, strict=True)]
    found = ct.attention(*inputs, grid=GRID, where=NEAR, backend=backend)
    mask = ct.plan(NEAR, GRID).mask()
    same(found, F.scaled_dot_product_attention(*inputs, attn_mask=mask), [x for x in inputs if x.requires_grad])


@BACKENDS
def test_without_gradients(backend: str) -> None:
    q, k, v = tensors()
    with torch.no_grad():
        assert not ct.attention(q, k, v, grid=GRID, where=NEAR, backend=backend).requires_grad
    with torch.inference_mode():
        found = ct.attention(q.detach() * 1, k.detach() * 1, v.detach() * 1, grid=GRID, where=NEAR, backend=backend)
    close(found.clone(), ct.attention(q, k, v, grid=GRID, where=NEAR, backend=backend).detach())


@BACKENDS
def test_equal_calls_give_equal_bits(backend: str) -> None:
    q, k, v = tensors()

    def call() -> list[Tensor]:
        out = ct.attention(q, k, v, grid=GRID, where=NEAR, backend=backend)
        return [out.detach(), *torch.autograd.grad(out.sum(), [q, k, v])]

    assert all(torch.equal(x, y) for x, y in zip(call(), call(), strict=True))


@BACKENDS
def test_checkpointing(backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    q, k, v = tensors()

    def call(*inputs: Tensor) -> Tensor:
        out = ct.attention(*inputs, grid=GRID, where=NEAR, backend=backend)
        assert isinstance(out, Tensor)
        return out

    same(checkpoint(call, q, k, v, use_reentrant=False), call(q, k, v), [q, k, v])


def test_auto_is_one_of_the_backends() -> None:
    q, k, v = tensors()
    for dtype in (torch.float32, torch.float64):
        x, y, z = (a.detach().to(dtype) for a in (q, k, v))
        found = ct.attention(x, y, z, grid=GRID, where=NEAR)
        named = [ct.attention(x, y, z, grid=GRID, where=NEAR, backend=name) for name in on_cpu(dtype)]
        assert any(torch.equal(found, other) for other in named)


def test_the_table_of_backends() -> None:
    table = ct.backends()
    assert {"reference", "torch"} <= {backend.name for backend in table}
    lines = repr(table).splitlines()
    assert len(lines) == len(table) + 1
    for word in ("devices", "dtypes", "head sizes", "backward", "lse", "bias", "grouped", "cross"):
        assert word in lines[0]


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (3, 3), (64, 64), (80, 80), (16, 40), (257, 8)], ids=str)
def test_what_the_table_says_of_dtypes_and_head_sizes(backend: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    grid = ct.Grid(t=2, h=3)
    size, value_size = sizes
    if dtype not in KERNELS[backend].dtypes:
        x = torch.randn(1, 2, grid.size, size, dtype=dtype)
        with pytest.raises(ct.UnsupportedError, match=f"{backend}: takes .*, got {dtype}"):
            ct.attention(x, x, x, grid=grid, backend=backend)
        return
    q, k, v = (torch.randn(1, 2, grid.size, n).to(dtype).requires_grad_() for n in (size, size, value_size))
    out, lse = ct.attention(q, k, v, grid=grid, where=ct.window(h=3), return_lse=True, backend=backend)
    assert (out.dtype, out.shape) == (dtype, (1, 2, grid.size, value_size))
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all() for x in (q, k, v))


def test_under_autocast_q_k_v_take_its_dtype_and_the_kernel_chooses_its_precision() -> None:
    grid = ct.Grid(t=3, h=4)
    q, k, v = (torch.randn(1, 2, grid.size, 8, dtype=torch.float32) for _ in range(3))
    low = [x.bfloat16() for x in (q, k, v)]
    want = ct.attention(*low, grid=grid, where=ct.window(h=3), softcap=3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ct.attention(q, k.bfloat16(), v, grid=grid, where=ct.window(h=3), softcap=3.0)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
