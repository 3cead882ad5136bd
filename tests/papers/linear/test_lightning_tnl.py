"""Lightning Attention / TransNormerLLM (system 23): one model in three forms, decays, stability, constant cost, a toy.

Compared once with the authors' example (github.com/OpenNLPLab/lightning-attention, d15c385, examples/module/tnl_attn)
with its kernel replaced by their masked form, LayerNorm with random weights, the same weights and x [2, 500, 64] in
float32, layers 1, 2, 3 of 4: largest difference 6.0e-7 of outputs up to 1.8, slopes equal. Layer 0 has no LRPE there.
"""

import itertools
import time
from functools import cache

import numpy as np
import pytest
import torch
from _grammar import VOCAB, SoftmaxModel, size, softmax_loss, train
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.papers.linear.lightning import lightning_attention
from chronotope.papers.linear.lightning_tnl import tnl, tnl_attention, tnl_block
from chronotope.papers.linear.transnormer_blocks import GatedLinearAttention, SimpleRMSNorm, released_slopes


def model(vocab=20, dim=32, heads=4, layers=3, seed=0):
    torch.manual_seed(seed)
    return tnl(vocab, dim, heads, layers)


def in_blocks_of(chunk, network):
    for module in network.modules():
        if isinstance(module, GatedLinearAttention):
            module.chunk = chunk
    return network


def stepped(network, ids, tokens=1):
    state, logits = network.init_state(len(ids), tokens), []
    for piece in ids.split(tokens, 1):
        out, state = network.step(piece, state)
        logits.append(out)
    return torch.cat(logits, 1), state


@torch.no_grad()
def test_parallel_blocks_and_token_by_token_are_one_model():
    network, ids = model(), torch.randint(20, (2, 300), generator=torch.Generator().manual_seed(1))
    parallel = in_blocks_of(300, network)(ids)
    for logits in (in_blocks_of(64, network)(ids), stepped(network, ids)[0], stepped(network, ids, 50)[0]):
        assert (logits - parallel).abs().max() < 1e-4
    assert parallel.abs().max() > 0.1


@torch.no_grad()
def test_stepping_leaves_states_alone_and_nothing_comes_from_the_future():
    network, ids = model(), torch.randint(20, (2, 40), generator=torch.Generator().manual_seed(1))
    _, state = stepped(network, ids[:, :20])
    first, _ = network.step(ids[:, 20:21], state)
    network.step(ids[:, 30:31], state)
    assert torch.equal(network.step(ids[:, 20:21], state)[0], first)
    changed = torch.cat((ids[:, :30], (ids[:, 30:] + 1) % 20), 1)
    assert torch.equal(network(ids)[:, :30], network(changed)[:, :30])


def test_decays_fall_with_the_head_and_with_the_layer():
    for heads, layers in ((4, 2), (8, 12), (16, 24), (6, 5)):
        slopes = released_slopes(heads, layers)
        assert slopes.shape == (layers, heads)
        assert (slopes > 0).all()
        assert (slopes.diff(dim=0) < 0).all()
        assert (slopes.diff(dim=1) < 0).all()
        assert torch.allclose(slopes[-1], 1e-5 * slopes[0] / (1 + 1e-5), rtol=1e-3)
        assert torch.equal(tnl_attention(heads * 4, heads, 1, layers).slopes, slopes[1])
    # 2^-1, 2^-2, ... for 8 heads, as in their utility.
    assert torch.allclose(released_slopes(8, 12)[0], 2.0 ** -torch.arange(1, 9) * (1 + 1e-5))


def test_learned_angles_are_in_the_first_layer_only_and_the_gate_has_low_rank():
    layers = [block.mixer for block in tnl(20, 64, 4, 3).blocks]
    assert [layer.lrpe is not None for layer in layers] == [True, False, False]
    assert [tuple(layer.gate[i].weight.shape) for layer in layers[:1] for i in (0, 1)] == [(16, 64), (64, 16)]
    gate = layers[0].gate(torch.randn(1, 5, 64))
    assert ((gate > 0) & (gate < 1)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.floats(1e-2, 1e3), st.integers(0, 10**6))
def test_the_norm_has_no_weights_and_gives_length_sqrt_d(dim, scale, seed):
    norm = SimpleRMSNorm()
    assert not list(norm.parameters())
    x = scale * torch.randn(7, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()
    x = torch.where(x.abs() < 1e-3 * scale, 1e-3 * scale, x)
    assert (norm(x).double().norm(dim=-1) - dim**0.5).abs().max() < 1e-5 * dim**0.5
    assert norm(torch.zeros(2, dim)).abs().max() == 0


def test_the_factored_form_overflows_and_the_recurrence_does_not():
    generator, n, slope = torch.Generator().manual_seed(0), 2000, 0.5
    q, k, v = torch.randn(3, 1, 1, n, 8, generator=generator)
    place = torch.arange(n)[:, None]
    shrunk, grown = (-slope * place).exp() * q, (slope * place).exp() * k
    factored = torch.einsum("bhnd,bhnde->bhne", shrunk, (grown[..., :, None] * v[..., None, :]).cumsum(2))
    assert not factored.isfinite().all()
    decay = torch.tensor([-slope])
    exact, _ = lightning_attention(*(x.double() for x in (q, k, v)), decay=decay.double(), chunk=1)
    for chunk in (1, 64, n):
        out, state = lightning_attention(q, k, v, decay=decay, chunk=chunk)
        assert state.memory.isfinite().all()
        assert (out - exact).abs().max() < 1e-5 * exact.abs().max()


@torch.no_grad()
def test_a_block_steps_over_the_frames_of_a_clip():
    torch.manual_seed(0)
    block, grid = tnl_block(32, 4, 0, 2, 64), ct.Grid(t=5, h=3, w=4)
    x = torch.randn(2, grid.size, 32)
    state, out = block.init_state(2, ct.Grid(t=1, h=3, w=4)), []
    for frame in x.split(12, 1):
        y, state = block.step(frame, state)
        out.append(y)
    assert (torch.cat(out, 1) - block(x, grid)).abs().max() < 1e-5
    assert state.from_dict(state.to_dict()).tokens == 60


@torch.no_grad()
def test_the_state_of_decoding_does_not_grow():
    network = model()
    ids = torch.randint(20, (1, 100), generator=torch.Generator().manual_seed(1))
    state, sizes = network.init_state(1), set()
    for token in ids.split(1, 1):
        _, state = network.step(token, state)
        sizes.add(sum(x.untyped_storage().nbytes() for x in state.tensors()))
    assert sizes == {(2 + 1 + 1) * 4 * 8 * 8 * 4}  # a cosine and a sine in the first layer


def test_what_does_not_fit_is_refused():
    with pytest.raises(ct.ChronotopeError, match="dividing 30"):
        tnl_attention(30, 4, 0, 2)
    layer = tnl_attention(32, 4, 0, 2)
    with pytest.raises(ct.ChronotopeError, match="takes no context"):
        layer(torch.zeros(1, 4, 32), ct.Grid(n=4), torch.zeros(1, 4, 32))
    with pytest.raises(ct.ChronotopeError, match="give that of one"):
        layer.init_state(1, ct.Grid(n=4))


@pytest.mark.slow
@torch.no_grad()
def test_cost_per_token_is_constant_over_lengths(one_thread):
    network, sizes = model(64, 128, 4, 2), (512, 1024, 2048, 4096, 8192)
    ids = {n: torch.randint(64, (1, n)) for n in sizes}
    times = {n: [] for n in sizes}
    for _, n in itertools.product(range(10), sizes):
        start = time.process_time()
        network(ids[n])
        times[n].append(time.process_time() - start)
    per_token = np.array([np.median(times[n][1:]) / n for n in sizes])
    assert np.abs(per_token / per_token.mean() - 1).max() < 0.35, per_token


@cache
def trained(decays):
    """The loss of 2 layers of width 128, as many parameters as the softmax model has.

    It was 0.494 with decays and 1.130 without, where softmax attention had 0.516.
    """
    torch.manual_seed(0)
    network = tnl(VOCAB, 128, 4, 2, hidden=368)
    assert abs(size(network) / size(SoftmaxModel()) - 1) < 0.01
    if not decays:
        for block in network.blocks:
            block.mixer.slopes.zero_()
    return train(network)


@pytest.mark.slow
def test_trained_it_is_on_par_with_softmax(one_thread):
    assert trained(True) < 1.05 * softmax_loss(), (trained(True), softmax_loss())


@pytest.mark.slow
def test_trained_without_decays_it_is_worse(one_thread):
    assert trained(True) < trained(False), (trained(True), trained(False))
