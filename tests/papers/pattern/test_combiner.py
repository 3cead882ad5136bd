"""Combiner: a full-support attention map by two short softmaxes, its cost, and recall beyond the own segment."""

import math

import pytest
import torch
from _toy import Tiny, accuracy, train
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.pattern.combiner import FixedStream, combiner, effective_map, layout
from chronotope.papers.pattern.combiner_axial import axial_mixture


def regions_of(pattern, i, n, segment, causal):
    """(direct keys, regions as lists of keys) of query i, from the paper's words."""
    if pattern == "fixed":
        parts = [list(range(s, min(n, s + segment))) for s in range(0, n, segment)]
        own = next(part for part in parts if i in part)
        others = [part for part in parts if part[0] > i or part[-1] < i]
        return (own, others) if not causal else ([j for j in own if j <= i], [p for p in others if p[-1] < i])
    others, level = [], 1
    while level < n:
        block = i // level
        if block % 2 or not causal:
            start = (block ^ 1) * level
            others.append([j for j in range(start, start + level) if j < n])
        level *= 2
    return [i], [part for part in others if part]


def written_out(q, k, pattern, segment, causal, pool_q="max", pool_k="max", real=None):
    """The effective map of one head, with loops, float64."""
    n, d = q.shape
    real = torch.ones(n, dtype=torch.bool) if real is None else real
    pools = {"max": lambda x: x.max(0).values, "mean": lambda x: x.mean(0)}
    out = torch.zeros(n, n, dtype=q.dtype)
    for i in range(n):
        direct, regions = regions_of(pattern, i, n, segment, causal)
        direct = [j for j in direct if real[j]]
        regions = [[j for j in part if real[j]] for part in regions]
        regions = [part for part in regions if part]
        keys = [k[j] for j in direct] + [pools[pool_k](k[part]) for part in regions]
        if not keys:
            continue
        p = (torch.stack(keys) @ q[i] / math.sqrt(d)).softmax(0)
        out[i, direct] = p[: len(direct)]
        for part, weight in zip(regions, p[len(direct) :], strict=True):
            out[i, part] = weight * (k[part] @ pools[pool_q](q[part]) / math.sqrt(d)).softmax(0)
    return out


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return torch.randn(3, 1, 2, 64, 8, dtype=torch.float64)


CASES = [("fixed", 8, True), ("fixed", 8, False), ("logn", 1, True), ("logn", 1, False)]


@pytest.mark.parametrize(("pattern", "segment", "causal"), CASES)
@pytest.mark.parametrize("n", [64, 45])
def test_map_is_the_factorised_softmax_with_full_support(qkv, pattern, segment, causal, n):
    q, k, v = qkv[:, :, :, :n]
    options = {"pattern": pattern, "segment": segment, "is_causal": causal}
    dense = effective_map(q, k, **options)
    by_hand = torch.stack([written_out(q[0, h], k[0, h], pattern, segment, causal) for h in range(2)])
    assert (dense[0] - by_hand).abs().max() < 1e-14
    assert (dense.sum(-1) - 1).abs().max() < 2e-15
    allowed = torch.ones(n, n).tril().bool() if causal else torch.ones(n, n).bool()
    assert (dense[..., allowed] > 0).all()
    assert (dense[..., ~allowed] == 0).all()
    assert (dense @ v - combiner(q, k, v, **options)).abs().max() < 2e-15


@pytest.mark.parametrize("pattern", ["fixed", "logn"])
def test_mean_pooling(qkv, pattern):
    q, k, v = qkv
    out = combiner(q, k, v, pattern=pattern, segment=8, summary_q="mean", summary_k="mean")
    assert (out[0, 0] - written_out(q[0, 0], k[0, 0], pattern, 8, True, "mean", "mean") @ v[0, 0]).abs().max() < 1e-14


def test_one_segment_is_dense_attention(qkv):
    q, k, v = qkv
    assert (combiner(q, k, v, segment=64) - sdpa(q, k, v, is_causal=True)).abs().max() < 2e-15
    assert (combiner(q, k, v, segment=64, is_causal=False) - sdpa(q, k, v)).abs().max() < 2e-15


@pytest.mark.parametrize(("pattern", "segment", "causal"), CASES)
def test_padding_reaches_direct_keys_and_summaries(qkv, pattern, segment, causal):
    q, k, v = qkv
    real = torch.ones(1, 64, dtype=torch.bool)
    real[0, 5:19] = real[0, 40] = real[0, 60:] = False
    options = {"pattern": pattern, "segment": segment, "is_causal": causal, "real": real}
    out = combiner(q, k, v, **options)
    by_hand = written_out(q[0, 1], k[0, 1], pattern, segment, causal, real=real[0]) @ v[0, 1]
    assert (out[0, 1] - by_hand)[real[0]].abs().max() < 1e-14
    noise = torch.where(real[0][:, None], 0.0, torch.randn(64, 8, dtype=torch.float64))
    again = combiner(q + noise, k + noise, v + noise, **options)
    assert torch.equal(again[:, :, real[0]], out[:, :, real[0]])


@pytest.mark.parametrize("pattern", ["fixed", "logn"])
def test_gradients_are_those_of_the_definition(pattern):
    torch.manual_seed(1)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 12, 4, dtype=torch.float64).unbind())
    weight = torch.randn(12, 4, dtype=torch.float64)
    ours = torch.autograd.grad((combiner(q, k, v, pattern=pattern, segment=4)[0, 0] * weight).sum(), (q, k, v))
    by_hand = written_out_differentiable(q[0, 0], k[0, 0], pattern) @ v[0, 0]
    theirs = torch.autograd.grad((by_hand * weight).sum(), (q, k, v))
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < 1e-13


def written_out_differentiable(q, k, pattern):
    return written_out(q, k, pattern, 4, True)


@pytest.mark.parametrize(("n", "segment"), [(64, 8), (256, 16), (96, 4)])
def test_number_of_logits_of_the_fixed_pattern(n, segment):
    """Half of N (S + N/S) where causal: the other half is what the masks hide."""
    assert logits(layout("fixed", n, segment, True)) == n * (segment + n // segment) / 2
    assert logits(layout("fixed", n, segment, False)) == n * (segment + n // segment - 1)


@pytest.mark.parametrize("n", [16, 64, 512])
def test_number_of_logits_of_the_logn_pattern(n):
    assert logits(layout("logn", n, 1, True)) == n + n * math.log2(n) / 2
    assert logits(layout("logn", n, 1, False)) == n + n * math.log2(n) <= n * (2 + math.log2(n))


def logits(parts):
    plans = [ct.plan(where, grid, key_grid) for grid, key_grid, where in parts]
    return sum(round(plan.density * plan.pairs) for plan in plans)


def test_streaming_the_fixed_pattern_keeps_one_segment_and_summaries(qkv):
    q, k, v = qkv
    stream = FixedStream(segment=8)
    steps = [stream.step(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(64)]
    assert (torch.cat(steps, 2) - combiner(q, k, v, segment=8)).abs().max() < 2e-15
    assert stream.nbytes == 8 * 2 * 8 * (2 * 8)  # two numbers of 8 channels for each of 8 regions, and no open segment


def test_wrong_settings_are_refused(qkv):
    with pytest.raises(ct.ChronotopeError, match="expected 'fixed' or 'logn'"):
        combiner(*qkv, pattern="axial")
    with pytest.raises(ct.ChronotopeError, match="expected each to be one of"):
        combiner(*qkv, summary_k="cls")


def axial_ways(r, c, height, width):
    """(direct keys, regions) of a query, as lists of places."""
    direct = [(y, c) for y in range(r)] + [(r, x) for x in range(c + 1)]
    regions = [[(y, x) for y in range(r)] for x in range(width) if x != c]
    regions += [[(y, x) for x in range(c)] for y in range(r)] + [
        [(y, x) for x in range(c + 1, width)] for y in range(r)
    ]
    flat = [[y * width + x for y, x in part] for part in (direct, *regions) if part]
    return flat[0], flat[1:]


@pytest.mark.parametrize(("height", "width"), [(5, 4), (1, 6), (6, 1), (3, 7)])
def test_axial_mixture_is_its_factorised_softmax_with_full_support(height, width):
    torch.manual_seed(2)
    n = height * width
    q, k = torch.randn(2, n, 8, dtype=torch.float64)
    expected = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        direct, regions = axial_ways(i // width, i % width, height, width)
        keys = torch.stack([k[j] for j in direct] + [k[part].max(0).values for part in regions])
        p = (keys @ q[i] / math.sqrt(8)).softmax(0)
        expected[i, direct] = p[: len(direct)]
        for part, weight in zip(regions, p[len(direct) :], strict=True):
            expected[i, part] += weight * (k[part] @ q[part].max(0).values / math.sqrt(8)).softmax(0)
    unit = torch.eye(n, dtype=torch.float64)
    dense = axial_mixture(*(x[None, None] for x in (q, k, unit)), ct.Grid(h=height, w=width))[0, 0]
    assert (dense - expected).abs().max() < 1e-14
    assert (dense.sum(-1) - 1).abs().max() < 2e-15
    past = torch.ones(n, n, dtype=torch.bool).tril()
    assert (dense[past] > 0).all() and (dense[~past] == 0).all()
    with pytest.raises(ct.ChronotopeError, match="expected a grid such as"):
        axial_mixture(*(x[None, None] for x in (q, k, unit)), ct.Grid(t=1, h=height, w=width))


def recall(generator, size=64):
    """4 key-value pairs, then the 4 keys among fillers in places 8 to 31; the target is the value of the key."""
    keys = torch.rand(size, 63, generator=generator).argsort(1)[:, :4] + 1
    values = torch.randint(64, 128, (size, 4), generator=generator)
    ids = torch.zeros(size, 32, dtype=torch.int64)
    target = torch.full((size, 32), -100)
    ids[:, 0:8:2], ids[:, 1:8:2] = keys, values
    places = torch.rand(size, 24, generator=generator).argsort(1)[:, :4] + 8
    return ids.scatter(1, places, keys), target.scatter(1, places, values)


def trained(attend):
    torch.manual_seed(0)
    model = Tiny(128, 32, 64, 2, 2, attend)
    train(model, recall, 500, 8e-3)
    return accuracy(model, *recall(torch.Generator().manual_seed(99), 256))


@pytest.mark.slow
def test_recall_is_learned_through_the_summaries():
    assert trained(lambda _, q, k, v: combiner(q, k, v, segment=4)) > 0.95


@pytest.mark.slow
def test_recall_is_not_learned_within_segments_alone():
    grid, _, direct = layout("fixed", 32, 4, True)[0]
    assert trained(lambda _, q, k, v: ct.attention(q, k, v, grid=grid, where=direct)) < 0.05
