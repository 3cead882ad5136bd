"""Miras: a sequence layer is a memory with four parts, its network, its loss, its retention and its rule of learning.

The memory f(x; W) = x + LN(gelu(x W_2) W_1), four times as wide inside, or a matrix, is taught v_t at k_t and read at
q_t; q and k have length 1, after a depthwise convolution over 4 tokens. With G the loss's gradient at the weights of
the chunk's start, and gates alpha (kept), eta (rate) and delta from the token through a narrow layer:

    Moneta  A_t = alpha_t A_{t-1} - eta_t G,  W_t = A_t / ||A_t||_q^(q-2),       G of ||f(k) - v||_p^p, p = 3, q = 4
    Yaad    W_t = alpha_t W_{t-1} - eta_t G,  G of ||f(k) - v||^2 up to a distance of delta_t, beyond delta_t ||.||_1
    Memora  W_t = c softmax(alpha_t log W_{t-1} - eta_t G), over the inputs of each output,    G of ||f(k) - v||^2

Sizes: x [B, N, dim] -> [B, N, dim]; state: weights of each sequence and head, now and at the chunk's start, whatever N.
Work O(N chunk dim) for Yaad. Where W is not linear in what is added up, and with gates by channel, the weights of each
token of a chunk are written out: chunk * 8 (dim / heads)^2 numbers for each head at a time.

    >>> layer = yaad(64, 4, chunk=16)
    >>> layer(torch.randn(2, 100, 64), Grid(n=100)).shape
    torch.Size([2, 100, 64])

Left out: language models of 340M to 1.3B. Where we depart: |x|^p is (x^2 + 1e-6)^(p/2) and its slope the exact one, so
that p = 2 is the delta rule (a known summary has tanh(a x) and sqrt(x^2 + 1e-6) as factors of the slope); W is
normalised at every read, not at the ends of chunks only, so a chunk of 1 is the rule token by token and gradients alone
are those of the chunk's start; gates by channel weigh the inputs of the first layer and the outputs of the last; delta
is one number for a token. `memories.Huber` is the loss that continues without a jump.

Paper: Behrouz, Razaviyayn, Zhong, Mirrokni 2025, "It's All Connected: A Journey Through Test-Time Memorization,
Attentional Bias, Retention, and Online Optimization", arXiv 2504.13173. No official code; widths are not known to us.
"""

from __future__ import annotations

from chronotope.memories import (
    L2,
    Decay,
    Descent,
    Learner,
    Loss,
    Lp,
    Lq,
    Matrix,
    Memory,
    Mlp,
    Residual,
    Retention,
    Softmax,
    Switch,
)
from chronotope.nn.memory import DeepMemory, MemoryGates
from chronotope.papers.registry import paper

MLP2 = Residual(Mlp(depth=2, expansion=4))
MATRIX = Matrix()


@paper(
    system=107,
    name="Miras (Moneta, Yaad, Memora)",
    family="memory",
    claim="a memory of four free parts: robust losses and retentions beside those of the delta rule",
    evidence=["tests/papers/memory/test_miras.py"],
)
def miras(
    dim: int,
    heads: int,
    *,
    memory: Learner = MLP2,
    bias: Loss | None = None,
    retention: Retention | None = None,
    chunk: int = 16,
    by_channel: bool = True,
    rank: int = 32,
    rate: float | int | None = None,
    threshold: float | int = 1.0,
) -> DeepMemory:
    """A layer with these parts; descent without momentum.

    Args:
        memory: the network, `MLP2` or `MATRIX`.
        bias: the loss; None: L2. retention: None: decay.
        by_channel: gates for each channel, or one number for each head.
        rank: width of the layer through which gates come.
        rate: the largest step; None: 1 / chunk.
        threshold: delta at the start.
    """
    parts = Memory(memory, bias or L2(), retention or Decay(), Descent())
    gates = MemoryGates(
        dim, heads, parts, channels=dim // heads if by_channel else None, rank=rank,
        rate=1 / chunk if rate is None else rate, threshold=threshold,
    )  # fmt: skip
    return DeepMemory(dim, heads, memory=parts, gates=gates, chunk=chunk, conv=4)


def moneta(dim: int, heads: int, *, p: float | int = 3, q: float | int = 4, chunk: int = 16) -> DeepMemory:
    """L_p loss, L_q retention."""
    return miras(dim, heads, bias=Lp(p), retention=Lq(q), chunk=chunk)


def yaad(dim: int, heads: int, *, threshold: float | int = 1.0, chunk: int = 16) -> DeepMemory:
    """The loss that is quadratic near and linear far, L2 retention."""
    return miras(dim, heads, bias=Switch(), retention=Decay(), chunk=chunk, threshold=threshold)


def memora(dim: int, heads: int, *, total: float | int = 1.0, chunk: int = 16) -> DeepMemory:
    """L2 loss, KL retention: positive weights whose sum is `total` for each output."""
    return miras(dim, heads, bias=L2(), retention=Softmax(total), chunk=chunk)
