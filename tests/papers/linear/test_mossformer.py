"""MossFormer (system 137): joint attention against dense weights, causal streaming, cost, the gate, toy separation.

The authors' block (alibabasglab/MossFormer2, commit 5727f73: FLASH_ShareA_FFConvM with its ScaleNorm and convolutions,
rotary code rewritten from its formula) and `GatedSingleHead` on the same weights, float64, width 48, chunks of 32, 96
and 100 tokens: largest difference 2.3e-15, and 4.9e-15 in causal mode with centred convolutions, of changes up to 2.4
(2026-11-21).
"""

import functools
import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.papers.linear.mossformer import GatedSingleHead, joint_attention
from chronotope.papers.linear.mossformer_separator import Separator, best_order, si_sdr


def problem(n, dtype=torch.float64, seed=0, d=6, e=5):
    rng = torch.Generator().manual_seed(seed)
    parts = [2 * torch.randn(2, n, d, generator=rng, dtype=torch.float64) for _ in range(4)]
    return tuple(x.to(dtype) for x in parts), torch.randn(2, n, e, generator=rng, dtype=torch.float64).to(dtype)


def dense(projected, values, chunk, causal=False, keep=None):
    """W [B, N, N] written out, times the values."""
    near_q, near_k, far_q, far_k = projected
    n = values.shape[1]
    number = torch.arange(n) // chunk
    near = torch.relu(near_q @ near_k.mT / chunk).square() * (number[:, None] == number[None, :])
    far = far_q @ far_k.mT
    if causal:
        near, far = near.tril(), far / chunk * (number[:, None] > number[None, :])
    else:
        far = far / (n if keep is None else keep.sum(1)[:, None, None])
    weights = near + far
    if keep is not None:
        weights, values = weights * keep[:, None, :], torch.where(keep[..., None], values, 0.0)
    return weights @ values


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.booleans(), st.booleans(), st.integers(0, 999))
def test_joint_attention_equals_dense_weights(n, chunk, causal, masked, seed):
    projected, values = problem(n, seed=seed)
    keep = None
    if masked:
        keep = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < 0.7
        keep[:, 0] = True
        values = values.masked_fill(~keep[..., None], torch.nan)
    out = joint_attention(projected, values, chunk=chunk, causal=causal, keep=keep)
    assert (out - dense(projected, values, chunk, causal, keep)).abs().max() < 1e-10


@pytest.mark.parametrize("causal", [False, True])
def test_joint_attention_in_single_precision(causal):
    projected, values = problem(300, torch.float32, d=32, e=16)
    projected = tuple(x / 4 for x in projected)
    out = joint_attention(projected, values, chunk=128, causal=causal)
    assert (out - dense(projected, values, 128, causal)).abs().max() < 1e-4


def test_padding_changes_nothing():
    projected, values = problem(20)
    longer, more = problem(33, seed=1)
    longer = tuple(torch.cat((x, y[:, 20:]), 1) for x, y in zip(projected, longer, strict=True))
    keep = torch.arange(33).expand(2, 33) < 20
    out = joint_attention(longer, torch.cat((values, more[:, 20:]), 1), chunk=8, keep=keep)
    assert (out[:, :20] - joint_attention(projected, values, chunk=8)).abs().max() < 1e-12


def lively(seed=0, **options):
    torch.manual_seed(seed)
    layer = GatedSingleHead(**{"dim": 12, "qk_dim": 8, "chunk": 8, "width": 5} | options)
    with torch.no_grad():
        layer.scales.normal_()
        layer.offsets.normal_()
    return layer


@pytest.mark.parametrize("slice_size", [1, 3, 8, 11])
def test_steps_equal_the_whole_and_nothing_leaks_back(slice_size):
    layer, grid = lively(causal=True).double(), ct.Grid(t=5, n=slice_size)
    x = torch.randn(2, grid.size, 12, dtype=torch.float64)
    whole = layer(x, grid)
    state, outs, held = layer.init_state(2, ct.Grid(t=1, n=slice_size)), [], 0
    for piece in x.split(slice_size, 1):
        before = [part.clone() for part in state.tensors()]
        y, after = layer.step(piece, state)
        assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))
        state = after
        outs.append(y)
        held = max(held, state.nbytes)
    assert (whole - torch.cat(outs, 1)).abs().max() < 1e-10
    # memory 8 x 48, at most 7 tokens of 8 + 8 + 48, tails of 4 tokens of 48, 8 and 12, one token of 12
    assert held <= 2 * 8 * (8 * 48 + 7 * 64 + 4 * 68 + 12)
    cut = 2 * slice_size
    changed = torch.cat((x[:, :cut], torch.randn_like(x[:, cut:])), 1)
    assert (layer(changed, grid)[:, :cut] - whole[:, :cut]).abs().max() == 0
    with pytest.raises(ct.ChronotopeError, match="cannot be stepped"):
        lively().init_state(1, ct.Grid(n=1))


class Open(torch.nn.Module):
    """A gate that is 1."""

    def forward(self, x):
        return torch.ones_like(x)


def test_without_local_weights_and_gate_it_is_gated_linear_attention():
    layer, grid = lively().double(), ct.Grid(n=21)
    with torch.no_grad():
        layer.scales[2] = layer.offsets[2] = 0  # local keys
    layer.gate = Open()
    x = torch.randn(2, 21, 12, dtype=torch.float64)
    shifted = layer._shifted(x, torch.zeros_like(x[:, :1]))
    v, u = layer.hidden(shifted)[0].chunk(2, -1)
    _, _, q, k = layer._project(layer.shared(shifted)[0], 0)
    seen = ct.linear_attention(q[:, None], k[:, None], u[:, None], causal=False, normalize=False, scale=1 / 21)[:, 0]
    assert (layer(x, grid) - (x + layer.leave(seen * v)[0])).abs().max() < 1e-12


def test_gradients():
    layer = lively(causal=True, dim=4, expansion=2, width=3).double()
    x = torch.randn(1, 11, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, ct.Grid(n=11)), (x,), fast_mode=True)
    loss = Separator(8, 1, chunk=16, qk_dim=8)(torch.randn(2, 200)).square().sum()
    loss.backward()


def test_the_measure_of_separation():
    source, noise = torch.randn(2, 1, 4000).unbind(0)
    noise = noise - noise.mean() - source * (noise * source).sum() / source.square().sum()
    noise = noise * (source.std() / noise.std()) / 10**0.5
    assert abs(float(si_sdr(3 * source + 3 * noise, source)) - 10) < 0.1
    sources = torch.randn(3, 2, 500)
    assert best_order(sources.flip(1), sources).min() > 60
    with pytest.raises(ct.ChronotopeError, match="width odd"):
        GatedSingleHead(8, width=4)
    with pytest.raises(ct.ChronotopeError, match="takes no context"):
        lively()(torch.randn(1, 4, 12), ct.Grid(n=4), torch.randn(1, 4, 12))
    with pytest.raises(ct.ChronotopeError, match="at least 1"):
        joint_attention(*problem(3), chunk=0)


@pytest.mark.slow
def test_time_grows_with_the_tokens(one_thread):
    layer, times = GatedSingleHead(64), {}
    with torch.no_grad():
        for _, n in itertools.product(range(6), (2048, 4096, 8192, 16384)):
            x = torch.randn(1, n, 64)
            start = time.process_time()
            layer(x, ct.Grid(n=n))
            times.setdefault(n, []).append(time.process_time() - start)
    slope = np.polyfit(np.log(list(times)), np.log([min(t) for t in times.values()]), 1)[0]
    assert slope < 1.25, (slope, times)


def mixtures(batch, generator, notes=4, samples=4000, rate=2000, slots=8):
    """Two voices of 2 s at 2 kHz, [B, 2, samples]. The notes, all of them, are shared out between them at random.

    The first eighth is the first voice alone, the second the second, each playing its notes in turn: the key, which
    alone says whose note is whose. After that each plays its notes at random, both at once.
    """
    pitch = 110.0 * 2 ** (torch.arange(notes) * 5 / 12)
    time = torch.arange(samples) / rate
    own = torch.rand(batch, notes, generator=generator).argsort(1).view(batch, 2, notes // 2)
    length = samples // slots
    half = notes // 2
    played = own.gather(2, torch.randint(0, half, (batch, 2, slots * 2), generator=generator))
    played = played.repeat_interleave(length // 2, 2)
    key = own.repeat_interleave(-(-length // half), 2)[..., :length]
    played[:, :, :length] = key
    played[:, :, length : 2 * length] = key
    phase = 2 * torch.pi * (pitch[played] * time + torch.rand(batch, 2, 1, generator=generator))
    voices = sum((h * phase).sin() / h for h in (1, 2, 3))
    voices[:, 1, :length] = 0
    voices[:, 0, length : 2 * length] = 0
    return voices


class Local(GatedSingleHead):
    """The same block without the linear part."""

    def _project(self, z, time):
        near_q, near_k, far_q, far_k = super()._project(z, time)
        return near_q, near_k, far_q, 0 * far_k


@functools.cache
def separation(local, steps=600, seed=0):
    """Mean SI-SDR improvement over mixtures not trained on, in dB."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = Separator(64, 2, chunk=64, qk_dim=64)
    if local:
        for block in model.blocks:
            block.__class__ = Local
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        voices = mixtures(4, generator)
        loss = -best_order(model(voices.sum(1)), voices).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    voices = mixtures(100, torch.Generator().manual_seed(99))
    with torch.no_grad():
        made = best_order(model(voices.sum(1)), voices)
    mixture = voices.sum(1, keepdim=True).expand_as(voices)
    return float((made - si_sdr(mixture, voices).mean(1)).mean())


def test_the_training_runs():
    assert abs(separation(local=True, steps=2)) < 50


@pytest.mark.slow
def test_it_separates_voices_by_a_key_in_another_chunk():
    """18.5 dB; 300 steps are too few to learn the key: 5.7 dB (2026-11-21)."""
    assert separation(local=False) > 5


@pytest.mark.slow
def test_chunks_alone_separate_less():
    """5.9 dB, where the same model with its linear part has 18.5 (2026-11-21)."""
    found = separation(local=False), separation(local=True)
    assert found[0] > found[1] + 5, found
