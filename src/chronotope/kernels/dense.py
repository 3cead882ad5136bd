"""One batch of query tiles with their keys: dense attention on blocks, forward and backward.

Blocks are [B, Hk, G, rows, D]: the query heads that share a key head lie in the rows, so that keys are read once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.kernels.call import Scores
from chronotope.planning import Group, Tiling

Block = Float[Tensor, "b hk g rows d"]
Keys = Float[Tensor, "b hk g keys d"]
Values = Float[Tensor, "b hk g keys dv"]
Out = Float[Tensor, "b hk g rows dv"]
Rows = Float[Tensor, "b hk g rows"]

FUSED_FROM = 32 * 32  # pairs in a block, measured on a CPU with AVX-512


class Piece:
    """Some tiles of a group and some rows of each: how to read them from tensors in token order, and write back."""

    def __init__(self, group: Group, tiles: slice, rows: slice, device: torch.device):
        queries, keys = group.queries(tiles)[:, rows], group.keys(tiles)
        self.group, self.rows = group, rows
        self.shape, self.q_tokens, self.k_tokens = queries.shape, queries, keys
        self.q_run, self.k_run = _run(queries), _run(keys)
        self.q_index, self.k_index = queries.flatten().to(device), keys.flatten().to(device)

    def queries(self, x: Tensor, k: Tensor) -> Block:
        """Rows of x [B, H, Nq, D] as blocks."""
        return self._fold(self.take(x), k.shape[1])

    def _fold(self, x: Tensor, key_heads: int) -> Block:
        batch, heads, _, size = x.shape
        x = x.view(batch, key_heads, heads // key_heads, *self.shape, size).transpose(2, 3)
        return x.reshape(batch, key_heads, self.shape[0], -1, size)

    def keys(self, x: Tensor) -> Keys:
        """Keys or values from x [B, Hk, Nk, D] as blocks."""
        taken = _take(x, self.k_index, self.k_run)
        return taken.reshape(*x.shape[:2], *self.k_tokens.shape, x.shape[3])

    def tokens(self, x: Block, q: Tensor) -> Float[Tensor, "b h tokens d"]:
        """Blocks back as rows for the heads of q."""
        batch, key_heads, size = x.shape[0], x.shape[1], x.shape[4]
        x = x.view(batch, key_heads, self.shape[0], -1, self.shape[1], size).transpose(2, 3)
        return x.reshape(batch, q.shape[1], -1, size)

    def mask(self, q: Tensor, k: Tensor) -> Bool[Tensor, "rows keys"] | None:
        """The element mask, repeated for the query heads that lie in the rows."""
        mask = self.group.mask
        return None if mask is None else mask[self.rows].to(q.device).repeat(q.shape[1] // k.shape[1], 1)

    def bias(self, scores: Scores, tiles: Tiling, k: Tensor) -> Tensor | None:
        """The bias as blocks [B or 1, Hk, G, rows, keys]."""
        values = scores.values(tiles, self.q_tokens.to(k.device), self.k_tokens.to(k.device))
        if values is None:
            return None
        values = values.expand(values.shape[0], len(scores.heads), *values.shape[2:])
        batch, heads, _, _, keys = values.shape
        values = values.reshape(batch, k.shape[1], heads // k.shape[1], *self.shape, keys).transpose(2, 3)
        return values.reshape(batch, k.shape[1], self.shape[0], -1, keys)

    def take(self, x: Tensor) -> Tensor:
        """These queries of x, on dimension 2."""
        return _take(x, self.q_index, self.q_run)

    def put(self, x: Tensor, value: Tensor) -> None:
        """Writes these queries into x, on dimension 2."""
        if self.q_run:
            start = int(self.q_tokens[0, 0])
            x[:, :, start : start + len(self.q_index)] = value
        else:
            x.index_copy_(2, self.q_index, value.to(x.dtype))


def _run(tokens: Tensor) -> bool:
    """Whether the tokens are consecutive: then a slice serves as well."""
    flat = tokens.flatten()
    return int(flat[-1] - flat[0]) == len(flat) - 1 and bool((flat.diff() == 1).all())


def _take(x: Tensor, index: Tensor, run: bool) -> Tensor:
    return x.narrow(2, int(index[0]), len(index)) if run else x.index_select(2, index)


def fused(group: Group, q: Tensor, v: Tensor, scores: Scores) -> bool:
    """Whether torch's fused CPU kernel computes this group. On small blocks it is slower than plain products."""
    able = q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and scores.softcap is None and not scores.biased
    return able and group.shape[1] * group.shape[2] > FUSED_FROM


@dataclass(frozen=True)
class Additive:
    """A group's mask as the fused kernel takes it, 0 or -inf for the rows of the blocks; and rows that see nothing."""

    mask: Tensor | None
    blind: Bool[Tensor, "rows"] | None

    @classmethod
    def of(cls, group: Group, q: Tensor, k: Tensor) -> Additive:
        """The mask of a group, for the heads of q and k."""
        mask = group.mask
        if mask is None:
            return cls(None, None)
        mask = mask.repeat(q.shape[1] // k.shape[1], 1)
        dtype = torch.promote_types(q.dtype, torch.float32)
        added = torch.zeros(1, 1, *mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
        sees = mask.any(1)
        return cls(added, None if bool(sees.all()) else ~sees)


def flash(q: Block, k: Keys, v: Values, scores: Scores, mask: Additive) -> tuple[Out, Rows]:
    """(out, lse) by the kernel behind scaled_dot_product_attention, which keeps lse to itself."""
    exact = torch.promote_types(q.dtype, torch.float32)
    q4, k4, v4 = (x.to(exact).flatten(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q4, k4, v4, 0.0, False, attn_mask=mask.mask, scale=scores.scale
    )
    if mask.blind is not None:
        # The kernel gives 0 for a row that sees nothing; the log of an empty sum is -inf.
        lse = torch.where(mask.blind, -torch.inf, lse)
    return out.view(*q.shape[:-1], v.shape[-1]), lse.contiguous().view(q.shape[:-1])


def flash_backward(
    q: Block, k: Keys, v: Values, out: Out, lse: Rows, dout: Out, scores: Scores, mask: Additive
) -> tuple[Block, Keys, Values]:
    """(dq, dk, dv) of one part: with out and lse of the whole attention its share of each gradient comes out."""
    exact = lse.dtype
    q4, k4, v4, o4, g4 = (x.to(exact).flatten(1, 2) for x in (q, k, v, out, dout))
    lse4 = torch.where(lse == -torch.inf, 0.0, lse).flatten(1, 2).transpose(1, 2).contiguous().transpose(1, 2)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g4.contiguous(), q4, k4, v4, o4, lse4, 0.0, False, attn_mask=mask.mask, scale=scores.scale
    )
    return tuple(grad.reshape(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))  # type: ignore[return-value]


def _logits(q: Block, k: Keys, scores: Scores, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """softcap(scale * q k^T) + bias, and the tanh that its gradient needs."""
    logits = scores.scale * (q @ k.transpose(-1, -2))
    bend = None
    if scores.softcap is not None:
        bend = torch.tanh(logits / scores.softcap)
        logits = scores.softcap * bend
    return (logits if bias is None else logits + bias), bend


def written(q: Block, k: Keys, v: Values, scores: Scores, bias: Tensor | None, mask: Tensor | None) -> tuple[Out, Rows]:
    """(out, lse) with the scores written out: any head size, softcap, bias, dtype, device."""
    exact = torch.promote_types(q.dtype, torch.float32)
    logits, _ = _logits(q.to(exact), k.to(exact), scores, None if bias is None else bias.to(exact))
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits - torch.where(top == -torch.inf, 0.0, top))
    # Divided by their own sum, weights do not carry the rounding of lse, which grows with the logits.
    total = weights.sum(-1, keepdim=True)
    out = (weights @ v.to(exact)) / torch.where(total == 0, 1.0, total)
    return out, (top + torch.log(total))[..., 0]


def written_backward(
    q: Block,
    k: Keys,
    v: Values,
    lse: Rows,
    dout: Out,
    shift: Rows,
    scores: Scores,
    bias: Tensor | None,
    mask: Tensor | None,
) -> tuple[Block, Keys, Values, Tensor]:
    """(dq, dk, dv, dbias) of one part, by the formulas of `tiled.gradients`."""
    exact = lse.dtype
    q, k, v, dout = (x.to(exact) for x in (q, k, v, dout))
    logits, bend = _logits(q, k, scores, None if bias is None else bias.to(exact))
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    ds = weights * (dout @ v.transpose(-1, -2) - shift[..., None])
    plain = ds if bend is None else ds * (1 - bend * bend)
    dbias = ds if bias is None else ds.sum_to_size(bias.shape)
    return (
        scores.scale * (plain @ k),
        scores.scale * (plain.transpose(-1, -2) @ q),
        weights.transpose(-1, -2) @ dout,
        dbias,
    )
