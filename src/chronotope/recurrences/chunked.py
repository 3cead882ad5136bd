"""A recurrence in chunks: inside a chunk every pair of tokens at once, from chunk to chunk the state.

With b the running sum of decays inside a chunk, S the state before it, A = tril(Q K^T exp(b_i - b_j)):

    out = exp(b) Q S + A U,   S' = exp(b_C) S + (exp(b_C - b) K)^T U,   U = V

and with the delta rule U solves (I + beta tril(K K^T exp(b_i - b_j), -1)) U = beta (V - exp(b) K S). Every exponent
is a sum of decays, so none is positive. Sources: Yang et al. 2024 (Gated Linear Attention, arXiv 2312.06635; DeltaNet
over length, arXiv 2406.06484).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chronotope.recurrences.call import Backend, Inputs, Outputs

CHUNK = 64
BLOCK = 8
"""Tokens whose pairs are weighed channel by channel, where decays differ by channel."""


def compute(inputs: Inputs, chunk: int) -> Outputs:
    """The recurrence, by chunks of `chunk` tokens."""
    n = inputs.q.shape[2]
    if n == 0:
        total = None if inputs.normalizer is None else inputs.q.new_zeros(inputs.q.shape[:3])
        return Outputs(torch.zeros_like(inputs.v), total, inputs.memory, inputs.normalizer)
    q, k, v = (_chunks(x, chunk) for x in (inputs.q, inputs.k, inputs.v))
    decay, beta = (None if x is None else _chunks(x, chunk) for x in (inputs.decay, inputs.beta))
    pairs, from_start, to_end, over = _weights(k, decay)
    parts = Parts(
        scores=pairs(q, k).tril(),
        q=from_start(q),
        k=to_end(k),
        over=over,
    )
    memory, normalizer = inputs.memory, inputs.normalizer
    if beta is not None:
        link = beta[..., None] * pairs(k, k).tril(-1)
        right = beta[..., None] * torch.cat([v, from_start(k)], -1)
        solved = torch.linalg.solve_triangular(link, right, upper=False, unitriangular=True)
        written, erased = solved.split([v.shape[-1], k.shape[-1]], -1)
        out, memory = parts.run(written, memory, erased)
    else:
        out, memory = parts.run(v, memory, None)
    total = None
    if normalizer is not None:
        # The decayed sum of keys is what is written when every value is 1.
        ones = v.new_ones(*v.shape[:-1], 1)
        sums, column = parts.run(ones, normalizer[..., None], None)
        total, normalizer = sums.flatten(2, 3)[:, :, :n, 0], column[..., 0]
    return Outputs(out.flatten(2, 3)[:, :, :n], total, memory, normalizer)


class Parts:
    """What does not depend on the values: weights between pairs, and from and to the ends of each chunk."""

    def __init__(self, scores: Tensor, q: Tensor, k: Tensor, over: Tensor | None):
        self.scores, self.q, self.k, self.over = scores, q, k, over

    def run(
        self, written: Float[Tensor, "b h m c e"], memory: Float[Tensor, "b h d e"], erased: Tensor | None
    ) -> tuple[Float[Tensor, "b h m c e"], Float[Tensor, "b h d e"]]:
        """(out, state after the last chunk); `erased` times the state is taken from what is written."""
        before, values = [], []
        keys = self.k.transpose(-1, -2)
        for m in range(written.shape[2]):
            value = written[:, :, m] if erased is None else written[:, :, m] - erased[:, :, m] @ memory
            before.append(memory)
            values.append(value)
            memory = memory if self.over is None else self.over[:, :, m] * memory
            memory = memory + keys[:, :, m] @ value
        states = torch.stack(before, 2)
        return self.q @ states + self.scores @ torch.stack(values, 2), memory


Pairs = Callable[[Tensor, Tensor], Tensor]
Scaled = Callable[[Tensor], Tensor]


def _weights(k: Tensor, decay: Tensor | None) -> tuple[Pairs, Scaled, Scaled, Tensor | None]:
    """How decays weigh: products of pairs (i, j <= i); rows from the start; rows to the end; the state over a chunk."""
    if decay is None:
        return (lambda x, y: x @ y.transpose(-1, -2)), (lambda x: x), (lambda x: x), None
    # Differences of sums: in float64 they keep what a small decay beside a large one needs.
    b = decay.double().cumsum(3)
    end = b[:, :, :, -1:]
    grown, rest, over = (x.to(k.dtype).exp() for x in (b, end - b, end))
    if decay.ndim == 4:
        difference = (b[..., :, None] - b[..., None, :]).to(k.dtype)
        hidden = torch.ones(b.shape[-1], b.shape[-1], dtype=torch.bool, device=b.device).triu(1)
        gaps = difference.masked_fill(hidden, -torch.inf).exp()
        return (
            (lambda x, y: (x @ y.transpose(-1, -2)) * gaps),
            (lambda x: x * grown[..., None]),
            (lambda x: x * rest[..., None]),
            over[..., None],
        )
    return (
        (lambda x, y: _channel_pairs(x, y, b)),
        (lambda x: x * grown),
        (lambda x: x * rest),
        over.transpose(-1, -2),
    )


def _channel_pairs(
    x: Float[Tensor, "b h m c d"], y: Float[Tensor, "b h m c d"], b: Float[Tensor, "b h m c d"]
) -> Float[Tensor, "b h m c c"]:
    """sum_d x_id y_jd exp(b_id - b_jd) for j <= i, else 0.

    Between blocks of tokens the exponent is split at the last token before the block of i, so that both parts are
    sums of decays; inside a block it is taken channel by channel.
    """
    size, dtype = x.shape[3], x.dtype
    rows = []
    for start in range(0, size, BLOCK):
        own = slice(start, min(start + BLOCK, size))
        near = own.stop - own.start
        hidden = torch.ones(near, near, dtype=torch.bool, device=x.device).triu(1)
        gap = (b[..., own, None, :] - b[..., None, own, :]).to(dtype)
        weights = gap.masked_fill(hidden[..., None], -torch.inf).exp()
        row = [torch.einsum("...id,...jd,...ijd->...ij", x[..., own, :], y[..., own, :], weights)]
        if start:
            split = b[..., start - 1 : start, :]
            left = x[..., own, :] * (b[..., own, :] - split).to(dtype).exp()
            right = y[..., :start, :] * (split - b[..., :start, :]).to(dtype).exp()
            row.insert(0, left @ right.transpose(-1, -2))
        rows.append(F.pad(torch.cat(row, -1), (0, size - own.stop)))
    return torch.cat(rows, -2)


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, H, N, ...] -> [B, H, M, C, ...]; zeros fill the last chunk: a key of 0 writes nothing, a decay of 0 keeps."""
    n = x.shape[2]
    padding = -n % chunk
    if padding:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, padding))
    return x.unflatten(2, (-1, chunk))


TORCH = Backend(
    name="torch",
    about="chunks, of torch's own operators",
    compute=compute,
    devices=("cpu", "cuda"),
    dtypes=(torch.float32, torch.float64),
    chunk=CHUNK,
    priority=10,
)
