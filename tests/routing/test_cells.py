"""Maps of a fixed width: which keys a cell stands for, which cells are kept, and the lists that come of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.routing.cells import COMPETING, cell_of, expand, first_keys


@given(st.integers(1, 400), st.integers(1, 64))
def test_every_key_lies_in_one_cell_and_cells_differ_by_one_key(n, width):
    first, cell = first_keys(torch.tensor(n), width), cell_of(torch.tensor(n), width, n + 3)
    sizes = first.diff()
    assert [int(first[0]), int(first[-1])] == [0, n]
    assert int(sizes.max() - sizes.min()) <= 1
    assert int(sizes.max()) == -(-n // width)
    assert torch.equal(cell[:n].bincount(minlength=width), sizes)
    assert cell[n:].tolist() == [-1, -1, -1]
    for j in range(0, n, 7):
        assert int(cell[j]) == (2 * j + 1) * width // (2 * n)


def brute_force(scores, sizes, budget):
    """The best cells that have keys, until half a cell is lacking."""
    kept, held = [], 0
    for at in sorted((i for i, size in enumerate(sizes) if size), key=lambda i: (-scores[i], i)):
        if kept and held + sizes[at] / 2 >= budget:
            break
        kept.append(at)
        held += sizes[at]
    return set(kept)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 20),
    width=st.integers(1, 12),
    keep=st.integers(1, 9),
    together=st.sampled_from(sorted(COMPETING)),
    causal=st.booleans(),
)
def test_cells_kept_and_their_keys_are_those_of_brute_force(seed, n, width, keep, together, causal):
    heads = 2
    scores = torch.randn(1, heads, n, width, generator=torch.Generator().manual_seed(seed))
    visible = (torch.arange(1, n + 1) if causal else torch.full((n,), n))[None]
    kept = ct.route.keep_cells(scores, visible, keep, together)
    sizes = first_keys(visible[0], width).diff()
    groups = {
        "query": [([h], [i]) for h in range(heads) for i in range(n)],
        "heads": [(range(heads), [i]) for i in range(n)],
        "queries": [([h], range(n)) for h in range(heads)],
        "all": [(range(heads), range(n))],
    }[together]
    for hs, rows in groups:
        cells = [(h, i, m) for h in hs for i in rows for m in range(width)]
        best = brute_force(
            [float(scores[0, h, i, m]) for h, i, m in cells],
            [int(sizes[i, m]) for _, i, m in cells],
            keep * len(hs) * len(rows),
        )
        assert {cell for at, cell in enumerate(cells) if at in best} == {c for c in cells if kept[0][c]}
    index = ct.route.keys_of(kept, visible)
    for h in range(heads):
        for i in range(n):
            cell = cell_of(visible[0, i], width, n).tolist()
            truth = [j for j in range(n) if cell[j] >= 0 and bool(kept[0, h, i, cell[j]])]
            assert [j for j in index[0, h, i].tolist() if j >= 0] == truth


def test_expanded_maps_have_the_number_of_its_cell_at_each_key():
    cells = torch.arange(4.0).expand(1, 1, 3, 4)
    out = expand(cells, torch.tensor([[1, 4, 6]]), 6, -9.0)
    assert out[0, 0].tolist() == [[2, -9, -9, -9, -9, -9], [0, 1, 2, 3, -9, -9], [0, 1, 1, 2, 3, 3]]


def test_what_is_refused():
    scores, visible = torch.zeros(1, 1, 4, 4), torch.full((1, 4), 4)
    with pytest.raises(ct.ChronotopeError, match="expected one of query, heads, queries, all"):
        ct.route.keep_cells(scores, visible, 2, "batch")
    with pytest.raises(ct.ChronotopeError, match="keep=0"):
        ct.route.keep_cells(scores, visible, 0)
