"""ResidualViT: streams and clips, what is kept, what it costs, what learns, and shapes that walk past still ones."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import chronotope as ct
from chronotope.papers.stream.residual_vit import (
    SELECTORS,
    DenseVideoEncoder,
    DenseVideoState,
    Random,
    ViT,
    center,
    distillation_loss,
    motion,
    uniform,
)


def videos(batch=2, frames=7, size=16, seed=0):
    return torch.rand(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


def small(seed=0, **options):
    torch.manual_seed(seed)
    return ViT((16, 16), **{"patch": 4, "dim": 32, "depth": 2, "heads": 4, "out": 12} | options)


def stepped(encoder, video, state=None):
    out = []
    for frame in video.unbind(1):
        feature, state = encoder.step(frame, state)
        out.append(feature)
    return torch.stack(out, 1), state


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


# --- 1: the dense limits ---


@pytest.mark.parametrize("selector", SELECTORS)
@torch.no_grad()
def test_without_p_frames_or_without_dropping_it_is_the_encoder_frame_by_frame(selector):
    vit, video = small(), videos()
    each = vit(video.flatten(0, 1)).unflatten(0, (2, 7))
    close(DenseVideoEncoder(vit, 0, 0.85, selector)(video), each)
    close(DenseVideoEncoder(vit, 2, 0.0, selector, residual=None)(video), each)
    # Neither is so with what makes them cheap: a residual token, or patches dropped.
    for other in (DenseVideoEncoder(vit, 2, 0.0, selector), DenseVideoEncoder(vit, 2, 0.5, selector, residual=None)):
        wrong = (other(video) - each).abs().amax((0, 2)) > 1e-3
        assert wrong.tolist() == [False, True, True, False, True, True, False]


# --- 2: streams ---


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 4), st.sampled_from([0.0, 0.3, 0.85, 0.99]), st.integers(1, 9),
    st.sampled_from([*SELECTORS, Random(3)]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@torch.no_grad()
def test_frame_by_frame_is_the_video_at_once(between, drop, frames, selector, residual, seed):
    seeded = Random(5) if selector == "random" else selector
    encoder = DenseVideoEncoder(small(seed), between, drop, seeded, nn.Linear if residual else None)
    video = videos(frames=frames, seed=seed)
    whole = encoder(video)
    parts, state = stepped(encoder, video)
    close(parts, whole)
    assert state.count == frames
    # The batch does not matter, nor do frames to come.
    close(encoder(video.flip(0)), whole.flip(0))
    cut = 1 + seed % frames
    close(encoder(torch.cat((video[:, :cut], videos(frames=3, seed=seed + 1)), 1))[:, :cut], whole[:, :cut])


@torch.no_grad()
def test_a_state_is_carried_like_any_other():
    encoder, video = DenseVideoEncoder(small()), videos(frames=9)
    first, state = stepped(encoder, video[:, :5])
    rest, _ = stepped(encoder, video[:, 5:], state)
    close(torch.cat((first, rest), 1), encoder(video))
    index = torch.tensor([1, 0, 1])
    some, _ = stepped(encoder, video[index, 5:], state.select(index))
    close(some, rest[index])
    empty = DenseVideoState(torch.zeros_like(state.feature), torch.zeros_like(state.frame), 0)
    close(stepped(encoder, video[:, 5:], empty.from_dict(state.to_dict()))[0], rest)
    # One feature and one frame, however long the video.
    assert state.nbytes == 2 * 4 * (12 + 3 * 16 * 16)
    frame = video[:, 4].clone()
    _, kept = encoder.step(frame, stepped(encoder, video[:, :4])[1])
    frame.zero_()
    close(stepped(encoder, video[:, 5:], kept)[0], rest)


# --- what is kept ---


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.5, 0.85, 0.9, 0.999])
@pytest.mark.parametrize("selector", [motion, uniform, center, Random(), Random(1)])
def test_as_many_patches_are_kept_as_asked_and_none_twice(selector, drop):
    keep = max(1, round((1 - drop) * 48))
    frames, before = torch.rand(2, 5, 3, 24, 32).unbind(0)
    index = selector(frames, before, torch.arange(5), 4, keep)
    assert index.shape == (5, keep) and index.min() >= 0 and index.max() < 48
    assert all(len(row.unique()) == keep for row in index)


def test_selectors_keep_what_they_say():
    frames = torch.rand(2, 3, 24, 32)
    moved = frames.clone()
    moved[0, :, 4:8, 8:16] += 0.3  # patches 1 * 8 + 2 and 1 * 8 + 3
    moved[0, :, 20:, 28:] += 0.1  # the last
    moved[1, :, :4, 4:8] -= 0.2
    number = torch.tensor([4, 4])
    kept = motion(moved, frames, number, 4, 3)
    assert set(kept[0].tolist()) == {10, 11, 47} and kept[1, 0] == 1
    # Still patches are taken from all over the frame, not from its top: the same every time.
    still = motion(frames, frames, number, 4, 12)
    assert torch.equal(still[0], still[1]) and len((still[0] // 8).unique()) >= 5
    assert uniform(frames, frames, number, 4, 5)[0].tolist() == [0, 11, 23, 35, 47]
    assert uniform(frames, frames, number, 4, 1)[0].tolist() == [0]
    assert set(center(frames, frames, number, 4, 4)[1].tolist()) == {19, 20, 27, 28}
    drawn = Random(7)(frames, frames, torch.tensor([4, 5]), 4, 9)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(Random(7)(frames, frames, number, 4, 9)[1], drawn[0])
    assert not torch.equal(Random(8)(frames, frames, number, 4, 9)[0], drawn[0])


@torch.no_grad()
def test_a_p_frame_is_the_encoder_of_its_kept_tokens_in_place_and_the_residual():
    """By hand: tokens of all patches with their position code, those of the moving square kept."""
    vit, video = small(), videos(batch=1, frames=1).repeat(1, 3, 1, 1, 1)
    video[0, 1, :, 4:8, 8:12] += 0.5
    video[0, 2, :, 8:12, :8] += 0.5  # and the place where the square was
    encoder = DenseVideoEncoder(vit, 2, 1 - 3 / 16)
    features = encoder(video)
    for t, kept in ((1, [6]), (2, [6, 8, 9])):
        tokens = vit.tokens(video[:, t])
        index = motion(video[:, t], video[:, t - 1], torch.tensor([t]), 4, 3)[0]
        assert set(kept) <= set(index.tolist())
        residual = features[:, 0] @ encoder.residual.weight.T + encoder.residual.bias
        close(features[:, t], vit.encode(torch.cat((tokens[:, index.sort().values], residual[:, None]), 1)))
    # The tokens of some patches are those of all, without the work for the others.
    some = torch.tensor([[3, 0, 15]])
    close(vit.tokens(video[:, 0], some), vit.tokens(video[:, 0])[:, some[0]])
    assert torch.equal(vit(video[:, 0]), vit.encode(vit.tokens(video[:, 0])))


def test_an_encoder_of_another_kind():
    class Average(nn.Module):
        patch, dim, out = 4, 48, 48

        def tokens(self, frames, keep=None):
            x = F.unfold(frames, 4, stride=4).transpose(1, 2)
            return x if keep is None else x.gather(1, keep[..., None].expand(-1, -1, 48))

        def encode(self, tokens):
            return tokens.mean(1)

    video = videos(frames=5)
    features = DenseVideoEncoder(Average(), 4, 0.75, "center", residual=None)(video)
    middle = F.unfold(video[:, 3, :, 4:12, 4:12], 4, stride=4).mean(2)
    close(features[:, 3], middle)


# --- 3: cost ---


def counted(run):
    """Multiplications and additions of a call; attention by operators that the counter knows."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def sized(backend):
    """Six layers, 196 patches of 16 x 16 pixels, as DeiT-Ti is wide."""
    torch.manual_seed(0)
    vit = ViT((224, 224), patch=16, dim=192, depth=6, heads=3)
    for block in vit.blocks.blocks:
        block.mixers[0].backend = backend
    return vit


def test_the_work_of_a_frame_is_one_and_n_r_over_n_and_one():
    vit = sized("reference")
    for between, drop in ((2, 0.85), (1, 0.85), (4, 0.5), (2, 0.0)):
        encoder, video = DenseVideoEncoder(vit, between, drop), videos(1, between + 1, 224)
        n, d, kept = 197, 192, max(1, round((1 - drop) * 196))
        full = counted(lambda v=video: vit(v[:, 0]))
        assert full == 6 * (24 * n * d * d + 4 * n * n * d) + 2 * 196 * 768 * d + 2 * d * d
        _, state = encoder.step(video[:, 0])
        r = counted(lambda e=encoder, v=video, s=state: e.step(v[:, 1], s)) / full
        share = counted(lambda e=encoder, v=video: e(v)) / ((between + 1) * full)
        assert share == pytest.approx((1 + between * r) / (between + 1), rel=1e-12)
        m = kept + 2  # and the class token and the residual one
        part = 6 * (24 * m * d * d + 4 * m * m * d) + 2 * kept * 768 * d + 2 * d * d + 2 * d * d
        assert r == pytest.approx(part / full, rel=1e-12)
        if (between, drop) == (2, 0.85):
            print(f"r = {r:.4f}, total {share:.4f}")
            assert share < 0.5


@pytest.mark.slow
@torch.no_grad()
def test_a_video_takes_less_time(one_thread):
    vit = sized("auto")
    encoder, video = DenseVideoEncoder(vit, 2, 0.85), videos(1, 12, 224)
    runs = {
        "full": lambda: vit(video[0]), "ours": lambda: encoder(video),
        "full by frame": lambda: [vit(frame) for frame in video.unbind(1)],
        "ours by frame": lambda: stepped(encoder, video),
    }  # fmt: skip
    spent = {name: [] for name in runs}
    for _ in range(7):
        for name, run in runs.items():
            start = time.process_time()
            run()
            spent[name].append(time.process_time() - start)
    best = {name: min(times) for name, times in spent.items()}
    print(best, best["full"] / best["ours"], best["full by frame"] / best["ours by frame"])
    assert best["full"] >= 1.6 * best["ours"]
    assert best["full by frame"] > best["ours by frame"]  # of one frame at a time, less of the time is work


# --- 4: what learns ---


@pytest.mark.parametrize("selector", [*SELECTORS])
def test_only_the_residual_map_gets_gradients(selector):
    vit = small().requires_grad_(True)
    encoder, video = DenseVideoEncoder(vit, 2, 0.8, selector).train(), videos()
    features = encoder(video)
    features.square().sum().backward()
    learns = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert learns == {"residual.weight", "residual.bias"}
    assert all(p.grad is None for p in vit.parameters())
    assert all(bool((p.grad != 0).any()) and bool(p.grad.isfinite().all()) for p in encoder.residual.parameters())
    # I-frames are of the frozen encoder alone.
    (grad,) = torch.autograd.grad(encoder(video)[:, ::3].sum(), encoder.residual.weight, allow_unused=True)
    assert grad is None or not bool(grad.any())


def test_the_loss_is_least_where_both_say_the_same_of_all_texts():
    torch.manual_seed(0)
    teacher, texts = torch.randn(6, 12), torch.randn(40, 12)
    student = (3 * teacher).requires_grad_()  # lengths do not matter
    loss = distillation_loss(student, teacher, texts, 10.0)
    cosine = 10 * F.normalize(teacher, dim=1) @ F.normalize(texts, dim=1).T
    torch.testing.assert_close(loss, -(cosine.softmax(1) * cosine.log_softmax(1)).sum(1).mean())
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.abs().max() < 1e-6
    for seed in range(1, 6):
        torch.manual_seed(seed)
        assert distillation_loss(teacher + 0.3 * torch.randn(6, 12), teacher, texts, 10.0) > loss


def test_bad_input_is_refused():
    with pytest.raises(ct.ChronotopeError, match="0 <= drop < 1"):
        DenseVideoEncoder(small(), 2, 1.0)
    with pytest.raises(ct.ChronotopeError, match="between from 0 on"):
        DenseVideoEncoder(small(), -1)
    with pytest.raises(ct.ChronotopeError, match="motion, random, uniform, center"):
        DenseVideoEncoder(small(), selector="merging")
    with pytest.raises(ct.ChronotopeError, match="at least one frame"):
        DenseVideoEncoder(small())(videos(frames=0))
    with pytest.raises(ct.ChronotopeError, match="multiple of the patch"):
        ViT((16, 18), patch=4)


# --- 5: a thing that stays and a thing that moves ---

SIDE = 32
COLOURS = torch.tensor([[1, 0.1, 0.1], [0.1, 1, 0.1], [0.2, 0.3, 1], [1, 1, 0.1], [1, 0.2, 1], [0.1, 1, 1]])
WORDS = (len(COLOURS), 4, 9)


def shapes():
    """A square, a cross, a ring, a triangle, 8 x 8."""
    y, x = torch.meshgrid(torch.arange(8) - 3.5, torch.arange(8) - 3.5, indexing="ij")
    far = (x**2 + y**2).sqrt()
    return torch.stack([far >= 0, (x.abs() < 1) | (y.abs() < 1), (far < 4) & (far > 2), x.abs() <= (y + 4) / 2]).float()


def clips(count, frames, rng):
    """A still square of one of 6 colours, a white shape of 4 that walks; the words for each frame [B, T, 3].

    The colour, the shape, and in which ninth of the picture it is.
    """
    video = 0.15 + 0.1 * torch.rand(count, 1, 3, SIDE, SIDE, generator=rng).repeat(1, frames, 1, 1, 1)
    colour, shape = (torch.randint(0, size, (count,), generator=rng) for size in WORDS[:2])
    still = torch.randint(0, SIDE - 8, (count, 2), generator=rng).tolist()
    place, last = torch.randint(0, SIDE - 7, (count, 2), generator=rng).float(), SIDE - 8
    turn = 2 * torch.pi * torch.rand(count, generator=rng)
    velocity, ninths = 2 * torch.stack((turn.cos(), turn.sin()), 1), []
    for i, (row, column) in enumerate(still):
        video[i, :, :, row : row + 8, column : column + 8] = COLOURS[colour[i]].view(3, 1, 1)
    for t in range(frames):
        velocity = torch.where((place + velocity < 0) | (place + velocity > last), -velocity, velocity)
        place = place + velocity
        corner = place.round().long()
        for i, (row, column) in enumerate(corner.tolist()):
            here, mask = video[i, t, :, row : row + 8, column : column + 8], shapes()[shape[i]]
            here.copy_(here * (1 - mask) + mask)
        ninths.append(((corner + 4) * 3 // SIDE) @ torch.tensor([3, 1]))
    constant = torch.stack((colour, shape), 1)[:, None].expand(-1, frames, -1)
    return video, torch.cat((constant, torch.stack(ninths, 1)[..., None]), 2)


def says(features, words):
    """What features say of each kind of word: cosines with those of the kind."""
    return (F.normalize(features, dim=-1) @ F.normalize(words, dim=1).T).split(WORDS, -1)


def encoder_and_words(steps=400):
    """An encoder of frames and vectors of words, taught that the right words are near."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    vit, words = ViT((SIDE, SIDE), patch=4, dim=64, depth=3, heads=4, out=32), nn.Parameter(torch.randn(sum(WORDS), 32))
    optimizer = torch.optim.AdamW([*vit.parameters(), words], 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        video, right = clips(64, 1, rng)
        said = says(vit(video[:, 0]), words)
        loss = sum(F.cross_entropy(10 * x, y) for x, y in zip(said, right[:, 0].unbind(1), strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return vit, words.detach()


LATE = [1, 2]  # the P-frames of N = 2


def distilled(vit, words, selector, steps=300):
    """The residual map, from what the encoder says of every pair of words and place: 216 texts."""
    torch.manual_seed(0)
    rng, encoder = torch.Generator().manual_seed(5), DenseVideoEncoder(vit, 2, 0.85, selector)
    colour, shape, place = F.normalize(words, dim=1).split(WORDS)
    texts = (colour[:, None, None] + shape[:, None] + place).flatten(0, 2)
    optimizer = torch.optim.AdamW(encoder.residual.parameters(), 2e-3, weight_decay=0.0)
    for _ in range(steps):
        video, _ = clips(32, 3, rng)
        with torch.no_grad():
            teacher = vit(video[:, LATE].flatten(0, 1))
        loss = distillation_loss(encoder(video)[:, LATE].flatten(0, 1), teacher, texts, 10.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.residual


@torch.no_grad()
def likeness(vit, words, selector, residual):
    """The cosine of P-features with full features of the same frames, and the share of words that they get right."""
    video, right = clips(128, 3, torch.Generator().manual_seed(77))
    encoder = DenseVideoEncoder(vit, 2, 0.85, selector, residual=None)
    encoder.residual = residual
    features, full = encoder(video)[:, LATE], vit(video[:, LATE].flatten(0, 1)).unflatten(0, (128, -1))
    said = [x.argmax(-1) for x in says(features, words)]
    shares = [(x == y).float().mean().item() for x, y in zip(said, right[:, LATE].unbind(2), strict=True)]
    return F.cosine_similarity(features, full, dim=2).mean().item(), [round(x, 3) for x in shares]


@pytest.mark.slow
def test_the_residual_token_brings_features_nearer_to_full_ones():
    vit, words = encoder_and_words()
    whole = likeness(vit, words, lambda f, b, n, p, k: torch.arange(64).expand(len(f), -1), None)
    with torch.no_grad():
        video, _ = clips(128, 3, torch.Generator().manual_seed(77))
        each = vit(video.flatten(0, 1)).unflatten(0, (128, 3))
        held = F.cosine_similarity(each[:, LATE], each[:, :1], dim=2).mean().item()
    found = {}
    for name, taught, asked in (("motion", motion, motion), ("random", Random(), Random(0))):
        residual = distilled(vit, words, taught)
        found[name] = likeness(vit, words, asked, residual)
        found[name, "alone"] = likeness(vit, words, asked, None)
        found[name, "motion"] = likeness(vit, words, motion, residual)
    print(whole, held, found)
    assert whole[0] > 0.9999 and min(whole[1]) >= 0.95
    for name in ("motion", "random"):
        assert found[name][0] >= found[name, "alone"][0] + 0.05
    assert found["motion"][0] >= found["random"][0]
    assert found["motion"][0] >= held + 0.02  # the I-feature in place of a P-feature
    assert found["random", "motion"][0] >= found["motion", "alone"][0] + 0.05
