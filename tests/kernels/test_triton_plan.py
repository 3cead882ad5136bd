"""What the Triton kernels are given, what they refuse, and that they compile for a GPU that need not be there."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import chronotope as ct
from chronotope.kernels import BACKENDS, Facts, Scores
from chronotope.kernels.triton import TRITON, limits
from chronotope.patterns.base import Or
from chronotope.planning import Tiles
from strategies import Case, cases, random_layout

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from chronotope.kernels.triton import tables
from chronotope.kernels.triton.lists import lists

CPU = torch.device("cpu")


def expand(tiles: Tiles, by_query: bool, height: int, width: int) -> tuple[Tensor, Tensor]:
    """[Nq, Nk] by position: how often the lists name a pair, and whether it is visible."""
    work, masks = lists(tiles, by_query, height, width, CPU), tables.masks(tiles, CPU)
    named = torch.zeros(tiles.q.grid.size, tiles.k.grid.size, dtype=torch.int64)
    seen = torch.zeros_like(named, dtype=torch.bool)
    for position, count, shared, number, first, middle, end in work.blocks.tolist():
        assert 1 <= count <= work.height.value
        for index in (*range(shared, shared + number), *range(first, end)):
            start, size, shift = work.pieces[index].tolist()
            assert 1 <= size <= work.width.value
            own, other = torch.arange(position, position + count), torch.arange(start, start + size)
            q, k = (own, other) if by_query else (other, own)
            at = (q[:, None], k[None, :])
            named[at] += 1
            masked = index >= middle
            seen[at] = visible(masks, work.kinds, shift, by_query, *at) if masked else True
    return named, seen


def visible(masks: tables.Masks, kinds: Tensor, shift: int, by_query: bool, q: Tensor, k: Tensor) -> Tensor:
    """The element mask of positions of a piece, as its tables define it."""
    if masks.relations.value == -1:
        kind = kinds[shift + (masks.k_tile[k] if by_query else masks.q_tile[q])]
        row, column = masks.q_within[q], masks.k_within[k]
        return (masks.bits[kind, row, column // 32] >> (column % 32)) & 1 == 1
    place = masks.k_places[k]
    return ((masks.q_bounds[q][..., 0] <= place) & (place <= masks.q_bounds[q][..., 1])).all(-1)


def test_lists_and_masks_name_what_the_pattern_shows(count_cases: Callable[[str, int], None]) -> None:
    """Both ways round every visible pair is listed once, and no other pair is visible."""
    done = 0

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(most=40, depth=2, per_head=False))
    def law(case: Case) -> None:
        nonlocal done
        rng = case.rng
        tiles = Tiles(case.where, random_layout(rng, case.grid), random_layout(rng, case.key_grid))
        expected = tiles.mask()[tiles.q.order][:, tiles.k.order]
        for by_query in (True, False):
            named, seen = expand(tiles, by_query, int(rng.choice([16, 32])), int(rng.choice([16, 64])))
            assert int(named.max()) <= 1
            assert torch.equal(seen, expected)
        order = tables.masks(tiles, CPU).k_order
        assert torch.equal(torch.where(order < 0, -1 - order, order), tiles.k.order.int())
        assert torch.equal(order >= 0, expected.any(0))
        done += 1

    law()
    count_cases("Triton's lists and masks against the pattern", done)


@pytest.mark.parametrize("where", [ct.window(n=33), ct.window(n=33) | ct.sinks(1)], ids=repr)
def test_neighbours_are_joined(where: ct.Pattern) -> None:
    """Tiles of 4 tokens in a row are read in pieces of 32, full ones and partial ones."""
    tiles = ct.plan(where, ct.Grid(n=256, prefix=1), tile={"n": 4}).parts[0].tiles
    blocks = lists(tiles, True, 128, 32, CPU).blocks.tolist()
    # The prefix, 36 keys that the window of a tile of 4 reaches, and the first tile with the sink.
    assert {number + end - first for _, _, _, number, first, _, end in blocks[32:-8]} == {3 + isinstance(where, Or)}


@pytest.mark.parametrize("where", [ct.window(n=33), ct.window(n=33) | ct.sinks(1)], ids=repr)
def test_blocks_leave_out_what_they_do_not_see(where: ct.Pattern) -> None:
    """In one tile of 256 tokens a block of 16 reaches 48 keys, and sees all of 16."""
    tiles = ct.plan(where, ct.Grid(n=256), tile={}).parts[0].tiles
    blocks = lists(tiles, True, 16, 16, CPU).blocks.tolist()
    sinks = int(isinstance(where, Or))
    assert {(number, middle - first, end - middle) for *_, number, first, middle, end in blocks[2:-1]} == {
        (0, 1, 2 + sinks)
    }


def test_tables_live_as_long_as_their_tiles() -> None:
    tiles = replace(ct.plan(ct.causal(), ct.Grid(t=3, h=3)).parts[0].tiles)
    first, watched = tables.masks(tiles, CPU), weakref.ref(tables.masks(tiles, CPU).q_order)
    assert tables.masks(tiles, CPU) is first
    del tiles, first
    gc.collect()
    assert watched() is None


class Curved(ct.Bias):
    """A bias that is no table of relative places."""

    heads = 2

    def check(self, axes: tuple[str, ...]) -> None:
        return None

    def score(self, q: Any, k: Any) -> Tensor:
        return torch.zeros(2, 1, 1) * (q.t * k.t)


def test_it_refuses_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "triton", replace(TRITON, devices=("cpu",)))
    grid = ct.Grid(t=4, h=4)
    q = torch.randn(1, 2, 16, 257)
    monkeypatch.setattr(limits, "find_spec", lambda name: None)
    monkeypatch.setattr(limits, "MASK_WORDS", 0)
    with pytest.raises(ct.UnsupportedError) as error:
        ct.attention(q, q, q, grid=grid, where=~ct.window(t=3, h=3), bias=Curved(), backend="triton")
    for reason in (
        "Triton is not installed: pip install triton",
        "head sizes up to 256, got 257 and 257",
        "GiB, 1 at most",
        "Curved gives no table of relative offsets",
    ):
        assert reason in str(error.value)
    with pytest.raises(ct.UnsupportedError, match=r"takes float32, bfloat16, float16, got torch\.float64"):
        ct.attention(*(x.double() for x in (q, q, q)), grid=grid, backend="triton")


def test_it_runs_on_cuda_alone_where_triton_compiles() -> None:
    tiles = ct.plan(None, ct.Grid(t=4)).parts[0].tiles
    scores = Scores(1.0, None, None, False, (), (0,))
    reasons = replace(TRITON, devices=("cuda",)).reasons(Facts("cpu", torch.float32, 16, 16), tiles, scores)
    assert reasons == ["runs on cuda, the tensors are on cpu"]


def python(script: str, **environment: str) -> str:
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment | _environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def _environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_triton_is_not_imported_before_a_kernel_runs() -> None:
    script = """
import sys, torch, chronotope as ct
from chronotope.kernels.triton import TRITON
tiles = ct.plan(ct.causal(), ct.Grid(t=4, h=4)).parts[0].tiles
from chronotope.kernels import Facts, Scores
assert TRITON.devices == {devices}, TRITON.devices
assert TRITON.reasons(Facts("cuda", torch.float16, 64, 64), tiles, Scores(1.0, None, None, False, (), (0,))) == []
print("triton" in sys.modules)
"""
    assert python(script.format(devices=("cuda",))) == "False\n"
    interpreted = script.format(devices=("cuda", "cpu"))
    assert python(f"import os; os.environ['TRITON_INTERPRET'] = '1'\n{interpreted}") == "False\n"


COMPILE = """
import itertools, sys, torch, triton, chronotope as ct
from triton.backends.compiler import GPUTarget
from chronotope.kernels import Scores, bias_tensors
from chronotope.kernels.call import Known
from chronotope.kernels.triton import backward_pass, forward_pass

class Driver:  # of a Hopper GPU, to compile for and not to run on
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")

triton.runtime.driver.set_active(Driver())

def compile_only(kernel, programs, device, shape, *arguments):
    made = kernel.warmup(*arguments, grid=(programs,), num_warps=shape.warps, num_stages=shape.stages)
    assert made.asm["cubin"]
    print(kernel.fn.__name__, made.metadata.shared)

forward_pass.launch = backward_pass.launch = compile_only
dtype, size, name = getattr(torch, sys.argv[1]), int(sys.argv[2]), sys.argv[3]
grid = ct.Grid(t=4, h=16, w=16, prefix=3)
near = ct.window(t=3, h=7, w=7, dilation={"w": 2}) & ct.causal("t")
full = torch.zeros(grid.size, grid.size, dtype=dtype)
where, bias, softcap = {
    "near": (near, None, None),
    "packed": (ct.causal(), None, 20.0),
    "relative": (near, ct.RelativeBias(2, t=1, h=3, w=3), None),
    "alibi": (ct.full(), ct.Alibi(2, learned=True), 20.0),
    "tensor": (ct.causal(), full, None),
    "columns": (near, full[:1], None),
}[name]
for tile in ({"t": 2, "h": 8, "w": 8}, {"t": 1, "h": 4, "w": 4}):
    tiles = ct.plan(where, grid, heads=2, tile=tile).parts[0].tiles
    q, k, v = (torch.zeros(2, heads, grid.size, size, dtype=dtype) for heads in (2, 1, 1))
    tensors = bias_tensors(bias)
    scores = Scores(0.1, softcap, bias if isinstance(bias, ct.Bias) else None, bias is not None, tensors, (0, 1))
    out, lse = forward_pass.forward(q, k, v, tiles, scores)
    backward_pass.backward(Known(q, k, v, out, lse, out, lse, tuple(True for _ in tensors)), tiles, scores)
"""
SHARED = 227 * 1024  # bytes of a block of threads on sm_90
VARIANTS = [
    *((dtype, size, "near") for dtype in ("bfloat16", "float32") for size in (1, 80, 128, 256)),
    *(("bfloat16", size, name) for size in (64, 256) for name in ("packed", "relative", "tensor")),
    ("float16", 64, "alibi"), ("float32", 64, "alibi"), ("float32", 256, "tensor"), ("bfloat16", 64, "columns"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton.backends.nvidia") is None, reason="Triton without its NVIDIA part")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_kernels_compile_for_hopper(variant: tuple[str, int, str], tmp_path: Any) -> None:
    dtype, size, name = variant
    script = f"import sys; sys.argv[1:] = [{dtype!r}, '{size}', {name!r}]\n{COMPILE}"
    made = [line.split() for line in python(script, TRITON_CACHE_DIR=str(tmp_path)).splitlines()]
    kernels = {"attend", "prepare", "queries", "keys"} | ({"pairs"} if name == "tensor" else set())
    assert {kernel for kernel, _ in made} == kernels
    assert max(int(shared) for _, shared in made) <= SHARED
