"""Every way to compute a recurrence against the reference that steps; pieces; resets; strong decays; refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import FORMS, Problem, off

import chronotope as ct
from chronotope.recurrences.call import Backend
from chronotope.recurrences.table import BACKENDS

EXACT = [name for name, backend in BACKENDS.items() if torch.float64 in backend.dtypes and name != "reference"]
FAST = [
    name
    for name, backend in BACKENDS.items()
    if torch.float32 in backend.dtypes and "cpu" in backend.devices and name != "reference"
]
RUNS = pytest.mark.parametrize(("backend", "form"), [(name, form) for name in FAST for form in FORMS])
FORM = pytest.mark.parametrize("form", FORMS)
DELTA = pytest.mark.parametrize("delta", [False, True], ids=["sum", "delta"])
NORMALIZE = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])


def formula(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """out and S, by the sum over pairs; without the delta rule, for decays by token."""
    n = p.q.shape[2]
    decay = torch.zeros(p.q.shape[:3]).double() if p.decay is None else p.decay
    after = torch.stack([torch.stack([decay[..., j + 1 : i + 1].sum(-1) for j in range(n)], -1) for i in range(n)], -2)
    weights = torch.where(torch.ones(n, n).tril().bool(), after.exp(), 0.0)
    total = decay.sum(-1, keepdim=True)
    memory = torch.einsum("bhjd,bhje,bhj->bhde", p.k, p.v, weights[..., -1, :])
    out = torch.einsum("bhid,bhjd,bhij,bhje->bhie", p.q, p.k, weights, p.v)
    assert p.state is not None
    memory = memory + total[..., None].exp() * p.state.memory
    return out + (p.q * decay.cumsum(-1).exp()[..., None]) @ p.state.memory, memory


@pytest.mark.parametrize("form", [None, "token"])
def test_the_reference_is_the_formula(form: str | None) -> None:
    p = Problem.random(form)
    out, state = ct.recurrence(p.q, p.k, p.v, decay=p.decay, state=p.state, scale=0.3, backend="reference")
    expected, memory = formula(p)
    torch.testing.assert_close(out, 0.3 * expected)
    torch.testing.assert_close(state.memory, memory)


def test_the_delta_rule_puts_a_value_in_place_of_another() -> None:
    k = torch.eye(3).double()[None, None, [0, 1, 0]]
    v = torch.tensor([[1.0], [2.0], [5.0]]).double()[None, None]
    _, state = ct.recurrence(k, k, v, beta=torch.ones(1, 1, 3).double(), backend="reference")
    assert state.memory.flatten().tolist() == [5.0, 2.0, 0.0]


@FORM
@DELTA
@NORMALIZE
@pytest.mark.parametrize("backend", EXACT)
def test_every_form_in_every_chunk(backend: str, form: str | None, delta: bool, normalize: bool) -> None:
    p = Problem.random(form, delta, normalize)
    expected = p.results("reference")
    for chunk in (1, 2, 7, 16, 37, 100):
        assert off(p.results(backend, chunk), expected) < 1e-11


@pytest.mark.parametrize("backend", EXACT)
def test_random_recurrences(backend: str, count_cases: Callable[[str, int], None]) -> None:
    cases = 0

    @settings(max_examples=60)
    @given(
        form=st.sampled_from(FORMS),
        delta=st.booleans(),
        normalize=st.booleans(),
        sizes=st.tuples(*(st.integers(1, most) for most in (2, 3, 70, 9, 9))),
        strongest=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
        chunk=st.integers(1, 80),
        state=st.booleans(),
        seed=st.integers(0, 2**30),
    )
    def law(form, delta, normalize, sizes, strongest, chunk, state, seed):  # type: ignore[no-untyped-def]
        nonlocal cases
        cases += 1
        p = Problem.random(form, delta, normalize, sizes, strongest=strongest, given=state, seed=seed)
        assert off(p.results(backend, chunk), p.results("reference")) < 1e-9

    law()
    count_cases(f"recurrences by {backend} against the reference, with every gradient", cases)


def stepping(p: Problem) -> list[torch.Tensor]:
    """What one token after the other gives in the problem's own precision."""
    return p.results("torch", 1)


@RUNS
@DELTA
@NORMALIZE
def test_float32(backend: str, form: str | None, delta: bool, normalize: bool) -> None:
    """Rounding errors are not more than twice those of stepping in float32, and a band for luck."""
    p = Problem.random(form, delta, normalize, (2, 2, 150, 16, 24), strongest=1.0).to(torch.float32)
    expected = p.to(torch.float64).results("reference")
    for x, near, exact in zip(p.results(backend), stepping(p), expected, strict=True):
        size = float(exact.abs().max())
        assert float((x - exact).abs().max()) <= 2 * float((near - exact).abs().max()) + 2e-6 * size


@pytest.mark.parametrize(("backend", "form"), [(name, form) for name in FAST for form in FORMS[1:]])
@DELTA
@NORMALIZE
def test_decays_of_any_strength(backend: str, form: str, delta: bool, normalize: bool) -> None:
    """From 0 to -50 in one sequence, side by side: nothing overflows, and a weak decay beside a strong one counts."""
    p = Problem.random(form, delta, normalize, (1, 2, 200, 8, 8)).to(torch.float32)
    assert p.decay is not None
    levels = torch.tensor([0.0, -1e-3, -0.5, -50.0])
    drawn = levels[torch.randint(4, p.decay.shape, generator=torch.Generator().manual_seed(1))]
    p = Problem(p.q, p.k, p.v, drawn, p.beta, p.state, normalize, p.scale, p.douts)
    found, expected = p.results(backend), p.to(torch.float64).results("reference")
    assert all(bool(x.isfinite().all()) for x in found)
    assert off(found, expected) < 2e-5


@pytest.mark.parametrize(("backend", "form"), [(name, form) for name in FAST for form in FORMS[1:]])
@DELTA
def test_decays_that_forget_all(backend: str, form: str, delta: bool) -> None:
    """Side by side with weak ones: what is forgotten is gone, and such a decay has no gradient."""
    p = Problem.random(form, delta, sizes=(1, 3, 150, 16, 16)).to(torch.float32)
    assert p.decay is not None
    levels = torch.tensor([0.0, -1e-3, -0.5, -90.0, -900.0, -torch.inf])
    drawn = levels[torch.randint(6, p.decay.shape, generator=torch.Generator().manual_seed(1))]
    p = Problem(p.q, p.k, p.v, drawn, p.beta, p.state, False, p.scale, p.douts)
    found, expected = p.results(backend), p.to(torch.float64).results("reference")
    assert all(bool(x.isfinite().all()) for x in found)
    assert off(found, expected) < 2e-5
    ddecay = found[5]
    assert ddecay.shape == drawn.shape and bool((ddecay[drawn < -800] == 0).all())


@pytest.mark.parametrize(("backend", "form"), [(name, form) for name in FAST for form in FORMS[1:]])
def test_weak_decays_add_up(backend: str, form: str) -> None:
    """exp(-3e-5), rounded, is off by up to 3e-8; 3,000 tokens of it in a product would be off by 1e-4."""
    n = 3000
    p = Problem.random(form, sizes=(1, 1, n, 16, 16)).to(torch.float32)
    assert p.decay is not None and p.state is not None
    weak = torch.full_like(p.decay, -3e-5)
    _, state = ct.recurrence(p.q, torch.zeros_like(p.k), p.v, decay=weak, state=p.state, backend=backend)
    kept = torch.full((), -3e-5).double().mul(n).exp()
    torch.testing.assert_close(state.memory.double(), kept * p.state.memory.double(), rtol=1e-5, atol=0)


@RUNS
@DELTA
@NORMALIZE
def test_pieces_equal_the_whole(backend: str, form: str | None, delta: bool, normalize: bool) -> None:
    dtype = torch.float64 if torch.float64 in BACKENDS[backend].dtypes else torch.float32
    p = Problem.random(form, delta, normalize, (1, 2, 40, 8, 8), dtype=dtype)
    kwargs = {"normalize": normalize, "chunk": 16, "backend": backend}
    whole, last = ct.recurrence(p.q, p.k, p.v, decay=p.decay, beta=p.beta, state=p.state, **kwargs)
    for cut in range(41):
        state, outs = p.state, []
        for part in (slice(0, cut), slice(cut, 40)):
            decay = p.decay if form in (None, "head") or p.decay is None else p.decay[:, :, part]
            beta = None if p.beta is None else p.beta[:, :, part]
            parts = (x[:, :, part] for x in (p.q, p.k, p.v))
            out, state = ct.recurrence(*parts, decay=decay, beta=beta, state=state, **kwargs)
            outs.append(out)
        assert state is not None
        found = [torch.cat(outs, 2), *state.tensors()]
        assert off(found, [whole, *last.tensors()]) < (1e-12 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("form", ["token", "channel"])
def test_any_order_of_memory(backend: str, form: str) -> None:
    """Tokens outside of heads, a state transposed: what a kernel reads in place must be where it looks."""
    p = Problem.random(form, True, sizes=(2, 2, 70, 16, 32)).to(torch.float32)
    assert p.decay is not None and p.beta is not None and p.state is not None

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    inner = p.state.memory.mT.contiguous().mT
    other = Problem(
        *map(turned, (p.q, p.k, p.v, p.decay, p.beta)), ct.RecurrentState(inner), False, p.scale, p.douts
    )  # fmt: skip
    assert inner.stride() != p.state.memory.stride() and other.q.stride() != p.q.stride()
    assert off(other.results(backend), p.results(backend)) < 1e-6


@pytest.mark.parametrize("heads_inside", [False, True])
@DELTA
def test_a_large_result_equals_its_pieces(heads_inside: bool, delta: bool) -> None:
    """A result of 16 MB is written past the cache, and each of its pieces is not."""
    rng = torch.Generator().manual_seed(0)
    shape = (1, 33000, 4, 32) if heads_inside else (1, 4, 33000, 32)
    q, k, v = (torch.randn(*shape, generator=rng) for _ in range(3))
    if heads_inside:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, beta = torch.nn.functional.normalize(k, dim=-1), torch.rand(1, 4, 33000, generator=rng) if delta else None
    decay = torch.tensor([-0.1, -0.02, -0.5, -0.001])
    whole, last = ct.recurrence(q, k, v, decay=decay, beta=beta, backend="native")
    assert whole.nbytes >= 1 << 24
    state, outs = None, []
    for part in (slice(0, 16000), slice(16000, 33000)):
        parts = (x[:, :, part] for x in (q, k, v))
        some = None if beta is None else beta[:, :, part]
        out, state = ct.recurrence(*parts, decay=decay, beta=some, state=state, backend="native")
        outs.append(out)
    assert state is not None
    assert torch.equal(whole, torch.cat(outs, 2)) and torch.equal(last.memory, state.memory)


@RUNS
@DELTA
def test_packed_equals_separate(backend: str, form: str | None, delta: bool) -> None:
    p = Problem.random(form, delta, sizes=(2, 2, 50, 8, 8), given=False).to(torch.float32)
    ids = torch.tensor([0] * 20 + [1] + [7] * 29)
    packed, state = ct.recurrence(p.q, p.k, p.v, decay=p.decay, beta=p.beta, segments=ids, backend=backend)
    outs = []
    for part in (slice(0, 20), slice(20, 21), slice(21, 50)):
        decay = p.decay if form in (None, "head") or p.decay is None else p.decay[:, :, part]
        beta = None if p.beta is None else p.beta[:, :, part]
        out, last = ct.recurrence(*(x[:, :, part] for x in (p.q, p.k, p.v)), decay=decay, beta=beta, backend=backend)
        outs.append(out)
    assert off([packed, state.memory], [torch.cat(outs, 2), last.memory]) < 3e-6
    twice = ct.recurrence(
        p.q, p.k, p.v, decay=p.decay, beta=p.beta, segments=ids.expand(2, 50), backend=backend
    )  # fmt: skip
    torch.testing.assert_close(twice[0], packed)


@pytest.mark.parametrize("backend", FAST)
def test_nothing_passes_a_reset(backend: str) -> None:
    p = Problem.random(sizes=(1, 2, 30, 8, 8)).to(torch.float32)
    q = p.q.clone().requires_grad_()
    k = p.k.clone().requires_grad_()
    decay = torch.zeros(1, 2, 30)
    decay[:, :, 11] = -torch.inf
    out, _ = ct.recurrence(q, k, p.v, decay=decay, backend=backend)
    (dk,) = torch.autograd.grad(out[:, :, 11:].sum(), k)
    assert bool((dk[:, :, :11] == 0).all()) and bool((dk[:, :, 11:] != 0).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    p = Problem.random("token", sizes=(1, 2, 50, 8, 8)).to(dtype)
    out, state = ct.recurrence(p.q, p.k, p.v, decay=p.decay)
    exact, _ = ct.recurrence(*(x.float() for x in (p.q, p.k, p.v)), decay=None if p.decay is None else p.decay.float())
    assert out.dtype == dtype and state.memory.dtype == torch.float32
    torch.testing.assert_close(out, exact.to(dtype))


def test_no_tokens() -> None:
    p = Problem.random(normalize=True, sizes=(1, 2, 0, 3, 4))
    for backend in ("reference", "torch"):
        out, state = ct.recurrence(p.q, p.k, p.v, normalize=True, state=p.state, backend=backend)
        assert out.shape == (1, 2, 0, 4) and p.state is not None and state.memory is not None
        torch.testing.assert_close(state.memory, p.state.memory)
        _, fresh = ct.recurrence(p.q, p.k, p.v, backend=backend)
        fresh.memory[0, 0, 0, 0] = 1.0  # nobody else's
        assert float(fresh.memory.sum()) == 1.0


def test_where_nothing_was_seen_the_output_is_0() -> None:
    q = k = torch.tensor([0.0, 1.0])[None, None, :, None]
    v = torch.tensor([3.0, 5.0])[None, None, :, None].requires_grad_()
    out, _ = ct.recurrence(q, k, v, normalize=True)
    assert out.flatten().tolist() == [0.0, 5.0]
    (dv,) = torch.autograd.grad(out.sum(), v)
    assert dv.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("backend", FAST)
def test_gradients_that_nobody_asks_for(backend: str) -> None:
    p = Problem.random("token", True, sizes=(1, 2, 20, 4, 4)).to(torch.float32)
    v = p.v.clone().requires_grad_()
    out, _ = ct.recurrence(p.q, p.k, v, decay=p.decay, beta=p.beta, backend=backend)
    (dv,) = torch.autograd.grad(out.sum(), v)
    whole = Problem(p.q, p.k, p.v, p.decay, p.beta, None, False, 1.0, (torch.ones_like(out), torch.zeros(1, 2, 4, 4)))
    torch.testing.assert_close(dv, whole.results("reference")[4], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@RUNS
@DELTA
def test_long_sequences(backend: str, form: str | None, delta: bool) -> None:
    p = Problem.random(form, delta, sizes=(1, 1, 8192, 32, 32), strongest=0.1).to(torch.float32)
    assert off(p.results(backend)[:2], p.to(torch.float64).results("reference")[:2]) < 1e-4


def test_states_move_and_fork() -> None:
    p = Problem.random(normalize=True)
    assert p.state is not None
    assert p.state.nbytes == 8 * (2 * 2 * 5 * 3 + 2 * 2 * 5)
    chosen = p.state.select(torch.tensor([1, 1, 0]))
    assert chosen.memory.shape[0] == 3 and torch.equal(chosen.memory[2], p.state.memory[0])
    assert torch.equal(p.state.repeat(2).memory[1], p.state.memory[0])
    empty = p.state.each(torch.zeros_like)
    again = empty.from_dict(p.state.to_dict())
    assert all(torch.equal(x, y) for x, y in zip(again.tensors(), p.state.tensors(), strict=True))
    with pytest.raises(ct.ChronotopeError, match="of another mixer"):
        empty.from_dict({"memory": p.state.memory})


X = torch.randn(2, 3, 10, 4)
REFUSED = {
    "expected q and k": (lambda: ct.recurrence(X, X[:, :1], X), None),
    "at most 0": (lambda: ct.recurrence(X, X, X, decay=torch.ones(3)), None),
    r"one of \[3\], \[2, 3, 10\], \[2, 3, 10, 4\]": (lambda: ct.recurrence(X, X, X, decay=torch.zeros(2)), None),
    "beta is of shape": (lambda: ct.recurrence(X, X, X, beta=torch.zeros(2, 3)), None),
    "chunk=0": (lambda: ct.recurrence(X, X, X, chunk=0), None),
    "segments is of shape": (lambda: ct.recurrence(X, X, X, segments=torch.zeros(3, 10).long()), None),
    "dtypes differ": (lambda: ct.recurrence(X, X.double(), X), None),
    "float32, bfloat16": (lambda: ct.recurrence(X.int(), X.int(), X.int()), None),
    "scale=nan": (lambda: ct.recurrence(X, X, X, scale=float("nan")), None),
    "there are reference": (lambda: ct.recurrence(X, X, X, backend="fast"), ct.UnsupportedError),
    "the state has no normalizer": (
        lambda: ct.recurrence(X, X, X, normalize=True, state=ct.RecurrentState(torch.zeros(2, 3, 4, 4))),
        None,
    ),
    r"expected \[B, H, D, Dv\]": (
        lambda: ct.recurrence(X, X, X, state=ct.RecurrentState(torch.zeros(2, 3, 4, 5))),
        None,
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    call, kind = REFUSED[message]
    with pytest.raises(kind or ct.ChronotopeError, match=message):
        call()


@pytest.mark.parametrize("backend", FAST)
def test_second_derivatives(backend: str) -> None:
    p = Problem.random("token", True, True, (1, 2, 20, 4, 4)).to(torch.float32)

    def twice(p: Problem, backend: str) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (p.q, p.k, p.v, p.decay, p.beta) if x is not None]
        q, k, v, decay, beta = leaves
        out, state = ct.recurrence(q, k, v, decay=decay, beta=beta, normalize=True, state=p.state, backend=backend)
        loss = out.square().sum() + state.memory.square().sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))

    assert off(twice(p, backend), twice(p.to(torch.float64), "reference")) < 1e-4


COMPILED = """
import torch, chronotope as ct
q, k, v = torch.randn(3, 1, 2, 40, 8).unbind(0)
decay, beta = -torch.rand(1, 2, 40), torch.rand(1, 2, 40)
q.requires_grad_()
for backend in ("torch", "native", "auto"):
    def run(q):
        out, state = ct.recurrence(q.sin(), k / 8, v, decay=decay, beta=beta, normalize=True, backend=backend)
        return out.relu().sum() + state.memory.sum()
    torch.compiler.reset()
    compiled, plain = torch.compile(run, fullgraph=True, backend="aot_eager")(q), run(q)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, q)[0] for x in (compiled, plain)))
"""


def test_a_compiled_recurrence_is_the_recurrence() -> None:
    # In a process of its own: what checks types in tests is not for a compiler to trace.
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


def test_a_backend_says_every_reason() -> None:
    backend = Backend("some", "", BACKENDS["torch"].compute, ("cuda",), (torch.bfloat16,), 64, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "some", backend)
        with pytest.raises(ct.UnsupportedError, match="runs on cuda, the tensors are on cpu; computes in bfloat16"):
            ct.recurrence(X, X, X, backend="some")
