"""TransNeXt's aggregated attention: one softmax over near and pooled keys, reach, length scaling, cost, other sizes."""

import math
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.pattern.transnext import ConvGLU, FovealAttention, TransNeXtBlock, key_counts


def layer_and_input(h, w, pool, window=3, dim=12, heads=2, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = FovealAttention(dim, heads, (h, w), window=window, pool=pool, **options).to(dtype)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer, torch.randn(2, h * w, dim, dtype=dtype), ct.Grid(h=h, w=w)


def cpb(layer, query, key):
    """The MLP on sign(z) log2(1 + |z|) / log2 8 of one pair of places."""
    z = [8 * (a - b) / (n - 1) for a, b, n in zip(query, key, layer.coarse_bias.pretrain, strict=True)]
    return layer.coarse_bias.mlp(
        torch.tensor([math.copysign(math.log2(1 + abs(a)) / math.log2(8), a) for a in z], dtype=torch.float64)
    )


def cells(n, count):
    """First and last place of each cell of an adaptive average pool."""
    return [(i * n // count, -(-(i + 1) * n // count) - 1) for i in range(count)]


def by_loop(layer, x, grid):
    """Query by query: [near; pooled] written side by side, one softmax, then the positional weights."""
    (h, w), heads, reach = grid.shape, layer.heads, layer.window // 2

    def split(y):
        return y.unflatten(-1, (heads, -1))

    q = F.normalize(split(layer.q(x)), dim=-1)
    k, v = (split(y) for y in layer.kv(x).chunk(2, -1))
    image = F.gelu(layer.coarsen(x.transpose(1, 2).unflatten(2, (h, w))))
    rows, columns = cells(h, layer.pool[0]), cells(w, layer.pool[1])
    pooled = [image[:, :, a : b + 1, c : d + 1].mean((2, 3)) for a, b in rows for c, d in columns]
    coarse_k, coarse_v = (split(y) for y in layer.kv(layer.norm(torch.stack(pooled, 1))).chunk(2, -1))
    k, coarse_k = F.normalize(k, dim=-1), F.normalize(coarse_k, dim=-1)
    centres = [((a + b) / 2, (c + d) / 2) for a, b in rows for c, d in columns]
    out = torch.empty_like(q)
    for i in range(h * w):
        y, z = divmod(i, w)
        near = [
            (y + dy, z + dz, (dy + reach) * layer.window + dz + reach)
            for dy in range(-reach, reach + 1)
            for dz in range(-reach, reach + 1)
        ]
        near = [(a * w + b, o) for a, b, o in near if 0 <= a < h and 0 <= b < w]
        places, offsets = [a for a, _ in near], [o for _, o in near]
        scale = F.softplus(layer.temperature[:, :, 0]) * math.log(len(near) + len(centres))
        scaled = (q[:, i] + layer.embedding[:, 0]) * scale
        keys, values = torch.cat([k[:, places], coarse_k], 1), torch.cat([v[:, places], coarse_v], 1)
        bias = torch.cat(
            [layer.near_bias.table[:, offsets], torch.stack([cpb(layer, (y, z), c) for c in centres], 1)], 1
        )
        weights = (torch.einsum("bhd,bkhd->bhk", scaled, keys) + bias).softmax(-1)
        if layer.positional:
            extra = torch.einsum("bhd,hdo->bho", q[:, i], layer.tokens[..., offsets]) + layer.weights[:, 0, offsets]
            weights = torch.cat([weights[..., : len(near)] + extra, weights[..., len(near) :]], -1)
        out[:, i] = torch.einsum("bhk,bkhd->bhd", weights, values)
    return layer.out(out.flatten(2))


# With the official module's weights drawn at std 0.3 (dim 48, 14 x 14, 10 x 14 and 28 x 28), outputs differed by
# 9.6e-6 at most where outputs reach 40, in float32.
@pytest.mark.parametrize("positional", [True, False], ids=["with T", "without T"])
@pytest.mark.parametrize(("size", "pool", "window"), [((6, 8), (3, 2), 3), ((5, 7), (2, 3), 5)], ids=str)
def test_equals_one_softmax_over_near_and_pooled_keys(size, pool, window, positional):
    layer, x, grid = layer_and_input(*size, pool, window, positional_tokens=positional)
    torch.testing.assert_close(layer(x, grid), by_loop(layer, x, grid), atol=1e-9, rtol=0)


def test_gradients_equal_those_of_the_loop():
    layer, x, grid = layer_and_input(5, 6, (2, 2))
    x.requires_grad_()
    parameters = [x, *layer.parameters()]
    target = torch.randn_like(x)
    mine = torch.autograd.grad((layer(x, grid) * target).sum(), parameters)
    for a, b in zip(mine, torch.autograd.grad((by_loop(layer, x, grid) * target).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_window_over_the_image_is_length_scaled_cosine_attention():
    """Without pooled keys the near part alone, its window covering 4 x 5, is dense attention with a bias table."""
    layer, x, grid = layer_and_input(4, 5, (2, 2), window=9, positional_tokens=False)
    q = F.normalize(layer._split(layer.q(x)), dim=-1)
    k, v = layer._keys(x)
    counts = key_counts(grid, 9, 0).double()
    assert counts.eq(20).all()
    scaled = (q + layer.embedding) * F.softplus(layer.temperature) * counts.log()
    out = ct.attention(scaled, k, v, grid=grid, where=ct.window(h=9, w=9), bias=layer.near_bias, scale=1.0)
    y, z = grid.coords().unbind(1)
    table = layer.near_bias.table[:, (y - y[:, None] + 4) * 9 + z - z[:, None] + 4]
    cosine = F.softplus(layer.temperature) * math.log(20) * (q + layer.embedding) @ k.transpose(-1, -2)
    torch.testing.assert_close(out, (cosine + table).softmax(-1) @ v, atol=1e-10, rtol=0)


def test_last_stage_is_length_scaled_cosine_attention():
    layer, x, grid = layer_and_input(4, 5, None)
    q, (k, v) = F.normalize(layer._split(layer.q(x)), dim=-1), layer._keys(x)
    bias = torch.stack(
        [torch.stack([cpb(layer, a, b) for b in grid.coords().tolist()]) for a in grid.coords().tolist()]
    )
    logits = F.softplus(layer.temperature) * math.log(20) * (q + layer.embedding) @ k.transpose(-1, -2)
    out = (logits + bias.movedim(-1, 0)).softmax(-1) @ v
    torch.testing.assert_close(layer(x, grid), layer.out(out.transpose(1, 2).flatten(2)), atol=1e-10, rtol=0)


def test_every_pixel_reaches_every_output():
    layer, x, grid = layer_and_input(8, 8, (2, 2))
    x.requires_grad_()
    for place in (0, 27, 63):
        (gradient,) = torch.autograd.grad(layer(x, grid)[0, place].square().sum(), x)
        assert gradient[0].abs().amax(-1).min() > 0
        assert gradient[1].abs().max() == 0


def test_temperature_starts_at_1_over_024():
    layer = FovealAttention(12, 2, (7, 7))
    torch.testing.assert_close(F.softplus(layer.temperature), torch.full((2, 1, 1), 1 / 0.24))


def test_length_scale_keeps_the_mass_on_a_planted_key():
    """One key of cosine 0.8 among n random unit keys, d = 24: log(n) holds its mass, the scale of n = 64 does not."""
    torch.manual_seed(0)
    queries, mass = 2000, {}
    for n in (64, 4096):
        q = F.normalize(torch.randn(queries, 24), dim=-1)
        side = F.normalize(torch.randn(queries, 24), dim=-1)
        side = F.normalize(side - (side * q).sum(-1, keepdim=True) * q, dim=-1)
        cosine = torch.cat(
            [(q * (0.8 * q + 0.6 * side)).sum(-1, keepdim=True), q @ F.normalize(torch.randn(n, 24), dim=-1).T], -1
        )
        for name, length in (("scaled", n), ("frozen", 64)):
            mass[name, n] = (cosine / 0.24 * math.log(length)).softmax(-1)[:, 0].mean().item()
    assert mass["scaled", 64] > 0.95 and mass["scaled", 4096] > 0.95
    assert mass["frozen", 4096] < 0.65


def test_pool_can_grow_with_the_image():
    layer, _, _ = layer_and_input(8, 8, (2, 2))
    x, grid = torch.randn(1, 256, 12, dtype=torch.float64), ct.Grid(h=16, w=16)
    grown = layer(x, grid, pool=(4, 4))
    assert grown.shape == x.shape and not torch.allclose(grown, layer(x, grid))
    assert key_counts(grid, 3, 16)[[0, 1, 17]].flatten().tolist() == [20, 22, 25]


def test_conv_glu_is_its_formula_and_block_trains():
    torch.manual_seed(0)
    glu, grid = ConvGLU(6, ratio=4), ct.Grid(h=3, w=4)
    x = torch.randn(2, 12, 6)
    assert glu.down.in_features == 16
    gate, value = F.linear(x, glu.up.weight, glu.up.bias).split(16, -1)
    gate = glu.mix(gate.mT.reshape(2, 16, 3, 4)).reshape(2, 16, 12).mT
    torch.testing.assert_close(glu(x, grid), glu.down(F.gelu(gate) * value))
    block = TransNeXtBlock(6, 2, (3, 4), pool=(1, 2))
    block(x, grid).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_errors_say_what_to_do():
    with pytest.raises(ct.ChronotopeError, match="10 channels do not split into 4 heads"):
        FovealAttention(10, 4, (7, 7))
    layer, x, grid = layer_and_input(4, 4, (2, 2))
    for other in (ct.Grid(y=4, z=4), ct.Grid(h=4, w=5), ct.Grid(h=3, w=5, prefix=1)):
        with pytest.raises(ct.ChronotopeError, match=r"16 tokens on .*; expected H \* W on Grid"):
            layer(x, other)
    with pytest.raises(ct.ChronotopeError, match="has no coarse map"):
        FovealAttention(12, 2, (4, 4), pool=None)(x.float(), grid, pool=(2, 2))


@pytest.mark.slow
def test_linear_mode_is_linear():
    """Processor time, not wall-clock: other work on the machine should not count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layer = FovealAttention(96, 4, (56, 56), pool=(7, 7))
    best = {56: math.inf, 112: math.inf}
    with torch.no_grad():
        for _ in range(15):
            for side in best:
                x, grid = torch.randn(1, side * side, 96), ct.Grid(h=side, w=side)
                start = time.thread_time()
                layer(x, grid)
                best[side] = min(best[side], time.thread_time() - start)
    torch.set_num_threads(threads)
    print(f"112 x 112 against 56 x 56: {best[112] / best[56]:.2f}")
    assert 3.2 <= best[112] / best[56] <= 5


def shapes(label, generator):
    """Images of 32 x 32 with one disk, square, triangle or cross at a random place, and noise."""
    u = torch.rand(len(label), 4, generator=generator)
    radius = 4 + 4 * u[:, 0]
    y, x = (
        (torch.arange(32.0) - (radius + at * (31 - 2 * radius))[:, None]) / radius[:, None] for at in (u[:, 1], u[:, 2])
    )
    y, x = y[:, :, None], x[:, None, :]
    small = (x.abs() < 1) & (y.abs() < 1)
    square, cross = (x.abs() < 0.85) & (y.abs() < 0.85), small & ((x.abs() < 0.3) | (y.abs() < 0.3))
    kinds = torch.stack([x * x + y * y < 1, square, (y < 0.8) & (y > 2 * x.abs() - 1), cross], 1)
    image = kinds[torch.arange(len(label)), label] * (0.6 + 0.4 * u[:, 3])[:, None, None]
    return (image + 0.15 * torch.randn(image.shape, generator=generator))[:, None]


def four_times(label, generator):
    """Images of 64 x 64: a shape of the same kind, and of the same size in pixels, in each quarter."""
    quarters = [shapes(label, generator) for _ in range(4)]
    return torch.cat([torch.cat(quarters[:2], 3), torch.cat(quarters[2:], 3)], 2)


class ViTBlock(nn.Module):
    """Plain attention and MLP, pre-norm; what it knows of places is in its input."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList((nn.LayerNorm(dim), nn.LayerNorm(dim)))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, grid, pool):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Classifier(nn.Module):
    """4 x 4 patches, two blocks of width 32, mean, four classes; the ViT's places are interpolated to other sizes."""

    def __init__(self, absolute):
        super().__init__()
        self.patch, self.norm, self.head = nn.Conv2d(1, 32, 4, stride=4), nn.LayerNorm(32), nn.Linear(32, 4)
        self.place = nn.Parameter(0.02 * torch.randn(1, 32, 8, 8)) if absolute else None
        make = (lambda: ViTBlock(32, 2)) if absolute else (lambda: TransNeXtBlock(32, 2, (8, 8), pool=(4, 4)))
        self.blocks = nn.ModuleList(make() for _ in range(2))

    def forward(self, image, pool=None):
        x = self.patch(image)
        if self.place is not None:
            x = x + F.interpolate(self.place, x.shape[2:], mode="bicubic", align_corners=False)
        grid, x = ct.Grid(h=x.shape[2], w=x.shape[3]), x.flatten(2).mT
        for block in self.blocks:
            x = block(x, grid, pool)
        return self.head(self.norm(x).mean(1))


def train(model, steps):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        label = torch.randint(4, (32,), generator=generator)
        loss = F.cross_entropy(model(shapes(label, generator)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.slow
def test_larger_images_cost_less_accuracy_than_with_absolute_places():
    """Trained on 32 x 32, tested on 64 x 64; the pooled map grows with the image, its cells keep their size in pixels.

    The ViT gets more steps: it learns the task more slowly.
    """
    accuracy = {}
    for name, absolute, steps in (("TransNeXt", False, 600), ("ViT", True, 2000)):
        torch.manual_seed(0)
        model = Classifier(absolute)
        train(model, steps)
        label = torch.randint(4, (1000,), generator=torch.Generator().manual_seed(2))
        for case, make, pool in (
            ("32", shapes, None),
            ("64", four_times, (8, 8)),
            ("64, linear mode", four_times, None),
        ):
            with torch.no_grad():
                guess = model(make(label, torch.Generator().manual_seed(3)), pool).argmax(1)
            accuracy[name, case] = (guess == label).float().mean().item()
    print({" ".join(key): round(value, 3) for key, value in accuracy.items()})
    assert accuracy["TransNeXt", "32"] > 0.9 and accuracy["ViT", "32"] > 0.9
    drop = {name: accuracy[name, "32"] - accuracy[name, "64"] for name in ("TransNeXt", "ViT")}
    assert drop["ViT"] - drop["TransNeXt"] >= 0.05
