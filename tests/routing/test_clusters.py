"""Clusters: who is near whom, groups, what came before, and how centroids move."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import chronotope as ct

DOUBLE = torch.float64


def tokens(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 14), st.booleans(), st.integers(0, 99))
def test_groups_are_the_nearest_in_order_of_position(n, k, size, masked, seed):
    x = tokens(2, 3, n, 4, seed=seed)
    clusters = ct.route.Clusters(3, k, 4, seed=seed).double()
    keep = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < 0.5 if masked else None
    found = clusters.members(x, size, keep)
    assert found.shape == (2, 3, k, min(size, n))
    for b, h, c in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(k)).tolist():
        scores = (x[b, h] @ clusters.centroids[h, c]).tolist()
        kept = [i for i in range(n) if keep is None or keep[b, i]]
        nearest = sorted(kept, key=lambda i: -scores[i])[:size]
        assert [i for i in found[b, h, c].tolist() if i in kept] == sorted(nearest)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 150), st.integers(0, 20), st.integers(1, 5), st.integers(1, 30), st.integers(0, 99))
def test_the_past_of_a_query_is_its_own_key_and_the_nearest_before_it(nq, before, k, size, seed):
    q, keys = tokens(1, 2, nq, 4, seed=seed), tokens(1, 2, before + nq, 4, seed=seed + 1)
    clusters = ct.route.Clusters(2, k, 4, seed=seed).double()
    found, of = clusters.past(q, keys, size), clusters.nearest(q)
    assert found.shape == (1, 2, nq, size)
    for h in range(2):
        scores = (keys[0, h] @ clusters.centroids[h].T).tolist()
        for i in range(nq):
            mine, now = int(of[0, h, i]), before + i
            best = sorted(range(now), key=lambda j: -scores[j][mine])[: size - 1]
            assert sorted(x for x in found[0, h, i].tolist() if x >= 0) == sorted([*best, now])


def test_centroids_move_by_the_formula_and_towards_their_tokens():
    clusters = ct.route.Clusters(2, 4, 8, decay=0.9).double()
    q, k = (tokens(3, 2, 50, 8, seed=i).requires_grad_() for i in range(2))
    before, of = clusters.centroids.clone(), [clusters.nearest(x) for x in (q, k)]
    clusters.update(q, k)
    assert not clusters.centroids.requires_grad and not list(clusters.parameters())
    for h in range(2):
        for c in range(4):
            near = [normalize(x[:, h][of_x[:, h] == c], dim=-1) for x, of_x in zip((q, k), of, strict=True)]
            moved = 0.9 * before[h, c] + 0.1 * (near[0].sum(0) + near[1].sum(0)) / 2
            assert (clusters.centroids[h, c] - normalize(moved, dim=0)).abs().max() < 1e-12
            middle = normalize(torch.cat(near).mean(0), dim=0)
            assert clusters.centroids[h, c] @ middle > before[h, c] @ middle
    keep = torch.arange(50).expand(3, 50) < 20
    apart = ct.route.Clusters(2, 4, 8, decay=0.9).double()
    apart.update(q[:, :, :20], k[:, :, :20])
    masked = ct.route.Clusters(2, 4, 8, decay=0.9).double()
    masked.update(*(torch.where(keep[:, None, :, None], x, torch.nan) for x in (q, k)), keep=keep)
    assert (apart.centroids - masked.centroids).abs().max() < 1e-12


def test_planted_clusters_are_found_whatever_the_first_centroids():
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        centre, of = torch.randn(16, 32, generator=rng), torch.randperm(512, generator=rng) % 16
        x = (centre[of] + 0.5 * torch.randn(512, 32, generator=rng))[None, None]
        clusters = ct.route.Clusters(1, 16, 32, decay=0.9, seed=seed)
        for _ in range(60):
            clusters.update(x)
        of_members = of[clusters.members(x, 32)[0, 0]]
        purity = torch.stack([row.bincount().max() for row in of_members]).sum() / 512
        assert float(purity) > 0.9, seed


def test_refusals_say_what_was_expected():
    with pytest.raises(ct.ChronotopeError, match=r"tokens .*; expected \[B, 2, N, 8\]"):
        ct.route.Clusters(2, 4, 8).nearest(torch.zeros(1, 3, 5, 8))
    with pytest.raises(ct.ChronotopeError, match="sizes of 1 or more and 0 <= decay < 1"):
        ct.route.Clusters(2, 4, 8, decay=1.0)
