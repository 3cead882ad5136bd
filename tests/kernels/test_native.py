"""The C++ kernels: what is theirs alone. (The laws of all kernels are tested with the others.)"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import chronotope as ct
from attend import close, random_call
from chronotope.kernels import BACKENDS
from chronotope.kernels.native import build, kernel, toolchain
from chronotope.kernels.native.tables import Problem
from strategies import Case, cases

REASONS = build.reasons()
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))


def gradients(call: object, *inputs: Tensor) -> list[Tensor]:
    out = call(*inputs)  # type: ignore[operator]
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.randn_like(out))]


def test_python_and_cpp_describe_the_same_call() -> None:
    size = build.library().chronotope_problem_size
    size.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(Problem)


GRID = ct.Grid(t=4, h=12, w=11, prefix=3)
PATTERNS = {
    "local": ct.along("t"),
    "blocks": ct.blocks(t=3, h=5, w=4),
    "shared": ct.window(t=3, h=5, w=5),
    "causal": ct.causal("t"),
    "spatial": ct.along("h", "w"),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1)], ids=str)
def test_any_number_of_threads_gives_the_result(name: str, heads: tuple[int, int]) -> None:
    """Forward bit by bit; gradients up to the order of sums, and bit by bit from call to call."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, GRID.size, 24, requires_grad=True) for n in (heads[0], heads[1], heads[1]))
    bias = ct.RelativeBias(heads[0], t=2, h=3)
    torch.nn.init.normal_(bias.table)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        out = ct.attention(q, k, v, grid=GRID, where=PATTERNS[name], bias=bias, backend="native")
        assert isinstance(out, Tensor)
        return out

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            once, again = (gradients(lambda *x: run(*x, bias.table), q, k, v) for _ in range(2))
            assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
            found.append(once)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        for x, y in zip(other[1:], found[0][1:], strict=True):
            close(x, y)


@pytest.mark.parametrize("size", [1, 7, 16, 33, 48, 80, 130])
def test_sizes_that_do_not_fill_registers(size: int) -> None:
    torch.manual_seed(0)
    grid = ct.Grid(t=3, h=7, w=5)
    q, k = (torch.randn(1, 2, grid.size, size, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 2, grid.size, 131 - size, requires_grad=True)
    for where in (ct.window(t=3, h=3, w=3), ct.along("t")):
        one, other = (
            gradients(lambda *x, b=b, w=where: ct.attention(*x, grid=grid, where=w, backend=b), q, k, v)  # type: ignore[misc]
            for b in ("native", "reference")
        )
        for x, y in zip(one, other, strict=True):
            close(x, y)


def test_results_lie_in_memory_as_the_inputs_do() -> None:
    grid = ct.Grid(t=2, h=8)
    joint = torch.randn(1, grid.size, 3, 4, 16)
    q, k, v = joint.permute(2, 0, 3, 1, 4)
    out = ct.attention(q, k, v, grid=grid, backend="native")
    assert isinstance(out, Tensor)
    assert out.transpose(1, 2).is_contiguous()


def test_masks_that_would_take_gigabytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from chronotope.kernels.native import tables

    monkeypatch.setattr(tables, "WORDS_KEPT", 8)
    monkeypatch.setattr(tables, "WORDS_PER_TOKEN", 0)
    q = torch.randn(1, 1, 64, 8)
    with pytest.raises(ct.UnsupportedError, match="native: the element masks of this plan"):
        ct.attention(q, q, q, grid=ct.Grid(n=64), where=ct.window(n=3), backend="native")
    assert ct.attention(q, q, q, grid=ct.Grid(n=64), where=ct.window(n=3)).shape == q.shape


class Strange(ct.Bias):
    """A bias that is no table of offsets."""

    heads = 1

    def check(self, axes: tuple[str, ...]) -> None: ...

    def score(self, q: ct.grid.Coords, k: ct.grid.Coords) -> Tensor:
        return ((q.n * k.n) % 3)[None].float()


def test_a_bias_of_another_kind_goes_to_another_kernel() -> None:
    grid = ct.Grid(n=20)
    q = torch.randn(1, 1, 20, 8)
    with pytest.raises(ct.UnsupportedError, match="Strange gives no table of relative offsets"):
        ct.attention(q, q, q, grid=grid, bias=Strange(), backend="native")
    found = ct.attention(q, q, q, grid=grid, bias=Strange())
    assert torch.equal(found, ct.attention(q, q, q, grid=grid, bias=Strange(), backend="torch"))


def test_nothing_is_computed_for_no_queries_that_see() -> None:
    """Tiles without a list, and key tiles that no one lists, still get their zeros."""
    grid = ct.Grid(t=6, h=40)
    where = ct.window(t=1, h=1) & ct.segments([i % 40 for i in range(240)]) & ct.causal("t", strict=True)
    q, k, v = (torch.randn(1, 1, 240, 8, requires_grad=True) for _ in range(3))
    for found in gradients(lambda *x: ct.attention(*x, grid=grid, where=where, backend="native"), q, k, v):
        assert (found == 0).all()


def test_switched_off_by_the_environment() -> None:
    code = (
        "import torch, chronotope as ct\n"
        "q = torch.randn(1, 1, 16, 4)\n"
        "ct.attention(q, q, q, grid=ct.Grid(n=16))\n"
        "try: ct.attention(q, q, q, grid=ct.Grid(n=16), backend='native')\n"
        "except ct.UnsupportedError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "CHRONOTOPE_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "switched off: CHRONOTOPE_NATIVE=0" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_shorter_vectors(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sources for processors with vectors of 4, 8 and 16 floats, as far as this one runs them."""
    if platform.machine() != "x86_64" or (level != "x86-64-v2" and level not in toolchain.cpu_level()):
        pytest.skip(f"this processor does not run {level}")
    compiler = toolchain.find_compiler(None)
    made = build.compiled(build.Setup(), compiler, [f"-march={level}"], tmp_path, "kernels", rpath=True)
    other = ctypes.CDLL(str(made))
    assert other.chronotope_lanes() == {"x86-64-v2": 4, "x86-64-v3": 8, "x86-64-v4": 16}[level]
    monkeypatch.setattr(kernel, "library", lambda: other)
    monkeypatch.setattr(kernel, "_tables", {})

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(most=60, depth=2))
    def law(case: Case) -> None:
        call = random_call(case, torch.float32)
        out, lse = call.run(backend="native")
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        found, expected = (call.gradients(dout, dlse, backend=name) for name in ("native", "reference"))
        for x, y in zip(found, expected, strict=True):
            close(x, y)

    law()


MEMORY = """
import torch, chronotope as ct
from chronotope.bench.referee import peak
torch.set_num_threads(2)
grid = ct.Grid(t=128, h=32, w=32)
q, k, v = (torch.randn(1, 4, grid.size, 64) for _ in range(3))
before = peak()
out = ct.attention(q, k, v, grid=grid, where=ct.window(t=5, h=9, w=9), backend="native")
print((peak() - before) * 2**20 + 3 * q.nbytes, 4 * q.nbytes)
"""


@pytest.mark.slow
def test_memory_of_131072_tokens() -> None:
    """q, k, v, out, the plan and all that the kernel needs take less than three times q + k + v + out."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    held, base = map(float, done.stdout.split())
    print(f"131,072 tokens under a window: {held / base:.2f} of q + k + v + out")
    assert held < 3 * base


def test_the_kernel_is_what_auto_takes() -> None:
    assert max(BACKENDS.values(), key=lambda b: b.priority * ("cpu" in b.devices)).name == "native"
    assert BACKENDS["native"] is kernel.NATIVE
