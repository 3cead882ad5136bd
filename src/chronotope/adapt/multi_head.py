"""torch's multi-head attention, taken apart: its projections, and attention in between."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


def multi_head(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], attend: Callable[..., Tensor]
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` with `attend` as its attention.

    The function of torch does not show its call of attention to those who watch for it. Weights, where they are asked
    for, are those after all changes.
    """
    given = dict(zip(NAMES, args, strict=False)) | kwargs
    if given.get("static_k") is not None or given.get("static_v") is not None:
        return func(*args, **kwargs)
    batched = given["query"].ndim == 3
    tokens = [given[name] if batched else given[name][:, None] for name in ("query", "key", "value")]
    q, k, v = (_heads(x, given["num_heads"]) for x in _more(_projected(tokens, given), given))
    mask = _mask(given, q, tokens[1].shape[0])
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))  # keys that are added are in sight
    kept: list[Tensor] | None = [] if given.get("need_weights", True) else None
    dropout = given["dropout_p"] if given.get("training", True) else 0.0
    out = attend(q, k, v, attn_mask=mask, dropout_p=dropout, keep=kept)
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"])
    weights = kept[0].to(out.dtype) if kept else None
    if weights is not None and given.get("average_attn_weights", True):
        weights = weights.mean(1)
    return (out, weights) if batched else (out[:, 0], None if weights is None else weights[0])


def _projected(tokens: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
    """Queries, keys and values [N, B, C]."""
    bias = given["in_proj_bias"]
    biases = [None] * 3 if bias is None else bias.chunk(3)
    if given.get("use_separate_proj_weight"):
        matrices = [given[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    elif tokens[0] is tokens[1] is tokens[2]:
        return list(F.linear(tokens[0], given["in_proj_weight"], bias).chunk(3, -1))
    else:
        matrices = list(given["in_proj_weight"].chunk(3))
    return [F.linear(x, m, b) for x, m, b in zip(tokens, matrices, biases, strict=True)]


def _more(qkv: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
    """With the keys that torch adds: a learned one, and one of zeros."""
    q, k, v = qkv
    if given["bias_k"] is not None:
        k, v = (torch.cat((x, given[name].expand(1, x.shape[1], -1))) for x, name in ((k, "bias_k"), (v, "bias_v")))
    if given["add_zero_attn"]:
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    return [q, k, v]


def _heads(x: Tensor, heads: int) -> Tensor:
    """[N, B, C] -> [B, H, N, D]."""
    return x.unflatten(2, (heads, -1)).permute(1, 2, 0, 3)


def _mask(given: dict[str, Any], q: Tensor, keys: int) -> Tensor | None:
    """What hides keys, added to the scores: torch says True where a query may NOT look."""
    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")
    parts = []
    if mask is not None:
        parts.append(_added(mask, q).unflatten(0, (-1, q.shape[1])) if mask.ndim == 3 else _added(mask, q)[None, None])
    elif given.get("is_causal"):
        hidden = torch.ones(q.shape[2], keys, dtype=torch.bool, device=q.device).triu(1)
        parts.append(_added(hidden, q)[None, None])
    if padding is not None:
        parts.append(_added(padding if padding.ndim == 2 else padding[None], q)[:, None, None])
    return sum(parts[1:], parts[0]) if parts else None


def _added(hidden: Tensor, like: Tensor) -> Tensor:
    if hidden.dtype != torch.bool:
        return hidden
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, -torch.inf)
