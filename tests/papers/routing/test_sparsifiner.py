"""Sparsifiner (system 87): the dense limit, lists against masks, and a predictor learned on maps of a small ViT.

The authors' attention (commit 9a11e26 of lim142857/Sparsifiner), 65 tokens of 64 channels, 4 heads, with our scale of
the cheap scores and a basis without negative entries, 2026-11-21: no entry of the mask differs; largest difference of
scores 2.2e-8 in float32 and 5.6e-17 in float64, of outputs 7.5e-8 and 2.2e-16.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.flop_counter import FlopCounterMode

import chronotope as ct
from chronotope.papers.routing.sparsifiner import Sparsifiner

GRID = ct.Grid(prefix=1, h=8, w=8)


def tokens(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def learned(**options):
    """A layer whose predictor is no longer small."""
    torch.manual_seed(0)
    layer = Sparsifiner(32, 2, 65, **options)
    for weight in (layer.predict.down, layer.predict.up):
        nn.init.normal_(weight)
    return layer


def test_keeping_all_is_dense_attention():
    layer, x = learned(keep=1.0), tokens(2, 65, 32)
    q, k, v = layer.project(x, GRID)
    dense = layer.out(sdpa(q, k, v).transpose(1, 2).flatten(2))
    assert (layer(x, GRID) - dense).abs().max() < 1e-6
    assert bool(layer.mask(x, GRID).all())
    layer = learned()
    layer.sparse = False
    q, k, v = layer.project(x, GRID)
    assert (layer(x, GRID) - layer.out(sdpa(q, k, v).transpose(1, 2).flatten(2))).abs().max() < 1e-6


@settings(max_examples=15, deadline=None)
@given(
    keep=st.sampled_from([0.1, 0.25, 0.5, 3, 16]),
    terms=st.integers(1, 12),
    floor=st.sampled_from([0.0, 0.02, 1.5]),
    dense=st.sampled_from([0, 1, 3, 65]),
    seed=st.integers(0, 99),
)
def test_lists_equal_masks_and_every_row_has_its_budget(keep, terms, floor, dense, seed):
    layer, x = learned(keep=keep, terms=terms, floor=floor, dense=dense), tokens(2, 65, 32, seed=seed)
    mask = layer.mask(x, GRID)
    budget = keep if isinstance(keep, int) else math.ceil(keep * 65 - 1e-6)
    assert bool((mask[:, :, dense:].sum(-1) == budget).all())
    assert bool(mask[:, :, :dense].all())
    q, k, v = layer.project(x, GRID)
    found = layer(x, GRID)
    for out in (
        sdpa(q, k, v, attn_mask=mask),
        ct.attention(q, k, v, grid=ct.Grid(n=65), where=ct.route.chosen(mask, n=1)),
    ):
        assert (found - layer.out(out.transpose(1, 2).flatten(2))).abs().max() < 1e-5


def test_scores_are_the_formula():
    layer, x = learned(terms=3, floor=0.5), tokens(1, 65, 32)
    q, k, _ = layer.project(x, GRID)
    p = layer.predict
    assert tuple(p.down.shape) == (65, 10)
    assert p.query.out_features == 8
    cheap = p.query(q) @ (p.down.T @ p.key(k)).mT / math.sqrt(8)
    coef = cheap.softmax(-1)
    torch.testing.assert_close(p(q, k), coef @ p.up)
    least = coef.sort(dim=-1, descending=True).values[..., 2:3]
    up = p.up.clone()
    up[up.abs() <= 0.5] = 0
    torch.testing.assert_close(p.scores(q, k), torch.where(coef >= least, coef, 0) @ up)


def test_who_learns_from_what():
    layer, x = learned(), tokens(2, 65, 32)
    layer(x, GRID).square().sum().backward()
    assert all(p.grad is None for p in layer.predict.parameters())
    assert layer.qkv.weight.grad.abs().max() > 0
    layer.zero_grad()
    layer.reconstruction(x, GRID).backward()
    assert all(p.grad.abs().max() > 0 for p in layer.predict.parameters())
    assert layer.qkv.weight.grad is None


def test_the_gradient_of_a_key_that_nobody_keeps_is_zero():
    layer = learned(keep=4, dense=0)
    x = tokens(1, 65, 32)
    q, k, v = (part.detach().requires_grad_() for part in layer.project(x, GRID))
    index = layer.choose(q, k)
    ct.route.gathered(q, k, v, index)[0].square().sum().backward()
    kept = torch.zeros(1, 2, 65).scatter_add_(2, index.flatten(2), torch.ones(1, 2, 65 * 4)) > 0
    assert not bool(kept.all())
    assert torch.equal(v.grad.abs().sum(-1) > 0, kept)
    assert bool((k.grad.abs().sum(-1) > 0)[~kept].logical_not().all())


def test_products_of_queries_keys_and_values_fall_by_more_than_48_percent():
    n, d, heads = 197, 64, 3  # DeiT-S: 6 such heads
    torch.manual_seed(0)
    layer = Sparsifiner(d * heads, heads, n)
    nn.init.normal_(layer.predict.up, std=0.03)  # as many entries beyond the floor as there are in a learned one
    q, k, v = (tokens(1, heads, n, d, seed=i) for i in range(3))
    index = layer.choose(q, k)[:, :, 1:]
    with FlopCounterMode(display=False) as sparse:
        ct.route.gathered(q[:, :, 1:], k, v, index)
    own = sparse.get_total_flops() / 2 + heads * 2 * n * d  # and the class token, which sees all
    dense = heads * 2 * n * n * d
    budget = math.ceil(0.25 * n)
    assert own == heads * 2 * d * ((n - 1) * budget + n)
    c, r, entries = d // 2, n // 6, int((layer.predict.basis() != 0).sum()) / (n // 6)
    predictor = heads * (2 * n * d * c + 2 * n * c * r + n * 8 * entries)
    print(f"fewer: {1 - own / dense:.3f}, with the predictor {1 - (own + predictor) / dense:.3f}")
    assert 1 - own / dense >= 0.48


def test_what_is_refused():
    with pytest.raises(ct.ChronotopeError, match="multiple of heads"):
        Sparsifiner(30, 4, 65)
    with pytest.raises(ct.ChronotopeError, match="keep=0"):
        Sparsifiner(32, 2, 65, keep=0)
    with pytest.raises(ct.ChronotopeError, match="made for 65 tokens, got 50"):
        Sparsifiner(32, 2, 65)(tokens(1, 50, 32), ct.Grid(n=50))
    with pytest.raises(ct.ChronotopeError, match="cannot be stepped"):
        Sparsifiner(32, 2, 65).init_state(1, ct.Grid(n=1))
    with pytest.raises(ct.ChronotopeError, match="rank=0"):
        ct.route.LowRank(65, 16, 0)


class Vit(nn.Module):
    """Pixels of 8 x 8 digits and a class token; two layers, the mean of all tokens, ten classes."""

    def __init__(self, dim=64, heads=4):
        super().__init__()
        self.embed, self.head = nn.Linear(1, dim), nn.Linear(dim, 10)
        self.first, self.place = nn.Parameter(torch.randn(1, 1, dim) * 0.02), nn.Parameter(torch.randn(65, dim) * 0.1)
        blocks = [ct.nn.Block([Sparsifiner(dim, heads, 65)], mlp="gelu", mlp_ratio=2) for _ in range(2)]
        self.stack, self.inputs = ct.nn.Stack(blocks), {}
        for i, layer in enumerate(self.layers()):
            layer.qkv.weight.data[: 2 * dim] *= 3  # attention of a short training is sharper for it
            layer.register_forward_hook(lambda layer, given, out, i=i: self.inputs.update({i: given[0].detach()}))

    def layers(self):
        return [block.mixers[0] for block in self.stack.blocks]

    def forward(self, pixels):
        x = torch.cat((self.first.expand(len(pixels), -1, -1), self.embed(pixels)), 1) + self.place
        return self.head(self.stack(x, GRID).mean(1))


def rate(optimizer, lr, step, steps):
    for group in optimizer.param_groups:
        group["lr"] = lr * min((step + 1) / 50, 1 - step / steps)


@pytest.mark.slow
def test_a_learned_predictor_covers_the_attention_of_a_small_vit():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images, labels = torch.from_numpy(digits.images).float().view(-1, 64, 1) / 16, torch.from_numpy(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:1500], order[1500:]
    torch.manual_seed(0)
    vit = Vit()
    for layer in vit.layers():
        layer.sparse = False
    optimizer = torch.optim.AdamW(vit.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(400):
        rate(optimizer, 3e-3, step, 400)
        some = train[torch.randint(len(train), (64,), generator=generator)]
        loss = F.cross_entropy(vit(images[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
        optimizer.step()

    def accuracy():
        with torch.no_grad():
            return float((vit(images[test]).argmax(-1) == labels[test]).float().mean())

    dense = accuracy()
    optimizer = torch.optim.AdamW([p for x in vit.layers() for p in x.predict.parameters()], weight_decay=0.0)
    for step in range(300):
        rate(optimizer, 1e-2, step, 300)
        some = train[torch.randint(len(train), (32,), generator=generator)]
        with torch.no_grad():
            vit(images[some])
        loss = sum(layer.reconstruction(vit.inputs[i], GRID) for i, layer in enumerate(vit.layers()))
        optimizer.zero_grad()
        (1e4 * loss).backward()
        optimizer.step()
    with torch.no_grad():
        vit(images[test[:64]])
    flat, near = ct.Grid(n=65), nearest()
    for i, layer in enumerate(vit.layers()):
        q, k, v = layer.project(vit.inputs[i], GRID)
        by_chance = torch.rand(*q.shape[:3], 65, generator=generator).topk(17).indices
        mass = {}
        for name, choice in (
            ("predicted", layer.choose(q, k)),
            ("best", (q @ k.mT).topk(17).indices),
            ("random", by_chance),
            ("window", near.expand(*q.shape[:2], -1, -1)),
        ):
            where = ct.route.chosen(choice, n=1)
            mass[name] = float(ct.fidelity(q, k, v, grid=flat, where=where).mass.mean())
        print(f"layer {i}: " + ", ".join(f"{name} {x:.3f}" for name, x in mass.items()))
        assert mass["predicted"] >= 0.8
        assert mass["predicted"] >= mass["random"] + 0.15
        assert mass["predicted"] > mass["window"]
    for layer in vit.layers():
        layer.sparse = True
    print(f"accuracy: dense {dense:.3f}, sparse {accuracy():.3f}")


def nearest():
    """The class token and the 16 nearest places of each place; of the class token, the first 17 tokens."""
    axis = torch.arange(8.0)
    places = torch.cartesian_prod(axis, axis)
    near = torch.cdist(places, places).topk(16, largest=False).indices + 1
    near = torch.cat((torch.zeros(64, 1, dtype=torch.int64), near), 1)
    return torch.cat((torch.arange(17)[None], near))
