"""Decoding with routes: in any cut it is what attention gives on the whole, and it reads no more than it keeps."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, composite
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import chronotope as ct
from attend import close
from chronotope.routing.decoding import AT_ONCE

pytestmark = pytest.mark.usefixtures("poisoned")
LAW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
PARTS = {
    "best": lambda keep: (ct.route.TopK(keep), ct.route.Mean(), ct.route.Dot()),
    "mass": lambda keep: (ct.route.Mass(0.6, keep), ct.route.Mean(normalized=True), ct.route.Cosine()),
    "max": lambda keep: (ct.route.TopK(keep), ct.route.Max(), ct.route.Cosine()),
    "middle": lambda keep: (ct.route.Impartial(ct.route.TopK(keep)), ct.route.Middle(), ct.route.Dot()),
}


@dataclass(frozen=True)
class Case:
    """A sequence, or frames of `places` tokens, and a route over it."""

    length: int
    places: int
    page: int
    queries: int | None
    keep: float | int
    parts: str
    heads: tuple[int, int]
    sizes: tuple[int, int]
    pieces: tuple[int, ...]
    seed: int

    @property
    def axis(self) -> str:
        return "n" if self.places == 1 else "t"

    def grid(self, length: int) -> ct.Grid:
        return ct.Grid(n=length) if self.places == 1 else ct.Grid(t=length, h=self.places)

    @property
    def where(self) -> ct.Pattern:
        queries = None if self.queries is None else {self.axis: self.queries}
        cut = ct.route.Cut.of("case", {self.axis: self.page}, queries)
        selection, summary, score = PARTS[self.parts](self.keep)
        return ct.route.Blockwise(cut, selection, summary, score) & ct.causal(self.axis)

    def tensors(self, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        rng = torch.Generator().manual_seed(self.seed)
        (h, hk), (d, dv), n = self.heads, self.sizes, self.length * self.places
        return [
            torch.randn(batch, *shape, generator=rng, dtype=dtype) for shape in ((h, n, d), (hk, n, d), (hk, n, dv))
        ]

    def state(self, batch: int = 2, dtype: torch.dtype = torch.float64) -> Any:
        (h, hk), (d, dv) = self.heads, self.sizes
        kinds = {"kv_heads": hk, "value_size": dv, "dtype": dtype}
        return ct.route.pages(self.where, self.grid(1), batch=batch, heads=h, size=d, **kinds)

    def cut(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tensors in pieces of so many slices, the last ones one by one."""
        sizes = list(self.pieces) + [1] * (self.length - sum(self.pieces))
        return list(zip(*(x.split([n * self.places for n in sizes], 2) for x in tensors), strict=True))


@composite
def cases(draw: DrawFn) -> Case:
    page = draw(st.integers(1, 6))
    queries = draw(st.sampled_from([None, *(n for n in range(1, page + 1) if page % n == 0)]))
    length = draw(st.integers(1, 30))
    pieces, left = [], length
    while left and draw(st.booleans()):
        pieces.append(draw(st.integers(1, left)))
        left -= pieces[-1]
    return Case(
        length=length, places=draw(st.sampled_from([1, 1, 3])), page=page, queries=queries,
        keep=draw(st.one_of(st.integers(1, 5), st.sampled_from([0.2, 0.5, 1.0]))),
        parts=draw(st.sampled_from(sorted(PARTS))),
        heads=draw(st.sampled_from([(1, 1), (4, 2), (3, 3), (4, 1)])), sizes=draw(st.sampled_from([(4, 4), (3, 5)])),
        pieces=tuple(pieces), seed=draw(st.integers(0, 1000)),
    )  # fmt: skip


def decoded(pieces: list[tuple[Tensor, ...]], state: Any, **more: Any) -> tuple[Tensor, Tensor, Any]:
    outs, lses = [], []
    for q, k, v in pieces:
        (out, lse), state = ct.route.decode(q, k, v, state, return_lse=True, **more)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2), state


def whole(case: Case, tensors: list[Tensor], **more: Any) -> tuple[Tensor, Tensor]:
    return ct.attention(*tensors, grid=case.grid(case.length), where=case.where, return_lse=True, **more)


@LAW
@given(cases(), st.sampled_from([{}, {"scale": 0.3, "softcap": 2.0}]))
def test_any_cut_gives_the_rows_of_the_whole(case, more):
    tensors = case.tensors()
    out, lse, state = decoded(case.cut(*tensors), case.state(), **more)
    expected = whole(case, tensors, **more)
    close(out, expected[0])
    close(lse, expected[1])
    assert state.length == case.length


@LAW
@given(
    st.integers(1, 60), st.integers(1, 9), st.one_of(st.integers(1, 6), st.floats(0.05, 1.0)),
    st.sampled_from([(1, 1), (6, 2), (4, 4)]), st.integers(0, 99),
)  # fmt: skip
def test_token_by_token_equals_top_blocks(length, page, keep, heads, seed):
    where = ct.route.top_blocks(keep, n=page, queries={"n": 1}) & ct.causal()
    case = Case(length, 1, page, 1, keep, "best", heads, (4, 4), (), seed)
    tensors = case.tensors()
    state = ct.route.pages(where, ct.Grid(n=1), batch=2, heads=heads[0], size=4, kv_heads=heads[1], dtype=torch.float64)
    out, lse, _ = decoded(case.cut(*tensors), state)
    expected = ct.attention(*tensors, grid=ct.Grid(n=length), where=where, return_lse=True)
    close(out, expected[0])
    close(lse, expected[1])


@LAW
@given(cases(), st.integers(1, 9))
def test_a_choice_does_not_ask_how_long_the_sequence_gets(case, more):
    longer = Case(**{**case.__dict__, "length": case.length + more})
    tensors = longer.tensors()
    rows = case.length * case.places
    # Blocks of queries that end later have the same first query; a page and a block are as long as they get.
    short = whole(case, [x[:, :, :rows] for x in tensors])[0]
    close(short, whole(longer, tensors)[0][:, :, :rows])


CASE = Case(23, 1, 4, 1, 3, "best", (4, 2), (4, 5), (6,), 0)
FRAMES = Case(11, 3, 2, 2, 2, "max", (4, 2), (4, 5), (3,), 1)


@pytest.mark.parametrize("case", [CASE, FRAMES])
def test_gradients_are_those_of_the_whole(case):
    tensors = [x.requires_grad_() for x in case.tensors()]
    out, lse, _ = decoded(case.cut(*tensors), case.state())
    expected = whole(case, tensors)
    rng = torch.Generator().manual_seed(5)
    back = [torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in expected]
    found = torch.autograd.grad((out, lse), tensors, back)
    for a, b in zip(found, torch.autograd.grad(expected, tensors, back), strict=True):
        close(a, b)


@pytest.mark.parametrize("case", [CASE, FRAMES])
@pytest.mark.parametrize("at", [0, 1, 5, 8])
def test_forks_do_not_know_of_each_other(case, at):
    """One state, gone on with twice, in turns: each is what the whole gives of its own tokens."""
    first, second = case.tensors(), Case(**{**case.__dict__, "seed": 77}).tensors()
    start = at * case.places
    second = [torch.cat((a[:, :, :start], b[:, :, start:]), 2) for a, b in zip(first, second, strict=True)]
    alone = Case(**{**case.__dict__, "pieces": ()})
    pieces = [alone.cut(*x) for x in (first, second)]
    _, _, root = decoded(pieces[0][:at], case.state()) if at else (0, 0, case.state())
    states, outs = [root, root], ([], [])
    for step in range(at, case.length):
        for i in (0, 1) if step % 2 else (1, 0):
            out, states[i] = ct.route.decode(*pieces[i][step], states[i])
            outs[i].append(out)
    for tensors, found in zip((first, second), outs, strict=True):
        close(torch.cat(found, 2), whole(case, tensors)[0][:, :, start:])


CARRY = {
    "select": (lambda s, new: s.select(torch.tensor([1, 0, 1])), lambda x: x[[1, 0, 1]]),
    "repeat": (lambda s, new: s.repeat(2), lambda x: x.repeat_interleave(2, 0)),
    "to": (lambda s, new: s.to("cpu"), lambda x: x),
    "detach": (lambda s, new: s.detach(), lambda x: x),
    "dict": (lambda s, new: new.from_dict(s.to_dict()), lambda x: x),
    "dict over another": (lambda s, new: s.from_dict({n: x.clone() for n, x in s.to_dict().items()}), lambda x: x),
    "deepcopy": (lambda s, new: copy.deepcopy(s), lambda x: x),
    "pickle": (lambda s, new: pickle.loads(pickle.dumps(s)), lambda x: x),
}


@pytest.mark.parametrize("case", [CASE, FRAMES])
@pytest.mark.parametrize("way", CARRY)
def test_a_state_carried_over_goes_on_beside_the_one_it_came_from(case, way):
    tensors = case.tensors()
    carry, of_batch = CARRY[way]
    pieces = case.cut(*tensors)
    half = len(pieces) // 2
    _, _, state = decoded(pieces[:half], case.state())
    other = carry(state, case.state())
    out, _, _ = decoded(pieces[half:], state)
    rest = [tuple(of_batch(x) for x in piece) for piece in pieces[half:]]
    carried, _, _ = decoded(rest, other)
    rows = whole(case, tensors)[0][:, :, -out.shape[2] :]
    close(out, rows)
    close(carried, of_batch(rows))


def test_a_prompt_is_appended_without_attending():
    tensors = FRAMES.tensors()
    prompt, rest = ([x[:, :, part] for x in tensors] for part in (slice(0, 15), slice(15, None)))
    state = ct.route.append(*prompt, FRAMES.state())
    assert state.length == 5
    out, _ = ct.route.decode(*rest, state)
    close(out, whole(FRAMES, tensors)[0][:, :, 15:])


def test_what_a_slice_does_not_see_cannot_leak():
    q, k, v = CASE.tensors()
    expected = decoded([(q, k, v)], CASE.state())[0]
    k, v = k.clone(), v.clone()
    k[:, :, 20:], v[:, :, 20:] = torch.tensor(float("nan")), torch.tensor(float("inf"))
    out = decoded([(q, k, v)], CASE.state())[0]
    close(out[:, :, :20], expected[:, :, :20])


def test_a_slice_that_keeps_nothing_gives_zero():
    class Never(ct.route.Selection):
        def __call__(self, scores, own):
            return torch.zeros_like(scores, dtype=torch.bool)

    where = ct.route.Blockwise(ct.route.Cut((("n", 2),), (("n", 1),)), Never()) & ct.causal()
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    state = ct.route.pages(where, ct.Grid(n=1), batch=1, heads=2, size=4)
    (out, lse), _ = ct.route.decode(q, q, q, state, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert bool((lse == -torch.inf).all())
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_may_change_on_the_way(mode, then):
    tensors = CASE.tensors()
    pieces = CASE.cut(*tensors)
    with mode():
        _, _, state = decoded(pieces[:7], CASE.state())
    with then():
        out, _, _ = decoded(pieces[7:], state)
    close(out.clone(), whole(CASE, tensors)[0][:, :, -out.shape[2] :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype):
    case = Case(20, 1, 4, 1, 1.0, "best", (2, 1), (8, 8), (), 2)
    tensors = case.tensors(dtype=dtype)
    out, lse, _ = decoded(case.cut(*tensors), case.state(dtype=dtype))
    exact, exact_lse = whole(case, [x.double() for x in tensors])
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    k, v = (x.repeat_interleave(2, 1) for x in tensors[1:])
    dense = torch.nn.functional.scaled_dot_product_attention(tensors[0], k, v, is_causal=True)
    error, of_dense = ((x.double() - exact).abs().max() for x in (out, dense))
    assert error <= 2 * of_dense
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


class Moved(TorchDispatchMode):
    """Bytes that the operators read and write; of a gather, what it takes and not what it takes it from."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        views = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        fresh = [x for x in made if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in views]
        if func is torch.ops.aten.copy_.default:
            self.bytes += 2 * args[0].nbytes
        elif fresh:
            self.bytes += sum(x.nbytes for x in fresh)
            if func is torch.ops.aten.index_select.default:
                self.bytes += fresh[0].nbytes
            else:
                self.bytes += sum(x.nbytes for x in args if isinstance(x, Tensor))
        return out


def moved(tokens: int, page: int, keep: int) -> int:
    """Bytes moved by one step after so many tokens, room being there."""
    where = ct.route.top_blocks(keep, n=page, queries={"n": 1}) & ct.causal()
    state = ct.route.pages(where, ct.Grid(n=1), batch=1, heads=4, size=16, kv_heads=2)
    prompt = torch.randn(1, 4, tokens + 1, 16)
    state = ct.route.append(prompt, prompt[:, :2], prompt[:, :2], state)
    q = torch.randn(1, 4, 1, 16)
    with torch.no_grad(), Moved() as meter:
        ct.route.decode(q, q[:, :2], q[:, :2], state)
    return meter.bytes


def test_a_step_reads_the_pages_kept_and_the_summaries_and_not_the_tokens():
    token = 4 * 16 * 2 * 4  # bytes of a key and a value, for each query head
    # As many pages, eight times the tokens: what is read grows with the tokens kept alone.
    assert moved(8192, 64, 4) - moved(1024, 8, 4) < 8 * token * 4 * (64 - 8)
    # As many tokens kept, eight times the tokens: some numbers for each page more.
    more = moved(8192, 64, 4) - moved(1024, 64, 4)
    assert more < 16 * 4 * 16 * 4 * (8192 - 1024) / 64
    assert more < 0.02 * token * 8192 * 4
    # Twice the pages kept: twice as much of them.
    few, many = (moved(8192, 64, keep) for keep in (4, 8))
    assert 3 * token * 4 * 64 < many - few < 8 * token * 4 * 64
    assert many < 0.1 * moved(8192, 64, 128)


def test_many_slices_are_gathered_some_at_a_time():
    case = Case(700, 1, 64, 1, 6, "best", (2, 1), (64, 64), (700,), 3)
    q, k, v = case.tensors(dtype=torch.float32)
    gathered = 2 * 2 * 700 * 6 * 64 * 128
    assert gathered > 4 * AT_ONCE
    out, _, _ = decoded(case.cut(q, k, v), case.state(dtype=torch.float32))
    close(out, whole(case, [q, k, v])[0])


ONE = ct.Grid(n=1)
TOP = ct.route.top_blocks(2, n=4)


@pytest.mark.parametrize(
    ("where", "grid", "reason"),
    [
        (TOP, ONE, r"expected a route & causal\('n'\)"),
        (ct.causal(), ONE, "cannot be decoded"),
        (TOP | ct.causal(), ONE, "cannot be decoded"),
        (TOP & ct.causal() & ct.sinks(2), ONE, "cannot be decoded"),
        (ct.per_head([TOP & ct.causal()] * 2), ONE, "cannot be decoded"),
        (TOP & ct.causal(strict=True), ONE, "cannot be decoded along 'n'"),
        (ct.route.top_blocks(2, t=2) & ct.causal(), ct.Grid(t=1, h=2), "slice by slice"),
        (ct.route.top_blocks(2, t=2, h=1) & ct.causal("t"), ct.Grid(t=1, h=2), "blocks of the first axis, 't', alone"),
        (ct.route.top_blocks(2, h=2) & ct.causal("t"), ct.Grid(t=1, h=2), "must divide"),
        (ct.route.top_blocks(2, n=4, queries={"n": 3}) & ct.causal(), ONE, r"blocks of queries \(3 on 'n'\)"),
        (ct.route.top_blocks(2, m=4) & ct.causal(), ONE, "'m'"),
        (ct.route.chosen(torch.ones(1, 1, 1, 1, dtype=torch.bool), n=4) & ct.causal(), ONE, "cannot be decoded"),
        (TOP & ct.causal(), ct.Grid(n=2), "one slice"),
        (TOP & ct.causal(), ct.Grid(n=1, prefix=1), "without a prefix"),
    ],
)
def test_what_cannot_be_decoded_says_why(where, grid, reason):
    with pytest.raises(ct.ChronotopeError, match=reason):
        ct.route.pages(where, grid, batch=1, heads=2, size=4)


@pytest.mark.parametrize("selection", [ct.route.Sampled(2), ct.route.Joint(ct.route.TopK(2))])
def test_selections_that_ask_for_the_whole_call_are_refused(selection):
    for one in (selection, ct.route.Impartial(selection)):
        where = ct.route.Blockwise(ct.route.Cut((("n", 4),), (("n", 1),)), one) & ct.causal()
        with pytest.raises(ct.ChronotopeError, match="depends on the other queries"):
            ct.route.pages(where, ONE, batch=1, heads=2, size=4)


def test_tensors_that_do_not_fit_are_refused():
    q, k, v = FRAMES.tensors()
    state = FRAMES.state()
    with pytest.raises(ct.ChronotopeError, match="4 tokens of k; expected whole slices of 3"):
        ct.route.decode(q[:, :, :4], k[:, :, :4], v[:, :, :4], state)
    with pytest.raises(ct.ChronotopeError, match="the cache is for"):
        ct.route.decode(q, k[:, :1], v[:, :1], state)
    with pytest.raises(ct.ChronotopeError, match="q has 2 heads; the cache is for 4"):
        ct.route.decode(q[:, :2], k, v, state)
    with pytest.raises(ct.ChronotopeError, match="heads=3 is not a multiple"):
        ct.route.pages(FRAMES.where, FRAMES.grid(1), batch=1, heads=3, kv_heads=2, size=4)
    state = ct.route.append(q, k, v, state)
    with pytest.raises(ct.ChronotopeError, match="float64"):
        ct.route.decode(q.float(), k.float(), v.float(), state)
