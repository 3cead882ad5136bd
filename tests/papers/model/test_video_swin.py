"""Video Swin: shifted windows against dense attention under their mask, cost, merging, motion."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.errors import ChronotopeError
from chronotope.papers.model.video_swin import AXES, Merge, VideoSwin, WindowAttention, shifted_windows


def _rolled_mask(shape: tuple[int, ...], window: tuple[int, ...], shifted: bool) -> torch.Tensor:
    """Pairs as Swin makes them: pad, roll by half a window, cut, and keep apart what was apart before the roll."""
    window = tuple(min(size, n) for size, n in zip(window, shape, strict=True))
    shift = [size // 2 if shifted and size < n else 0 for size, n in zip(window, shape, strict=True)]
    padded = [-(-n // size) * size for n, size in zip(shape, window, strict=True)]
    region = torch.zeros(padded, dtype=torch.int64)
    cuts = [[slice(0, n - size), slice(n - size, n - s), slice(n - s, None)] if s else [slice(None)]
            for n, size, s in zip(padded, window, shift, strict=True)]  # fmt: skip
    for number, part in enumerate(itertools.product(*cuts)):
        region[part] = number
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in padded), indexing="ij"), -1)
    block = (place // torch.tensor(window)).flatten(0, 2)
    name = torch.cat((block, region.flatten()[:, None]), 1)  # of the rolled places
    rolled = torch.roll(torch.arange(region.numel()).view(padded), [-s for s in shift], (0, 1, 2)).flatten()
    of = torch.empty_like(name)
    of[rolled] = name  # of the places before the roll
    of = of.view(*padded, 4)[: shape[0], : shape[1], : shape[2]].flatten(0, 2)
    return (of[:, None] == of[None]).all(-1)


CASES = [((4, 8, 8), (2, 4, 4)), ((3, 7, 9), (2, 4, 4)), ((2, 5, 8), (8, 4, 7)), ((1, 1, 1), (2, 2, 2))]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("shape", "window"), CASES)
def test_windows_are_those_of_rolled_and_masked_grids(
    shape: tuple[int, ...], window: tuple[int, int, int], shifted: bool
) -> None:
    grid = ct.Grid(**dict(zip(AXES, shape, strict=True)))
    mask = ct.plan(shifted_windows(grid, window, shifted), grid).mask()
    assert torch.equal(mask, _rolled_mask(shape, window, shifted))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("shape", "window"), CASES[:2])
def test_attention_is_dense_attention_with_mask_and_gathered_bias(
    shape: tuple[int, ...], window: tuple[int, int, int], shifted: bool
) -> None:
    torch.manual_seed(0)
    grid = ct.Grid(**dict(zip(AXES, shape, strict=True)))
    layer = WindowAttention(16, 2, window, shifted)
    table = layer.places.table
    nn.init.normal_(table)
    x = torch.randn(2, grid.size, 16)
    coords = grid.coords()
    offset = (coords[None] - coords[:, None] + torch.tensor(window) - 1).clamp(min=0)
    widths = [2 * size - 1 for size in window]
    index = (offset[..., 0] * widths[1] + offset[..., 1]) * widths[2] + offset[..., 2]
    mask = _rolled_mask(shape, window, shifted)
    bias = table[:, index.clamp(max=table.shape[1] - 1)].masked_fill(~mask, -torch.inf)
    q, k, v = layer.inner.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    dense = layer.inner.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))
    out = layer(x, grid)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.square().sum(), table, retain_graph=True)[0] for y in (out, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shifted", [False, True])
def test_cost_is_linear_in_time(shifted: bool) -> None:
    grids = [ct.Grid(t=t, h=14, w=14) for t in (256, 512)]  # the two half windows at the ends weigh little
    flops = [ct.plan(shifted_windows(grid, (8, 7, 7), shifted), grid).flops(16) for grid in grids]
    assert abs(flops[1] / flops[0] - 2) <= 0.04


def test_merging_takes_two_by_two_places_and_never_time() -> None:
    merge, grid = Merge(1, 4).double(), ct.Grid(t=2, h=3, w=4)
    nn.init.eye_(merge.reduce.weight)
    merge.norm = nn.Identity()  # type: ignore[assignment]
    x = torch.arange(1.0, 25, dtype=torch.float64).view(1, 24, 1)
    out, smaller = merge(x, grid)
    assert smaller == ct.Grid(t=2, h=2, w=2)
    frame = x.view(2, 3, 4)
    assert out[0, 0].tolist() == [frame[0, 0, 0], frame[0, 1, 0], frame[0, 0, 1], frame[0, 1, 1]]
    assert out[0, 7].tolist() == [frame[1, 2, 2], 0, frame[1, 2, 3], 0]


def test_errors_and_saving(tmp_path: object) -> None:
    with pytest.raises(ChronotopeError, match="every stage"):
        VideoSwin(2, depths=(2, 2), heads=(2,))
    with pytest.raises(ChronotopeError, match="cannot be stepped"):
        WindowAttention(8, 2, (2, 2, 2), False).init_state(1, ct.Grid(t=1, h=2, w=2))
    model = VideoSwin(3, patch=(2, 2, 2), channels=1, dim=8, depths=(1, 2), heads=(1, 2), window=(2, 2, 2))
    model.save_pretrained(tmp_path)  # type: ignore[arg-type]
    clips = torch.rand(1, 4, 1, 8, 12)
    assert torch.equal(VideoSwin.from_pretrained(tmp_path)(clips), model(clips))  # type: ignore[arg-type]


def _squares(count: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares of 4 x 4 that go right, left, down or up around a frame of 16 x 16, from anywhere."""
    way = torch.randint(4, (count,), generator=rng)
    start = torch.randint(16, (count, 2), generator=rng)
    step = torch.tensor([[0, 2], [0, -2], [2, 0], [-2, 0]])[way]
    at = start[:, None] + step[:, None] * torch.arange(8)[:, None]  # [count, 8, 2]
    far = (torch.arange(16) - at[..., None]) % 16 < 4  # [count, 8, 2, 16]
    return (far[:, :, 0, :, None] & far[:, :, 1, None]).float()[:, :, None], way


@pytest.mark.slow
def test_it_learns_motion_which_a_single_frame_does_not_show() -> None:
    found = {}
    for frames in (8, 1):
        torch.manual_seed(0)
        patch = (2, 2, 2) if frames == 8 else (1, 2, 2)
        model = VideoSwin(4, patch=patch, channels=1, dim=16, depths=(2, 2), heads=(2, 4), window=(2, 4, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        rng = torch.Generator().manual_seed(0)
        for _ in range(400):
            clips, way = _squares(16, rng)
            loss = F.cross_entropy(model(clips[:, :frames]), way)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            clips, way = _squares(1000, rng)
            found[frames] = (model.eval()(clips[:, :frames]).argmax(1) == way).float().mean().item()
    assert found[8] >= 0.95 and found[1] <= 0.35, found
