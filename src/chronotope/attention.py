"""The one call: attention of queries over keys, on a grid, under a pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from chronotope.bias import Bias
from chronotope.checks import check_bias, check_grids, check_scores, check_tensors
from chronotope.copied import Copied
from chronotope.errors import ChronotopeError, UnsupportedError
from chronotope.grid import Grid
from chronotope.kernels import BACKENDS, Backend, Call, Facts, Scores, backends, bias_tensors, run
from chronotope.patterns import Pattern
from chronotope.planning import Plan, Tiling, plan
from chronotope.routed import attend, chosen, of_heads

AUTOCAST = ("cpu", "cuda")


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Grid,
    where: Pattern | Plan | None = None,
    key_grid: Grid | None = None,
    bias: Tensor | Bias | None = None,
    scale: float | int | None = None,
    softcap: float | int | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Grid,
    where: Pattern | Plan | None = None,
    key_grid: Grid | None = None,
    bias: Tensor | Bias | None = None,
    scale: float | int | None = None,
    softcap: float | int | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Grid,
    where: Pattern | Plan | None = None,
    key_grid: Grid | None = None,
    bias: Tensor | Bias | None = None,
    scale: float | int | None = None,
    softcap: float | int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softcap(scale * q k^T) + bias, over the keys that `where` lets a query see) v.

    Args:
        q: queries [B, H, Nq, D], Nq = grid.size, prefix first, then tokens in row-major order.
        k: keys [B, Hk, Nk, D], Nk = key_grid.size; H is a multiple of Hk (grouped heads).
        v: values [B, Hk, Nk, Dv].
        grid: where the queries are.
        where: who may look at whom, a pattern or a plan of one; None: everybody sees everybody.
        key_grid: where the keys are; default: `grid`.
        bias: a tensor that broadcasts to [B, H, Nq, Nk], or a `ct.RelativeBias`, `ct.Alibi` or other `ct.Bias`.
        scale: default 1 / sqrt(D).
        softcap: c in c * tanh(logits / c), before the bias; default: none.
        return_lse: return (out, lse) instead of out.
        backend: "auto", or the name of one of `ct.backends()`, which then runs or refuses.

    Returns:
        out [B, H, Nq, Dv] in q's dtype; lse [B, H, Nq], natural log, float32 (float64 where q is). A query that sees
        no key gets out 0, lse -inf and gradient 0. Both are differentiable, twice.

    Raises:
        ChronotopeError: shapes, devices or dtypes that do not fit, or a pattern that does not fit the grids.
        UnsupportedError: a backend asked for by name cannot run this call; every reason is listed.

    Example:
        >>> grid = Grid(t=4, h=8, w=8)
        >>> q = k = v = torch.randn(1, 2, grid.size, 16)
        >>> attention(q, k, v, grid=grid, where=window(t=3, h=5, w=5)).shape
        torch.Size([1, 2, 256, 16])
    """
    if has_torch_function((q, k, v)):  # somebody watches, or these are tensors of another kind
        given: dict[str, Any] = {"grid": grid, "where": where, "key_grid": key_grid, "bias": bias, "scale": scale}
        given |= {"softcap": softcap, "return_lse": return_lse, "backend": backend}
        call: Any = attention
        return handle_torch_function(call, (q, k, v), q, k, v, **given)
    key_grid = grid if key_grid is None else key_grid
    q, k, v = _autocast(q, k, v)
    check_grids(grid, key_grid)
    check_tensors(q, k, v, grid, key_grid)
    check_bias(bias, q, k, grid, key_grid)
    if torch.compiler.is_compiling():
        from chronotope.tracing import named_calls, outside, settled  # imports the compiler, a second

        scale, softcap = settled(scale), settled(softcap)
    check_scores(scale, softcap)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    biases = bias if isinstance(bias, Bias) else None
    # Plain values: a compiler that traces this function can hand them on.
    facts = (q.device.type, q.dtype, q.shape[3], v.shape[3])
    if isinstance(where, Pattern) and where.routes:
        routed = (q, k, v, where, grid, key_grid, bias, (scale, softcap), backend)
        out, lse = outside(_routed, *routed) if torch.compiler.is_compiling() else _routed(*routed)
        return (out, lse) if return_lse else out
    request = (where, grid, key_grid, q.shape[1], facts, (scale, softcap), bias is not None, biases, backend)
    parts: Sequence[tuple[Heads, Call | str]]
    parts = named_calls(*request) if torch.compiler.is_compiling() else calls(*request)
    with torch.autocast(q.device.type, enabled=False) if q.device.type in AUTOCAST else nullcontext():
        results = [run(*of_heads(q, k, v, heads), bias_tensors(bias), call) for heads, call in parts]
    out, lse = results[0] if len(results) == 1 else _gather(results, [heads for heads, _ in parts])
    return (out, lse) if return_lse else out


Heads = tuple[int, ...]


def calls(
    where: Pattern | Plan | None,
    grid: Grid,
    key_grid: Grid,
    heads: int,
    facts: tuple[str, torch.dtype, int, int],
    scores: tuple[float, float | None],
    biased: bool,
    bias: Bias | None,
    backend: str,
) -> list[tuple[Heads, Call]]:
    """The kernel, tiles and scores of each part of the plan, and its heads."""
    out = []
    for part in _plan(where, grid, key_grid, heads).parts:
        own = Scores(*scores, bias, biased, (), part.heads)
        out.append((part.heads, Call(_choose(backend, Facts(*facts), part.tiles, own), part.tiles, own)))
    return out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast q, k, v take its dtype, as for scaled_dot_product_attention."""
    devices = {x.device.type for x in tensors if isinstance(x, Tensor)}
    device = devices.pop() if len(devices) == 1 else "none"
    if device not in AUTOCAST or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _plan(where: Pattern | Plan | None, grid: Grid, key_grid: Grid, heads: int) -> Plan:
    if not isinstance(where, Plan):
        return plan(where, grid, key_grid, heads=heads)
    if where.grid != grid or where.key_grid != key_grid:
        raise ChronotopeError(
            f"the plan is for {where.grid!r} -> {where.key_grid!r}, the call for {grid!r} -> {key_grid!r}; "
            "make a plan for these grids."
        )
    if where.where.heads is not None and where.heads != heads:
        raise ChronotopeError(f"the plan is for {where.heads} heads, q has {heads}.")
    if where.heads != heads:  # all heads are alike, and the plan was made for another number of them
        (part,) = where.parts
        return replace(where, heads=heads, parts=(replace(part, heads=tuple(range(heads))),))
    return where


def _choose(name: str, facts: Facts, tiles: Tiling, scores: Scores) -> Backend:
    """The first backend by priority that can run the call, or the one named, or the error with all reasons."""
    if name != "auto" and name not in BACKENDS:
        raise UnsupportedError(f"backend {name!r} is unknown; there are: auto, {', '.join(BACKENDS)}.")
    asked = backends() if name == "auto" else [BACKENDS[name]]
    refusals = []
    for backend in asked:
        reasons = backend.reasons(facts, tiles, scores)
        if not reasons:
            return backend
        refusals.append(f"{backend.name}: {'; '.join(reasons)}")
    raise UnsupportedError(f"no backend can run this call (backend={name!r}):\n  " + "\n  ".join(refusals))


def _routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Pattern,
    grid: Grid,
    key_grid: Grid,
    bias: Tensor | Bias | None,
    scores: tuple[float, float | None],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Lets the routes choose, then runs what they chose."""
    facts = Facts(q.device.type, q.dtype, q.shape[3], v.shape[3])
    with torch.autocast(q.device.type, enabled=False) if q.device.type in AUTOCAST else nullcontext():
        parts = chosen(where, q, k, grid, key_grid)
        results = []
        for heads, tiles in parts:
            copied = None if bias is None else Copied(bias, grid, key_grid, heads)
            own = Scores(*scores, copied, bias is not None, bias_tensors(copied), (0,))
            call = Call(_choose(backend, facts, tiles, own), tiles, own)
            results.append(attend(*of_heads(q, k, v, heads), call))
    return results[0] if len(results) == 1 else _gather(results, [heads for heads, _ in parts])


def _gather(results: list[tuple[Tensor, Tensor]], heads: list[Heads]) -> tuple[Tensor, Tensor]:
    """The parts' heads back in order."""
    order = [head for some in heads for head in some]
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat([out for out, _ in results], 1)[:, back], torch.cat([lse for _, lse in results], 1)[:, back]
