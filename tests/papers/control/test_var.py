"""VAR (system 109): sinks by their channels, the rule on maps, on real layers and a cache, and what sinks are worth."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.adapt import Control, control
from chronotope.papers.control.var import VAR, redistributed, sink_tokens

IMAGE, DIMS, N = slice(3, 19), (5, 20), 27
SINKS = (0, 4, 11)  # one of text, two of the image


def tokens(batch=2, n=N, dim=1024, sinks=SINKS, seed=0, massive=80):
    """Random tokens, of which some have a massive channel."""
    x = torch.randn(batch, n, dim, generator=torch.Generator().manual_seed(seed))
    for i, place in enumerate(sinks):
        x[:, place, DIMS[i % 2]] = massive * (-1) ** i
    return x


def maps(seed=0, batch=2, heads=8, liked=2.0):
    """Causal maps of which some rows look at the image and some at sinks."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, N, N, generator=rng)
    for place in SINKS:
        scores[..., place] += liked * torch.randn(batch, heads, N, generator=rng)
    return scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def planted():
    sinks = torch.zeros(2, N, dtype=torch.bool)
    sinks[:, list(SINKS)] = True
    return sinks


def test_massive_channels_are_found_at_any_scale_and_nothing_else():
    for seed in range(20):
        x = tokens(seed=seed)
        x[:, 7, 100] = 90  # massive elsewhere: not a sink of this model
        for scale in (1e-3, 1, 1e3):
            assert torch.equal(sink_tokens(scale * x, DIMS), planted())
    assert not sink_tokens(tokens(sinks=()), DIMS).any()


def test_rows_keep_their_sum_and_what_is_hidden():
    weights = maps()[:, :, IMAGE.stop :]
    new = redistributed(weights, planted(), IMAGE)
    assert (new.sum(-1) - 1).abs().max() <= 1e-6
    assert new.min() >= 0
    assert (new[weights == 0] == 0).all()
    exact = redistributed(weights.double(), planted(), IMAGE)
    assert (exact.sum(-1) - weights.double().sum(-1)).abs().max() <= 1e-15
    assert torch.equal(redistributed(weights, planted(), IMAGE, p=1), weights)


def test_heads_and_rows_are_changed_where_they_look_at_the_image_and_not_at_its_sinks():
    weights, inside = maps()[:, :, IMAGE.stop :], torch.arange(IMAGE.start, IMAGE.stop)
    looks, lost = weights[..., inside].sum(-1), weights[..., [4, 11]].sum(-1)
    chosen = (looks >= 0.2) & (lost / looks <= 0.5)
    assert 0.2 < chosen.float().mean() < 0.95
    new = redistributed(weights, planted(), IMAGE)
    assert torch.equal((new != weights).any(-1), chosen)
    assert torch.equal(new[~chosen], weights[~chosen])
    rest = [j for j in inside.tolist() if j not in SINKS]
    gained = (new - weights)[..., rest].sum(-1)[chosen]
    assert (gained - 0.4 * weights[..., list(SINKS)].sum(-1)[chosen]).abs().max() <= 1e-6
    assert (new / weights)[..., list(SINKS)][chosen].sub(0.6).abs().max() <= 1e-6
    text = [j for j in range(N) if j not in rest and j not in SINKS]
    assert torch.equal(new[..., text], weights[..., text])
    factor = (new / weights)[..., rest][chosen]
    assert (factor - factor[:, :1]).abs().max() <= 1e-5


def test_without_a_sink_in_the_image_nothing_is_changed():
    sinks = planted()
    sinks[1, IMAGE] = False
    weights = maps()[:, :, IMAGE.stop :]
    new = redistributed(weights, sinks, IMAGE)
    assert torch.equal(new[1], weights[1])
    assert torch.equal(new[0], redistributed(weights, planted(), IMAGE)[0])


class Layer(nn.Module):
    """x + attention: a block whose attention module is `attention`."""

    def __init__(self, dim, heads):
        super().__init__()
        self.attention = SelfAttention(dim, heads)

    def forward(self, x):
        return x + self.attention(F.rms_norm(x, x.shape[-1:]))


class SelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.enter, self.leave = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.enter(x).chunk(3, -1))
        return self.leave(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Explicit(Control):
    """The same by maps that are held as a whole."""

    def __init__(self, sinks):
        self.sinks = sinks

    def weights(self, at, weights):
        text = redistributed(weights[:, :, IMAGE.stop :], self.sinks, IMAGE)
        return torch.cat((weights[:, :, : IMAGE.stop], text), 2)


class Heads(Control):
    """Keeps what the heads bring."""

    def __init__(self):
        self.kept = []

    def out(self, at, asked, out):
        self.kept.append(out)
        return out


def decoder(layers=5, dim=1024, heads=4):
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(dim, heads) for _ in range(layers))).requires_grad_(False)


def test_the_correction_equals_whole_maps_on_a_real_model():
    model, x = decoder(), tokens()
    plain = model(x)
    with VAR(IMAGE, DIMS).on(model):
        got = model(x)
    with control(model, Explicit(planted()), layers=["2.attention", "3.attention"]):
        want = model(x)
    assert (got - want).abs().max() <= 1e-5
    assert (got - plain).abs().max() > 1e-3
    assert torch.equal(got[:, : IMAGE.stop], plain[:, : IMAGE.stop])
    assert torch.equal(model(x), plain)  # nothing is left behind
    with VAR(IMAGE, DIMS, p=1).on(model):
        assert torch.equal(model(x), plain)
    with VAR(IMAGE, DIMS, tau=40).on(model):
        assert torch.equal(model(x), plain)


def test_heads_that_are_not_chosen_bring_the_same():
    model, x, before, after = decoder(1), tokens(), Heads(), Heads()
    weights = ct.adapt.Capture()
    with control(model, before):
        model(x)
    with control(model, weights):
        model(x)
    with control(model, after), VAR(IMAGE, DIMS, least=0.62).on(model, skip=(0, 0)):
        model(x)
    looks = weights.kept["0.attention", 0][0][..., IMAGE].sum(-1)[:, :, IMAGE.stop :]
    chosen = looks >= 0.62
    assert 0.1 < chosen.float().mean() < 0.9
    changed = (after.kept[0] != before.kept[0]).any(-1)[:, :, IMAGE.stop :]
    assert torch.equal(changed, chosen)


def test_a_cache_keeps_the_sinks_of_its_tokens():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=4, **sizes)
    model = transformers.LlamaModel(config).eval().requires_grad_(False)
    model.embed_tokens.weight[30:, DIMS[0]] = 100.0  # words from 30 on are sinks
    ids = torch.randint(0, 30, (2, N), generator=torch.Generator().manual_seed(0))
    ids[:, list(SINKS)] = 35
    ids[1, 22] = 31  # one that comes while it is decoding
    plain, var = model(ids).last_hidden_state, VAR(IMAGE, DIMS)
    with var.on(model, skip=(1, 1)):
        whole = model(ids).last_hidden_state
        assert sorted(var.sinks) == ["layers.1.self_attn", "layers.2.self_attn"]
        for found in var.sinks.values():
            assert torch.equal(found, ids >= 30)
        first = model(ids[:, :20], use_cache=True)
        outs, cache = [first.last_hidden_state], first.past_key_values
        for i in range(20, N):
            step = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            outs.append(step.last_hidden_state)
        for found in var.sinks.values():
            assert torch.equal(found, ids >= 30)
    assert (torch.cat(outs, 1) - whole).abs().max() <= 1e-5
    assert (whole - plain).abs().max() > 1e-3
    cache = model(ids[:, :20], use_cache=True).past_key_values
    with (
        VAR(IMAGE, DIMS).on(model, skip=(1, 1)),
        pytest.raises(ct.ChronotopeError, match="attach it before the cache gets its first tokens"),
    ):
        model(ids[:, 20:21], past_key_values=cache)


def test_wrong_parts_and_too_few_layers_are_refused():
    with pytest.raises(ct.ChronotopeError, match=r"expected slice\(start, stop\)"):
        VAR(slice(5, None), DIMS)
    with (
        pytest.raises(ct.ChronotopeError, match="first 2 layers and the last 1 none is left"),
        VAR(IMAGE, DIMS).on(decoder(3)),
    ):
        pass


class Removed(Control):
    """What some tokens bring is taken away; the weights of the others stay as they are."""

    def __init__(self, places):
        self.places = list(places)

    def weights(self, at, weights):
        return weights.index_fill(-1, torch.tensor(self.places), 0.0)


def test_sinks_are_worth_nothing_and_as_many_other_tokens_are():
    """A layer whose queries look for the massive channels and whose values leave them out, as the paper finds it."""
    dim, model = 1024, decoder(1)
    x, attention = tokens(massive=80000), model[0].attention
    q, k, v = (attention.enter.weight[i * dim : (i + 1) * dim] for i in range(3))
    q[0], k[0], v[:, list(DIMS)], attention.enter.bias[:] = 0.0, 0.0, 0.0, 0.0
    k[0, list(DIMS)], attention.enter.bias[0] = torch.tensor([1.0, -1.0]), 1.5
    heads, weights = Heads(), ct.adapt.Capture()

    def brought(*controls):
        with control(model, *controls, heads), control(model, weights):
            model(x)
        return heads.kept[-1][:, 0, IMAGE.stop :]  # of the first head, to the text after the image

    plain = brought()
    mass = weights.kept["0.attention", 0][0][:, 0, IMAGE.stop :, [4, 11]].sum(-1)
    assert sink_tokens(x, DIMS).equal(planted())
    assert mass.mean() > 0.3  # much is spent on them
    rng, ordinary = torch.Generator().manual_seed(0), [j for j in range(IMAGE.start, IMAGE.stop) if j not in SINKS]

    def change(places):
        return float((brought(Removed(places)) - plain).norm() / plain.norm())

    assert change([4, 11]) < 0.01
    for _ in range(10):
        some = [ordinary[i] for i in torch.randperm(len(ordinary), generator=rng)[:2].tolist()]
        assert change(some) > 0.05
