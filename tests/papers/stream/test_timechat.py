"""Differential Token Drop: streams and clips, moving squares, drifts, cuts, and questions about what moves."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import chronotope as ct
from chronotope.papers.stream.timechat import differential_token_drop, pack, valleys


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def walking(frames=8, cells=16, channels=8, noise=0.5, batch=2, seed=0):
    """Frames whose tokens walk at random from frame to frame."""
    first = numbers(batch, 1, cells, channels, seed=seed)
    return first + noise * numbers(batch, frames, cells, channels, seed=seed + 1).cumsum(1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.sampled_from([("feature", 0.9, False), ("feature", 0.4, True), ("pixel", 0.4, False), ("pixel", 0.3, True)]),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_frame_by_frame_is_the_clip_exactly(cuts, how, last_kept, seed):
    mode, tau, relative = how
    x, grid = walking(sum(cuts), seed=seed), ct.Grid(t=sum(cuts), h=4, w=4)
    options = {"mode": mode, "relative": relative, "last_kept": last_kept}
    keep, last = differential_token_drop(x, tau, **options)
    state, kept, start, packed = None, [], 0, []
    for frames in x.split(cuts, 1):
        found, state = differential_token_drop(frames, tau, state=state, **options)
        kept.append(found)
        packed.append(pack(frames, found, grid.replace(t=frames.shape[1]), start))
        start += frames.shape[1]
    assert torch.equal(torch.cat(kept, 1), keep)
    assert torch.equal(state.frame, last.frame)
    # The ids of what is kept are those of the full grid, whichever way it came.
    everything = grid.coords().view(1, sum(cuts), 16, 3).expand(2, -1, -1, -1)
    whole = pack(x, keep, grid)
    assert torch.equal(whole.ids.T, everything[keep])
    assert torch.equal(whole.tokens, x[keep])
    for member in range(2):
        mine = torch.cat([part.ids[:, part.member == member] for part in packed], 1)
        assert torch.equal(mine, whole.ids[:, whole.member == member])


def test_a_state_is_carried_like_any_other():
    x = walking()
    _, state = differential_token_drop(x[:, :4], 0.9)
    index = torch.tensor([1, 0, 1])
    rest, _ = differential_token_drop(x[:, 4:], 0.9, state=state)
    again, _ = differential_token_drop(x[index, 4:], 0.9, state=state.select(index))
    assert torch.equal(again, rest[index])
    assert state.nbytes == x[:, 0].nbytes


def moving_square(frames=12, size=8, side=2, channels=6, seed=0):
    """A square that goes one cell to the right with each frame, over a background that stays; and where it is."""
    back = numbers(1, 1, size, size, channels, seed=seed)
    x, inside = back.repeat(1, frames, 1, 1, 1), torch.zeros(frames, size, size, dtype=torch.bool)
    for t in range(frames):
        columns = (torch.arange(side) + t) % size
        inside[t, 3 : 3 + side, columns] = torch.ones((), dtype=torch.bool)
        x[0, t][inside[t]] = numbers(channels, seed=seed + 9)
    return x.flatten(2, 3), inside.flatten(1)


@pytest.mark.parametrize(("mode", "tau"), [("feature", 0.999), ("pixel", 1e-4)])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_kept_are_the_cells_that_a_square_enters_and_leaves(mode, tau, side):
    x, inside = moving_square(side=side)
    keep, _ = differential_token_drop(x, tau, mode=mode)
    assert keep[0, 0].all()
    assert torch.equal(keep[0, 1:], inside[1:] ^ inside[:-1])
    ratio = 1 - keep.float().mean(-1)
    torch.testing.assert_close(ratio[0, 1:], torch.full((11,), 1 - 2 * side / 64))


class Layer(nn.Module):
    """One layer of attention over tokens wherever they are, causal in time, by rotary code of their ids."""

    def __init__(self, channels=8, heads=2):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * 12 * heads)
        self.heads = heads

    def forward(self, packed):
        q, k, v = self.qkv(packed.tokens)[None].unflatten(2, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        q, k = (ct.Rope()(y, coords=packed.ids.T) for y in (q, k))
        line = ct.Grid(n=len(packed.member))
        return ct.attention(q, k, v, grid=line, where=ct.segments(packed.member) & ct.causal())


@torch.no_grad()
def test_above_one_all_is_kept_and_the_model_is_as_it_was():
    torch.manual_seed(0)
    layer, x, grid = Layer(), walking(), ct.Grid(t=8, h=4, w=4)
    keep, _ = differential_token_drop(x, 1.01)
    assert keep.all()
    packed = pack(x, keep, grid)
    assert torch.equal(packed.tokens, x.flatten(0, 2))
    whole = packed._replace(ids=grid.coords().T.repeat(1, 2), member=torch.arange(2).repeat_interleave(grid.size))
    assert torch.equal(layer(packed), layer(whole))


@pytest.mark.parametrize(
    ("mode", "taus"), [("feature", [-1.0, 0.0, 0.25, 0.5, 0.9, 0.99, 1.01]), ("pixel", [3.0, 1.0, 0.5, 0.4, 0.2, 0.0])]
)
@pytest.mark.parametrize("seed", range(3))
def test_fewer_are_kept_the_more_alike_they_need_to_be(mode, taus, seed):
    x = walking(seed=seed)
    masks = [differential_token_drop(x, tau, mode=mode)[0] for tau in taus]
    for fewer, more in pairwise(masks):
        assert not (fewer & ~more).any()
    counts = [int(mask.sum()) for mask in masks]
    assert counts[-1] == x[..., 0].numel() and counts[0] < counts[-3] < counts[-1]


def test_a_relative_share_is_dropped_of_every_frame():
    x = walking()
    for mode in ("feature", "pixel"):
        keep, _ = differential_token_drop(x, 0.4, mode=mode, relative=True)
        assert keep[:, 0].all()
        assert torch.equal(keep[:, 1:].sum(-1), torch.full((2, 7), 16 - 6))
    alike = torch.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1)
    kept = differential_token_drop(x, 0.4, relative=True)[0][:, 1:]
    assert (alike.masked_fill(kept, 2).amin(-1) >= alike.masked_fill(~kept, -2).amax(-1)).all()


@pytest.mark.parametrize("mode", ["feature", "pixel"])
def test_a_slow_drift_is_lost_unless_compared_with_what_was_kept(mode):
    angle = torch.arange(40) * 0.1  # cos(0.1) = 0.995 from frame to frame, once around in 63 frames
    x = torch.stack((angle.cos(), angle.sin()), 1)[None, :, None].repeat(1, 1, 4, 1)
    tau = 0.9 if mode == "feature" else 0.3
    lost, _ = differential_token_drop(x, tau, mode=mode)
    assert lost[:, 0].all() and not lost[:, 1:].any()
    kept, _ = differential_token_drop(x, tau, mode=mode, last_kept=True)
    times = kept[0, :, 0].nonzero()[:, 0].tolist()
    assert len(times) >= 8
    if mode == "feature":
        assert times == list(range(0, 40, 5))  # cos(0.5) = 0.88 is the first below 0.9


def test_scene_cuts_are_the_valleys_of_the_share_dropped():
    cuts = [37, 90, 151, 152 + 60, 260]
    scenes = torch.zeros(300, dtype=torch.int64)
    for cut in cuts:
        scenes[cut:] += 1
    back = numbers(6, 64, 16, seed=3)
    x = back[scenes][None] + 0.2 * numbers(1, 300, 64, 16, seed=4)
    for t in range(300):  # something moves all the time
        x[0, t, (t + torch.arange(6)) % 64] = numbers(16, seed=5) + 0.2 * numbers(6, 16, seed=100 + t)
    keep, _ = differential_token_drop(x, 0.5)
    ratio = 1 - keep.float().mean(-1)
    found = valleys(ratio)[0].nonzero()[:, 0].tolist()
    assert found == cuts  # precision and recall 1
    steady = torch.ones(300, dtype=torch.bool)
    steady[[0, *cuts]] = torch.zeros((), dtype=torch.bool)
    assert ratio[0, steady].min() > 0.75 and ratio[0, cuts].max() < 0.2
    # As it comes: each frame is judged when it is seen.
    parts = [valleys(ratio[:, :1])]
    parts += [valleys(ratio[:, t : t + 1], before=ratio[:, t - 1]) for t in range(1, 300)]
    assert torch.equal(torch.cat(parts, 1), valleys(ratio))
    assert not valleys(torch.zeros(1, 3))[0, 0] and valleys(torch.tensor([[0.0, 0.1, 0.9]])).tolist() == [
        [False, True, False]
    ]


def test_kept_tokens_have_their_gradient_and_dropped_ones_none():
    x = walking().requires_grad_()
    keep, state = differential_token_drop(x, 0.9)
    packed = pack(x, keep, ct.Grid(t=8, h=4, w=4))
    (grad,) = torch.autograd.grad(packed.tokens.square().sum(), x)
    assert torch.equal(grad, torch.where(keep[..., None], 2 * x, 0.0))
    assert not state.frame.requires_grad


def test_the_released_code_chooses_the_same():
    """yaolinli/TimeChat-Online at 25a15783, eval/qwen2_5_vl, `token_drop`, ran on these frames: tokens it kept of 168.

    Its tokens and position ids were equal to those of `pack`, in all these cases. Both pictures of a pair were one.
    """
    torch.manual_seed(0)
    x = torch.randn(1, 1, 24, 16) + 0.6 * torch.randn(1, 7, 24, 16).cumsum(1)
    for tau, relative, kept in [
        (0.25, False, 24), (0.5, False, 24), (0.8, False, 32),
        (0.25, True, 132), (0.5, True, 96), (0.8, True, 54),
    ]:  # fmt: skip
        assert int(differential_token_drop(x, tau, relative=relative)[0].sum()) == kept


def test_bad_input_is_refused():
    x = walking()
    with pytest.raises(ct.ChronotopeError, match="feature, pixel"):
        differential_token_drop(x, mode="both")
    with pytest.raises(ct.ChronotopeError, match="share from 0 to 1"):
        differential_token_drop(x, 1.5, relative=True)
    with pytest.raises(ct.ChronotopeError, match="at least one frame"):
        differential_token_drop(x[:, :0])
    with pytest.raises(ct.ChronotopeError, match="8 frames of 16"):
        pack(x, differential_token_drop(x)[0], ct.Grid(t=8, h=4, w=5))


CLIP = ct.Grid(t=12, h=4, w=4)


def clips(count, rng, channels=12):
    """Static cells, and one of 4 things that walks over them; a question of 4 about it, and the answer of 4.

    Which kind it is, the row and the column in which it ends, the row in which it began.
    """
    frames, size = CLIP.shape[:2]
    x = torch.zeros(count, 1, size * size, channels)
    x[..., 4:] = torch.randn(count, 1, size * size, channels - 4, generator=rng)
    x = x.repeat(1, frames, 1, 1)
    kind, way, ask = (torch.randint(0, 4, (count,), generator=rng) for _ in range(3))
    start = torch.randint(0, size, (count, 2), generator=rng)
    step = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]])[way]
    for t in range(frames):
        row, column = ((start + t * step) % size).T
        x[torch.arange(count), t, row * size + column] = 2 * torch.eye(channels)[kind]
    end = (start + (frames - 1) * step) % size
    answers = torch.stack((kind, end[:, 0], end[:, 1], start[:, 0]), 1)
    return x, ask, answers[torch.arange(count), ask]


class Answerer(nn.Module):
    """Two layers of attention and MLP over tokens with ids, and one token more that asks."""

    def __init__(self, channels=12, dim=32, heads=4):
        super().__init__()
        self.enter, self.ask, self.read = nn.Linear(channels, dim), nn.Embedding(4, dim), nn.Linear(dim, 4)
        self.place = nn.ModuleList([nn.Embedding(n, dim) for n in CLIP.shape])
        self.mix = nn.ModuleList([ct.nn.Block([ct.nn.Attention(dim, heads)]) for _ in range(2)])

    def forward(self, tokens, ids, ask):
        x = self.enter(tokens) + sum(place(ids[..., i]) for i, place in enumerate(self.place))
        x = torch.cat((self.ask(ask)[:, None], x), 1)
        for mix in self.mix:
            x = mix(x, ct.Grid(n=x.shape[1]))
        return self.read(x[:, 0])


def given(x, drop):
    """Tokens and ids of clips, [B, M, C] and [B, M, 3]: all keep as many, since each thing enters and leaves a cell."""
    keep, _ = differential_token_drop(x, 0.9 if drop else 1.01)
    packed = pack(x, keep, CLIP)
    return packed.tokens.view(len(x), -1, x.shape[3]), packed.ids.T.reshape(len(x), -1, 3)


def trained(drop, steps=450):
    torch.manual_seed(0)
    model, rng = Answerer(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        x, ask, answer = clips(64, rng)
        loss = nn.functional.cross_entropy(model(*given(x, drop), ask), answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model, drop):
    x, ask, answer = clips(512, torch.Generator().manual_seed(9))
    return (model(*given(x, drop), ask).argmax(1) == answer).float().mean().item()


@pytest.mark.slow
def test_questions_about_what_moves_are_answered_from_a_fifth_of_the_tokens():
    x, _, _ = clips(8, torch.Generator().manual_seed(3))
    few, many = given(x, True)[0].shape[1], given(x, False)[0].shape[1]
    assert 1 - few / many >= 0.8
    work = [ct.plan(ct.full(), ct.Grid(n=n + 1)).flops(8, heads=4) for n in (few, many)]
    assert work[0] <= 0.1 * work[1]
    full, dropped = trained(False), trained(True)
    of_all, of_few, untrained = accuracy(full, False), accuracy(dropped, True), accuracy(full, True)
    print(of_all, of_few, untrained)
    assert of_all >= 0.97
    assert of_few >= 0.98 * of_all
    assert untrained >= 0.8 * of_all  # of a model that has never seen tokens missing
