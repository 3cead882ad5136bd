"""AlignedGen (system 131): image 0 as by itself, copies that change nothing, places side by side, statistics."""

import pytest
import torch
from _joint import ROPE, Small, flux, flux_ids, places
from torch.nn import functional as F

import chronotope as ct
from chronotope.adapt import Asked, Control, control
from chronotope.models.diffusion import flow_sample
from chronotope.papers.control.aligned_gen import (
    SharedAttention,
    adain,
    falling,
    flux_turn,
    shift_ids,
    with_reference,
)

H, W, B = 4, 5, 3
IDS = places(H, W)


def turn(x, ids):
    return ROPE(x, coords=ids)


def solved(asked):
    return F.scaled_dot_product_attention(asked.q, asked.k, asked.v, attn_mask=asked.mask)


def drawn(batch=B, text=0, dim=16, dtype=torch.float32, seed=0):
    return torch.randn(3, batch, 2, text + H * W, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def small_run(model, x, text, shared=None, layers=None, **keywords):
    if shared is None:
        return model(x, IDS, encoder_hidden_states=text, **keywords)
    with control(model, shared, layers=layers):
        return model(x, IDS, encoder_hidden_states=text, **keywords)


@pytest.mark.parametrize("strength", [1.0, 1.1, falling])
def test_image_0_comes_out_as_by_itself(strength):
    torch.manual_seed(0)
    model, x, text = Small(2, 4), torch.randn(B, H * W, 3), torch.randn(B, 6, 32)
    time = torch.full((B,), 0.7)
    shared, single = SharedAttention(turn, IDS, strength), [f"attentions.{i}" for i in range(2, 6)]
    together = small_run(model, x, text, shared, single, timestep=time)
    alone = small_run(model, x[:1], text[:1], shared, single, timestep=time[:1])
    plain = small_run(model, x, text, timestep=time)
    assert (together[0] - alone[0]).abs().max() < 1e-5 and (alone[0] - plain[0]).abs().max() < 1e-5
    assert (together[1:] - plain[1:]).abs().amax((1, 2)).min() > 1e-2
    open_ = SharedAttention(turn, IDS, strength, protect_first=False)
    assert (small_run(model, x, text, open_, single, timestep=time)[0] - plain[0]).abs().max() > 1e-3


def test_an_image_that_is_the_reference_is_not_changed_by_it():
    """Every key twice, at the same place: each weight is halved and met twice. With text, its weight would change."""
    q, k, v = (x[:1].expand(B, -1, -1, -1).contiguous() for x in drawn())
    shared = SharedAttention(turn, IDS, 1.0, shift=(0.0, 0.0), protect_first=False)
    asked = shared.share(Asked(turn(q, IDS), turn(k, IDS), v), first=0)
    plain = F.scaled_dot_product_attention(turn(q, IDS), turn(k, IDS), v)
    assert asked.k.shape[2] == 2 * H * W and (solved(asked) - plain).abs().max() < 1e-5

    torch.manual_seed(0)
    model, x = Small(2, 4), torch.randn(1, H * W, 3).expand(B, -1, -1)
    none = torch.zeros(B, 0, 32)
    assert (small_run(model, x, none, shared) - small_run(model, x, none)).abs().max() < 1e-5


def test_the_reference_lies_beside():
    """A score of own token i and reference token j is that of places (j - i) + W apart, and no two places are one."""
    q, k, v = drawn(dtype=torch.float64)
    ids = IDS.double()
    shared = SharedAttention(turn, ids, 1.0, adain=False)
    asked = shared.share(Asked(turn(q, ids), turn(k, ids), v), first=0)
    scores = asked.q[1:] @ asked.k[1:, :, H * W :].transpose(-1, -2)
    for i in range(H * W):
        apart = ids - ids[i] + torch.tensor([0.0, W])
        expected = q[1:, :, i, None] @ turn(k[:1], apart).transpose(-1, -2)
        assert (scores[:, :, i] - expected[:, :, 0]).abs().max() < 1e-12
    side_by_side = places(H, 2 * W).view(H, 2 * W, 2)[:, W:].flatten(0, 1)
    assert torch.equal(shift_ids(IDS, 1, W), side_by_side)
    assert len(torch.cat((IDS, side_by_side)).unique(dim=0)) == 2 * H * W


def test_statistics_are_those_of_the_reference():
    q, k, v = drawn(text=6)
    k, q = k * 3 + 1, q * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1, 1) - 2

    def placed(x):
        return torch.cat((x[:, :, :6], turn(x[:, :, 6:], IDS)), 2)

    asked = SharedAttention(turn, IDS, 1.0).share(Asked(placed(q), placed(k), v), first=6)
    for found, before in ((asked.q, q), (asked.k[:, :, : 6 + H * W], k)):
        plain = turn(found[:, :, 6:], -IDS)
        for statistic in (torch.mean, torch.std):
            assert (statistic(plain, 2) - statistic(before[:1, :, 6:], 2)).abs().max() < 1e-4
        assert torch.equal(found[:, :, :6], before[:, :, :6])  # text as it was
        assert torch.equal(found[0], placed(before)[0])
    x = torch.randn(2, 3, 50, 4) * 5 + 3
    assert (adain(x, x[:1])[0] - x[0]).abs().max() < 1e-4


def conflict(turn, ids, dim, heads, norm, noise, shift, queries=64):
    """How much of the attention to the reference goes to the same place, against the share of one place of it.

    Keys are random for each head, the same at all places but for noise: what tells them apart is rotation.
    """
    rng, n = torch.Generator().manual_seed(0), len(ids)
    content = torch.randn(1, heads, 1, dim, generator=rng)
    q, k = (content + noise * torch.randn(2, heads, n, dim, generator=rng) for _ in range(2))
    q, k = (norm**0.5 * F.rms_norm(x, (dim,)) for x in (q, k))
    asked = Asked(turn(q, ids), turn(k, ids), torch.zeros(2, heads, n, 1))
    shared = SharedAttention(turn, ids, 1.0, adain=False, shift=shift).share(asked, 0)
    rows = torch.randperm(n, generator=rng)[:queries]
    weights = (shared.q[1, :, rows] @ shared.k[1].transpose(-1, -2) / dim**0.5).softmax(-1)[..., n:]
    same = weights.gather(-1, rows.expand(heads, -1)[..., None])[..., 0]
    return float((same / weights.sum(-1)).mean()) * n


def test_without_the_shift_the_same_place_is_looked_at():
    ids, rope = places(6, 10), ct.Rope(axes=("h", "w"), base=100.0)
    given = (lambda x, ids: rope(x, coords=ids)), ids, 64, 64, 2.0, 0.5
    before, after = conflict(*given, shift=(0.0, 0.0)), conflict(*given, shift=None)
    assert before > 5 and after < 2


def test_the_conflict_at_the_head_of_flux():
    """Rows still meet, so the shift leaves more than on small grids."""
    given = flux_turn((16, 56, 56)), flux_ids(32, 32), 128, 24, 1.0, 0.0
    before, after = conflict(*given, shift=(0.0, 0.0, 0.0)), conflict(*given, shift=None)
    assert before > 5 and 2 < after < before / 4


@pytest.mark.parametrize("kind", [None, "bool", "added"])
def test_a_mask_of_the_model_stays(kind):
    q, k, v = drawn(text=4)
    hidden = torch.rand(B, 1, 24, 24, generator=torch.Generator().manual_seed(1)) < 0.3
    hidden[..., 0] = False
    mask = None if kind is None else ~hidden if kind == "bool" else torch.where(hidden, -torch.inf, 0.0)
    asked = SharedAttention(turn, IDS, 1.0).share(Asked(q, k, v, mask), first=4)
    allowed = torch.ones(B, 1, 24, 44, dtype=torch.bool)
    allowed[0, ..., 24:] = False
    if kind is not None:
        allowed[..., :24] &= ~hidden
    expected = F.scaled_dot_product_attention(asked.q, asked.k, asked.v, attn_mask=allowed)
    assert (solved(asked) - expected).abs().max() < 1e-6


def test_gradients_reach_the_reference():
    q, k, v = (x.requires_grad_() for x in drawn().unbind(0))
    asked = SharedAttention(turn, IDS, 1.0).share(Asked(turn(q, IDS), turn(k, IDS), v), first=0)
    grads = torch.autograd.grad(solved(asked)[1].sum(), (q, k, v))
    assert all(grad[0].abs().max() > 0 and grad[2].abs().max() == 0 for grad in grads)


class Kept(Control):
    def __init__(self):
        self.scale = []

    def asks(self, at, asked):
        n = H * W
        self.scale.append((asked.k[1, :, -n:].norm() / asked.k[0, :, -n:].norm()).item())
        return asked


def test_the_strength_falls_with_the_noise_level():
    torch.manual_seed(0)
    model, x, text, kept = Small(1, 0), torch.randn(B, H * W, 3), torch.randn(B, 6, 32), Kept()
    with control(model, SharedAttention(turn, IDS), kept):
        for time in (1.0, 0.5, 0.1):
            small_run(model, x, text, timestep=torch.full((B,), time))
    assert kept.scale == pytest.approx([1.0, 0.25, 0.01], rel=1e-4)
    assert falling(500.0, longest=1000) == 0.25


def test_a_picture_that_exists_is_the_reference():
    """The others are made as they are beside it, and it enters with the noise of each step."""
    torch.manual_seed(0)
    model, picture, noise = Small(1, 2), torch.randn(1, H * W, 3), torch.randn(3, H * W, 3)
    seen, text = [], torch.randn(3, 6, 32)

    def told(x, t):
        seen.append((float(t[0]), x[0]))
        return model(x, IDS, t, text[: len(x)])

    with torch.no_grad(), control(model, SharedAttention(turn, IDS, 1.0)):
        found = flow_sample(with_reference(told, picture, noise[:1]), noise[1:], steps=4)
        apart = flow_sample(lambda x, t: model(x, IDS, t, text[1:]), noise[1:], steps=4)
    assert found.shape == (2, H * W, 3) and (found - apart).abs().max() > 1e-2
    for t, x in seen:
        assert (x - (t * picture[0] + (1 - t) * noise[0])).abs().max() < 1e-6


def test_what_cannot_be_shared_is_refused():
    model, text = Small(1, 0), torch.zeros(B, 2, 32)
    with (
        control(model, SharedAttention(turn, places(6, 6))),
        pytest.raises(ct.ChronotopeError, match="36 image tokens"),
    ):
        small_run(model, torch.zeros(B, H * W, 3), text)
    with control(model, SharedAttention(turn, IDS)), pytest.raises(ct.ChronotopeError, match="no noise level"):
        small_run(model, torch.zeros(B, H * W, 3), text)
    with (
        ct.adapt.attach(model, where=ct.window(n=5)),
        control(model, SharedAttention(turn, IDS, 1.0)),
        pytest.raises(ct.UnsupportedError, match="not with a pattern"),
    ):
        small_run(model, torch.zeros(B, H * W, 3), text)


def test_a_flux_transformer_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import apply_rotary_emb

    torch.manual_seed(0)
    ids, dims, model = flux_ids(H, W), (4, 6, 6), flux(2, 4)
    x = torch.randn(2, 3, H * W, 16)
    assert (flux_turn(dims)(x, ids) - apply_rotary_emb(x, model.pos_embed(ids))).abs().max() < 1e-5
    inputs = {
        "hidden_states": torch.randn(B, H * W, 4),
        "encoder_hidden_states": torch.randn(B, 6, 16),
        "pooled_projections": torch.randn(B, 8),
        "img_ids": ids,
        "txt_ids": torch.zeros(6, 3),
    }

    def run(batch, time, shared=None):
        given = {name: value[:batch] if len(value) == B else value for name, value in inputs.items()}
        with torch.no_grad():
            return model(**given, timestep=torch.full((batch,), time)).sample

    plain = run(B, 0.8)
    with control(model, SharedAttention(flux_turn(dims), ids), layers="single_transformer_blocks.*", steps=range(2)):
        together, alone = run(B, 0.8), run(1, 0.8)
        later = [run(B, time) for time in (0.5, 0.2)]
    size = plain.abs().max()
    assert (together[0] - alone[0]).abs().max() < 1e-5 * size
    assert (together[1:] - plain[1:]).abs().amax((1, 2)).min() > 1e-2 * size
    assert not torch.equal(later[0], run(B, 0.5)) and torch.equal(later[1], run(B, 0.2))
