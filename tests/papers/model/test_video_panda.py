"""Video-Panda (system 41): what zeros do at first, cells against a dense mask, images, cost, a toy question."""

import copy
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.nn import Attention, Block, Stack
from chronotope.papers.model.video_panda import STAB, CellAttentionPool, GlobalQuery, LocalSTEncoding, distillation

GRID = ct.Grid(t=4, h=6, w=4)


def lively(module, seed=0):
    """The same module with nothing at 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.double().eval()


def small(**options):
    return lively(STAB(**({"dim": 16, "width": 24, "patch": 4, "cell": 2, "heads": 4} | options)))


def same(told, other):
    """The largest difference of two lists of lists of tokens."""
    pairs = [(a, b) for x, y in zip(told, other, strict=True) for a, b in zip(x, y, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    return max((a - b).abs().max().item() for a, b in pairs if a.numel())


def test_zeros_at_first_make_nothing_of_the_new_parts():
    torch.manual_seed(0)
    x = torch.randn(2, GRID.size, 16)
    local, video = LocalSTEncoding(16), GlobalQuery(16, 4, ("t", "h", "w"), mlp=True)
    assert torch.equal(local(x, GRID), local.place(x, GRID))
    nn.init.normal_(video.query)
    assert torch.equal(video(x, GRID), video.query.expand(2, 1, 16))
    g, f = torch.randn(2, 3, 1, 16)
    assert (STAB(16, 24, 4, heads=4).mixed(g, f) - (g + f) / 2).abs().max() < 1e-6
    for module in (local, video):  # and they do something once they have learned
        before = module(x, GRID)
        assert (lively(module)(x.double(), GRID) - before).abs().max() > 1e-2


def dense(pool, x, grid):
    """Cells by one dense softmax over all tokens of the clip, -inf outside of a cell: torch alone."""
    s, (t, h, w), dim = pool.cell, grid.shape, x.shape[2]
    place = torch.cartesian_prod(torch.arange(t), torch.arange(h) // s, torch.arange(w) // s)
    cells = torch.cartesian_prod(torch.arange(t), torch.arange(h // s), torch.arange(w // s))
    inside = (cells[:, None] == place).all(-1)
    mean = inside.to(x) / s**2 @ x
    ask, heads = pool.ask, pool.ask.attention.heads
    wq, wk, wv = ask.attention.qkv.weight.chunk(3)
    q, k, v = (
        (y @ weight.T).unflatten(2, (heads, -1)).transpose(1, 2)
        for y, weight in ((ask.q_norm(mean), wq), (ask.k_norm(x), wk), (ask.k_norm(x), wv))
    )
    weights = (q @ k.mT / math.sqrt(dim)).masked_fill(~inside, -torch.inf).softmax(-1)
    return mean + ask.attention.out((weights @ v).transpose(1, 2).flatten(2))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))
def test_cells_are_attention_under_a_mask_of_cells(t, h, w, cell, seed):
    pool = lively(CellAttentionPool(16, 4, cell), seed)
    grid = ct.Grid(t=t, h=h * cell, w=w * cell)
    x = torch.randn(2, grid.size, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cells, coarse = pool(x, grid)
    assert coarse == ct.Grid(t=t, h=h, w=w)
    assert (cells - dense(pool, x, grid)).abs().max() < 1e-10
    single = copy.deepcopy(pool).float()
    assert (single(x.float(), grid)[0] - cells).abs().max() < 1e-5


def test_equal_scores_give_the_mean_of_a_cell_and_its_mean_value():
    pool = lively(CellAttentionPool(16, 4, 2))
    pool.ask.attention.qkv.weight.data[:16] = 0
    x = torch.randn(2, GRID.size, 16).double()
    value = pool.ask.k_norm(x) @ pool.ask.attention.qkv.weight[32:].T

    def mean(y):
        maps = y.unflatten(1, GRID.shape).flatten(0, 1).permute(0, 3, 1, 2)
        return F.avg_pool2d(maps, 2).unflatten(0, (2, 4)).permute(0, 1, 3, 4, 2).flatten(1, 3)

    assert (pool(x, GRID)[0] - mean(x) - pool.ask.attention.out(mean(value))).abs().max() < 1e-10


def test_a_query_asks_along_its_axes_only():
    frames, video = lively(GlobalQuery(16, 4)), lively(GlobalQuery(16, 4, ("t", "h", "w"), mlp=True))
    x = torch.randn(2, GRID.size, 16).double()
    one = ct.Grid(t=1, h=6, w=4)
    apart = torch.cat([frames(part, one) for part in x.split(one.size, 1)], 1)
    assert (frames(x, GRID) - apart).abs().max() < 1e-10
    order = torch.randperm(GRID.size)
    assert video(x, GRID).shape == (2, 1, 16)
    assert (video(x[:, order], GRID) - video(x, GRID)).abs().max() < 1e-10


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_number_of_tokens(frames, h, w):
    told = small()(torch.randn(2, frames, 3, 8 * h, 8 * w).double())
    assert [[len(tokens) for tokens in clip] for clip in told] == [[1 + h * (w + 1)] * frames] * 2
    assert {tokens.shape[1] for clip in told for tokens in clip} == {24}


def test_eight_by_eight_cells_are_73_tokens_and_the_published_size_is_45_million():
    assert len(small()(torch.randn(1, 1, 3, 64, 64).double())[0][0]) == 73
    with torch.device("meta"):
        assert round(sum(parameter.numel() for parameter in STAB().parameters()) / 1e6) == 45


def test_a_clip_of_one_frame_is_an_image():
    model = small()
    clips = torch.randn(2, 4, 3, 16, 24).double()
    told = model(clips)
    alone = [[model(clips[b : b + 1, t : t + 1])[0][0] for t in range(4)] for b in range(2)]
    assert same(told, alone) > 1e-2  # frames of a clip know of each other
    model.temporal = False
    assert same([[model(clips[b : b + 1, t : t + 1])[0][0] for t in range(4)] for b in range(2)], alone) == 0
    assert same(model(clips), alone) < 1e-10


def test_a_mask_crops_each_frame():
    model = small(temporal=False)
    clips = torch.randn(2, 2, 3, 24, 24).double()
    mask = torch.zeros(2, 2, 24, 24, dtype=torch.bool)
    mask[0, 0] = True
    mask[0, 1, 4:20, :10] = True  # rows of patches 1 to 4, columns 0 to 2, of which 0 and 1 fill a cell
    mask[1, 1, 13:22, 8:24] = True  # rows 3 to 5, of which 3 and 4 fill a cell
    told = model(clips, mask)
    crops = [[clips[0, 0], clips[0, 1, :, 4:20, :8]], [None, clips[1, 1, :, 12:20, 8:24]]]
    expected = [[told[1][0][:0] if x is None else model(x[None, None])[0][0] for x in row] for row in crops]
    assert len(told[1][0]) == 0
    assert same(told, expected) < 1e-10
    assert same(small()(clips, mask.fill_(True)), small()(clips)) == 0


def test_what_cannot_be():
    model = small()
    clips = torch.randn(1, 2, 3, 16, 16).double()
    narrow = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    narrow[..., :4] = True
    with pytest.raises(ct.ChronotopeError, match="less than a cell"):
        model(clips, narrow)
    with pytest.raises(ct.ChronotopeError, match="one truth for each pixel"):
        model(clips, narrow[..., :8])
    with pytest.raises(ct.ChronotopeError, match="multiples of 2"):
        model.pool(torch.randn(1, 15, 16).double(), ct.Grid(h=3, w=5))
    with pytest.raises(ct.ChronotopeError, match="two frames"):
        model.local.init_state(1, ct.Grid(t=1, h=4, w=4))


def test_the_convolutions_look_two_frames_ahead():
    grid = ct.Grid(t=7, h=4, w=4)
    local = lively(LocalSTEncoding(8))
    x = torch.randn(1, grid.size, 8).double()
    other = x.clone()
    other.view(1, 7, 16, 8)[:, 4] += 1
    moved = (local(other, grid) - local(x, grid)).view(7, -1).abs().amax(1) > 1e-12
    assert moved.tolist() == [False, False, True, True, True, True, True]


def test_gradients_reach_every_parameter():
    model = small(dim=8, width=8, heads=2).train()
    clips = torch.randn(2, 3, 3, 16, 16).double()
    sum(tokens.square().sum() for clip in model(clips) for tokens in clip).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    model.eval()

    def first(x):
        return torch.cat(model(x)[0])

    assert torch.autograd.gradcheck(first, clips[:1, :2].clone().requires_grad_(), fast_mode=True)


def test_distillation():
    x = torch.randn(3, 5, 8)
    assert abs(distillation(x, 3 * x)) < 1e-6
    assert abs(distillation(x, -x) - 2) < 1e-6
    teacher = x.clone().requires_grad_()
    distillation(x.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


@pytest.mark.slow
def test_cost_is_linear(one_thread):
    model = STAB(64, 64, 4, heads=4).eval()

    def seconds(frames, side):
        clips, spent = torch.randn(1, frames, 3, side, side), []
        for _ in range(5):
            start = time.process_time()
            with torch.no_grad():
                model(clips)
            spent.append(time.process_time() - start)
        return min(spent)

    sizes = [(8, 64), (8, 128), (16, 128), (32, 128), (32, 256)]
    counts = torch.tensor([float(frames * side**2) for frames, side in sizes]).log()
    times = torch.tensor([seconds(*size) for size in sizes]).log()
    slope = ((counts - counts.mean()) * (times - times.mean())).sum() / (counts - counts.mean()).square().sum()
    print(f"slope {slope:.3f}")
    assert abs(slope - 1) < 0.2


FRAMES, SIDE, DIM = 16, 32, 32
WAYS = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])


def moving(count, generator):
    """Clips [B, T, 3, 32, 32] of a rectangle of a random colour that moves by 2 places a frame, around the borders, on
    a little noise; and which of four ways it moves."""
    way = torch.randint(4, (count,), generator=generator)
    start = torch.randint(SIDE, (count, 1, 2), generator=generator)
    place = start + 2 * torch.arange(FRAMES)[:, None] * WAYS[way][:, None]
    size = torch.randint(4, 9, (count, 1, 2, 1), generator=generator)
    inside = (torch.arange(SIDE) - place[..., None]) % SIDE < size
    shape = inside[:, :, 0, :, None] & inside[:, :, 1, None, :]
    colour = 1 + torch.rand(count, 1, 3, 1, 1, generator=generator)
    return shape[:, :, None] * colour + 0.05 * torch.randn(count, FRAMES, 3, SIDE, SIDE, generator=generator), way


class Asked(nn.Module):
    """A decoder of two blocks over the tokens of all frames in a row, with a code of place, and then a question."""

    def __init__(self, temporal):
        super().__init__()
        self.eyes = STAB(DIM, DIM, patch=4, cell=4, heads=4, temporal=temporal)
        self.question = nn.Parameter(torch.randn(DIM))
        self.blocks = Stack([Block([Attention(DIM, 4, where=ct.causal("n"), position=ct.Rope("n"))]) for _ in range(2)])
        self.answer = nn.Linear(DIM, 4)

    def forward(self, clips):
        told = torch.stack([torch.cat(frames) for frames in self.eyes(clips)])
        x = torch.cat((told, self.question.expand(len(told), 1, -1)), 1)
        return self.answer(self.blocks(x, ct.Grid(n=x.shape[1]))[:, -1])


def accuracy(temporal, steps=250, batch=32):
    """Of 512 clips that were not trained on."""
    torch.manual_seed(0)
    model, generator = Asked(temporal), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for _ in range(steps):
        clips, way = moving(batch, generator)
        loss = F.cross_entropy(model(clips), way)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    clips, way = moving(512, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (model(clips).argmax(1) == way).float().mean().item()


@pytest.mark.slow
def test_which_way_a_shape_moves(one_thread):
    """The same decoder, steps and clips: with local encoding and the token of the video, and with frames alone."""
    start = time.process_time()
    whole, frames = accuracy(True), accuracy(False)
    print(f"with time {whole:.3f}, frames alone {frames:.3f}, {time.process_time() - start:.0f} s")
    assert whole >= 0.85
    assert frames <= 0.6
