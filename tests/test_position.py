"""Rotary codes: what a product of rotated vectors depends on, which channels turn, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.position import Rope

AXES = ("t", "h", "w")


def vectors(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(x, coords, pairs, base):
    """Every channel pair as a complex number, turned one by one."""
    out = x.clone()
    half = sum(pairs)
    for row in range(x.shape[2]):
        channel = 0
        for axis, n in enumerate(pairs):
            for i in range(n):
                angle = float(coords[row, axis]) * base ** (-i / n)
                z = torch.complex(x[:, :, row, channel], x[:, :, row, channel + half])
                z = z * complex(math.cos(angle), math.sin(angle))
                out[:, :, row, channel], out[:, :, row, channel + half] = z.real, z.imag
                channel += 1
    return out


@pytest.mark.parametrize(("size", "pairs"), [(6, (1, 1, 1)), (16, (2, 2, 2)), (19, (3, 3, 3))])
def test_each_pair_turns_by_the_formula_and_the_rest_passes(size, pairs):
    grid = Grid(t=3, h=2, w=5)
    x = vectors(2, 3, grid.size, size)
    out = Rope(base=100.0)(x, grid)
    torch.testing.assert_close(out, by_hand(x, grid.coords(), pairs, 100.0))
    assert torch.equal(out[..., 2 * sum(pairs) :], x[..., 2 * sum(pairs) :])


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(6, 21),
    shift=st.tuples(*[st.floats(-50, 50) for _ in AXES]),
    seed=st.integers(0, 1000),
)
def test_products_depend_on_differences_only(size, shift, seed):
    rope = Rope(AXES)
    q, k = vectors(1, 2, 7, size, seed=seed), vectors(1, 2, 5, size, seed=seed + 1)
    at_q, at_k = vectors(7, 3, seed=seed + 2) * 9, vectors(5, 3, seed=seed + 3) * 9
    moved = torch.tensor(shift, dtype=torch.float64)
    before = rope(q, coords=at_q) @ rope(k, coords=at_k).transpose(2, 3)
    after = rope(q, coords=at_q + moved) @ rope(k, coords=at_k + moved).transpose(2, 3)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    # The code says something: without the move of the keys the products differ.
    if max(map(abs, shift)) > 0.5:
        assert not torch.allclose(rope(q, coords=at_q + moved) @ rope(k, coords=at_k).transpose(2, 3), before)


def test_codes_stay_when_axes_grow():
    small, large = Grid(t=3, h=4, w=5), Grid(t=7, h=6, w=9)
    one = vectors(1, 1, 1, 24)
    rope = Rope()
    a = rope(one.expand(1, 1, small.size, 24), small)
    b = rope(one.expand(1, 1, large.size, 24), large)
    for t, h, w in small.coords().tolist():
        assert torch.equal(a[0, 0, small.index(t=t, h=h, w=w)], b[0, 0, large.index(t=t, h=h, w=w)])


def test_prefix_tokens_pass():
    grid = Grid(t=2, h=3, prefix=4)
    x = vectors(2, 2, grid.size, 8)
    rope = Rope(("t", "h"))
    out = rope(x, grid)
    assert torch.equal(out[:, :, :4], x[:, :, :4])
    assert torch.equal(out[:, :, 4:], rope(x[:, :, 4:], Grid(t=2, h=3)))
    assert torch.equal(out, rope(x, grid, coords=rope.coords(grid)))


def test_a_slice_with_an_offset_is_that_slice_of_the_whole():
    whole, one = Grid(t=5, h=2, w=3), Grid(t=1, h=2, w=3)
    x = vectors(1, 2, whole.size, 12)
    rope = Rope()
    stepped = [rope(part, one, offset={"t": t}) for t, part in enumerate(x.split(one.size, 2))]
    torch.testing.assert_close(torch.cat(stepped, 2), rope(x, whole))


def test_coords_can_differ_in_the_batch():
    rope = Rope("t")
    x, times = vectors(3, 2, 4, 6), vectors(3, 4, 1)
    together = rope(x, coords=times)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], rope(x[i : i + 1], coords=times[i]))


def test_places_of_a_coarse_grid_lie_in_the_middle_of_the_fine_ones():
    rope = Rope(("t", "h"))
    coarse = rope.coords(Grid(t=2, h=2), onto=Grid(t=4, h=6))
    assert coarse.tolist() == [[0.5, 1.0], [0.5, 4.0], [2.5, 1.0], [2.5, 4.0]]
    fine, same = rope.between(Grid(t=4, h=6), Grid(t=4, h=6))
    assert torch.equal(fine, same) and torch.equal(fine, Grid(t=4, h=6).coords().double())
    places, text = rope.between(Grid(t=2, h=3), Grid(h=6))
    assert places[:, 0].unique().tolist() == text[:, 0].unique().tolist() == [0.0]
    assert text[:, 1].tolist() == [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25]


def test_shares_divide_the_pairs():
    rope = Rope(share={"t": 0.5, "h": 0.2, "w": 0.2})
    assert rope.pairs(20) == {"t": 5, "h": 2, "w": 2}
    assert Rope().pairs(16) == {"t": 2, "h": 2, "w": 2}
    assert rope == Rope(share={"w": 0.2, "h": 0.2, "t": 0.5}) and hash(rope) != hash(Rope())
    assert eval(repr(rope)) == rope and eval(repr(Rope(base=50.0))) == Rope(base=50.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept_and_angles_are_exact(dtype):
    x = vectors(1, 1, 8, 8, dtype=torch.float32).to(dtype)
    far = torch.arange(100_000, 100_008)[:, None].double()
    out = Rope("n")(x, coords=far)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out, Rope("n")(x.double(), coords=far).to(dtype), rtol=1e-6 + torch.finfo(dtype).eps, atol=1e-6
    )


def test_gradients_and_tables_made_in_inference_mode():
    grid = Grid(t=2, h=2, prefix=1)
    rope = Rope(("t", "h"), base=77.0)
    x = vectors(1, 1, grid.size, 5).requires_grad_()
    with torch.inference_mode():
        rope(x, grid)
    assert torch.autograd.gradcheck(lambda y: rope(y, grid), (x,))


def test_what_is_refused():
    x, grid = vectors(1, 1, 6, 8), Grid(t=2, h=3)
    for call, words in [
        (lambda: Rope(()), "different names"),
        (lambda: Rope(("t", "t")), "different names"),
        (lambda: Rope(base=1.0), "above 1"),
        (lambda: Rope(("t", "h"), share={"t": 0.9, "h": 0.2}), "adding up to 1"),
        (lambda: Rope(("t", "h"), share={"t": 0.9}), "each of the axes"),
        (lambda: Rope(("t", "z"))(x, grid), "'z'"),
        (lambda: Rope(AXES)(x[..., :4], Grid(t=1, h=2, w=3)), "2 pairs"),
        (lambda: Rope(("t", "h"))(x), "give a grid, or coords"),
        (lambda: Rope(("t", "h"))(x, coords=torch.zeros(6, 3)), r"\[N, 2\]"),
        (lambda: Rope(("t", "h"))(x, coords=torch.zeros(5, 2)), "5 coordinates"),
        (lambda: Rope(("t", "h"))(x, Grid(t=2, h=2)), "4 coordinates"),
        (lambda: Rope(("t", "h"))(x, grid, offset={"w": 1}), "w"),
        (lambda: Rope(("t", "z")).between(grid, grid), "'z'"),
    ]:
        with pytest.raises(ChronotopeError, match=words):
            call()
