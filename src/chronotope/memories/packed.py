"""Packed sequences: each is a sequence of its own, and is computed beside the others."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.memories.memorize import memorize
from chronotope.memories.state import Gates, Memory, MemoryState, from_zeros


def memorize_packed(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    memory: Memory,
    gates: Gates,
    segments: Int[Tensor, "n"] | Int[Tensor, "b n"],
    *,
    state: MemoryState | None = None,
    chunk: int = 64,
) -> Float[Tensor, "b h n dv"]:
    """`memorize`, which begins again from `state` wherever the id differs from that of the token before.

    Chunks begin with segments, so each gives what it would alone. Segments become rows of a batch, the shorter ones
    padded: the cost is that of the longest times their number. There is no one state after them, so none is returned.
    """
    batch, heads, n = q.shape[:3]
    if list(segments.shape) not in ([n], [batch, n]):
        raise ChronotopeError(f"segments is {list(segments.shape)}; expected ids [N] or [B, N], N = {n}.")
    if n == 0:
        return torch.zeros_like(v)
    ids = segments.expand(batch, n)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    member, first = begins.nonzero(as_tuple=True)
    after = torch.cat((first[1:], first.new_tensor([n])))
    last = torch.where(torch.cat((member[1:] != member[:-1], member.new_ones(1, dtype=torch.bool))), n, after)
    place = torch.arange(int((last - first).max()), device=q.device)
    inside = place < (last - first)[:, None]
    token = (first[:, None] + place).clamp(max=n - 1)

    def rows(x: Tensor) -> Tensor:
        """[B, H, N, ...] -> [segments, H, longest, ...]."""
        return x.transpose(1, 2)[member[:, None], token].transpose(1, 2)

    keep = inside if gates.keep is None else inside & gates.keep[member[:, None], token]
    rate, decay, momentum, threshold = (
        None if x is None else rows(x) for x in (gates.rate, gates.decay, gates.momentum, gates.threshold)
    )
    assert rate is not None
    if state is None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        state = from_zeros(memory, q.new_zeros((), dtype=dtype).expand(batch, heads), q.shape[3], v.shape[3])
    out, _ = memorize(
        rows(q), rows(k), rows(v), memory, Gates(rate, decay, momentum, threshold, keep),
        state=state.select(member), chunk=chunk,
    )  # fmt: skip
    # Rows in order and tokens in order: what is inside comes out in the order of the batch.
    return out.transpose(1, 2)[inside].unflatten(0, (batch, n)).transpose(1, 2)
