"""What the row asks: (a) the skew, (b) decoding, (c) memory, (d) translation, (f) the local variant; (e) a motif."""

import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import chronotope as ct
from chronotope import Grid
from chronotope.nn.relative import Offsets, relative_attention
from chronotope.papers.position.music_transformer import music_attention, two_blocks


def tensors(tokens, length, heads=2, size=8, shared=False, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, heads, tokens, size, dtype=torch.float64, generator=rng).unbind()
    return q, k, v, torch.randn(1 if shared else heads, length, size, dtype=torch.float64, generator=rng)


def gathered(q, vectors):
    """S by a vector for each pair: row `length - 1 + j - i` of the table."""
    n, length = q.shape[2], vectors.shape[1]
    place = torch.arange(n)
    entry = (length - 1 + place[None] - place[:, None]).clamp(0, length - 1)
    return torch.einsum("bhid,hijd->bhij", q, vectors[:, entry].expand(q.shape[1], -1, -1, -1))


def skewed(q, vectors):
    """S as the paper has it, for at most as many tokens as vectors: pad a column on the left, reshape, drop a row."""
    n = q.shape[2]
    products = q @ vectors[:, -n:].transpose(1, 2)
    return F.pad(products, (1, 0)).reshape(*q.shape[:2], n + 1, n)[:, :, 1:]


def attended(q, k, v, score, where, grid):
    mask = ct.plan(where, grid).mask()
    logits = (q @ k.transpose(2, 3) + score) / math.sqrt(q.shape[3])
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def relative(q, k, v, vectors, where):
    offsets = {"n": Offsets(vectors, vectors.shape[1] - 1)}
    return relative_attention(q, k, v, offsets, grid=Grid(n=q.shape[2]), where=where)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("tokens", "length"), [(24, 24), (17, 24), (1, 5), (40, 24)])
def test_a_the_skew_is_the_gather(tokens, length, shared):
    q, k, v, vectors = tensors(tokens, length, shared=shared)
    score = gathered(q, vectors)
    if tokens <= length:  # the last rows of the table are those of the distances that there are
        below = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        assert ((skewed(q, vectors) - score)[..., below]).abs().max() <= 1e-14
    out = relative(q, k, v, vectors, ct.causal())
    assert (out - attended(q, k, v, score, ct.causal(), Grid(n=tokens))).abs().max() <= 1e-14


@pytest.mark.parametrize("block", [None, 6])
def test_b_cached_decoding_is_the_parallel_form(block):
    layer = music_attention(16, 2, length=20, block=block)
    x = torch.randn(2, 50, 16)
    state, out = layer.init_state(2, Grid(n=1)), []
    with torch.no_grad():
        for token in x.split(1, 1):
            y, state = layer.step(token, state)
            out.append(y)
        assert (torch.cat(out, 1) - layer(x, Grid(n=50))).abs().max() <= 1e-5


SCRIPT = """
import sys, torch, chronotope as ct
from chronotope.nn.relative import Offsets, relative_attention
torch.set_num_threads(1)

def status(key):  # in bytes
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

def run(n):
    q, k, v = torch.randn(3, 1, 1, n, 64).unbind()
    offsets = {"n": Offsets(torch.randn(1, n, 64), n - 1)}
    relative_attention(q, k, v, offsets, grid=ct.Grid(n=n), where=ct.causal())

run(64)
before = status("VmRSS")
run(2048)
print(status("VmHWM") - before)
"""


def test_c_memory_is_below_two_floats_for_each_pair():
    found = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    print(f"peak above the start: {int(found) / 2**20:.1f} MiB; 2 N^2 floats: {8 * 2048**2 / 2**20:.1f} MiB")
    assert int(found) <= 2 * 4 * 2048**2


def test_d_without_content_weights_depend_on_the_distance_alone():
    q, _, _, vectors = tensors(30, 30)
    q = q[:, :, :1].expand(2, 2, 30, 8)
    keys, eye = torch.zeros_like(q), torch.eye(30, dtype=torch.float64).expand(2, 2, 30, 30)
    weights = relative(q, keys, eye, vectors, ct.causal())
    for distance in range(1, 30):  # a row is normalised over what it sees: ratios are left
        ratio = weights.diagonal(-distance, 2, 3) / weights.diagonal(0, 2, 3)[..., distance:]
        torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))


@pytest.mark.parametrize("tokens", [5, 24, 31])
def test_f_the_local_variant_is_dense_attention_under_its_mask(tokens):
    q, k, v, vectors = tensors(tokens, 12)
    place = torch.arange(tokens)
    gap = place[:, None] // 6 - place[None] // 6
    mask = (place[None] <= place[:, None]) & (gap <= 1)
    assert torch.equal(ct.plan(two_blocks(6), Grid(n=tokens)).mask(), mask)
    logits = (q @ k.transpose(2, 3) + gathered(q, vectors)) / math.sqrt(8)
    expected = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    assert (relative(q, k, v, vectors, two_blocks(6)) - expected).abs().max() <= 1e-14
