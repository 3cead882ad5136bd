"""Laws of the associative scan: it is the sequential fold, in few steps and little work, with its gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chronotope.errors import ChronotopeError
from chronotope.recurrences.scans import affine, linear_recurrence, scan, segmented, softmax_prefix, starts

LENGTHS = st.one_of(st.integers(1, 9), st.integers(10, 70))


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def product(earlier, later):
    """2 x 2 matrices: does not commute."""
    return (earlier[0] @ later[0],)


def largest(earlier, later):
    return (torch.maximum(earlier[0], later[0]),)


def elements(name, n, dim, seed):
    """(operator, its elements with n places along dim)."""
    lead = [2, 3][:dim]
    match name:
        case "product":
            return product, (torch.linalg.qr(random(seed, *lead, n, 2, 2))[0],)
        case "largest":
            return largest, (random(seed, *lead, n, 3),)
        case "affine":
            return affine, (random(seed, *lead, n, 3), random(seed + 1, *lead, n, 3))
        case "complex":
            a, b = (random(seed + i, *lead, n, 3, dtype=torch.complex128) for i in range(2))
            return affine, (a / a.abs().clamp(min=1), b)
        case "softmax":
            m = (100 * random(seed, *lead, n)).masked_fill(random(seed + 2, *lead, n) > 0.5, -torch.inf)
            there = m > -torch.inf
            return softmax_prefix, (m, there.double(), random(seed + 1, *lead, n, 3) * there[..., None])


def folded(op, parts, dim, reverse=False):
    """The same, one place after another."""
    n = parts[0].shape[dim]
    order = range(n - 1, -1, -1) if reverse else range(n)
    out, last = [None] * n, None
    for t in order:
        own = tuple(x.narrow(dim, t, 1) for x in parts)
        last = own if last is None else op(last, own)
        out[t] = last
    return tuple(torch.cat(column, dim) for column in zip(*out, strict=True))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["product", "largest", "affine", "complex", "softmax"]),
    n=LENGTHS,
    dim=st.integers(0, 2),
    reverse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_scan_is_the_sequential_fold(name, n, dim, reverse, seed):
    op, parts = elements(name, n, dim, seed)
    for found, expected in zip(scan(op, parts, dim, reverse), folded(op, parts, dim, reverse), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5000))
def test_scan_takes_logarithmically_many_calls_and_linear_work(n):
    counted = []

    def op(earlier, later):
        counted.append(later[0].shape[0])
        return (earlier[0] + later[0],)

    (found,) = scan(op, (torch.ones(n, dtype=torch.int64),), 0)
    assert torch.equal(found, torch.arange(1, n + 1))
    assert len(counted) <= 2 * math.ceil(math.log2(n)) if n > 1 else not counted
    assert sum(counted) < 2 * n


def test_elements_may_have_other_shapes_beside_the_scanned_dimension():
    a, b = random(0, 1, 7, 1), random(1, 2, 7, 3)
    full = scan(affine, (a.expand(2, 7, 3), b))
    found = scan(affine, (a, b))
    torch.testing.assert_close(found[1], full[1])
    assert found[0].shape == (1, 7, 1)
    for negative, positive in zip(scan(affine, (b, b), -2), scan(affine, (b, b), 1), strict=True):
        assert torch.equal(negative, positive)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("name", ["product", "affine", "complex", "softmax"])
def test_gradients_of_scan(name, n, reverse):
    op, parts = elements(name, n, 1, 3)
    if name == "softmax":  # finite scores: gradcheck moves every input
        parts = (random(0, 2, n), torch.ones(2, n, dtype=torch.float64), random(1, 2, n, 3))
    parts = tuple(x.detach().requires_grad_() for x in parts)
    assert torch.autograd.gradcheck(lambda *x: scan(op, x, 1, reverse), parts)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    cut=st.integers(0, 40),
    dim=st.integers(0, 2),
    one=st.sampled_from(["none", "batch", "time"]),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
    reverse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linear_recurrence_steps_and_goes_on_in_pieces(n, cut, dim, one, dtype, reverse, seed):
    shape = [2, 3, 4]
    shape[dim] = n
    sizes = list(shape)
    if one == "time":
        sizes[dim] = 1
    elif one == "batch":
        sizes[(dim + 1) % 3] = 1
    a = random(seed, *sizes, dtype=dtype)
    a = a / a.abs().clamp(min=1)
    b, state = random(seed + 1, *shape, dtype=dtype), random(seed + 2, *shape, dtype=dtype).sum(dim)
    whole = linear_recurrence(a, b, state, dim, reverse)
    cut = min(cut, n)
    after, stepped = state, [None] * n
    for t in range(n - 1, -1, -1) if reverse else range(n):
        after = a.select(dim, t if sizes[dim] == n else 0) * after + b.select(dim, t)
        stepped[t] = after
    if n:
        torch.testing.assert_close(whole, torch.stack(stepped, dim), rtol=1e-10, atol=1e-10)
    pieces, after = [], state
    for start, length in [(cut, n - cut), (0, cut)] if reverse else [(0, cut), (cut, n - cut)]:
        factor = a.narrow(dim, start, length) if sizes[dim] == n and one != "time" else a
        piece = linear_recurrence(factor, b.narrow(dim, start, length), after, dim, reverse)
        after = piece.select(dim, 0 if reverse else length - 1) if length else after
        pieces.append(piece)
    joined = torch.cat(pieces[::-1] if reverse else pieces, dim)
    torch.testing.assert_close(joined, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3, 2), (1, 3, 2), (2, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("dtypes", [("float64", "float64"), ("complex128", "complex128"), ("complex128", "float64")])
def test_gradients_of_linear_recurrence(sizes, dtypes, reverse):
    shapes = (sizes, (2, 3, 2), (2, 2))
    a, b, initial = (
        random(i, *shape, dtype=getattr(torch, dtype)).requires_grad_()
        for i, (shape, dtype) in enumerate(zip(shapes, (*dtypes, dtypes[1]), strict=True))
    )
    assert torch.autograd.gradcheck(lambda *x: linear_recurrence(*x, 1, reverse), (a, b, initial))
    assert torch.autograd.gradgradcheck(lambda *x: linear_recurrence(*x, 1, reverse), (a, b, initial))


def test_linear_recurrence_under_vmap():
    a, b = random(0, 4, 6, 2), random(1, 4, 6, 2)
    found = torch.vmap(lambda x, y: linear_recurrence(x, y, dim=0))(a, b)
    torch.testing.assert_close(found, linear_recurrence(a, b))


def test_a_factor_of_zero_forgets_and_large_factors_do_not_divide():
    b = random(0, 1, 9, 2)
    a = torch.ones_like(b)
    a[:, 4] = 0
    a.requires_grad_()
    states = linear_recurrence(a, b)
    torch.testing.assert_close(states[:, 4:], b[:, 4:].cumsum(1))
    states.sum().backward()
    assert torch.isfinite(a.grad).all()
    tiny = torch.full((1, 5000, 1), 1e-30)
    torch.testing.assert_close(linear_recurrence(tiny, torch.ones(1, 5000, 1)), torch.ones(1, 5000, 1))


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=40), seed=st.integers(0, 1000))
def test_packed_sequences_equal_separate_ones(ids, seed):
    n = len(ids)
    parts = random(seed, 1, n, 2), random(seed + 1, 1, n, 2)
    begins = starts(torch.tensor([ids]))
    flags, *found = scan(segmented(affine), (begins, *parts))
    assert torch.equal(flags[0], begins[0].cumsum(0) > 0)
    ends = [t for t in range(1, n) if ids[t] != ids[t - 1]]
    for start, stop in zip([0, *ends], [*ends, n], strict=True):
        own = scan(affine, tuple(x[:, start:stop] for x in parts))
        for one, other in zip(found, own, strict=True):
            torch.testing.assert_close(one[:, start:stop], other, rtol=1e-10, atol=1e-10)


def softmax_elements(scores, values):
    there = scores > -torch.inf
    return scores, there.to(values.dtype), values * there[..., None]


def test_prefixes_of_softmax_where_nothing_has_been_seen():
    scores, values = random(0, 1, 12), random(1, 1, 12, 3)
    scores[:, [0, 1, 5, 6, 11]] = -torch.inf
    scores.requires_grad_()
    values.requires_grad_()
    m, u, w = scan(softmax_prefix, softmax_elements(scores, values))
    seen = u > 0
    out = torch.where(seen[..., None], w / torch.where(seen, u, 1.0)[..., None], 0.0)
    assert torch.equal(out[:, :2], torch.zeros(1, 2, 3).double())
    for t in range(2, 12):
        expected = scores[:, : t + 1].softmax(1) @ values[0, : t + 1]
        torch.testing.assert_close(out[:, t], expected)
        torch.testing.assert_close(m[:, t] + u[:, t].log(), scores[:, : t + 1].logsumexp(1))
    for gradient in torch.autograd.grad(out.square().sum(), (scores, values)):
        assert torch.isfinite(gradient).all()
        assert (gradient[:, [0, 1, 5, 6, 11]] == 0).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), empty=st.integers(0, 7))
def test_softmax_prefix_is_associative_and_the_empty_element_is_neutral(seed, empty):
    scores = 100 * random(seed, 3, 1)
    scores[[i for i in range(3) if empty >> i & 1]] = -torch.inf
    a, b, c = zip(*(x.unbind(0) for x in softmax_elements(scores, random(seed + 1, 3, 1, 4))), strict=True)
    left, right = softmax_prefix(softmax_prefix(a, b), c), softmax_prefix(a, softmax_prefix(b, c))
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_refusals_say_what_was_given():
    x = torch.ones(2, 5)
    with pytest.raises(ChronotopeError, match=r"elements is \(\); expected a tuple of one or more"):
        scan(affine, ())
    with pytest.raises(ChronotopeError, match=r"lengths along dim=1 differ: \(\[2, 5\], \[2, 4\]\)"):
        scan(affine, (x, x[:, 1:]))
    with pytest.raises(ChronotopeError, match=r"dim=2 is not a dimension of every element: \(\[2, 5\], \[2, 5\]\)"):
        scan(affine, (x, x), 2)
    with pytest.raises(ChronotopeError, match=r"returned shapes \[\[2\]\] for \[\[2, 2\]\]"):
        scan(lambda a, b: (a[0].sum(1),), (x,))
    with pytest.raises(ChronotopeError, match=r"returned shapes \[\] for \[\[2, 2\], \[2, 2\]\]"):
        scan(lambda a, b: (), (x, x))
    with pytest.raises(ChronotopeError, match="returned a Tensor; expected a tuple"):
        scan(lambda a, b: a[0], (x,))
    with pytest.raises(ChronotopeError, match=r"a \[3, 5\], b \[2, 5\], dim=1"):
        linear_recurrence(torch.ones(3, 5), x)
    with pytest.raises(ChronotopeError, match=r"initial is \[5\]; expected \[2\]"):
        linear_recurrence(x, x, torch.ones(5))


def test_one_tensor_is_scanned_as_it_is() -> None:
    x = torch.rand(3, 7, 2, dtype=torch.float64)
    torch.testing.assert_close(scan(torch.add, x), x.cumsum(1))
    torch.testing.assert_close(scan(torch.maximum, x, dim=0, reverse=True), x.flip(0).cummax(0).values.flip(0))
