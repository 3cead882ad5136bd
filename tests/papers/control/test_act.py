"""ACT (system 61): the rule on maps, rows at a time, on a real layer, and recall that a planted sink disturbs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.adapt import Control, control
from chronotope.papers.control.act import ACT, calibrate, damped, search, sinks_of
from chronotope.papers.control.heads import heads_of, on_heads
from chronotope.papers.control.rows import row_blocks


def causal_maps(seed=0, batch=2, heads=3, n=24, columns=()):
    """Random causal maps; more is added to the scores of some columns."""
    scores = 2 * torch.randn(batch, heads, n, n, generator=torch.Generator().manual_seed(seed))
    scores[..., 0] += 3
    for column in columns:
        scores[..., column] += 4
    return scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


class SelfAttention(nn.Module):
    def __init__(self, dim, heads, kv_heads=None):
        super().__init__()
        self.heads, self.kv = heads, kv_heads or heads
        self.enter, self.leave = nn.Linear(dim, dim + 2 * dim * self.kv // heads), nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        each = x.shape[-1] // self.heads
        q, k, v = self.enter(x).split([each * self.heads, each * self.kv, each * self.kv], -1)
        q, k, v = (y.unflatten(2, (-1, each)).transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.kv != self.heads)
        return self.leave(out.transpose(1, 2).flatten(2))


class Explicit(Control):
    """The same by maps that are held as a whole."""

    def weights(self, at, weights):
        return calibrate(weights)


class Planted(Control):
    """A key that all queries of all heads like, by a constant that is added to its scores."""

    def __init__(self, place, much=6.0):
        self.place, self.much = place, much

    def scores(self, at, scores):
        return scores + self.much * (torch.arange(scores.shape[-1]) == self.place)


def test_rows_sum_to_one_and_nothing_is_seen_ahead():
    weights = causal_maps(columns=(5, 9))
    new = calibrate(weights)
    assert (new - weights).abs().max() > 0.05
    assert (new.sum(-1) - 1).abs().max() <= 1e-6
    assert (new.triu(1) == 0).all()
    assert torch.equal(new[:, :, 0], weights[:, :, 0])  # row 0 has one token to look at


def test_nothing_to_damp_is_the_identity():
    weights = causal_maps(columns=(5, 9))
    assert torch.equal(calibrate(weights, beta=1), weights)
    assert torch.equal(calibrate(weights, threshold=1), weights)


def test_all_others_of_a_row_grow_by_one_factor():
    weights = causal_maps(columns=(5, 9))
    sinks = sinks_of(weights.sum(2) / torch.arange(24, 0, -1))
    assert bool(sinks.any(-1).all())
    ratio = (calibrate(weights) / weights)[:, :, 10:]
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(14)).tolist():
        row, at = ratio[b, h, i, : 11 + i], sinks[b, h, : 11 + i]
        assert (row[at] - 0.4).abs().max() <= 1e-6
        assert row[~at].max() - row[~at].min() <= 1e-5
        assert row[~at].min() > 1


def test_a_planted_sink_is_found_alone_and_the_first_is_left():
    n = 64
    weights = torch.zeros(n, n)
    weights[:, 0], weights[7:, 7] = 0.2, 0.4
    rest = torch.ones(n, n).tril()
    rest[:, 0] = rest[7:, 7] = 0
    rest = rest / rest.sum(1, keepdim=True).clamp(min=1)
    weights = (weights + (1 - weights.sum(1, keepdim=True)) * rest)[None, None]
    weights[:, :, 0] = torch.eye(n)[0]
    mean = weights.sum(2) / torch.arange(n, 0, -1)
    assert sinks_of(mean)[0, 0].nonzero()[:, 0].tolist() == [7]
    new = calibrate(weights)
    assert (new[0, 0, 7:, 7] - 0.16).abs().max() <= 1e-6
    assert (new[0, 0, 7:, 0] >= weights[0, 0, 7:, 0]).all()
    assert sinks_of(mean, protect_first=False)[0, 0].nonzero()[:, 0].tolist() == [0, 7]


def test_a_row_of_sinks_alone_stays():
    weights = causal_maps(columns=(5,))
    everything = torch.ones(2, 3, 24, dtype=torch.bool)
    assert torch.equal(damped(weights, everything), weights)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_rows_at_a_time_equal_whole_maps(kv_heads):
    torch.manual_seed(0)
    layer, x = SelfAttention(32, 4, kv_heads), torch.randn(2, 40, 32)
    with torch.no_grad():
        layer.enter.weight[:32] *= 20  # of the queries
        plain = layer(x)
        with control(layer, Explicit()):
            whole = layer(x)
        with control(layer.double(), ACT(budget=1000)):
            exact = layer(x.double())
        assert (whole - exact).abs().max() <= 1e-6
        layer.float()
        for budget in (1, 1000, 1 << 24):
            with control(layer, ACT(budget=budget)):
                assert (layer(x) - whole).abs().max() <= 1e-6
        with control(layer, ACT(beta=1)):
            assert torch.equal(layer(x), plain)
        assert (whole - plain).abs().max() > 1e-3
        with control(layer, Planted(20), ACT(), heads=[1, 3]):  # beside another control
            both = layer(x)
        with control(layer, Planted(20), Explicit(), heads=[1, 3]):
            assert (layer(x) - both).abs().max() <= 1e-6
        assert torch.equal(layer(x), plain)


def test_blocks_are_the_rows_of_the_whole():
    seen = []

    class Look(Control):
        def out(self, at, asked, out):
            seen.append([tuple(torch.cat(x, 2) for x in list(zip(*row_blocks(asked, 3, budget), strict=True))[1:])
                         for budget in (1, 500, 1 << 24)])  # fmt: skip
            return out

    torch.manual_seed(0)
    layer, x = SelfAttention(16, 2), torch.randn(2, 9, 16)
    hidden = torch.zeros(1, 1, 9, 9).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -3e38)
    with control(layer, Look()):
        layer(x)
        layer(x, hidden)
        layer(x, torch.ones(2, 1, 1, 9, dtype=torch.bool))
    for blocks in seen:
        for visible, weights in blocks:
            assert torch.equal(visible, blocks[-1][0]) and (weights - blocks[-1][1]).abs().max() <= 1e-7
            assert weights.shape == (2, 2, 6, 9) and (weights.sum(-1) - 1).abs().max() <= 1e-6
    assert torch.equal(seen[0][0][0][0, 0], torch.ones(9, 9, dtype=torch.bool).tril()[3:])
    assert torch.equal(seen[0][0][0], seen[1][0][0]) and bool(seen[2][0][0].all())


def test_padding_counts_for_nothing():
    torch.manual_seed(0)
    layer, x = SelfAttention(16, 2), torch.randn(1, 20, 16)
    with torch.no_grad():
        layer.enter.weight *= 6
        with control(layer, ACT()):
            alone = layer(x)
        padded = torch.cat((torch.randn(1, 9, 16), x), 1)
        seen = torch.ones(29, 29, dtype=torch.bool).tril() & (torch.arange(29) >= 9)
        with control(layer, ACT()):
            assert (layer(padded, seen[None, None])[:, 9:] - alone).abs().max() <= 1e-5
        assert (layer(x) - alone).abs().max() > 1e-3


def test_a_wrong_beta_is_refused():
    with pytest.raises(ct.ChronotopeError, match=r"expected 0 to 1"):
        ACT(beta=1.5)


def test_search_finds_the_heads_that_a_score_wants():
    torch.manual_seed(0)
    layer, x = SelfAttention(32, 4), torch.randn(2, 40, 32)
    with torch.no_grad():
        layer.enter.weight *= 5
        model = nn.Sequential(layer)
        assert heads_of(model, lambda: model(x)) == [("0", head) for head in range(4)]
        plain = model(x)
        with on_heads(model, ACT(), [("0", 0), ("0", 2)]):
            wanted = model(x)
        score = lambda: -float((model(x) - wanted).square().sum())  # noqa: E731
        assert search(model, score) == [("0", 0), ("0", 2)]
        assert torch.equal(model(x), plain)


PAIRS, WORDS = 8, 16


class Recaller(nn.Module):
    """Two layers that say the value of each key that comes again."""

    def __init__(self, dim=64, heads=2, layers=2):
        super().__init__()
        self.embed, self.place = nn.Embedding(2 * WORDS + 1, dim), nn.Parameter(0.1 * torch.randn(3 * PAIRS + 1, dim))
        self.attentions = nn.ModuleList(SelfAttention(dim, heads) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(layers)
        )
        self.norms, self.say = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers + 1)), nn.Linear(dim, WORDS)

    def forward(self, tokens):
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=False):
            x = x + attention(norm(x))
            x = x + mlp(x)
        return self.say(self.norms[-1](x))[:, -PAIRS:]


def sequences(count, rng):
    """A first token, pairs of key and value, then all keys in another order -> tokens, values of the latter."""
    keys = torch.rand(count, WORDS, generator=rng).argsort(1)[:, :PAIRS]
    said = torch.randint(WORDS, (count, PAIRS), generator=rng)
    order = torch.rand(count, PAIRS, generator=rng).argsort(1)
    told = torch.stack((keys, WORDS + said), 2).flatten(1)
    return torch.cat((torch.full((count, 1), 2 * WORDS), told, keys.gather(1, order)), 1), said.gather(1, order)


def trained_recaller(seed, steps=400, rate=3e-3):
    torch.manual_seed(seed)
    model, rng = Recaller(), torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(model.parameters(), rate)
    course = torch.optim.lr_scheduler.OneCycleLR(opt, rate, total_steps=steps)
    for _ in range(steps):
        tokens, said = sequences(64, rng)
        opt.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), said.flatten()).backward()
        opt.step()
        course.step()
    return model.eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_recall_that_a_planted_sink_disturbs_is_better_with_calibration(seed, one_thread):
    model = trained_recaller(seed)

    def accuracy(count, seed):
        tokens, said = sequences(count, torch.Generator().manual_seed(seed))
        return float((model(tokens).argmax(-1) == said).float().mean())

    clean = accuracy(1024, 101)
    with control(model, Planted(8)):
        before = accuracy(1024, 101)
        found = search(model, lambda: accuracy(256, 100))
        with on_heads(model, ACT(), found):
            after = accuracy(1024, 101)
    print(f"recall {clean:.3f}, with a sink {before:.3f}, calibrated {after:.3f} in {found}")
    assert clean >= 0.99
    assert before <= clean - 0.1
    assert after >= before + 0.03
