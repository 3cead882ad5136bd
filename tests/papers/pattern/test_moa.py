"""MoA: mixed spans against the explicit mask, decoding in rings, influence of a weight, and the search for rules."""

from itertools import product

import pytest
import torch
from _toy import Tiny, accuracy, train
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.pattern.moa import MoA, Rule, masked
from chronotope.papers.pattern.moa_search import by_block, by_group, influence, rule_losses, search_space, solve

MIXED = MoA(rules=(((16, 0.0), (0, 0.5), (0, 1.0), (-8, 0.25)),), sink=8, block=8)


def by_definition(plan, layer, n):
    i, j = torch.arange(n)[:, None], torch.arange(n)
    spans = torch.tensor(plan.spans(layer, n))[:, None, None]
    return (j <= i) & ((j < plan.sink) | (i - j < spans))


@pytest.mark.parametrize("n", [48, 61])
def test_prefill_and_decoding_equal_dense_attention_under_the_mask(n):
    assert len(set(MIXED.spans(0, n))) >= 3
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, n, 16)
    dense = sdpa(q, k, v, attn_mask=by_definition(MIXED, 0, n))
    whole = ct.attention(q, k, v, grid=ct.Grid(n=n), where=MIXED.where(0, n))
    cache = MIXED.cache(0, n)
    steps = torch.cat([cache.step(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(n)], 2)
    assert (whole - dense).abs().max() < 1e-5
    assert (steps - dense).abs().max() < 1e-5
    assert cache.nbytes == 2 * 2 * 16 * 4 * sum(MIXED.sink + span for span in MIXED.spans(0, n))


def test_grouped_heads_decode_with_one_ring_for_each_head_of_the_keys():
    plan, n = MoA(rules=(((8, 0.0),) * 2 + ((0, 0.5),) * 2,), sink=4, block=8), 40
    torch.manual_seed(1)
    q, (k, v) = torch.randn(1, 4, n, 8), torch.randn(2, 1, 2, n, 8)
    whole = ct.attention(q, k, v, grid=ct.Grid(n=n), where=plan.where(0, n))
    cache = MoA(rules=(((8, 0.0), (0, 0.5)),), sink=4, block=8).cache(0, n)
    steps = [cache.step(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(n)]
    assert (torch.cat(steps, 2) - whole).abs().max() < 1e-5
    with pytest.raises(ct.ChronotopeError, match="RingCache has 2 spans, k has 3 heads"):
        cache.step(torch.randn(1, 3, 1, 8), *torch.randn(2, 1, 3, 1, 8))


def test_spans_of_the_whole_input_are_dense_causal_attention():
    plan = MoA(rules=(((0, 1.0), (500, 0.0)),), sink=4, block=8)
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 1, 2, 96, 16)
    out = ct.attention(q, k, v, grid=ct.Grid(n=96), where=plan.where(0, 96))
    assert (out - sdpa(q, k, v, is_causal=True)).abs().max() < 1e-5
    assert plan.density(96) == 1


def test_spans_grow_in_whole_blocks_and_the_plan_survives_json():
    assert [Rule(-64, 0.5).span(n) for n in (128, 256, 1024)] == [64, 64, 448]
    assert [Rule(4096, 0.0).span(n) for n in (1000, 8192)] == [1000, 4096]
    assert MoA.from_json(MIXED.to_json()) == MIXED
    assert MIXED.density(64) == pytest.approx((24 + 40 + 64 + 16) / (4 * 64))
    with pytest.raises(ct.ChronotopeError, match="give a rule"):
        MoA(rules=())


def test_influence_is_the_exact_effect_where_the_loss_is_linear():
    torch.manual_seed(3)
    n = 12
    weights = (
        torch.randn(n, n, dtype=torch.float64).masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf).softmax(-1)
    )
    gradient = torch.randn(n, n, dtype=torch.float64)
    predicted = influence(weights, gradient)
    for i in range(1, n):
        for j in range(i + 1):
            row = weights[i].clone()
            row[j] = 0
            change = (row / row.sum() * gradient[i]).sum() - (weights[i] * gradient[i]).sum()
            assert abs(float(predicted[i, j] - change)) < 1e-10


class Probe(torch.nn.Module):
    """Two layers whose softmax maps are kept with their gradients, or multiplied by a mask and divided by the rest."""

    def __init__(self, n=12, dim=16, heads=2):
        super().__init__()
        self.maps, self.keep, self.causal = [], {}, torch.ones(n, n, dtype=torch.bool).tril()
        self.model = Tiny(8, n, dim, heads, 2, self.attend).double()

    def attend(self, layer, q, k, v):
        weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~self.causal, -torch.inf).softmax(-1)
        if layer in self.keep:
            weights = weights * self.keep[layer]
            weights = weights / weights.sum(-1, keepdim=True)
        if weights.requires_grad:
            weights.retain_grad()
            self.maps.append(weights)
        return weights @ v

    def loss(self, ids):
        logits = self.model(ids[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def test_influence_predicts_the_ablation_of_single_weights_in_a_real_model():
    torch.manual_seed(4)
    probe = Probe()
    ids = torch.randint(0, 8, (1, 13))
    probe.loss(ids).backward()
    predicted = torch.stack([influence(m.detach(), m.grad)[0] for m in probe.maps])
    base, measured = float(probe.loss(ids).detach()), torch.zeros_like(predicted)
    cells = [cell for cell in product(range(2), range(2), range(12), range(12)) if cell[3] <= cell[2] and cell[2] > 0]
    with torch.no_grad():
        for layer, head, i, j in cells:
            keep = torch.ones(2, 12, 12, dtype=torch.float64)
            keep[head, i, j] = 0
            probe.keep = {layer: keep}
            measured[layer, head, i, j] = probe.loss(ids) - base
    index = torch.tensor(cells).T.unbind()
    assert torch.corrcoef(torch.stack([predicted[index], measured[index]]))[0, 1] > 0.8


def test_solver_matches_brute_force_on_two_layers_of_four_heads_and_five_rules():
    torch.manual_seed(5)
    losses = torch.rand(2, 2, 4, 5, dtype=torch.float64).sort(-1, descending=True).values
    density = torch.tensor(
        [[0.1, 0.25, 0.5, 0.7, 1.0], [0.1, 0.2, 0.55, 0.65, 0.9], [0.15, 0.2, 0.5, 0.6, 0.95]]
    ).double()
    found = solve(losses, density)

    layer = torch.cartesian_prod(*[torch.arange(5)] * 4)
    layer = layer[torch.tensor([len(set(row)) <= 2 for row in layer.tolist()])]
    one, two = torch.cartesian_prod(torch.arange(len(layer)), torch.arange(len(layer))).T
    both = torch.stack([layer[one], layer[two]], 1)
    loss = sum(losses[:, la, h][:, both[:, la, h]] for la in range(2) for h in range(4)).T
    mean = (density[:, both].sum((-1, -2)) / 8).T
    allowed = ((mean <= 0.5 + 1e-9) & (mean >= 0.45 - 1e-9)).all(1)
    loss = loss[allowed]
    order = torch.argsort(loss[:, 0])
    front, best = [], float("inf")
    for a, b in loss[order].tolist():
        if b < best:
            front.append((a, b))
            best = b
    assert len(front) > 3
    ours = sorted(choice.loss for choice in found)
    assert torch.allclose(torch.tensor(ours), torch.tensor(front), atol=1e-9)
    for choice in found:
        assert all(len(set(row)) <= 2 for row in choice.rules)
        assert all(0.45 - 1e-9 <= d <= 0.5 + 1e-9 for d in choice.density)
        again = sum(losses[:, la, h, r] for la, row in enumerate(choice.rules) for h, r in enumerate(row))
        assert torch.allclose(again, torch.tensor(choice.loss).double())
    with pytest.raises(ct.ChronotopeError, match="no choice has a density"):
        solve(losses, density + 1)


def test_loss_of_a_rule_is_the_influence_outside_its_sink_and_window():
    effect = by_block(torch.ones(3, 1, 1, 20, 20).tril(), 4)
    assert effect.shape == (1, 1, 5, 5) and effect.sum() == 210
    assert masked(8, 20, 4, 4).sum() == 3  # key blocks 1 of queries 3, 4 and 2 of query 4
    losses = rule_losses(effect, [Rule(4, 0.0), Rule(8, 0.0), Rule(0, 1.0)], 20, sink=4, block=4)
    assert losses[0, 0].tolist() == [6 * 16, 3 * 16, 0]
    shared = by_group(torch.tensor([1.0, 5.0, 4.0, 2.0]).view(1, 4, 1, 1), 2)
    assert shared.flatten().tolist() == [5, 4]
    rules = search_space((2048, 4096, 8192))
    assert Rule(-2048, 0.5) not in rules and Rule(0, 0.5) in rules
    assert all(rule.span(2048) <= 2048 and rule.alpha + rule.beta * 2048 >= 64 for rule in rules)


N, BLOCK, KEYS, KINDS, STEPS = 256, 16, 4, 8, 220


class Retrieval:
    """4 keys with a value each (one token a pair) anywhere among fillers, then 8 questions for the value of a key.

    At first each pair is there up to 16 times, fewer and fewer; in the last 40% of the steps once.
    """

    def __init__(self):
        self.calls = 0

    def __call__(self, generator):
        left = max(0.0, 1 - self.calls / (0.6 * STEPS))
        self.calls += 1
        return self.draw(generator, 8, max(1, int(16 * left**2)))

    def draw(self, generator, size, copies=1):
        ids, target = torch.zeros(size, N, dtype=torch.int64), torch.full((size, N), -100)
        values = torch.randint(0, KINDS, (size, KEYS), generator=generator)
        pairs = 1 + torch.arange(KEYS) * KINDS + values
        places = torch.rand(size, N - 32, generator=generator).argsort(1)[:, : KEYS * copies]
        which = torch.randint(0, KEYS, (size, 8), generator=generator)
        ids.scatter_(1, places, pairs.repeat(1, copies))
        ids[:, -8:], target[:, -8:] = 1 + KEYS * KINDS + which, values.gather(1, which)
        return ids, target


def profiled(model, ids):
    """Influence by block of every head on the loss of the model's own answers."""
    maps, past = [], torch.ones(N, N, dtype=torch.bool).tril()

    def attend(_, q, k, v):
        weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~past, -torch.inf).softmax(-1)
        weights.retain_grad()
        maps.append(weights)
        return weights @ v

    model.attend = attend
    logits = model(ids)[:, -8:].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum").backward()
    return by_block(torch.stack([influence(m.detach(), m.grad) for m in maps], 1), BLOCK)


@pytest.mark.slow
def test_searched_spans_retrieve_more_than_a_uniform_window_of_equal_mean():
    torch.manual_seed(0)
    model = Tiny(1 + KEYS * KINDS + KEYS, N, 64, 8, 2, lambda _, q, k, v: sdpa(q, k, v, is_causal=True), KINDS)
    with torch.no_grad():
        model.place.weight.mul_(0.1)
    train(model, Retrieval(), STEPS, 5e-3)
    ids, target = Retrieval().draw(torch.Generator().manual_seed(99), 64)
    assert accuracy(model, ids, target) > 0.95

    effect = profiled(model, Retrieval().draw(torch.Generator().manual_seed(5), 16)[0])
    rules = [Rule(BLOCK, 0.0), *(Rule(0, beta) for beta in (0.25, 0.5, 0.75, 1.0))]
    losses = rule_losses(effect, rules, N, sink=BLOCK, block=BLOCK)[None]
    density = torch.tensor([[min(N, BLOCK + rule.span(N, BLOCK)) / N for rule in rules]])
    best = min(solve(losses, density), key=lambda choice: choice.loss)
    plan = MoA(tuple(tuple(tuple(rules[r]) for r in row) for row in best.rules), sink=BLOCK, block=BLOCK)
    assert 0.45 <= plan.density(N) <= 0.5

    grid = ct.Grid(n=N)
    model.attend = lambda layer, q, k, v: ct.attention(q, k, v, grid=grid, where=plan.where(layer, N))
    searched = accuracy(model, ids, target)
    mean = round(sum(sum(plan.spans(layer, N)) for layer in range(2)) / 16)
    uniform = (ct.sinks(BLOCK) | ct.window(n=(mean - 1, 0))) & ct.causal()
    model.attend = lambda _, q, k, v: ct.attention(q, k, v, grid=grid, where=uniform)
    assert searched >= 1.5 * accuracy(model, ids, target)
