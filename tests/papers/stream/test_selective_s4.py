"""Selective S4 (system 53): masks and their gradients, the slow copy, work by what is kept, and clips with few tokens
that tell."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import chronotope as ct
from chronotope.papers.stream.selective_s4 import Momentum, S4Layer, SelectiveS4, enqueue, lsmcl, select

GRID = ct.Grid(t=6, h=3, w=4)


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(dim=8, layers=2, seed=0, **options):
    torch.manual_seed(seed)
    return SelectiveS4(dim, layers, states=8, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grid", [GRID, ct.Grid(t=1, h=3, w=7), ct.Grid(t=1, h=1, w=1)], ids=repr)
def test_where_all_is_kept_it_is_the_plain_model(training, grid):
    model, x = made(keep=1).train(training), numbers(2, grid.size, 8)
    seen = model(x, grid)
    assert (seen.tokens - model.space(x)).abs().max() <= 1e-6
    assert (seen.mask == 1).all()
    grads = [
        torch.autograd.grad(y.square().sum(), list(model.space.parameters())) for y in (seen.tokens, model.space(x))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 40), share=st.integers(1, 10), mode=st.sampled_from(["topk", "gumbel_st"]), seed=st.integers(0, 99)
)
def test_what_is_kept(n, share, mode, seed):
    x, scores, keep = numbers(2, n, 3, seed=seed), numbers(2, n, seed=seed + 1), share / 10
    found, again = (
        select(x, scores, keep, mode, generator=torch.Generator().manual_seed(seed)) for _ in range(2)
    )  # fmt: skip
    count = -(-share * n // 10)
    assert found.indices.shape == (2, count) and ((found.mask == 0) | (found.mask == 1)).all()
    for i in range(2):
        assert torch.equal(found.mask[i].nonzero()[:, 0], found.indices[i])  # in order, each once
        assert torch.equal(found.tokens[i], x[i, found.indices[i]])
        if mode == "topk":
            assert scores[i][found.mask[i] == 0].lt(scores[i, found.indices[i]].min()).all()
    assert torch.equal(found.mask, again.mask)


def test_tokens_are_sampled_in_proportion_to_their_odds():
    scores = torch.tensor([2.0, 0.0]).repeat(20000, 1)
    rng = torch.Generator().manual_seed(0)
    first = select(torch.zeros(20000, 2, 1), scores, 0.5, "gumbel_st", generator=rng).mask[:, 0].mean()
    # P(2 + a > b) for two logistic variables: (1 - e^-d (1 + d)) / (1 - e^-d)^2 at d = 2.
    odds = (1 - 3 * math.exp(-2)) / (1 - math.exp(-2)) ** 2
    assert abs(first - odds) < 0.01


@pytest.mark.parametrize("temperature", [0.5, 2])
def test_the_mask_is_hard_and_has_the_gradient_of_the_sampled_probability(temperature):
    x, scores = numbers(2, 30, 3).requires_grad_(), numbers(2, 30, seed=1).requires_grad_()
    noise = torch.rand(2, 30, generator=torch.Generator().manual_seed(5)).logit()
    p = ((scores + noise) / temperature).sigmoid()
    rng = torch.Generator().manual_seed(5)
    found = select(x, scores, 0.4, "gumbel_st", temperature=temperature, generator=rng)
    slope = numbers(2, 30, seed=2)
    (own,) = torch.autograd.grad((found.mask * slope).sum(), scores, retain_graph=True)
    torch.testing.assert_close(own, slope * p * (1 - p) / temperature)
    own, at = torch.autograd.grad((found.tokens * 2).sum(), (scores, x))
    torch.testing.assert_close(own, (2 * x.sum(2) * found.mask * p * (1 - p) / temperature).detach())
    torch.testing.assert_close(at, 2 * found.mask.detach()[..., None].expand_as(x))
    assert not select(x, scores, 0.4).mask.requires_grad


def test_the_generator_learns_and_the_slow_copy_does_not():
    model, x = made(keep=0.5), numbers(2, GRID.size, 8).requires_grad_()
    model(x, GRID, torch.Generator().manual_seed(0)).tokens.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("guide"):
            assert not parameter.requires_grad and parameter.grad is None
        elif name.startswith("space"):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(parameter.grad.abs().max() > 0 for parameter in model.score.parameters())
    # x has a gradient where it was kept, as input of the layers, and none as input of the generator.
    seen = model(x, GRID, torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(seen.tokens.square().sum(), x)
    assert torch.equal(grad.abs().amax(2) > 0, seen.mask == 1)


@pytest.mark.parametrize("m", [0, 0.9, 1])
def test_the_slow_copy_is_the_closed_form(m):
    model = made().double()
    start = [p.clone() for p in model.guide.model.parameters()]
    for own, other in zip(start, model.space[0].parameters(), strict=True):
        assert torch.equal(own, other)
    steps = []
    for t in range(7):
        with torch.no_grad():
            for i, p in enumerate(model.space[0].parameters()):
                p.copy_(numbers(*p.shape, seed=10 * t + i, dtype=torch.float64))
        steps.append([p.clone() for p in model.space[0].parameters()])
        model.ema_update(m)
    for i, own in enumerate(model.guide.model.parameters()):
        expected = m**7 * start[i] + sum((1 - m) * m ** (6 - t) * step[i] for t, step in enumerate(steps))
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


class Stepped(nn.Module):
    """A state space, one token after the other."""

    def __init__(self, s4):
        super().__init__()
        self.s4 = s4

    def forward(self, x, grid):
        state, out = self.s4.init_state(len(x), ct.Grid(n=1)), []
        for token in x.split(1, 1):
            y, state = self.s4.step(token, state)
            out.append(y)
        return torch.cat(out, 1)


def test_convolution_and_recurrence_agree_on_what_is_kept():
    model, grid = made(keep=0.25).eval(), ct.Grid(t=64, h=4, w=4)
    with torch.no_grad():
        expected = model(numbers(2, grid.size, 8), grid)
        for layer in model.space:
            layer.s4 = Stepped(layer.s4)
        found = model.space(numbers(2, grid.size, 8).gather(1, expected.indices[..., None].expand(-1, -1, 8)))
    assert (found - expected.tokens).abs().max() <= 1e-4


def held(model, x):
    """Bytes kept for the gradient, each storage once, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(y):
        storage = y.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), y)
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        y = model(x)
    assert y.requires_grad
    return sum(size for size, _ in found.values())


def test_memory_of_the_layers_is_that_of_the_tokens_kept():
    model, x = made(32).space, numbers(4, 2048, 32)
    kept = select(x, numbers(4, 2048, seed=1), 0.5).tokens
    assert abs(held(model, kept) / held(model, x) - 0.5) <= 0.05


def transform(shape, dims, *rest, out_shape, **options):
    """Operations of a Fourier transform, of which the library's counter knows nothing."""
    longest = max(shape[dims[-1]], out_shape[dims[-1]])
    return int(5 * math.prod(shape) / shape[dims[-1]] * longest * math.log2(longest))


def test_operations_of_the_layers_are_those_of_the_tokens_kept():
    model, x = made(32).space, numbers(4, 2048, 32)
    aten, work = torch.ops.aten, []
    for tokens in (x, select(x, numbers(4, 2048, seed=1), 0.5).tokens):
        mapping = {aten._fft_r2c: transform, aten._fft_c2r: transform}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            model(tokens).sum().backward()
        counts = counter.get_flop_counts()["Global"]
        assert all(counts[name] > 0 for name in mapping)
        work.append(counter.get_total_flops())
    assert abs(work[1] / work[0] - 0.5) <= 0.05


@pytest.mark.slow
def test_half_the_tokens_take_no_more_than_about_half_the_time(one_thread):
    # Found 0.39 to 0.50 on a busy machine: half the tokens fit the cache better. For an eighth of these tokens 0.6.
    model, x = made(32).space, numbers(8, 4096, 32)
    inputs = x, select(x, numbers(8, 4096, seed=1), 0.5).tokens
    best = [math.inf, math.inf]
    for _ in range(25):
        for i, tokens in enumerate(inputs):
            start = time.process_time()
            model(tokens).sum().backward()
            best[i] = min(best[i], time.process_time() - start)
    print(best)
    assert best[1] / best[0] <= 0.55


def test_contrast_of_long_and_short_clips():
    long, short, queue = numbers(5, 6).requires_grad_(), numbers(5, 6, seed=1).requires_grad_(), numbers(9, 6, seed=2)

    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    same, others = (unit(short) * unit(long)).sum(1) / 0.1, unit(short) @ unit(queue).T / 0.1
    loss = lsmcl(long, short, queue)
    torch.testing.assert_close(loss, -(same - torch.cat((same[:, None], others), 1).logsumexp(1)).mean())
    every = unit(short) @ unit(long).T / 0.1
    torch.testing.assert_close(lsmcl(long, short), (every.logsumexp(1) - every.diag()).mean())
    for found in (loss, lsmcl(long, short)):
        a, b = torch.autograd.grad(found, (long, short), allow_unused=True)
        assert a is None and b.abs().max() > 0
    assert torch.equal(enqueue(queue, long), torch.cat((long, queue[:4])))


def clips(count, rng):
    """Long and short clips of the same videos, half of their tokens masked at random.

    A token of each frame, of 8, shows who the video is of, under noise; the others are noise.
    """
    identity, out = torch.randn(count, 16, generator=rng), []
    for frames in (32, 8):
        x = torch.randn(count, frames, 8, 16, generator=rng)
        place = torch.randint(0, 8, (count, frames, 1, 1), generator=rng).expand(-1, -1, -1, 16)
        x = x.scatter_add(2, place, 4 * identity[:, None, None].expand(-1, frames, 1, -1)).flatten(1, 2)
        out.append(select(x, torch.rand(x.shape[:2], generator=rng), 0.5).tokens)
    return out


@pytest.mark.slow
def test_short_clips_learn_to_say_what_long_ones_do():
    torch.manual_seed(0)
    rng, encoder = torch.Generator().manual_seed(0), S4Layer(16, 8)
    slow, held_out = Momentum(encoder), clips(256, rng)

    @torch.no_grad()
    def right():
        long, short = (F.normalize(encoder(x).mean(1), dim=1) for x in held_out)
        return ((short @ long.T).argmax(1) == torch.arange(256)).float().mean().item()

    before, optimizer = right(), torch.optim.AdamW(encoder.parameters(), 1e-2)
    queue = torch.cat([slow(clips(32, rng)[0]).mean(1) for _ in range(4)])
    for _ in range(250):
        long, short = clips(32, rng)
        z_long = slow(long).mean(1)
        loss = lsmcl(z_long, encoder(short).mean(1), queue)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slow.update(encoder, 0.99)
        queue = enqueue(queue, z_long)
    after = right()
    print(before, after)
    assert before < 0.1 and after > 0.25  # of 256 videos


FRAMES, TOKENS, CHANNELS, CLASSES = 64, 16, 16, 8
CLIP = ct.Grid(t=FRAMES, h=4, w=4)


def marked(count, rng):
    """Clips, which tokens carry the label, and labels.

    Two tokens of each frame, anywhere, carry a mark and the prototype of the label; all others the prototype of some
    class. All are noisy.
    """
    prototypes = F.normalize(numbers(CLASSES, CHANNELS - 1), dim=1)
    label = torch.randint(0, CLASSES, (count,), generator=rng)
    other = torch.randint(0, CLASSES, (count, FRAMES * TOKENS), generator=rng)
    place = (
        torch.rand(count, FRAMES, TOKENS, generator=rng).argsort(2)[..., :2] + TOKENS * torch.arange(FRAMES)[:, None]
    )
    telling = torch.zeros(count, FRAMES * TOKENS).scatter_(1, place.flatten(1), 1.0)
    shown = torch.where(telling.bool(), label[:, None], other)
    x = torch.randn(count, FRAMES * TOKENS, CHANNELS, generator=rng)
    x[..., 0] += 3 * telling
    x[..., 1:] += prototypes[shown] * (1 + telling[..., None])
    return x, telling, label


class Classifier(nn.Module):
    """kind: "selective", "plain", or "random", which keeps as many tokens by chance."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.model = kind, SelectiveS4(CHANNELS, 2, keep=0.25, states=8)
        self.head = nn.Linear(CHANNELS // 4, CLASSES)

    def forward(self, x, rng):
        """Logits, and the mask."""
        if self.kind == "selective":
            seen = self.model(x, CLIP, rng)
            return self.head(seen.tokens.mean(1)), seen.mask
        keep = 0.25 if self.kind == "random" else 1
        kept = select(x, torch.rand(x.shape[:2], generator=rng), keep)
        return self.head(self.model.space(kept.tokens).mean(1)), kept.mask


def trained(kind, seed, steps=300):
    """Accuracy, and the share of telling tokens that is kept."""
    torch.manual_seed(seed)
    model, rng = Classifier(kind), torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in range(steps):
        x, _, label = marked(16, rng)
        loss = F.cross_entropy(model(x, rng)[0], label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.model.ema_update()
    model.eval()
    right, recall = [], []
    with torch.no_grad():
        rng = torch.Generator().manual_seed(77)
        for _ in range(8):
            x, telling, label = marked(64, rng)
            logits, mask = model(x, rng)
            right.append((logits.argmax(1) == label).float().mean())
            recall.append((mask * telling).sum() / telling.sum())
    return sum(right).item() / 8, sum(recall).item() / 8


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_tokens_that_tell_are_found_and_clips_told_better_than_by_all_tokens(seed):
    found = {kind: trained(kind, seed) for kind in ("selective", "plain", "random")}
    print(found)
    assert found["selective"][0] >= found["plain"][0] + 0.03
    assert found["selective"][1] >= 0.9
    assert abs(found["random"][1] - 0.25) < 0.01 and found["random"][0] < found["plain"][0]


def test_refusals():
    with pytest.raises(ct.ChronotopeError, match="gumbel_st, topk"):
        select(numbers(1, 4, 2), numbers(1, 4), 0.5, "all")
    with pytest.raises(ct.ChronotopeError, match="share above 0"):
        select(numbers(1, 4, 2), numbers(1, 4), 0)
    with pytest.raises(ct.ChronotopeError, match="to divide dim"):
        SelectiveS4(12, 3)
    with pytest.raises(ct.ChronotopeError, match="expected \\[B, 72, 8\\]"):
        made()(numbers(1, 5, 8), GRID)
