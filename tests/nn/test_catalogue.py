"""Cross-entropy in parts against PyTorch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from chronotope.nn import catalogue
from chronotope.nn.catalogue import LEAST, cross_entropy


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 300), st.integers(0, 99))
def test_it_is_cross_entropy_with_its_gradients(steps: int, classes: int, held: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    h, table = (torch.randn(n, 5, generator=rng, dtype=torch.float64) for n in (steps, classes))
    taken = torch.randint(classes, (steps,), generator=rng)
    h.requires_grad_()
    table.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "HELD", held)
        found = 2 * cross_entropy(h, table, taken)
    expected = 2 * F.cross_entropy(h @ table.T, taken)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(*(torch.autograd.grad(loss, (h, table)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_scores_far_apart_stay_finite() -> None:
    h = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    loss = cross_entropy(h, torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1]))
    assert loss.item() == LEAST / 2  # of 600 / 2
    (slope,) = torch.autograd.grad(loss, h)
    assert slope.tolist() == [[1.0], [0.0]]


def test_without_gradients_it_is_the_same() -> None:
    h, table, taken = torch.randn(7, 4), torch.randn(9, 4), torch.randint(9, (7,))
    torch.testing.assert_close(cross_entropy(h, table, taken), F.cross_entropy(h @ table.T, taken))


def test_from_rounded_factors_it_is_as_near_as_they_are() -> None:
    rng = torch.Generator().manual_seed(0)
    h, table = (torch.randn(n, 16, generator=rng).requires_grad_() for n in (200, 300))
    taken = torch.randint(300, (200,), generator=rng)
    found, exact = cross_entropy(h, table, taken, torch.bfloat16), cross_entropy(h, table, taken)
    assert found.item() == pytest.approx(exact.item(), rel=2**-8)
    for mine, theirs in zip(*(torch.autograd.grad(loss, (h, table)) for loss in (found, exact)), strict=True):
        assert (mine - theirs).norm() < 2**-6 * theirs.norm()
        assert mine.dtype == torch.float32
