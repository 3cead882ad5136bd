"""The search in a tree: against a search by lists and loops, what it may know, and what it finds at the limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct

LINE = ct.Grid(n=61)
CLIP = ct.Grid(t=5, h=6, w=4)


def tensors(grid, seed=0, batch=2, heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, grid.size, dim, generator=generator)
    k, v = (torch.randn(batch, kv_heads, grid.size, dim, generator=generator) for _ in range(2))
    return q, k, v


def by_lists(scores, keep, sample):
    """The same search over the scores of all items of one row, with a list of (start, size)."""
    n = len(scores)
    runs = [(n * j // keep, n * (j + 1) // keep - n * j // keep) for j in range(keep)]
    runs = [run for run in runs if run[1]]
    while any(size > 1 for _, size in runs):
        halves = [(a, s // 2) for a, s in runs] + [(a + s // 2, s - s // 2) for a, s in runs]
        halves = [half for half in halves if half[1]]
        halves.sort(key=lambda half: -scores[half[0] + half[1] // 2 if sample == "middle" else half[0]])
        runs = halves[:keep]
    return sorted(a for a, _ in runs)


@given(count=st.lists(st.integers(0, 70), min_size=1, max_size=4), keep=st.integers(1, 9), seed=st.integers(0, 99))
@pytest.mark.parametrize("sample", ["middle", "first"])
@settings(max_examples=60, deadline=None)
def test_refine_is_the_search_by_lists(sample, count, keep, seed):
    scores = torch.rand(len(count), 70, generator=torch.Generator().manual_seed(seed))
    found = ct.route.refine(lambda item: scores.gather(1, item.clamp(min=0)), torch.tensor(count), keep, sample)
    assert found.shape == (len(count), keep)
    for row, n in enumerate(count):
        ours = sorted(found[row][found[row] >= 0].tolist())
        assert ours == by_lists(scores[row, :n].tolist(), keep, sample)
        assert len(set(ours)) == min(keep, n)  # none twice, and as many as there are


def test_refine_bears_scores_that_are_no_numbers():
    odd = torch.tensor([[torch.nan, -torch.inf, torch.inf, 0.0, torch.nan, 1.0, -torch.inf, 2.0]])
    found = ct.route.refine(lambda item: odd.gather(1, item.clamp(min=0)), torch.tensor([8]), 3)
    assert len(set(found[0].tolist())) == 3 and 2 in found and bool((found >= 0).all())


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("sample", ["middle", "first"])
@pytest.mark.parametrize("causal", [False, True])
def test_route_is_the_search_of_each_block_over_what_it_may_know(causal, sample, ahead):
    q, k, _ = tensors(LINE)
    route = ct.route.tree_search(3, stride=2, sample=sample, ahead=ahead, queries={"n": 8}, n=2)
    found = (route & ct.causal() if causal else route).select(q, k, LINE)
    for batch, head, row in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(8)).tolist():
        first, end = 8 * row, min(61, 8 * row + 8)
        votes = q[batch, head, first : end if ahead or not causal else first + 1 : 2]
        scores = (votes @ k[batch, head // 2].T).amax(0)
        best = [scores[2 * j : 2 * j + 2].max().item() for j in range(31)]
        own = [j for j in range(31) if 2 * j < end and 2 * j + 1 >= first]
        line = [j for j in range(31) if j not in own and (not causal or 2 * j < first)]
        kept = {line[i] for i in by_lists([best[j] for j in line], 3, sample)} | set(own)
        expected = torch.tensor([j // 2 in kept for j in range(61)]).expand(end - first, -1)
        if causal:
            expected = expected & (torch.arange(61) <= torch.arange(first, end)[:, None])
        assert torch.equal(found[batch, head, first:end], expected)


@pytest.mark.parametrize(
    ("grid", "route"),
    [
        (LINE, ct.route.tree_search(4, queries={"n": 8}, n=2) & ct.causal()),
        (LINE, ct.route.tree_search(4, n=1, queries={"n": 1}) & ct.causal()),
        (CLIP, ct.route.tree_search(2, t=2, h=3, w=4)),
        (CLIP, ct.route.tree_search(2, t=2, h=3, w=2) & ct.causal("t")),
        (CLIP.replace(prefix=3), ct.route.tree_search(2, t=2, h=3, w=2) & ct.causal("t")),
    ],
    ids=["blocks", "tokens", "clip", "causal clip", "prefix"],
)
def test_output_and_gradients_are_those_of_dense_softmax_over_what_was_chosen(grid, route):
    q, k, v = (x.requires_grad_() for x in tensors(grid))
    mask = route.select(q, k, grid)
    assert not bool(mask.all()) and bool(mask.any(-1).all())
    out = ct.attention(q, k, v, grid=grid, where=route)
    expected = sdpa(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=mask)
    assert (out - expected).abs().max() < 1e-5
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("grid", "block", "order"),
    [(LINE, {"n": 3}, ct.causal()), (CLIP, {"t": 2, "h": 3, "w": 2}, ct.causal("t"))],
    ids=["line", "clip"],
)
def test_keeping_all_is_dense(grid, block, order):
    q, k, _ = tensors(grid)
    where = ct.route.tree_search(1000, **block) & order
    assert torch.equal(where.select(q, k, grid), ct.plan(order, grid).mask().expand(2, 4, -1, -1))


def later(grid, order):
    """[N, N]: whether the column is after the row in the order."""
    return ~ct.plan(order, grid).mask()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("grid", "order", "blocks"),
    [
        (LINE, ct.causal(), {"queries": {"n": 8}, "n": 2}),
        (LINE, ct.causal(), {"queries": {"n": 3}, "n": 5}),
        (CLIP, ct.causal("t"), {"t": 2, "h": 3, "w": 2}),
    ],
    ids=["line", "large keys", "clip"],
)
def test_the_future_does_not_influence_a_choice(grid, order, blocks, stride):
    where = ct.route.tree_search(2, stride=stride, **blocks) & order
    q, k, _ = tensors(grid)
    before = where.select(q, k, grid)
    for now in range(0, grid.size, 7):
        after = later(grid, order)[now]
        changed = [torch.where(after[:, None], 5 * torch.randn(x.shape), x) for x in (q, k)]
        assert torch.equal(where.select(changed[0], changed[1], grid)[:, :, now], before[:, :, now])


def test_blocks_of_which_nothing_may_be_known_come_last():
    grid = ct.Grid(t=2, w=4)
    where = ct.route.tree_search(3, queries={"t": 2, "w": 1}, t=1, w=1) & ct.causal("t")
    for seed in range(5):
        q, k, _ = tensors(grid, seed)
        seen = where.select(q, k, grid)
        # The block of a place sees frame 0, and of frame 1, which is the future of its first query, nothing but itself.
        assert bool(seen[:, :, 4:, :4].all())
        assert torch.equal(seen[:, :, 4:, 4:], torch.eye(4, dtype=torch.bool).expand(2, 4, -1, -1))


def test_votes_of_all_queries_let_the_own_block_influence_and_nothing_behind_it():
    where = ct.route.tree_search(2, ahead=True, queries={"n": 8}, n=2) & ct.causal()
    q, k, _ = tensors(LINE)
    before = where.select(q, k, LINE)
    differs = False
    for now in range(16, 61, 8):
        q_new, k_new = q.clone(), k.clone()
        q_new[:, :, now + 8 :], k_new[:, :, now + 1 :] = 3.0, 3.0
        assert torch.equal(where.select(q_new, k_new, LINE)[:, :, now], before[:, :, now])
        q_new[:, :, now + 1 : now + 8] *= -1
        differs |= not torch.equal(where.select(q_new, k, LINE)[:, :, now], before[:, :, now])
    assert differs


def test_what_is_seen_anyway_is_not_searched():
    q, k, _ = tensors(LINE)
    near = ct.window(n=(15, 0)) | ct.sinks(4)
    where = (ct.route.tree_search(3, beside=near, queries={"n": 1}, n=1) | near) & ct.causal()
    count = where.select(q, k, LINE).sum(-1)
    assert torch.equal(count[0, 0], (torch.arange(61) + 1).clamp(max=16 + 4 + 3))
    overlapping = (ct.route.tree_search(3, queries={"n": 1}, n=1) | near) & ct.causal()
    assert overlapping.select(q, k, LINE).sum() < count.sum()


def test_the_scores_are_few():
    asked = []

    def score(item):
        asked.append(int((item >= 0).sum()))
        return item.double()

    found = ct.route.refine(score, torch.tensor([1 << 20]), 16)
    assert sum(asked) == 2 * 16 * 16 and len(asked) == 16  # 2 keep log2(count / keep)
    assert found.max() == (1 << 20) - 1


def test_bad_input_is_refused():
    for bad, message in (
        ({"keep": 0, "n": 2}, "keep=0"),
        ({"keep": 2, "n": 2, "stride": 0}, "stride=0"),
        ({"keep": 2, "n": 2, "sample": "last"}, "middle, first"),
        ({"keep": 2}, "name the blocks"),
        ({"keep": 2, "n": 2, "beside": ct.route.top_blocks(n=2)}, "pattern of coordinates"),
    ):
        with pytest.raises(ct.ChronotopeError, match=message):
            ct.route.tree_search(**bad)
    q, k, v = tensors(LINE)
    with pytest.raises(ct.ChronotopeError, match="'t'"):
        ct.attention(q, k, v, grid=LINE, where=ct.route.tree_search(2, t=2))
    with pytest.raises(ct.ChronotopeError, match="'t'"):
        ct.attention(q, k, v, grid=LINE, where=ct.route.tree_search(2, n=2, beside=ct.window(t=3)))
