"""GC ViT: local and global window attention against loops, reach, cost, and a task that needs two windows at once."""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.pattern.gcvit import GCViT, GCViTBlock, GCViTStage, GlobalQuery, WindowAttention


def by_loop(layer, x, q_global=None):
    """Window by window, query and key by key offset: softmax(q k^T / sqrt(d) + b) v."""
    _, height, width, dim = x.shape
    w, heads = layer.window, layer.heads
    out = torch.empty_like(x)
    for top in range(0, height, w):
        for left in range(0, width, w):
            tile = x[:, top : top + w, left : left + w]
            rows, columns = tile.shape[1:3]
            place = [(i, j) for i in range(rows) for j in range(columns)]
            *q, k, v = layer.project(tile.flatten(1, 2)).chunk(2 if q_global is not None else 3, -1)
            q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q[0] if q else k, k, v))
            if q_global is not None:
                q = q_global[:, :, [i * w + j for i, j in place]]
            offset = [[(y - i + w - 1) * (2 * w - 1) + z - j + w - 1 for y, z in place] for i, j in place]
            scores = q @ k.transpose(-1, -2) / (dim // heads) ** 0.5 + layer.bias.table[:, offset]
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(tile.shape)
            out[:, top : top + w, left : left + w] = layer.out(mixed)
    return out


@pytest.mark.parametrize("size", [(14, 21), (9, 5)], ids=str)
@pytest.mark.parametrize("mode", ["local", "global"])
def test_windows_equal_a_loop_over_windows(mode, size):
    torch.manual_seed(0)
    window = 7 if size[0] % 7 == 0 else 4
    layer = WindowAttention(12, 3, window, mode).double()
    nn.init.normal_(layer.bias.table)
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    g = torch.randn(2, 3, window**2, 4, dtype=torch.float64) if mode == "global" else None
    torch.testing.assert_close(layer(x, g), by_loop(layer, x, g), atol=1e-10, rtol=0)


def test_local_block_equals_dense_attention_with_mask_and_gathered_bias():
    torch.manual_seed(0)
    layer = WindowAttention(8, 2, 7)
    nn.init.normal_(layer.bias.table)
    x, grid = torch.randn(2, 14, 14, 8), ct.Grid(h=14, w=14)
    q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in layer.project(x.flatten(1, 2)).chunk(3, -1))
    y, z = grid.coords().unbind(1)
    same = (y[:, None] // 7 == y // 7) & (z[:, None] // 7 == z // 7)
    offset = (y - y[:, None]).clamp(-6, 6) * 13 + (z - z[:, None]).clamp(-6, 6) + 84
    mask = torch.where(same, layer.bias.table[:, offset], -torch.inf)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
    expected = layer.out(dense.transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)


def test_queries_are_shared_by_all_windows():
    torch.manual_seed(0)
    layer = WindowAttention(8, 2, 4, "global")
    g = torch.randn(1, 2, 16, 4, requires_grad=True)
    tile = torch.randn(1, 4, 4, 8)
    out = layer(tile.repeat(1, 3, 2, 1), g)
    for window in out.unfold(1, 4, 4).unfold(2, 4, 4).flatten(1, 2).unbind(1):
        torch.testing.assert_close(window.permute(0, 2, 3, 1), layer(tile, g), atol=1e-6, rtol=0)
    out[:, :4, :4].sum().backward()
    assert g.grad.abs().min() > 0


@pytest.mark.parametrize("second", ["local", "global"])
def test_reach_of_two_blocks(second):
    torch.manual_seed(0)
    stage = GCViTStage(8, depth=2, heads=2, window=7, pools=2).double()
    stage.blocks[1] = GCViTBlock(8, 2, 7, second).double()
    x = torch.randn(1, 28, 28, 8, dtype=torch.float64, requires_grad=True)
    stage(x)[0, :7, :7].square().sum().backward()
    far = x.grad[0, 21:, 21:].abs()
    assert far.max() == 0 if second == "local" else far.min() > 0


def test_generator_gives_one_window_of_queries_and_learns():
    x = torch.randn(2, 56, 56, 8)
    generator = GlobalQuery(8, 2, 7, pools=3)
    assert generator(x).shape == (2, 2, 49, 4)
    # 15 x 21 does not halve to 7 x 7: the adaptive pool, which is no step of the paper's, sees to it.
    assert GlobalQuery(8, 2, 7, pools=1)(torch.randn(1, 15, 21, 8)).shape == (1, 2, 49, 4)
    stage = GCViTStage(8, depth=2, heads=2, window=7, pools=3)
    stage(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.queries.parameters())


def test_queries_of_an_earlier_frame_can_be_carried():
    torch.manual_seed(0)
    stage = GCViTStage(8, depth=2, heads=2, window=4, pools=1).eval()
    first, second = torch.randn(2, 1, 8, 8, 8)
    assert torch.equal(stage(first, stage.queries(first)), stage(first))
    assert not torch.allclose(stage(second, stage.queries(first)), stage(second))


def test_errors_say_what_to_do():
    with pytest.raises(ct.ChronotopeError, match="expected 'local' or 'global'"):
        WindowAttention(8, 2, 4, "shifted")
    with pytest.raises(ct.ChronotopeError, match="9 channels do not split into 2 heads"):
        WindowAttention(9, 2, 4)
    with pytest.raises(ct.ChronotopeError, match=r"None, expected \[1, 2, 16, 4\]; make it with GlobalQuery"):
        WindowAttention(8, 2, 4, "global")(torch.randn(1, 8, 8, 8))


# The published sizes are rounded: 28M, 51M, 90M, 201M. With the official code's weights at dim=32, depths 2,2,2,2,
# 224 x 224, logits differed by 1.2e-7 at most (logits up to 1.26).
@pytest.mark.parametrize(
    ("dim", "heads", "mlp", "millions"),
    [
        (64, (2, 4, 8, 16), 3, 28),
        (96, (3, 6, 12, 24), 2, 51),
        (128, (4, 8, 16, 32), 2, 90),
        (192, (6, 12, 24, 48), 2, 201),
    ],
)
def test_sizes_are_the_published_ones(dim, heads, mlp, millions):
    with torch.device("meta"):
        model = GCViT(dim=dim, heads=heads, mlp=mlp, layer_scale=None if dim == 64 else 1e-5)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert abs(count / 1e6 - millions) < 0.01 * millions


def test_model_runs_at_its_published_resolution():
    torch.manual_seed(0)
    model = GCViT(dim=8, depths=(2, 2, 2, 2), heads=(1, 2, 2, 2), classes=5)
    logits = model(torch.randn(1, 3, 224, 224))
    logits.sum().backward()
    assert logits.shape == (1, 5)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def ratio(run, calls):
    """Best processor time at 56 x 56 over that at 28 x 28, in turn: other work on the machine should not count."""
    best = {28: float("inf"), 56: float("inf")}
    for _ in range(calls):
        for side in best:
            start = time.thread_time()
            run(side)
            best[side] = min(best[side], time.thread_time() - start)
    return best[56] / best[28]


@pytest.mark.slow
def test_cost_is_linear_in_the_map():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layer = WindowAttention(128, 4, 7)
    maps = {side: torch.randn(4, side, side, 128) for side in (28, 56)}
    heads = {side: torch.randn(2, 4, side * side, 32) for side in (28, 56)}
    with torch.no_grad():
        window = ratio(lambda side: layer(maps[side]), 40)
        dense = ratio(lambda side: ct.attention(*[heads[side]] * 3, grid=ct.Grid(h=side, w=side)), 15)
    torch.set_num_threads(threads)
    print(f"56 x 56 against 28 x 28: windows {window:.2f}, dense {dense:.2f}")
    assert 3.2 <= window <= 4.8
    assert 12 <= dense <= 20


def two_patches(count, generator, size=5):
    """Maps of 28 x 28 with two red or green patches, each inside a 7 x 7 window of its own; label: colours differ."""
    windows = torch.rand(count, 16, generator=generator).argsort(1)[:, :2]
    colours = torch.randint(2, (count, 2), generator=generator)
    corner = torch.randint(0, 8 - size, (2, count, 2), generator=generator)
    x = 0.02 * torch.randn(count, 28, 28, 3, generator=generator)
    place = torch.arange(28)
    for which in range(2):
        top, left = windows[:, which] // 4 * 7 + corner[0, :, which], windows[:, which] % 4 * 7 + corner[1, :, which]
        rows, columns = ((place >= at[:, None]) & (place < at[:, None] + size) for at in (top, left))
        x[torch.arange(count), :, :, colours[:, which]] += (rows[:, :, None] & columns[:, None, :]).float()
    return x, colours[:, 0] ^ colours[:, 1]


class Reader(nn.Module):
    """Embedding, four blocks on the full map, norm, mean, two classes."""

    def __init__(self, local_only):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, 16), nn.LayerNorm(16), nn.Linear(16, 2)
        # Patches must stand out of the embedding's offset, or the first steps see a constant.
        self.embed.weight.data *= 4
        self.stage = GCViTStage(16, depth=4, heads=2, window=7, pools=2, mlp=2)
        if local_only:
            self.stage.blocks = nn.ModuleList(GCViTBlock(16, 2, 7, "local", mlp=2) for _ in range(4))

    def forward(self, x):
        return self.head(self.norm(self.stage(self.embed(x))).mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("local_only", [False, True], ids=["local and global", "local only"])
def test_parity_of_two_windows_needs_a_global_block(local_only):
    torch.manual_seed(0)
    model, generator = Reader(local_only), torch.Generator().manual_seed(1)
    steps, batch = 300, 16
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        x, label = two_patches(batch, generator)
        loss = F.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    x, label = two_patches(512, torch.Generator().manual_seed(2))
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == label).float().mean().item()
    print(f"parity, {'local only' if local_only else 'local and global'}: {accuracy:.3f}")
    assert accuracy < 0.6 if local_only else accuracy > 0.95
