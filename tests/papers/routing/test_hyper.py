"""HyperAttention (system 57): the formula, errors beside its two ablations, the dense limits, draws, time.

The forward kernel of the released code (amirzandieh/HyperAttention, commit aa5bb45), interpreted on a CPU with its
checks for a GPU taken out, beside `HyperAttention.released()` on the same order, 2026-11-21, float32, 2 heads of 1,024
tokens, blocks of 256, 128 samples: largest difference of out 4.8e-7 and of lse 9.5e-7; its smooth blocks beside
step=128: 6.0e-7 and 9.5e-7. Sorted by the numbers that its hash gives, buckets that follow each other differ in up to 4
of 8 bits, 1.32 in the mean.
"""

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.routing.hyper import HyperAttention

DOUBLE = torch.float64


def tokens(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def clustered(seed, scale=1.0, n=2048, d=64, clusters=16, noise=0.3):
    """Queries and keys around 16 directions; values with a part that is the cluster's."""
    rng = torch.Generator().manual_seed(seed)
    centre, value = (torch.randn(clusters, d, generator=rng) for _ in range(2))
    of_q, of_k = (torch.randint(clusters, (n,), generator=rng) for _ in range(2))
    q, k = (centre[of] + noise * torch.randn(n, d, generator=rng) for of in (of_q, of_k))
    return tuple(x[None, None] for x in (scale * q, k, value[of_k] + torch.randn(n, d, generator=rng)))


def errors(scale):
    """Relative Frobenius error, the mean of 5: as it is, without the sort, without samples."""
    found = []
    for seed in range(5):
        q, k, v = clustered(seed, scale)
        dense = sdpa(q, k, v)
        kinds = (HyperAttention(seed=seed), HyperAttention(seed=seed, bits=0), HyperAttention(seed=seed, samples=0))
        found.append([float((kind(q, k, v)[0] - dense).norm() / dense.norm()) for kind in kinds])
    return torch.tensor(found).mean(0).tolist()


# 2026-11-21: 0.162, 0.227, 0.197; softer 0.182, 0.239, 0.675.
def test_sort_and_samples_together_are_best():
    both, unsorted, unsampled = errors(1.0)
    print(f"both {both:.3f}, no sort {unsorted:.3f}, no samples {unsampled:.3f}")
    assert both < unsampled
    assert both <= 0.75 * unsorted
    both, unsorted, unsampled = errors(0.35)
    print(f"softer logits: both {both:.3f}, no sort {unsorted:.3f}, no samples {unsampled:.3f}")
    assert both < min(unsorted, unsampled)


def by_formula(hyper, q, k, v, keep, scale):
    """(out, lse) from N x N weights: 1 in what faces a query, what a sample stands for outside."""
    nq, nk, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    bucket = ct.route.Buckets(hyper.bits, hyper.seed)
    to_q = bucket(q).argsort(dim=-1, stable=True)
    number = bucket(k).masked_fill(~keep[:, None], 1 << hyper.bits)
    to_k = number.argsort(dim=-1, stable=True)
    valid = keep.sum(1)
    place = hyper._drawn(to_k, valid, torch.Generator().manual_seed(hyper.seed))
    count = -(-max(nq, nk) // hyper.block)
    size = -(-nq // count)
    width = -(-nk // -(-nq // size))
    weights = [[[[0.0] * nk for _ in range(nq)] for _ in range(q.shape[1])] for _ in range(q.shape[0])]
    for b in range(q.shape[0]):
        n = int(valid[b])
        for h in range(q.shape[1]):
            order, drawn = to_k[b, h // group].tolist(), [x for x in place[b, h // group].tolist() if x < n]
            each = n / len(drawn) if drawn and hyper.weight else 1.0
            for at, query in enumerate(to_q[b, h].tolist()):
                if hyper.step is None:
                    facing = set(range(at // size * width, min(nk, (at // size + 1) * width)))
                else:
                    middle = min(at // hyper.step * hyper.step + hyper.step // 2, nq - 1) * nk // nq
                    start = middle - hyper.block // 2
                    facing = {x % nk for x in range(start, start + min(hyper.block, nk))}
                row = weights[b][h][query]
                for x in facing:
                    row[order[x]] += float(x < n)
                for x in drawn:
                    row[order[x]] += 0.0 if hyper.distinct and x in facing else each
    k, v = (torch.where(keep[:, None, :, None], x, 0.0).repeat_interleave(group, 1) for x in (k, v))
    logits = scale * q.double() @ k.double().mT + torch.tensor(weights, dtype=DOUBLE).log()
    return logits.softmax(-1).nan_to_num() @ v.double(), logits.logsumexp(-1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_it_is_its_formula(data):
    nq, nk = (data.draw(st.integers(1, 40)) for _ in range(2))
    if data.draw(st.booleans()):
        nk = nq
    hyper = HyperAttention(
        bits=data.draw(st.integers(0, 6)),
        block=data.draw(st.integers(1, 20)),
        samples=data.draw(st.integers(0, 12)),
        min_length=1,
        sample=data.draw(st.sampled_from(["uniform", "first"])),
        weight=data.draw(st.booleans()),
        distinct=data.draw(st.booleans()),
        step=data.draw(st.sampled_from([None, None, 1, 4])),
        seed=data.draw(st.integers(0, 99)),
    )
    q, k, v = (tokens(2, h, n, 8, seed=i, dtype=DOUBLE) for i, (h, n) in enumerate(((4, nq), (2, nk), (2, nk))))
    keep = torch.ones(2, nk, dtype=torch.bool)
    masked = data.draw(st.booleans())
    if masked:
        keep = torch.rand(2, nk, generator=torch.Generator().manual_seed(nk)) < 0.6
        k, v = (torch.where(keep[:, None, :, None], x, torch.nan) for x in (k, v))
    out, lse = hyper(q, k, v, keep=keep if masked else None, scale=0.5)
    expected, total = by_formula(hyper, q, k, v, keep, 0.5)
    assert (out - expected).abs().max() < 1e-10
    assert torch.equal(lse == -torch.inf, total == -torch.inf)
    assert (lse - total)[total > -torch.inf].abs().amax() < 1e-10 if bool((total > -torch.inf).any()) else True


def test_gradients_are_those_of_the_formula():
    hyper = HyperAttention(bits=4, block=12, samples=10, min_length=1)
    parts = [tokens(1, h, 50, 8, seed=h, dtype=DOUBLE).requires_grad_() for h in (4, 2, 2)]
    keep = torch.ones(1, 50, dtype=torch.bool)
    dout, dlse = tokens(1, 4, 50, 8, seed=9, dtype=DOUBLE), tokens(1, 4, 50, seed=8, dtype=DOUBLE)
    found = [
        torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), parts)
        for out, lse in (hyper(*parts), by_formula(hyper, *parts, keep, 8**-0.5))
    ]
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).abs().max() < 1e-9


@pytest.mark.parametrize("options", [{"block": 300}, {"block": 32, "samples": 300}, {"block": 32, "samples": 999}])
@pytest.mark.parametrize("causal", [False, True])
def test_one_block_or_all_samples_are_dense_attention(options, causal):
    # In one block every sample is dropped: a part that sees nothing must not make NaN.
    q, k, v = (tokens(1, 2, 300, 16, seed=i).requires_grad_() for i in range(3))
    out, lse = HyperAttention(min_length=80, **options)(q, k, v, causal=causal)
    assert (out - sdpa(q, k, v, is_causal=causal)).abs().max() <= 1e-5
    logits = q @ k.mT / 4
    if causal:
        logits = logits.masked_fill(torch.ones(300, 300, dtype=torch.bool).triu(1), -torch.inf)
    assert (lse - logits.logsumexp(-1)).abs().max() <= 1e-5
    found, dense = (torch.autograd.grad(y.sin().sum(), (q, k, v)) for y in (out, sdpa(q, k, v, is_causal=causal)))
    for ours, exact in zip(found, dense, strict=True):
        assert (ours - exact).abs().max() < 1e-5


def test_short_sequences_are_exact():
    q, k, v = (tokens(2, 2, 300, 16, seed=i) for i in range(3))
    hyper = HyperAttention(block=16, samples=4, min_length=301)
    assert (hyper(q, k, v, causal=True)[0] - sdpa(q, k, v, is_causal=True)).abs().max() <= 1e-5
    assert (hyper(q, k, v)[0] - sdpa(q, k, v)).abs().max() <= 1e-5
    keep = torch.arange(300) < torch.tensor([[200], [1]])
    mask = keep[:, None, None] & torch.ones(300, 300, dtype=torch.bool)
    assert (hyper(q, k, v, keep=keep)[0] - sdpa(q, k, v, attn_mask=mask)).abs().max() <= 1e-5
    dense = sdpa(q, k, v, attn_mask=mask.tril())
    assert (hyper(q, k, v, keep=keep, causal=True)[0] - dense).abs().max() <= 1e-5


def test_draws_are_unbiased(count_cases):
    draws, n = 2000, 64
    q, k, v = (tokens(1, 1, n, 8, seed=i) + (i == 2) for i in range(3))  # a numerator that does not cancel
    hyper = HyperAttention(bits=4, block=16, samples=16, min_length=1)
    out, lse = hyper(*(x.expand(draws, -1, -1, -1) for x in (q, k, v)))
    assert not torch.equal(out[0], out[1])  # members of a batch have draws of their own
    weights = (q @ k.mT / 8**0.5).exp()[0, 0].double()
    total = lse.double().exp()[:, 0]
    numerator = (total[..., None] * out[:, 0]).mean(0)
    assert (total.mean(0) / weights.sum(-1) - 1).abs().max() < 0.02
    exact = weights @ v[0, 0].double()
    assert (numerator - exact).norm() < 0.02 * exact.norm()
    apart = replace(hyper, distinct=False)(*(x.expand(draws, -1, -1, -1) for x in (q, k, v)))[1]
    assert (apart.double().exp()[:, 0].mean(0) / weights.sum(-1) - 1).min() > 0.05  # counted twice
    count_cases("unbiased draws of HyperAttention", draws)


def test_the_future_says_nothing_but_where_a_later_query_moves_an_earlier_one():
    hyper = HyperAttention(bits=4, block=16, samples=8, min_length=20)
    q, k, v = (tokens(1, 2, 103, 8, seed=i) for i in range(3))
    out = hyper(q, k, v, causal=True)[0]
    moved = 0
    for j in (1, 37, 70, 102):
        new = tokens(1, 2, 103 - j, 8, seed=j)
        other = hyper(q, *(torch.cat((x[:, :, :j], 3 * new), 2) for x in (k, v)), causal=True)[0]
        assert torch.equal(other[:, :, :j], out[:, :, :j])
        assert not torch.equal(other, out)
        later = hyper(torch.cat((q[:, :, :j], new), 2), k, v, causal=True)[0]
        moved += not torch.equal(later[:, :, :j], out[:, :, :j])
    assert moved  # as the page says: queries of a half are sorted together


def test_the_seed_decides_and_refusals_say_why():
    q, k, v = (tokens(1, 2, 100, 8, seed=i) for i in range(3))
    hyper = HyperAttention(block=16, samples=8, min_length=1)
    assert torch.equal(hyper(q, k, v)[0], hyper(q, k, v)[0])
    assert not torch.equal(replace(hyper, seed=1)(q, k, v)[0], hyper(q, k, v)[0])
    assert HyperAttention.released().sample == "first"
    with pytest.raises(ct.ChronotopeError, match="100 queries over 50 keys; give as many"):
        hyper(q, k[:, :, :50], v[:, :, :50], causal=True)
    with pytest.raises(ct.ChronotopeError, match="block, min_length and step must be 1 or more"):
        HyperAttention(block=0)
    with pytest.raises(ct.ChronotopeError, match=r"bits=63.*from 0 to 62"):
        HyperAttention(bits=63, min_length=1)(q, k, v)


# 2026-11-21, one busy core: 35, 53, 82 ms; dense 57, 221, 873 ms.
@pytest.mark.slow
def test_time_grows_near_linearly(one_thread):
    lengths, found = (4096, 8192, 16384), {}
    with torch.no_grad():
        for name, call in (("hyper", lambda *x: HyperAttention()(*x)), ("dense", sdpa)):
            for n in lengths:
                q, k, v = (tokens(1, 1, n, 64, seed=i) for i in range(3))
                call(q, k, v)
                spent = []
                for _ in range(5):
                    start = time.process_time()
                    call(q, k, v)
                    spent.append(time.process_time() - start)
                found[name, n] = sorted(spent)[2]
    print({f"{name} {n}": f"{1000 * seconds:.1f} ms" for (name, n), seconds in found.items()})
    ratios = {name: [found[name, 2 * n] / found[name, n] for n in lengths[:-1]] for name in ("hyper", "dense")}
    assert max(ratios["hyper"]) <= 2.6, ratios
    assert min(ratios["dense"]) > 3, ratios
    assert found["hyper", 16384] < found["dense", 16384] / 4
