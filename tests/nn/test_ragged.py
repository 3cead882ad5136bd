"""Sequences end to end: side by side and back, and padding, against loops; a gradient of one for each token."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from chronotope.nn.ragged import ALIKE, Ragged

lengths = st.lists(st.integers(0, 70), min_size=1, max_size=8).filter(any)


def made(sizes: list[int]) -> tuple[Ragged, torch.Tensor]:
    count = sum(sizes)
    return Ragged(torch.tensor(sizes)), torch.arange(1.0, 2 * count + 1, dtype=torch.float64).reshape(count, 2)


@given(lengths)
def test_every_token_knows_its_sequence_and_its_place(sizes: list[int]) -> None:
    ragged, _ = made(sizes)
    expected = [(row, place) for row, size in enumerate(sizes) for place in range(size)]
    assert list(zip(ragged.row.tolist(), ragged.place.tolist(), strict=True)) == expected


@given(lengths)
def test_apart_and_together_is_nothing(sizes: list[int]) -> None:
    ragged, x = made(sizes)
    x.requires_grad_()
    groups = ragged.apart(x)
    again = ragged.together(groups)
    assert torch.equal(again, x)
    (slope,) = torch.autograd.grad(again.sum(), x)
    assert torch.equal(slope, torch.ones_like(x))


@given(lengths)
def test_apart_each_sequence_stands_in_one_row_that_its_last_token_fills(sizes: list[int]) -> None:
    ragged, x = made(sizes)
    found = sorted(row.tolist() for group in ragged.apart(x) for row in group)
    expected = []
    for row in (row for row in x.split(sizes) if len(row)):
        width = min(-(-len(row) // ALIKE) * ALIKE, max(sizes))
        expected.append(torch.cat([row, row[-1:].expand(width - len(row), -1)]).tolist())
    assert found == sorted(expected)


@given(lengths, st.integers(0, 5))
def test_padded_has_zeros_after_the_end(sizes: list[int], more: int) -> None:
    ragged, x = made(sizes)
    out = ragged.padded(x, max(sizes) + more)
    for row, size, own in zip(out, sizes, x.split(sizes), strict=True):
        assert torch.equal(row[:size], own)
        assert not row[size:].any()
