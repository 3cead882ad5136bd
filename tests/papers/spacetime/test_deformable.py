"""3D deformable attention: the sampler, the dense limit, cost, strides; points that find a moving dot."""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.errors import ChronotopeError
from chronotope.nn import sample as trilinear
from chronotope.papers.spacetime.deformable import (
    DeformableAttention3d,
    DeformableBlock,
    JointStride,
    TemporalStride,
)

GRID = ct.Grid(t=3, h=4, w=5)


def _heads(layer: ct.nn.Attention, x: torch.Tensor) -> torch.Tensor:
    return layer.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)


def test_the_sampler_gathers_at_tokens_mixes_between_and_stops_at_the_border() -> None:
    x = torch.randn(2, 60, 7, dtype=torch.float64)
    whole = torch.stack([torch.randint(n, (2, 9)) for n in GRID.shape], -1)
    index = (whole[..., 0] * 4 + whole[..., 1]) * 5 + whole[..., 2]
    torch.testing.assert_close(
        trilinear(x, GRID, whole.double()), torch.stack([x[b, index[b]] for b in (0, 1)]), rtol=0, atol=1e-12
    )
    volume, place = x.view(2, 3, 4, 5, 7), torch.tensor([0.25, 1.5, 3.75], dtype=torch.float64)
    by_hand = sum(
        abs(1 - a - 0.25) * 0.5 * abs(1 - c - 0.75) * volume[:, a, 1 + b, 3 + c]
        for a in (0, 1) for b in (0, 1) for c in (0, 1)
    )  # fmt: skip
    torch.testing.assert_close(trilinear(x, GRID, place.expand(2, 1, 3))[:, 0], by_hand)
    far = torch.tensor([-4.0, 9.0, 2.0], dtype=torch.float64).expand(2, 1, 3)
    torch.testing.assert_close(trilinear(x, GRID, far)[:, 0], volume[:, 0, 3, 2])
    one = trilinear(x[:, :1], ct.Grid(t=1, h=1, w=1), torch.zeros(2, 1, 3, dtype=torch.float64))
    torch.testing.assert_close(one, x[:, :1])


def test_gradients_of_the_sampler() -> None:
    x = torch.randn(2, 60, 2, dtype=torch.float64, requires_grad=True)
    places = (torch.rand(2, 3, 5, 3, dtype=torch.float64) * torch.tensor([2.0, 3.0, 4.0])).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: trilinear(a, GRID, b), (x, places))


def test_without_offsets_and_with_all_points_it_is_dense_attention() -> None:
    torch.manual_seed(0)
    layer = DeformableAttention3d(16, 2, points=1000)
    with torch.no_grad():
        layer.say.weight.view(2, 4, 16)[:, :3] = 0
        layer.say.bias.view(2, 4)[:, :3] = 0
    z, m = torch.randn(2, 60, 16), torch.randn(2, 3, 16)
    out = torch.cat(layer(z, m, GRID), 1)
    q, k, v = _heads(layer.inner, torch.cat((z, m), 1))
    dense = layer.inner.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-5)


def test_whole_offsets_are_a_gather() -> None:
    torch.manual_seed(0)
    layer = DeformableAttention3d(16, 2, points=60, reach=(2.0, 2.0, 2.0)).double()
    with torch.no_grad():  # tanh of it is one half: an offset of one token back on every axis
        layer.say.weight.view(2, 4, 16)[:, :3] = 0
        layer.say.bias.view(2, 4)[:, :3] = -torch.tensor(0.5, dtype=torch.float64).atanh()
    z = torch.randn(1, 60, 16, dtype=torch.float64)
    places = layer.points_of(z, GRID)
    index = (places.round().long().clamp(min=0) * torch.tensor([20, 5, 1])).sum(-1)
    assert (places - places.round()).abs().max() < 1e-12 and places.round().min() == -1
    torch.testing.assert_close(trilinear(z, GRID, places), z[0, index[0]][None], rtol=0, atol=1e-12)


def test_gradients_reach_offsets_and_scores() -> None:
    torch.manual_seed(0)
    layer = DeformableAttention3d(16, 2, points=5)
    z, _ = layer(torch.randn(2, 60, 16), torch.randn(2, 1, 16), GRID)
    z.square().sum().backward()
    assert (layer.say.weight.grad.view(2, 4, 16).abs().amax(2) > 0).all()
    with pytest.raises(ChronotopeError, match="three reaches"):
        DeformableAttention3d(16, 2, reach=(1.0, 1.0))


def test_scores_are_tokens_times_points() -> None:
    counted, inner = [], ct.attention

    def counting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: object) -> object:
        counted.append(q.shape[2] * k.shape[2])
        return inner(q, k, v, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chronotope.papers.spacetime.deformable.attention", counting)
        layer = DeformableAttention3d(16, 2, points=8)
        for t in (3, 6):
            layer(torch.randn(1, 20 * t, 16), torch.randn(1, 2, 16), GRID.replace(t=t))
    assert counted == [(60 + 2) * (8 + 2), (120 + 2) * (8 + 2)]


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_a_stride_in_time_is_a_mask_of_columns(stride: int) -> None:
    torch.manual_seed(0)
    layer, grid = TemporalStride(16, 2, stride), ct.Grid(t=5, h=2, w=3)
    x = torch.randn(2, 30, 16)
    q, k, v = _heads(layer.inner, x)
    mask = (grid.coords()[:, 0] % stride == 0)[None].expand(30, -1)
    dense = layer.inner.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, grid), dense, rtol=0, atol=1e-5)


def test_joints_look_inside_their_group_and_at_the_shared_tokens() -> None:
    torch.manual_seed(0)
    layer, grid = JointStride(16, 2, group=3, stride=2), ct.Grid(t=2, v=7)
    x, m = torch.randn(1, 14, 16), torch.randn(1, 2, 16)
    q, k, v = _heads(layer.inner, torch.cat((m, x), 1))
    coords = grid.coords() // torch.tensor([1, 3])
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[2:, 2:] = (coords[:, None] == coords[None]).all(-1)
    dense = layer.inner.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
    kept, shared, after = layer(x, m, grid)
    assert after == ct.Grid(t=2, v=4)
    torch.testing.assert_close(shared, dense[:, :2])
    torch.testing.assert_close(kept, dense[:, 2:].unflatten(1, (2, 7))[:, :, ::2].flatten(1, 2))


def test_a_block_takes_clip_joints_and_shared_tokens() -> None:
    block = DeformableBlock(16, 2, points=4, stride=2, group=3)
    z, m, joints = block(
        torch.randn(1, 60, 16), torch.randn(1, 2, 16), GRID, (torch.randn(1, 21, 16), ct.Grid(t=3, v=7))
    )
    assert z.shape == (1, 60, 16) and m.shape == (1, 2, 16)
    assert joints is not None and joints[0].shape == (1, 21, 16)


@pytest.mark.slow
def test_time_grows_as_the_tokens(one_thread: None) -> None:
    layer, sizes, seconds = DeformableAttention3d(32, 2, points=16), (16, 32, 64), []
    for t in sizes:
        grid, m = ct.Grid(t=t, h=16, w=16), torch.randn(1, 1, 32)
        z, runs = torch.randn(1, grid.size, 32), []
        with torch.inference_mode():
            layer(z, m, grid)
            for _ in range(7):
                before = time.process_time()
                layer(z, m, grid)
                runs.append(time.process_time() - before)
        seconds.append(sorted(runs)[3])
    x, y = torch.tensor(sizes).float().log(), torch.tensor(seconds).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert slope < 1.3, slope


def _dots(count: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy clips [count, 16, 1, 16, 16] of a dot on one of 8 straight ways, their classes, its places in tokens."""
    way = torch.randint(8, (count,), generator=rng)
    angle = way * torch.pi / 4
    start = 7.5 + 1.5 * torch.randn(count, 1, 2, generator=rng)
    at = start + torch.stack((angle.sin(), angle.cos()), 1)[:, None] * (torch.arange(16)[:, None] - 7.5) * 0.6
    at = at.clamp(0, 15)
    bump = torch.exp(-0.5 * (torch.arange(16.0) - at[..., None]).square() / 0.8**2)  # [count, 16, 2, 16]
    clips = 2 * bump[:, :, 0, :, None] * bump[:, :, 1, None] + 0.3 * torch.randn(count, 16, 16, 16, generator=rng)
    return clips[:, :, None], way, (at - 0.5) / 2


class Ways(nn.Module):
    """Logits of clips: patches, places, two blocks, the shared token."""

    def __init__(self, learned: bool):
        super().__init__()
        self.embed, self.code = ct.nn.PatchEmbed(32, 2), ct.nn.Learned(32, t=16, h=8, w=8)
        self.shared, self.head = nn.Parameter(torch.zeros(1, 1, 32)), nn.Linear(32, 8)
        self.search = DeformableAttention3d(32, 4, points=16, learned=learned)
        self.norms, self.mlp = nn.ModuleList(nn.LayerNorm(32) for _ in range(3)), ct.nn.FeedForward(32, "gelu")

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and where the points are."""
        x, grid = self.embed(clips)
        z = self.norms[0](self.code(x, grid))
        m = self.shared.expand(len(x), -1, -1)
        m = m + self.search(z, m, grid)[1]
        return self.head(self.norms[2](m + self.mlp(self.norms[1](m)))[:, 0]), self.search.points_of(z, grid)


@pytest.mark.slow
def test_points_find_the_dot() -> None:
    found = {}
    for learned in (True, False):
        torch.manual_seed(0)
        model, rng = Ways(learned), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        distances = []
        for step in range(1200):
            clips, way, at = _dots(32, rng)
            logits, places = model(clips)
            loss = F.cross_entropy(logits, way)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in (0, 1199):  # from each point to the dot in the frame of the point
                frame = places[..., 0].round().long().clamp(0, 15).flatten(1)
                dot = at.gather(1, frame[..., None].expand(-1, -1, 2))
                distances.append((places[..., 1:].flatten(1, 2) - dot).norm(dim=-1).mean().item())
        with torch.inference_mode():
            clips, way, _ = _dots(1000, rng)
            found[learned] = (model(clips)[0].argmax(1) == way).float().mean().item()
        if learned:
            nearer = distances
    assert found[True] > 0.9 and found[True] >= found[False] + 0.1 and nearer[1] < nearer[0], (found, nearer)
