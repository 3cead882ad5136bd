"""PredFormer (system 6): its attentions against masks, who reaches whom, pairs, parameters, a bouncing square."""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.spacetime.predformer import LETTERS, PostNorm, PredFormer, gated, words_of

GRID = ct.Grid(t=3, h=2, w=4)
SHORTEST = {"full": 1, "fac-st": 2, "fac-ts": 2, "ts": 2, "st": 2, "tst": 3, "sts": 3, "tsst": 4, "stts": 4}
PUBLISHED = list(SHORTEST)


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(plan, blocks, **options):
    torch.manual_seed(0)
    return PredFormer(plan, blocks, **{"patch": 4, "dim": 16, "heads": 2, **options})


def block_diagonal(letter):
    t, h, w = GRID.coords().T
    same = {"S": t, "T": h * GRID.sizes["w"] + w, "F": torch.zeros_like(t)}[letter]
    return same[:, None] == same[None]


@pytest.mark.parametrize("letter", LETTERS)
def test_each_attention_is_full_attention_under_its_mask(letter):
    torch.manual_seed(0)
    layer = gated([letter], 16, 2).blocks[0].mixers[0]
    x = tokens(2, GRID.size, 16)
    q, k, v = layer.project(x, GRID)
    masked = sdpa(q, k, v, attn_mask=block_diagonal(letter)).transpose(1, 2).flatten(2)
    assert (layer(x, GRID) - masked @ layer.out.weight.T).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("plan", "blocks", "reached"),
    [("s", 2, "S"), ("t", 2, "T"), *((plan, SHORTEST[plan], "all") for plan in PUBLISHED), ("divided", 2, "all")],
)
def test_plans_reach_what_their_letters_say(plan, blocks, reached):
    torch.manual_seed(0)
    stack, x = gated(words_of(plan, blocks), 8, 2).double(), tokens(1, GRID.size, 8).double().requires_grad_()
    weights = tokens(8, seed=1).double()
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0] for y in (stack(x, GRID)[0] @ weights).unbind()]
    change = torch.cat(rows).abs().amax(2)
    expected = torch.ones_like(change, dtype=torch.bool) if reached == "all" else block_diagonal(reached)
    assert torch.equal(change > 0, expected)


@pytest.mark.parametrize("sizes", [(10, 8, 8), (5, 4, 6)])
def test_pairs_by_counter(sizes):
    t, h, w = sizes
    grid, n = ct.Grid(t=t, h=h, w=w), h * w
    count = {letter: ct.plan(where, grid).density * grid.size**2 for letter, where in LETTERS.items()}
    assert count["S"] + count["T"] == pytest.approx(t * n**2 + n * t**2)
    assert count["F"] == (t * n) ** 2


@pytest.mark.parametrize("post_norm", [False, True])
def test_all_plans_have_the_same_parameters(post_norm):
    sizes = {}
    for plan in PUBLISHED:
        model = made(plan, 24, post_norm=post_norm)
        sizes[plan] = sum(p.numel() for p in model.parameters())
    assert len(set(sizes.values())) == 1, sizes
    # Per block: attention 4 d^2, feed-forward 3 * 4 d^2, two or three norms; around them two matrices and a norm.
    assert sizes["full"] == 24 * (16 * 256 + (6 if post_norm else 4) * 16) + 2 * 16 * 16 + 16 + 16 + 32
    divided = sum(p.numel() for p in made("divided", 24).parameters())
    assert divided == sizes["full"] - 12 * 32 or post_norm


def test_the_words_of_plans():
    assert "".join(words_of("tsst", 8)) == "TSSTTSST" and "".join(words_of("fac-ts", 6)) == "TTTSSS"
    assert words_of("full", 2) == ["F", "F"] and words_of("divided", 4) == ["TS", "TS"]
    for name, blocks in [("tsst", 6), ("fac-st", 3), ("divided", 1), ("abc", 3), ("", 2), ("full", 0), ("fac-ts", 0)]:
        with pytest.raises(ct.ChronotopeError, match="expected full, fac-st, fac-ts, divided"):
            words_of(name, blocks)


def test_the_equations():
    model, x = made("ts", 2, ratio=3.0), tokens(2, 3, 1, 8, 16)
    state = {name: value.double() for name, value in model.double().state_dict().items()}
    d, n, t = 16, 8, 3
    patches = x.double().view(2, t, 2, 4, 4, 4).transpose(3, 4).reshape(2, t * n, 16)
    z = patches @ state["embed.project.weight"].T + state["embed.project.bias"]
    place = torch.arange(t * n, dtype=torch.float64)[:, None] / 10000 ** (torch.arange(0, d, 2).double() / d)
    z = z + torch.stack((place.sin(), place.cos()), -1).flatten(1)

    def norm(z, name):
        return F.layer_norm(z, (d,), state[f"{name}.weight"], state[f"{name}.bias"])

    for block, same in enumerate((torch.arange(t * n) % n, torch.arange(t * n) // n)):
        own = f"stack.blocks.{block}"
        qkv = norm(z, f"{own}.norms.0") @ state[f"{own}.mixers.0.qkv.weight"].T
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in qkv.chunk(3, 2))
        score = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(same[:, None] != same[None], -torch.inf)
        z = z + (score.softmax(3) @ v).transpose(1, 2).flatten(2) @ state[f"{own}.mixers.0.out.weight"].T
        gate, value = (norm(z, f"{own}.mlp_norm") @ state[f"{own}.mlp.enter.weight"].T).chunk(2, 2)
        assert gate.shape[2] == 3 * d
        z = z + (gate * gate.sigmoid() * value) @ state[f"{own}.mlp.leave.weight"].T
    out = norm(z, "stack.norm") @ state["head.project.weight"].T + state["head.project.bias"]
    expected = out.view(2, t, 2, 4, 4, 4).transpose(3, 4).reshape(2, t, 1, 8, 16)
    torch.testing.assert_close(model(x.double()), expected, rtol=0, atol=1e-10)


def test_blocks_may_end_in_a_norm_and_may_be_dropped():
    blocks = made("ts", 2, post_norm=True).stack.blocks
    assert all(isinstance(block, PostNorm) for block in blocks)
    x = tokens(2, GRID.size, 16)
    assert torch.equal(blocks[0](x, GRID), blocks[0].norm(blocks[0].mixer(x, GRID)))
    torch.manual_seed(0)
    model, clips = made("s", 2, drop_path=0.9, post_norm=False), tokens(64, 1, 1, 4, 4)
    plain = made("s", 2)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(clips), plain(clips))
    kept = plain.head(plain.stack.norm(plain.place(plain.embed(clips)[0], ct.Grid(n=1))), ct.Grid(t=1, h=1, w=1))
    same = (model.train()(clips) - kept).abs().amax((1, 2, 3, 4)) < 1e-6
    # All four branches are gone in 0.9^4 = 0.66 of the examples.
    assert 0.4 < same.float().mean() < 0.9


@pytest.mark.parametrize("plan", ["tsst", "full", "divided"])
def test_a_causal_plan_looks_at_nothing_later_and_steps(plan):
    model, clips = made(plan, 4, causal=True), tokens(2, 4, 1, 8, 8)
    later = clips.clone()
    later[:, 2:] += 1
    assert (model(later)[:, :2] - model(clips)[:, :2]).abs().max() < 1e-6
    free = made(plan, 4)
    assert (free(later)[:, :2] - free(clips)[:, :2]).abs().max() > 1e-4
    x, grid = tokens(2, 4 * 4, 16), ct.Grid(t=4, h=2, w=2)
    state, out = model.stack.init_state(2, grid.replace(t=1)), []
    for part in x.split(4, 1):
        y, state = model.stack.step(part, state)
        out.append(y)
    assert (torch.cat(out, 1) - model.stack(x, grid)).abs().max() < 1e-5


def test_post_normed_blocks_step_and_models_are_saved(tmp_path):
    model, grid = made("tsst", 4, causal=True, post_norm=True), ct.Grid(t=3, h=2, w=2)
    x, state, out = tokens(1, 12, 16), model.stack.init_state(1, ct.Grid(t=1, h=2, w=2)), []
    for part in x.split(4, 1):
        y, state = model.stack.step(part, state)
        out.append(y)
    assert (torch.cat(out, 1) - model.stack(x, grid)).abs().max() < 1e-5
    model.save_pretrained(tmp_path)
    clips = tokens(1, 3, 1, 8, 8)
    assert torch.equal(PredFormer.from_pretrained(tmp_path)(clips), model(clips))
    model.loss(clips, clips).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def squares(clips, frames, seed):
    """A square of 4 x 4 pixels that bounces in 16 x 16, by a step of -2 .. 2 on each axis."""
    rng = torch.Generator().manual_seed(seed)
    start, way = (torch.randint(low, high, (clips, 1, 2), generator=rng) for low, high in ((0, 24), (-2, 3)))
    place = 12 - ((start + way * torch.arange(frames)[:, None]) % 24 - 12).abs()
    inside = torch.arange(16) - place[..., None]
    row, column = ((inside >= 0) & (inside < 4)).float().unbind(2)
    return (row[..., :, None] * column[..., None, :])[:, :, None]


def fitted(plan, clips, seconds, batch=None, seed=0):
    """A model after so many seconds of processor time on these clips, 5 frames in and 5 out."""
    torch.manual_seed(seed)
    model = PredFormer(plan, 4, 4, 1, 64, 4)
    opt, rng = torch.optim.AdamW(model.parameters(), 1e-3), torch.Generator().manual_seed(seed)
    start, steps = time.process_time(), 0
    while time.process_time() - start < seconds:
        some = clips if batch is None else clips[torch.randperm(len(clips), generator=rng)[:batch]]
        opt.zero_grad()
        model.loss(some[:, :5], some[:, 5:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        steps += 1
    print(plan, steps, "steps", flush=True)
    return model


@pytest.mark.slow
def test_a_few_clips_are_learned_by_heart(one_thread):
    clips = squares(8, 10, 0)
    model = fitted("tsst", clips, 45)
    with torch.no_grad():
        error = float(model.loss(clips[:, :5], clips[:, 5:]) / clips[:, 5:].var())
    print(f"{error:.4f} of the variance")
    assert error < 0.1


@pytest.mark.slow
def test_without_time_less_is_learned(one_thread):
    clips, others = squares(4096, 10, 1), squares(256, 10, 2)
    found = {}
    for plan in ("tsst", "ssss"):
        model = fitted(plan, clips, 50, batch=16)
        with torch.no_grad():
            found[plan] = float(model.loss(others[:, :5], others[:, 5:]))
    print(found, "variance", float(others[:, 5:].var()))
    assert found["tsst"] < found["ssss"]
