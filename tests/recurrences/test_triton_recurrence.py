"""The Triton kernels of recurrences, run by Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import Problem, off
from torch import Tensor

import chronotope as ct
from chronotope.recurrences import triton as package
from chronotope.recurrences.table import BACKENDS
from chronotope.recurrences.triton import TRITON

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import interpreted as interpreting
from chronotope.recurrences.triton import backward_kernels, device, forward_kernels, passes

SLOW = pytest.mark.slow
ROUNDING = 2.0**-24
FORMS = (None, "token", "channel")  # that of a head reaches a backend as that of a token
CHANNEL = pytest.param("channel", marks=SLOW)


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend "triton" is in the table, as on a machine with a GPU."""
    monkeypatch.setitem(BACKENDS, "triton", replace(TRITON, devices=("cuda",), priority=20))


@pytest.fixture(scope="module")
def kernels() -> Iterator[None]:
    """Kernels run here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreting, "OURS", (device, forward_kernels, backward_kernels, passes))
        with interpreting.interpreted():
            yield


@pytest.fixture
def here(kernels: None, listed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend "triton" runs here when asked for by name."""
    monkeypatch.setitem(BACKENDS, "triton", replace(TRITON, devices=("cpu",), priority=-1))


def compare(problem: Problem, chunk: int | None = 32) -> None:
    """The law: results and all gradients err at most twice as much as torch's operators, and 16 roundings more.

    The rest is luck: where few numbers meet, torch may be exact by chance.
    """
    given = problem.to(torch.float32)
    exact = given.to(torch.float64).results("reference")
    found, theirs = given.results("triton", chunk), given.results("torch", chunk)
    assert [x.shape for x in found] == [x.shape for x in exact]
    assert off(found, exact) <= 2 * off(theirs, exact) + 16 * ROUNDING


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("delta", [False, True], ids=["add", "delta"])
@pytest.mark.parametrize("form", FORMS)
def test_it_equals_the_reference(form: str | None, delta: bool, normalize: bool) -> None:
    """Two chunks, or two parts of one, the last not full; sizes that fill no block."""
    compare(Problem.random(form, delta, normalize, sizes=(1, 1, 20 if form == "channel" else 40, 5, 18)))


def law(count: int, most: tuple[int, int], chunks: tuple[int | None, ...]) -> int:
    """Random sizes, forms and decays; `most` heads and tokens.

    Where few numbers meet, luck decides how good torch is; so errors are held against the largest numbers around.
    """
    done = 0
    sizes = st.tuples(*(st.integers(1, top) for top in (2, *most, 20, 20)))
    flags = st.tuples(*[st.booleans()] * 3)

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(FORMS), flags, sizes, st.sampled_from(chunks), st.floats(0.01, 100), st.integers(0, 2**30))
    def check(form: Any, flags: Any, sizes: Any, chunk: int | None, strongest: float, seed: int) -> None:
        nonlocal done
        done += 1
        delta, normalize, state = flags
        # Out of one key channel, normalised, does not depend on q: what is left of its gradient is rounding.
        sizes = (*sizes[:3], max(sizes[3], 4 if normalize else 1), sizes[4])
        p = Problem.random(form, delta, normalize, sizes, strongest=strongest, given=state, seed=seed)
        p = p.to(torch.float32)
        exact = p.to(torch.float64).results("reference")
        largest = [float(x.abs().max()) for x in exact]
        for x, y, size in zip(p.results("triton", chunk), exact, largest, strict=True):
            assert float((x.double() - y).abs().max()) <= 2.0**-17 * max(size, 0.1 * max(largest))

    check()
    return done


@pytest.mark.usefixtures("here")
def test_it_equals_the_reference_at_random(count_cases: Callable[[str, int], None]) -> None:
    count_cases("recurrences by triton against the reference, with every gradient", law(5, (1, 20), (16,)))


@SLOW
@pytest.mark.usefixtures("here")
def test_it_equals_the_reference_often(count_cases: Callable[[str, int], None]) -> None:
    count_cases(
        "recurrences by triton against the reference, with every gradient", law(60, (2, 70), (16, 32, 64, None))
    )


@SLOW
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("sizes", [(1, 1, 150, 128, 128), (1, 2, 70, 65, 130), (2, 1, 130, 40, 1)], ids=str)
@pytest.mark.parametrize("form", [None, "token", "channel"])
def test_several_blocks(form: str | None, sizes: tuple[int, ...]) -> None:
    """More key channels and more values than one program holds, and chunks of 64."""
    compare(Problem.random(form, True, True, sizes), None)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["token", CHANNEL])
def test_pieces_equal_the_whole(form: str) -> None:
    p = Problem.random(form, True, True, sizes=(1, 1, 40, 5, 3)).to(torch.float32)

    def run(start: int, stop: int, state: ct.RecurrentState | None) -> tuple[Tensor, ct.RecurrentState]:
        q, k, v, decay, beta = (x[:, :, start:stop] for x in (p.q, p.k, p.v, p.decay, p.beta))  # type: ignore[index]
        kwargs = {"decay": decay, "beta": beta, "normalize": True, "state": state}
        return ct.recurrence(q, k, v, **kwargs, chunk=16, backend="triton")  # type: ignore[arg-type]

    whole, end = run(0, 40, p.state)
    outs, state = [], p.state
    for start, stop in ((0, 1), (1, 1), (1, 18), (18, 40)):
        out, state = run(start, stop, state)
        outs.append(out)
    assert state is not None
    found, expected = [torch.cat(outs, 2), *state.tensors()], [whole, *end.tensors()]
    assert off(found, expected) <= 64 * ROUNDING


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("delta", [pytest.param(False, marks=SLOW), True], ids=["add", "delta"])
@pytest.mark.parametrize("form", ["token", "channel"])
def test_strong_decays_and_resets(form: str, delta: bool) -> None:
    """Tokens that forget nearly all, or all, among tokens that forget nearly nothing."""
    p = Problem.random(form, delta, False, sizes=(1, 1, 36, 4, 3), strongest=1e-3)
    assert p.decay is not None
    decay = p.decay.clone()
    strong = decay[..., :2] if form == "channel" else decay
    strong[:, :, [3, 16, 18]] = -50
    strong[:, :, [8, 15, 33]] = -math.inf  # 15: the last before another part of the chunk
    compare(replace(p, decay=decay))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["token", CHANNEL])
def test_forgetting_all_equals_starting_anew(form: str) -> None:
    p = Problem.random(form, True, True, sizes=(1, 1, 24, 4, 3), given=False).to(torch.float32)
    segments = (torch.arange(24) >= 10).long()
    kwargs: dict[str, Any] = {"normalize": True, "chunk": 16, "backend": "triton"}
    out, _ = ct.recurrence(p.q, p.k, p.v, decay=p.decay, beta=p.beta, segments=segments, **kwargs)
    parts = [[None if x is None else x[:, :, at] for x in (p.q, p.k, p.v, p.decay, p.beta)] for at in
             (slice(0, 10), slice(10, 24))]  # fmt: skip
    alone = [ct.recurrence(q, k, v, decay=decay, beta=beta, **kwargs)[0] for q, k, v, decay, beta in parts]  # type: ignore[arg-type]
    assert off([out], [torch.cat(alone, 2)]) <= 64 * ROUNDING


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("strength", [pytest.param(0.01, marks=SLOW), 8.0])
@pytest.mark.parametrize("each", ["head", "channel"])
def test_one_decay_for_all_tokens(each: str, strength: float) -> None:
    """Its gradient is a sum over tokens, where errors add up that cancel in the sums of decays."""
    p = Problem.random(None, False, False, sizes=(1, 4 if each == "head" else 1, 40, 4, 3)).to(torch.float32)
    rates = -strength * torch.rand(4, generator=torch.Generator().manual_seed(0))

    def gradient(backend: str, dtype: torch.dtype) -> Tensor:
        q, k, v = (x.to(dtype) for x in (p.q, p.k, p.v))
        rate = rates.to(dtype).requires_grad_()
        decay = rate if each == "head" else rate.expand(k.shape)
        out, _ = ct.recurrence(q, k, v, decay=decay, chunk=32, backend=backend)
        return torch.autograd.grad(out, rate, p.douts[0].to(dtype))[0]

    exact = gradient("reference", torch.float64)
    found, theirs = (off([gradient(name, torch.float32)], [exact]) for name in ("triton", "torch"))
    assert found <= 2 * theirs + 16 * ROUNDING


@pytest.mark.usefixtures("here")
def test_keys_that_are_alike() -> None:
    """Powers of the links between 64 equal keys have 18 digits, and what was written under them has one."""
    p = Problem.random(None, True, False, sizes=(1, 1, 64, 4, 3), given=False)
    assert p.beta is not None
    compare(replace(p, k=p.k[:, :, :1].expand_as(p.k), beta=torch.ones_like(p.beta)), 64)


@pytest.mark.usefixtures("here", "poisoned")
@pytest.mark.parametrize("form", FORMS)
def test_no_element_is_left_unwritten(form: str | None) -> None:
    for x in Problem.random(form, True, False, sizes=(1, 1, 19, 4, 3)).to(torch.float32).results("triton", 16):
        assert not x.isnan().any()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["token", CHANNEL])
def test_two_runs_give_the_same_bits(form: str) -> None:
    p = Problem.random(form, True, True, sizes=(1, 2, 20, 4, 3)).to(torch.float32)
    for x, y in zip(p.results("triton", 16), p.results("triton", 16), strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["token", CHANNEL])
def test_memory_order_does_not_matter(form: str) -> None:
    p = Problem.random(form, False, False, sizes=(1, 2, 17, 4, 3)).to(torch.float32)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (p.q, p.k, p.v, p.decay)]  # type: ignore[union-attr]
    other = replace(p, q=turned[0], k=turned[1], v=turned[2], decay=turned[3])
    for x, y in zip(p.results("triton", 16), other.results("triton", 16), strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("here")
def test_no_tokens() -> None:
    p = Problem.random("token", True, True, sizes=(1, 2, 0, 4, 3)).to(torch.float32)
    kwargs: dict[str, Any] = {"decay": p.decay, "beta": p.beta, "normalize": True, "state": p.state}
    out, state = ct.recurrence(p.q, p.k, p.v, **kwargs, backend="triton")
    assert out.shape == (1, 2, 0, 3)
    assert p.state is not None
    for x, y in zip(state.tensors(), p.state.tensors(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("which", ["q", "dout"])
def test_a_second_derivative_says_that_there_is_none(which: str) -> None:
    q, k, v, dout = torch.randn(4, 1, 1, 5, 4)
    {"q": q, "dout": dout}[which].requires_grad_()
    v.requires_grad_()
    out, _ = ct.recurrence(q, k, v, backend="triton")
    (first,) = torch.autograd.grad(out, v, dout, create_graph=True)
    with pytest.raises(ct.UnsupportedError, match="first derivatives only; for second ones use backend='torch'"):
        first.square().sum().backward()


@pytest.fixture
def in_tensor_cores(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of three parts in TF32, which has 10 bits behind the point, as the kernels ask a GPU for."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    assert device.PRECISION == "tf32x3"

    def rounded(x: Any) -> Any:
        return ((x.view(np.int32) + 0x1000) & ~0x1FFF).view(np.float32)

    def product(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        left, right = rounded(a.data), rounded(b.data)
        small = rounded(a.data - left) @ right + left @ rounded(b.data - right)
        return TensorHandle(small + left @ right + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)


@pytest.mark.usefixtures("here", "in_tensor_cores")
@pytest.mark.parametrize("form", [None, "token", CHANNEL])
def test_errors_of_products_in_tensor_cores(form: str | None) -> None:
    """The same law as everywhere here."""
    compare(Problem.random(form, True, False, sizes=(1, 1, 70, 32, 32)), 64)


def test_it_refuses_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    q = torch.randn(1, 1, 20, 129)
    with pytest.raises(ct.UnsupportedError, match="runs on cuda, the tensors are on cpu"):
        ct.recurrence(q, q, q, backend="triton")
    monkeypatch.setitem(BACKENDS, "triton", replace(TRITON, devices=("cpu",)))
    with pytest.raises(ct.UnsupportedError) as error:
        ct.recurrence(q, q, q, chunk=20, backend="triton")
    for reason in (
        "Triton is not installed: pip install triton",
        "key sizes up to 128, got 129",
        "chunks of 16, 32, 64 tokens, got 20",
    ):
        assert reason in str(error.value)
    with pytest.raises(ct.UnsupportedError, match="computes in float32, the inputs need float64"):
        ct.recurrence(*(x.double() for x in (q, q, q)), backend="triton")


def python(script: str, **environment: str) -> str:
    around = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=around | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("devices", [("cuda",), pytest.param(("cuda", "cpu"), marks=SLOW)], ids=str)
def test_triton_is_not_needed_before_a_kernel_runs(devices: tuple[str, ...]) -> None:
    script = f"""
import sys
sys.modules["triton"] = None  # which makes importing it fail
import torch, chronotope as ct
from chronotope.recurrences.triton import TRITON
from chronotope.recurrences.call import Inputs
assert TRITON.devices == {devices}, TRITON.devices
x = torch.zeros(1, 1, 5, 4)
print(TRITON.also(Inputs(x, x, x, None, None, x, None), 64))
"""
    interpret = {"TRITON_INTERPRET": "1"} if "cpu" in devices else {}
    assert python(script, **interpret) == "['Triton is not installed: pip install triton']\n"


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from chronotope.recurrences.triton import passes

class Driver:  # of a GPU to compile for and not to run on
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_active_torch_device(self): return torch.device("cpu")

triton.runtime.driver.set_active(Driver())

def compile_only(self, kernel, programs, *arguments, **constants):
    made = kernel.warmup(*arguments, grid=(1,), CHUNK=self.chunk, **constants, num_warps=passes.WARPS, num_stages=1)
    assert made.asm["cubin"]
    print(kernel.fn.__name__, made.metadata.shared)

passes.Sizes.launch = compile_only
size = int(sys.argv[2])
x = torch.zeros(2, 100, size)
for sums in (None, torch.zeros(2, 128, dtype=torch.float64), torch.zeros(2, 128, size, dtype=torch.float64)):
    for erase in (None, x):
        out, last, kept = passes.forward(x, x, erase, x, sums, torch.zeros(2, size, size), 64)
        passes.backward(kept, out, last)
"""
SHARED = {"80": 163 * 1024, "90": 227 * 1024}  # bytes of a block of threads, by generation
KERNELS = {"pairs", "invert", "carry", "read", "carry_back", "readers_back", "writers_back"}


@SLOW
@pytest.mark.skipif(importlib.util.find_spec("triton.backends.nvidia") is None, reason="Triton without its NVIDIA part")
@pytest.mark.parametrize("size", [5, 64, 128])
@pytest.mark.parametrize("generation", SHARED)
def test_kernels_compile_for_a_gpu(generation: str, size: int, tmp_path: Any) -> None:
    script = f"import sys; sys.argv[1:] = ['{generation}', '{size}']\n{COMPILE}"
    made = [line.split() for line in python(script, TRITON_CACHE_DIR=str(tmp_path)).splitlines()]
    assert {kernel for kernel, _ in made} == KERNELS
    assert max(int(shared) for _, shared in made) <= SHARED[generation]
