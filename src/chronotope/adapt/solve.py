"""Computes what a layer asks for, after everybody has said what it should be."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.adapt.asked import Asked, Own
from chronotope.adapt.masks import causal_mask, read_mask
from chronotope.attention import AUTOCAST, attention
from chronotope.bias import Bias
from chronotope.boxes import chunks
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.patterns import Pattern, causal, full
from chronotope.planning import heads_alike
from chronotope.routed import of_heads, select

AT_ONCE = 1 << 24
"""Scores that are held at once where queries are taken some at a time."""


def solve(asked: Asked, own: Own) -> Float[Tensor, "b h nq dv"]:
    """Explicitly where somebody edits scores or weights, by the pattern where one is set, else as the model does."""
    edited = bool(asked.scores or asked.probs) or (asked.bias is not None and asked.mask is not None)
    if not edited and (asked.where is None or asked.where is asked.first):
        return own(asked)
    if asked.dropout > 0:
        raise ChronotopeError(
            f"this layer drops attention weights (p={asked.dropout}), which no kernel here holds; set the attention "
            "dropout of the model to 0, or call model.eval()."
        )
    if edited:
        return explicit(asked)
    return _moved(sparse(fronted(asked)), -asked.tail) if asked.tail else sparse(asked)


def sparse(asked: Asked) -> Float[Tensor, "b h nq dv"]:
    """By the pattern on the grid, joined with the model's own mask."""
    assert asked.grid is not None
    where, bias = joined(asked)
    q, k, v, scale, softcap = asked.q, asked.k, asked.v, asked.scale, asked.softcap
    if asked.square:
        out, lse = attention(
            q, k, v, grid=asked.grid, where=where, bias=bias, scale=scale, softcap=softcap, return_lse=True
        )
    else:
        assert not isinstance(bias, Bias)  # Chronotope's own layers do not decode by this way
        out, lse = rows(q, k, v, where, asked.grid, asked.start, bias=bias, scale=scale, softcap=softcap)
    if asked.sinks is None:
        return out
    # exp(lse) / (exp(lse) + exp(sink)) of the weight stays with the keys.
    return out * torch.sigmoid(lse - asked.sinks.float()[:, None])[..., None].to(out.dtype)


def explicit(asked: Asked) -> Float[Tensor, "b h nq dv"]:
    """With the weights in memory, N x N, which the edits see."""
    with exactly(asked.q):
        return (weights(asked).to(asked.v.dtype) @ _spread(asked.v, asked)).to(asked.q.dtype)


def weights(asked: Asked) -> Float[Tensor, "b h nq nk"]:
    """Attention weights after all edits, float32 or better. Rows that see nothing are 0."""
    with exactly(asked.q):
        return _weights(asked)


def exactly(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast, which would round scores."""
    return torch.autocast(x.device.type, enabled=False) if x.device.type in AUTOCAST else nullcontext()


def _weights(asked: Asked) -> Float[Tensor, "b h nq nk"]:
    exact = torch.promote_types(asked.q.dtype, torch.float32)
    scores = logits(asked.q.to(exact), _spread(asked.k, asked).to(exact), asked.scale, asked.softcap)
    seen = _seen(asked)
    if asked.mask is not None:
        scores = scores + read_mask(asked.mask, asked.q.dtype).own.to(exact)
    if asked.bias is not None and asked.grid is not None:
        here, keys = (
            Coords.of(grid, torch.arange(grid.size, device=scores.device))
            for grid in (asked.grid, asked.key_grid or asked.grid)
        )
        scores = scores + asked.bias(here.view(-1, 1), keys.view(1, -1)).to(exact)
    if asked.causal:
        scores = scores + causal_mask(scores.shape[-2], scores.shape[-1], asked.start, scores)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    for edit in asked.scores:
        scores = edit(scores)
    if asked.sinks is not None:
        sinks = asked.sinks.to(exact)[:, None, None].expand(*scores.shape[:-1], 1)
        probs = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    else:
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        probs = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    for edit in asked.probs:
        probs = edit(probs)
    return probs


def joined(asked: Asked) -> tuple[Pattern, Tensor | Bias | None]:
    """The pattern and the model's own mask: what of it is a rule, and what is added to the scores."""
    assert asked.grid is not None
    where = full() if asked.where is None else asked.where
    bias: Tensor | Bias | None = asked.bias
    if asked.mask is not None:
        rule, added = read_mask(asked.mask, asked.q.dtype).on(asked.grid)
        where = both(where, rule)
        bias = added if bias is None else _summed(bias, added, asked)
    if asked.causal:
        if asked.grid.prefix <= 1:
            return both(where, causal()), bias
        hidden = causal_mask(asked.q.shape[2], asked.k.shape[2], asked.start, asked.q)
        bias = bias + hidden if isinstance(bias, Tensor) else hidden
    return where, bias


def _summed(bias: Bias | Tensor, added: Tensor | None, asked: Asked) -> Bias | Tensor:
    """A bias object and a mask that a control has set, N x N."""
    if added is None or isinstance(bias, Tensor) or asked.grid is None:
        return bias
    places = Coords.of(asked.grid, torch.arange(asked.grid.size, device=asked.q.device))
    return bias(places.view(-1, 1), places.view(1, -1)).to(asked.q.dtype) + added


def rows(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk dv"],
    where: Pattern,
    grid: Grid,
    start: int,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"]]:
    """Attention of the tokens from `start` on over all of the grid, as in decoding: dense over the keys that some see.

    A route, which chooses for all queries of a grid, chooses nothing here: these see what the patterns beside it leave.
    """
    where.check(grid, grid)
    where = where.given(dict.fromkeys(where.routes, full()))
    order: list[int] = []
    found = []
    for pattern, heads in heads_alike(where, q.shape[1]).items():
        qs, ks, vs = of_heads(q, k, v, heads)
        some = []
        for part in chunks(q.shape[2], q.shape[0] * len(heads) * grid.size, AT_ONCE):
            at = torch.arange(start + part.start, start + part.stop, device=q.device)
            own = None if bias is None else rows_of_bias(bias, part, heads)
            with exactly(q):
                some.append(_dense(qs[:, :, part], ks, vs, _sees(pattern, grid, at), own, scale, softcap))
        order += heads
        found.append([torch.cat(parts, 2) for parts in zip(*some, strict=True)])
    back = sorted(range(len(order)), key=order.__getitem__)
    out, lse = (torch.cat(parts, 1)[:, back] for parts in zip(*found, strict=True))
    return out, lse


def _dense(
    q: Float[Tensor, "b h m d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk dv"],
    seen: Bool[Tensor, "m nk"],
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Float[Tensor, "b h m dv"], Float[Tensor, "b h m"]]:
    keys = seen.any(0).nonzero()[:, 0]
    if len(keys) < seen.shape[1]:
        k, v, seen = k[:, :, keys], v[:, :, keys], seen[:, keys]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., keys]
    exact = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).to(exact) for x in (k, v))
    scores = logits(q.to(exact), k, scale, softcap)
    scores = (scores if bias is None else scores + bias.to(exact)).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    blind = lse == -torch.inf
    probs = (scores - lse.masked_fill(blind, 0.0)[..., None]).exp()
    return (probs @ v).to(q.dtype), lse


def _sees(where: Pattern, grid: Grid, at: Tensor) -> Bool[Tensor, "m nk"]:
    keys = Coords.of(grid, torch.arange(grid.size, device=at.device))
    return where.sees(Coords.of(grid, at[:, None]), keys).expand(len(at), grid.size)


def _seen(asked: Asked) -> Bool[Tensor, "#b #h nq nk"] | None:
    """What the pattern alone shows."""
    where, grid = asked.where, asked.grid
    if where is None or grid is None:
        return None
    if asked.square or asked.key_grid is not None:
        q, k = (_moved(x, asked.tail) for x in (asked.q, asked.k))
        seen = select(where, q, k, grid, asked.key_grid)
        return seen.roll((-asked.tail, -asked.tail), (-2, -1)) if asked.tail else seen
    where.check(grid, grid)
    where = where.given(dict.fromkeys(where.routes, full()))
    at = torch.arange(asked.start, asked.start + asked.q.shape[2], device=asked.q.device)
    return torch.stack([_sees(where.head(head), grid, at) for head in range(asked.q.shape[1])])[None]


def both(where: Pattern, rule: Pattern) -> Pattern:
    """Their `&`, shorter where one of them sees everything."""
    if rule == full():
        return where
    return rule if where == full() else where & rule


def logits(q: Tensor, k: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """scale q k^T, capped; scale: 1 / sqrt(D) if it is None. q and k have the same heads."""
    scores = (1 / math.sqrt(q.shape[-1]) if scale is None else scale) * q @ k.transpose(-1, -2)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def rows_of_bias(bias: Tensor, at: Tensor | slice, heads: tuple[int, ...] | None = None) -> Tensor:
    """A bias that broadcasts to [B, H, Nq, Nk], for some queries and heads; None: all heads."""
    bias = bias[(None,) * (4 - bias.ndim)]
    bias = bias if heads is None or bias.shape[1] == 1 else bias[:, list(heads)]
    return bias if bias.shape[2] == 1 else bias[:, :, at]


def _spread(x: Float[Tensor, "b hk nk d"], asked: Asked) -> Float[Tensor, "b h nk d"]:
    return x.repeat_interleave(asked.q.shape[1] // x.shape[1], 1)


def fronted(asked: Asked) -> Asked:
    """The same call with the last `tail` tokens first, as a grid has them. Causality is of the order as it was."""
    mask = asked.mask
    if asked.causal:
        hidden = causal_mask(asked.q.shape[2], asked.k.shape[2], asked.start, asked.q)
        mask = hidden if mask is None else read_mask(mask, asked.q.dtype).own + hidden
    if mask is not None:
        mask = _moved(mask, asked.tail, -1)
        mask = mask if mask.shape[-2] == 1 else _moved(mask, asked.tail, -2)
    q, k, v = (_moved(x, asked.tail) for x in (asked.q, asked.k, asked.v))
    return asked.but(q=q, k=k, v=v, mask=mask, causal=False, tail=0)


def _moved(x: Tensor, count: int, dim: int = 2) -> Tensor:
    """The last `count` come first; where it is negative, so many of the first come last."""
    return torch.roll(x, count, dim) if count else x
