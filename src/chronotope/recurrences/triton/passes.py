"""The two passes of a recurrence over chunks: which kernels run, and what they write."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chronotope.recurrences.triton import backward_kernels, forward_kernels
from chronotope.recurrences.triton.device import Rows, Sums

SMALLEST = 16  # rows and columns that a matrix product of Triton has at least
WIDEST = 64  # columns of a block
CARRIED = 2048  # numbers of a state that one program carries along, of 16 or 32 value columns
WARPS = 4  # with 8, ptxas spills more registers for sm_90
"""None of these is timed: they were chosen by what ptxas says of registers and shared memory."""


class Kept(NamedTuple):
    """What the backward pass knows of the forward one.

    `scores` are of q with k, `links` L of erase with k, and `solve` is (I - L)^-1. `written` are the values with which
    keys were written; v, unless there is `erase`. `states` are those before each chunk and the last.
    """

    q: Float[Tensor, "h n d"]
    k: Float[Tensor, "h n d"]
    erase: Float[Tensor, "h n d"] | None
    sums: Tensor | None
    scores: Float[Tensor, "h m c c"]
    links: Float[Tensor, "h m c c"] | None
    solve: Float[Tensor, "h m c c"] | None
    written: Float[Tensor, "h n e"]
    states: Float[Tensor, "h m1 d e"]


class Gradients(NamedTuple):
    """Of what `forward` is given."""

    q: Tensor
    k: Tensor
    erase: Tensor | None
    v: Tensor
    sums: Tensor | None
    memory: Tensor


class Reader(NamedTuple):
    """Gradients of q, or of erase, and of its products with keys; and its shares in those of the sums of decays."""

    pairs: Tensor
    dpairs: Tensor
    dx: Tensor
    shares: Tensor | None


class Keys(NamedTuple):
    """Gradients of k, and its shares in those of the sums: to the end of the chunk, and of pairs by channel."""

    dk: Tensor
    ends: Tensor | None
    shares: Tensor | None


def summed(decay: Tensor, chunk: int) -> Tensor:
    """Sums of decays [h, n] or [h, n, d] from the start of each chunk, of tokens padded to chunks, in float64."""
    padded = F.pad(decay.double(), (0, 0) * (decay.ndim - 2) + (0, -decay.shape[1] % chunk))
    return padded.unflatten(1, (-1, chunk)).cumsum(2).flatten(1, 2)


class Sizes:
    """The blocks that kernels work in, and how kernels are started."""

    def __init__(self, q: Tensor, v: Tensor, sums: Tensor | None, chunk: int):
        self.heads, self.n, self.size = q.shape
        self.chunk, self.chunks = chunk, triton.cdiv(self.n, chunk)
        self.device = q.device
        self.form = 0 if sums is None else sums.ndim - 1
        self.sums = Sums(sums, tl.constexpr(self.form), tl.constexpr(self.size))
        # Where decays differ by channel, the pairs among so many tokens are weighed one by one.
        self.rows = SMALLEST if self.form == 2 else chunk
        self.keys, self.values = (max(SMALLEST, triton.next_power_of_2(x.shape[2])) for x in (q, v))
        self.columns = min(WIDEST, self.keys)
        self.width = min(CARRIED // self.keys, 32, self.values)
        self.carried = triton.cdiv(v.shape[2], self.width)

    def pairs(self, x: Tensor, y: Tensor, decayed: bool, strict: bool) -> Float[Tensor, "h m c c"]:
        """Products of rows of x and of earlier rows of y, by chunks."""
        out = x.new_empty(self.heads, self.chunks, self.chunk, self.chunk)
        rows, sums = (self.rows, self.sums) if decayed else (self.chunk, Sums(None, tl.constexpr(0), tl.constexpr(0)))
        self.launch(
            forward_kernels.pairs, self.chunk // rows * self.chunks, dense(x), dense(y), dense(out), sums, self.n,
            ROWS=rows, COLUMNS=min(WIDEST, max(SMALLEST, triton.next_power_of_2(x.shape[2]))), STRICT=strict,
        )  # fmt: skip
        return out

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: int | bool) -> None:
        """Starts so many programs for each head on the device of the tensors."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            # Fused multiply-add is said outright: the default of Triton is about to change (3.9 warns of it).
            options = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True}
            kernel[(programs * self.heads,)](*arguments, CHUNK=self.chunk, **constants, **options)


def dense(x: Tensor) -> Rows:
    """A dense tensor [..., rows, size] as an argument of a kernel."""
    return Rows(x, tl.constexpr(x.shape[-1]))


def maybe(x: Tensor | None) -> Rows | None:
    """The same, or nothing."""
    return None if x is None else dense(x)


def forward(
    q: Float[Tensor, "h n d"],
    k: Float[Tensor, "h n d"],
    erase: Float[Tensor, "h n d"] | None,
    v: Float[Tensor, "h n e"],
    sums: Tensor | None,
    memory: Float[Tensor, "h d e"],
    chunk: int,
) -> tuple[Float[Tensor, "h n e"], Float[Tensor, "h d e"], Kept]:
    """out_t = q_t S_t, the last state, and what is kept for the backward pass; all tensors are dense.

    S' = exp(decay_t) S_{t-1},    S_t = S' + k_t^T w_t,    w_t = v_t, with `erase` v_t + erase_t S'
    """
    sizes = Sizes(q, v, sums, chunk)
    scores = sizes.pairs(q, k, decayed=True, strict=False)
    links, solve, written = None, None, v
    if erase is not None:
        links = sizes.pairs(erase, k, decayed=True, strict=True)
        solve, written = torch.empty_like(links), torch.empty_like(v)
        levels = chunk.bit_length() - 1
        sizes.launch(forward_kernels.invert, sizes.chunks, dense(links), dense(solve), LEVELS=levels)
    states = memory.new_empty(sizes.heads, sizes.chunks + 1, *memory.shape[1:])
    states[:, 0] = memory
    sizes.launch(
        forward_kernels.carry, sizes.carried, dense(k), dense(v), maybe(erase), maybe(solve), dense(written),
        dense(states), sizes.sums, sizes.n, KEYS=sizes.keys, VALUES=sizes.width,
    )  # fmt: skip
    out, values = torch.empty_like(v), min(WIDEST, sizes.values)
    sizes.launch(
        forward_kernels.read, triton.cdiv(v.shape[2], values) * sizes.chunks, dense(q), dense(scores), dense(written),
        dense(states), dense(out), sizes.sums, sizes.n, COLUMNS=sizes.columns, VALUES=values,
    )  # fmt: skip
    return out, states[:, -1].clone(), Kept(q, k, erase, sums, scores, links, solve, written, states)


class Backward:
    """What the kernels of one backward pass share."""

    def __init__(self, kept: Kept, dout: Float[Tensor, "h n e"], dmemory: Float[Tensor, "h d e"]):
        self.kept, self.dout = kept, dout.contiguous()
        self.sizes = Sizes(kept.q, kept.written, kept.sums, kept.scores.shape[-1])
        sizes, self.dstates, self.dv = self.sizes, torch.empty_like(kept.states), torch.empty_like(kept.written)
        self.dstates[:, -1] = dmemory
        sizes.launch(
            backward_kernels.carry_back, sizes.carried, dense(kept.q), dense(kept.k), maybe(kept.erase),
            dense(kept.scores), maybe(kept.solve), dense(self.dout), dense(self.dv), dense(self.dstates), sizes.sums,
            sizes.n, KEYS=sizes.keys, VALUES=sizes.width,
        )  # fmt: skip
        self.blocks = {"ROWS": sizes.rows, "COLUMNS": sizes.columns, "VALUES": min(WIDEST, sizes.values)}
        self.programs = sizes.chunk // sizes.rows * sizes.chunks * triton.cdiv(sizes.size, sizes.columns)

    def of_reader(self, x: Tensor, pairs: Tensor, grad: Tensor, strict: bool) -> Reader:
        """The gradients of a reader, from those of what it read."""
        kept, sizes = self.kept, self.sizes
        dpairs = sizes.pairs(grad, kept.written, decayed=False, strict=strict)
        dx, shares = torch.empty_like(x), torch.empty_like(x) if sizes.form else None
        sizes.launch(
            backward_kernels.readers_back, self.programs, dense(grad), dense(dpairs), dense(x), dense(kept.k),
            dense(kept.states), dense(dx), maybe(shares), sizes.sums, sizes.n, **self.blocks,
        )  # fmt: skip
        return Reader(pairs, dpairs, dx, shares)

    def of_keys(self, dscores: Tensor, dlinks: Tensor | None = None) -> Keys:
        """The gradients of the keys."""
        kept, sizes = self.kept, self.sizes
        dk = torch.empty_like(kept.k)
        ends = torch.empty_like(dk) if sizes.form else None
        shares = torch.empty_like(dk) if sizes.form == 2 else None
        sizes.launch(
            backward_kernels.writers_back, self.programs, dense(kept.written), dense(self.dstates), dense(kept.k),
            dense(kept.q), dense(dscores), maybe(kept.erase), maybe(dlinks), dense(dk), maybe(ends), maybe(shares),
            sizes.sums, sizes.n, **self.blocks,
        )  # fmt: skip
        return Keys(dk, ends, shares)

    def of_sums(self, readers: list[Reader], keys: Keys) -> Tensor:
        """The gradient of the sums of decays.

        Exponents are b_i of readers, b_i - b_j of pairs, b_C - b_j of keys, and b_C of the state before the chunk. What
        is added at one end is taken away at the other: the same number, in float64, so that nothing of it is left in
        decays that are not between.
        """
        sums, sizes = self.kept.sums, self.sizes
        assert sums is not None

        def chunked(x: Tensor | None) -> Float[Tensor, "h m c *d"]:
            assert x is not None
            x = x.sum(-1, dtype=sums.dtype) if sizes.form == 1 else x.double()
            return F.pad(x, (0, 0) * (x.ndim - 2) + (0, -sizes.n % sizes.chunk)).unflatten(1, (-1, sizes.chunk))

        ends = chunked(keys.ends)
        total = -ends
        for reader in readers:
            total += chunked(reader.shares)
            if sizes.form == 1:
                pairs = reader.pairs * reader.dpairs
                total += pairs.sum(-1, dtype=sums.dtype) - pairs.sum(-2, dtype=sums.dtype)
        if keys.shares is not None:
            total -= chunked(keys.shares)
        over = sums.unflatten(1, (-1, sizes.chunk))[:, :, -1].exp()
        carried = (self.kept.states[:, :-1] * self.dstates[:, 1:]).sum(-1)
        total[:, :, -1] += ends.sum(2) + over * (carried.sum(-1) if sizes.form == 1 else carried)
        return total.flatten(1, 2)


def backward(kept: Kept, dout: Float[Tensor, "h n e"], dmemory: Float[Tensor, "h d e"]) -> Gradients:
    """The gradient of everything that `forward` was given."""
    run = Backward(kept, dout, dmemory)
    readers = [run.of_reader(kept.q, kept.scores, run.dout, strict=False)]
    if kept.erase is not None and kept.links is not None:
        readers.append(run.of_reader(kept.erase, kept.links, run.dv, strict=True))
    keys = run.of_keys(*(reader.dpairs for reader in readers))
    return Gradients(
        q=readers[0].dx,
        k=keys.dk,
        erase=readers[1].dx if len(readers) == 2 else None,
        v=run.dv,
        sums=None if kept.sums is None else run.of_sums(readers, keys),
        memory=run.dstates[:, 0].clone(),
    )
