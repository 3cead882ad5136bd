"""BiFormer: the choice of regions, its output and gradients against dense softmax, kept mass, cost, sizes of models."""

import pytest
import torch
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import chronotope as ct
from chronotope.kernels.operator import attend
from chronotope.papers.routing.biformer import BiLevelRoutingAttention, bilevel
from chronotope.papers.routing.biformer_model import BiFormer

MAP = ct.Grid(h=14, w=21)


def tensors(grid=MAP, batch=2, heads=2, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, heads, grid.size, size, generator=generator).requires_grad_() for _ in range(3))


def regions_of(grid, count=7):
    """The region of each token of a map: [N]."""
    rows, columns = (-(-n // count) for n in grid.shape)
    y, x = grid.coords().T
    return (y // rows) * count + x // columns


def indices(q, k, region, topk):
    """The best regions of each region by means over all channels: [B, S^2, topk]."""
    wide = [x.detach().transpose(1, 2).flatten(2) for x in (q, k)]
    means = [torch.stack([x[:, region == i].mean(1) for i in range(int(region.max()) + 1)], 1) for x in wide]
    return (means[0] @ means[1].mT).topk(topk, dim=-1).indices


def repeated(index, region):
    """The mask of tokens from the regions chosen: [B, 1, N, N]."""
    chosen = torch.zeros(*index.shape[:2], index.shape[1], dtype=torch.bool).scatter_(2, index, True)
    return chosen[:, region][:, :, region][:, None]


def test_all_regions_are_dense_attention():
    q, k, v = tensors()
    for topk in (49, None):
        out = ct.attention(q, k, v, grid=MAP, where=bilevel(MAP, topk))
        assert (out - sdpa(q, k, v)).abs().max() < 1e-5


def test_one_region_is_window_attention_where_each_region_answers_itself_best():
    q, _, v = tensors(size=32)
    code = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0][:49]
    q = 0.1 * q + code[regions_of(MAP)].view(-1, 2, 32).transpose(0, 1)
    out = ct.attention(q, q, v, grid=MAP, where=bilevel(MAP, 1))
    assert (out - ct.attention(q, q, v, grid=MAP, where=ct.blocks(h=2, w=3))).abs().max() < 1e-5


@pytest.mark.parametrize("topk", [1, 4, 16])
def test_output_and_gradients_are_those_of_dense_softmax_under_the_mask_of_the_regions(topk):
    q, k, v = tensors()
    mask = repeated(indices(q, k, regions_of(MAP), topk), regions_of(MAP))
    where = bilevel(MAP, topk)
    assert torch.equal(where.select(q, k, MAP), mask.expand(-1, 2, -1, -1))
    assert mask.float().mean() == pytest.approx(topk / 49)
    out, expected = ct.attention(q, k, v, grid=MAP, where=where), sdpa(q, k, v, attn_mask=mask)
    assert (out - expected).abs().max() < 1e-5
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    # The mask is a constant: were there a gradient through the means of regions, these would differ.
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-4


def test_no_gradient_reaches_keys_by_the_choice_alone():
    q, k, v = tensors()
    region = regions_of(MAP)
    index = indices(q, k, region, 4)[0]
    out = ct.attention(q, k, v, grid=MAP, where=bilevel(MAP, 4))
    out[0, :, region == 0].sum().backward()
    unseen = torch.isin(region, index[0], invert=True)
    assert k.grad[0, :, unseen].abs().max() == 0
    assert q.grad[0, :, region != 0].abs().max() == 0
    assert k.grad[0, :, ~unseen].abs().max() > 0


def test_a_map_that_regions_do_not_divide_is_the_padded_map_with_padding_masked():
    grid, topk = ct.Grid(h=30, w=41), 5
    q, k, v = tensors(grid, batch=1)
    padded = ct.Grid(h=35, w=42)
    real = pad(torch.ones(30, 41, dtype=torch.bool), (0, 1, 0, 5)).flatten()
    wide = [pad(x.unflatten(2, (30, 41)), (0, 0, 0, 1, 0, 5)).flatten(2, 3) for x in (q, k, v)]
    region = regions_of(padded)
    filled = torch.stack([real[region == i].any() for i in range(49)])
    assert filled.sum() == 42  # the last row of regions is padding only
    means = []
    for x in wide[:2]:
        x = x.detach().transpose(1, 2).flatten(2)
        means.append(torch.stack([x[:, (region == i) & real].mean(1).nan_to_num() for i in range(49)], 1))
    index = (means[0] @ means[1].mT).masked_fill(~filled, -torch.inf).topk(topk, dim=-1).indices
    mask = repeated(index, region) & real
    expected = sdpa(*wide, attn_mask=mask)[:, :, real]
    assert (ct.attention(q, k, v, grid=grid, where=bilevel(grid, topk)) - expected).abs().max() < 1e-5


def test_routed_regions_keep_far_more_mass_than_chance_or_neighbours():
    """7 kinds of content over 49 regions of 16 tokens; queries and keys are the kind's code and noise."""
    grid, generator = ct.Grid(h=28, w=28), torch.Generator().manual_seed(0)
    code = 0.5 * torch.randn(7, 64, generator=generator)
    kind = torch.randperm(49, generator=generator) % 7
    content = code[kind[regions_of(grid)]]
    q, k = ((content + 0.5 * torch.randn(content.shape, generator=generator))[None, None] for _ in range(2))
    y, x = torch.arange(49) // 7, torch.arange(49) % 7
    near = ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2).argsort(dim=-1, stable=True)[:, :7]
    chance = torch.rand(49, 49, generator=generator).argsort(-1)[:, :7]
    routes = [bilevel(grid, 7), *(ct.route.chosen(some[None, None], h=4, w=4) for some in (chance, near))]
    every = ct.attention(q, k, k, grid=grid, return_lse=True)[1]
    found = [ct.attention(q, k, k, grid=grid, where=where, return_lse=True)[1] for where in routes]
    routed, random, neighbours = ((lse - every).exp().mean().item() for lse in found)
    print(f"kept mass of 7 regions: routed {routed:.3f}, random {random:.3f}, neighbours {neighbours:.3f}")
    assert routed >= 2.5 * max(random, neighbours)


class Multiplications(TorchDispatchMode):
    """Counts multiplications of matrix products, those inside of attention too, and leaves out convolutions."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.chronotope.attend.default:
            with self:
                return attend(*args)
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in func.name():
            q, k = args[:2]
            self.count += 2 * q.shape.numel() * k.shape[-2]
        elif func is torch.ops.aten.matmul.default:
            self.count += out.numel() * args[0].shape[-1]
        elif func._overloadpacket in flop_registry and "convolution" not in func.name():
            self.count += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out) // 2
        return out


# Regions of 64 and of 16 tokens. Smaller ones are computed in tiles of 16, so that some more is.
@pytest.mark.usefixtures("torch_operators")
@pytest.mark.parametrize(
    ("side", "dim", "topk", "low", "high"),
    [(56, 64, 1, 0.95, 1.05), (56, 64, 8, 0.95, 1.05), (28, 128, 4, 0.95, 1.05), (14, 256, 16, 1.05, 1.3)],
)
def test_cost_is_the_published_formula(side, dim, topk, low, high):
    layer, n = BiLevelRoutingAttention(dim, dim // 32, topk), side * side
    with torch.no_grad(), Multiplications() as meter:
        layer(torch.randn(1, n, dim), ct.Grid(h=side, w=side))
    found = meter.count - n * dim**2  # the output projection, which the formula leaves out
    formula = 3 * n * dim**2 + 2 * dim * 49**2 + 2 * n * dim * topk * n // 49
    print(f"{side} x {side}, {dim} channels, topk {topk}: {found / formula:.3f} of the formula")
    assert low < found / formula < high


def test_regions_that_are_frames_stream():
    grid = ct.Grid(t=6, h=3, w=4)
    q, k, v = tensors(grid)
    where = bilevel(grid, 2, {"t": 6}) & ct.causal("t")
    whole = ct.attention(q, k, v, grid=grid, where=where)
    for frames in range(1, 6):
        past = ct.Grid(t=frames, h=3, w=4)
        some = (x[:, :, : past.size] for x in (q, k, v))
        out = ct.attention(*some, grid=past, where=bilevel(past, 2, {"t": frames}) & ct.causal("t"))
        assert (out - whole[:, :, : past.size]).abs().max() < 1e-5


def test_layer_adds_the_local_context_of_values_frame_by_frame():
    torch.manual_seed(0)
    layer, grid = BiLevelRoutingAttention(16, 2, topk=3, kernel=3, scale=0.25), ct.Grid(t=2, h=8, w=9)
    x = torch.randn(2, grid.size, 16)
    q, k, v = layer.qkv(x).view(2, grid.size, 3, 2, 8).permute(2, 0, 3, 1, 4)
    out = ct.attention(q, k, v, grid=grid, where=bilevel(grid, 3), scale=0.25).transpose(1, 2).flatten(2)
    maps = v.transpose(1, 2).reshape(4, 8, 9, 16).permute(0, 3, 1, 2)
    near = torch.conv2d(maps, layer.local.weight, layer.local.bias, padding=1, groups=16)
    expected = layer.out(out + near.permute(0, 2, 3, 1).reshape(x.shape))
    assert (layer(x, grid) - expected).abs().max() < 1e-5


def test_bad_input_is_refused():
    with pytest.raises(ct.ChronotopeError, match="10 channels do not divide into 4 heads"):
        BiLevelRoutingAttention(10, 4, 1)
    with pytest.raises(ct.ChronotopeError, match="kernel=4"):
        BiLevelRoutingAttention(8, 2, 1, kernel=4)
    with pytest.raises(ct.ChronotopeError, match="ints from 1 on"):
        bilevel(MAP, 1, {"h": 0})
    with pytest.raises(ct.ChronotopeError, match="'h'"):
        bilevel(ct.Grid(n=8), 1)
    layer = BiLevelRoutingAttention(8, 2, 1, {"h": 2})
    with pytest.raises(ct.ChronotopeError, match="end in h, w"):
        layer(torch.randn(1, 8, 8), ct.Grid(h=4, n=2))
    with pytest.raises(ct.ChronotopeError, match="leave out context"):
        layer(torch.randn(1, 8, 8), ct.Grid(h=4, w=2), context=torch.randn(1, 8, 8))
    for call in (lambda: layer.init_state(1, ct.Grid(t=1, h=4, w=2)), lambda: layer.step(torch.randn(1, 8, 8), None)):
        with pytest.raises(ct.ChronotopeError, match="cannot be stepped"):
            call()


# The authors' code (commit 1697bbb) has 13142760, 25536232, 56804968: no bias of q, k, v in the last stage. With its
# random weights, its scale, and its last stage (8 heads; a convolution of the input instead of the values), logits of
# BiFormer-T at 224 x 224 differed by 4e-7 at most (logits up to 2.4).
@pytest.mark.parametrize(
    ("sizes", "count"),
    [({}, 13_142_760), ({"depths": (4, 4, 18, 4)}, 25_536_232), ({"dim": 96, "depths": (4, 4, 18, 4)}, 56_804_968)],
    ids=["T", "S", "B"],
)
def test_sizes_are_the_published_ones(sizes, count):
    with torch.device("meta"):
        model = BiFormer(**sizes)
    found = sum(p.numel() for p in model.parameters())
    width, depth = model.head.in_features, len(model.stages[-1])
    assert found - 3 * width * depth == count


def test_model_runs_at_its_published_resolution():
    torch.manual_seed(0)
    model = BiFormer(dim=16, depths=(1, 1, 1, 1), head_dim=8, classes=5)
    logits = model(torch.randn(2, 3, 224, 224))
    logits.sum().backward()
    assert logits.shape == (2, 5)
    assert all(p.grad is not None for p in model.parameters())
