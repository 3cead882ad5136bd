"""Reading between tokens: against sums by hand, beyond the border, gradients; attention over places."""

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.errors import ChronotopeError
from chronotope.nn import SampledAttention, sample


def by_hand(x: torch.Tensor, grid: ct.Grid, place: list[float], outside: str) -> torch.Tensor:
    """One place of one member of the batch, from the tokens around it."""
    if outside == "border":
        place = [min(max(p, 0.0), n - 1.0) for p, n in zip(place, grid.shape, strict=True)]
    total = torch.zeros(x.shape[1], dtype=x.dtype)
    for corner in itertools.product(*[(math.floor(p), math.floor(p) + 1) for p in place]):
        if all(0 <= c < n for c, n in zip(corner, grid.shape, strict=True)):
            weight = math.prod(1 - abs(p - c) for p, c in zip(place, corner, strict=True))
            total = total + weight * x[grid.index(**dict(zip(grid.axes, corner, strict=True)))]
    return total


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=3),
    st.lists(st.floats(-3, 6), min_size=3, max_size=3),
    st.sampled_from(["border", "zeros"]),
)
def test_a_place_is_the_mean_of_the_tokens_around(shape: list[int], place: list[float], outside: str) -> None:
    grid = ct.Grid(**dict(zip("thw", shape, strict=False)))
    x = torch.randn(2, grid.size, 3, dtype=torch.float64)
    at = torch.tensor(place[: len(shape)], dtype=torch.float64).expand(2, 1, 4, -1)
    out = sample(x, grid, at, outside)  # type: ignore[arg-type]
    assert out.shape == (2, 1, 4, 3)
    expected = torch.stack([by_hand(one, grid, place[: len(shape)], outside) for one in x])
    torch.testing.assert_close(out[:, 0], expected[:, None].expand(-1, 4, -1), rtol=0, atol=1e-12)


def test_gradients_reach_tokens_and_places() -> None:
    x = torch.randn(2, 12, 2, dtype=torch.float64, requires_grad=True)
    places = (torch.rand(2, 5, 2, dtype=torch.float64) * torch.tensor([2.0, 3.0])).requires_grad_()
    for outside in ("border", "zeros"):
        assert torch.autograd.gradcheck(
            lambda a, b, outside=outside: sample(a, ct.Grid(h=3, w=4), b, outside), (x, places)
        )


def test_places_keep_their_precision_under_small_numbers() -> None:
    x = torch.arange(64.0).view(1, 64, 1).bfloat16()
    out = sample(x, ct.Grid(h=1, w=64), torch.tensor([[[0.0, 40.5], [0.0, 41.0]]]))
    assert out.dtype == torch.bfloat16 and out.flatten().tolist() == [40.5, 41.0]


def test_what_cannot_be_read_is_refused() -> None:
    x = torch.randn(1, 6, 2)
    with pytest.raises(ChronotopeError, match="two or three axes"):
        sample(x, ct.Grid(n=6), torch.zeros(1, 1, 1))
    with pytest.raises(ChronotopeError, match="no prefix"):
        sample(torch.randn(1, 7, 2), ct.Grid(h=2, w=3, prefix=1), torch.zeros(1, 1, 2))
    with pytest.raises(ChronotopeError, match="expected 'border' or 'zeros'"):
        inspect.unwrap(sample)(x, ct.Grid(h=2, w=3), torch.zeros(1, 1, 2), "wrap")  # type: ignore[arg-type]
    with pytest.raises(ChronotopeError, match="heads that divide"):
        SampledAttention(16, 3, 4)
    with pytest.raises(ChronotopeError, match="places of shape"):
        SampledAttention(2, 1, 4)(x, x, ct.Grid(h=2, w=3), torch.zeros(1, 6, 1, 3, 2))


def test_attention_is_a_weighted_mean_of_values_head_by_head() -> None:
    torch.manual_seed(0)
    layer, grid = SampledAttention(6, heads=2, points=3).double(), ct.Grid(h=4, w=5)
    torch.nn.init.normal_(layer.weights.weight)
    q, x = torch.randn(2, 7, 6, dtype=torch.float64), torch.randn(2, 20, 6, dtype=torch.float64)
    places, hidden = 6 * torch.rand(2, 7, 2, 3, 2, dtype=torch.float64) - 1, torch.rand(2, 20) < 0.3
    v = layer.value(x) * ~hidden[..., None]
    weight = layer.weights(q).view(2, 7, 2, 3).softmax(-1)
    rows = []
    for b, i in itertools.product(range(2), range(7)):
        heads = [
            sum(
                weight[b, i, h, p] * by_hand(v[b, :, 3 * h : 3 * h + 3], grid, places[b, i, h, p].tolist(), "zeros")
                for p in range(3)
            )
            for h in range(2)
        ]
        rows.append(torch.cat(heads))
    expected = layer.out(torch.stack(rows).view(2, 7, 6))
    torch.testing.assert_close(layer(q, x, grid, places, hidden), expected, rtol=0, atol=1e-12)
