"""The one call: attention of queries over keys, on a grid, under a pattern."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from chronotope.bias import Bias
from chronotope.errors import ChronotopeError, UnsupportedError
from chronotope.grid import Grid
from chronotope.kernels import BACKENDS, Backend, Scores
from chronotope.patterns import Pattern
from chronotope.planning import Part, Plan, plan


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Grid,
    where: Pattern | Plan | None = None,
    key_grid: Grid | None = None,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
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
    planned = _plan(where, grid, key_grid, q)
    _check_tensors(q, k, v, planned)
    _check_bias(bias, q, k, planned)
    if scale is not None and not math.isfinite(_number(scale)):
        raise ChronotopeError(f"scale={scale}: expected a finite number; the default is 1 / sqrt(D).")
    if softcap is not None and not (math.isfinite(_number(softcap)) and softcap > 0):
        raise ChronotopeError(f"softcap={softcap}: expected a positive number, or None.")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    results = []
    for part in planned.parts:
        scores = Scores(scale, None if softcap is None else float(softcap), bias, part.heads)
        chosen = _choose(backend, q, v, part, scores)
        results.append(chosen.run(*_heads(q, k, v, part), part.tiles, scores))
    out, lse = results[0] if len(results) == 1 else _gather(results, planned)
    return (out, lse) if return_lse else out


def backends() -> Backends:
    """The capability table: what each backend takes and gives. Prints as a table; a list of `Backend` otherwise."""
    return Backends(sorted(BACKENDS.values(), key=lambda backend: -backend.priority))


class Backends(list[Backend]):
    """A list of backends that prints as a table."""

    def __repr__(self) -> str:
        rows = [
            [
                "backend",
                "devices",
                "dtypes",
                "head sizes",
                "backward",
                "lse",
                "bias",
                "softcap",
                "grouped",
                "cross",
                "tested on",
                "what",
            ]
        ]
        for b in self:
            flags = ["twice" if b.double_backward else "yes" if b.backward else "no"]
            flags += ["yes" if f else "no" for f in (b.lse, b.bias, b.softcap, b.grouped_heads, b.cross_grids)]
            dtypes = ",".join(str(d).removeprefix("torch.") for d in b.dtypes)
            rows.append([b.name, ",".join(b.devices), dtypes, b.head_sizes, *flags, b.tested_on, b.about])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(value: Any) -> float:
    """The value as a float; NaN for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _plan(where: Pattern | Plan | None, grid: Grid, key_grid: Grid | None, q: Tensor) -> Plan:
    heads = q.shape[1] if isinstance(q, Tensor) and q.ndim == 4 else 1
    if not isinstance(where, Plan):
        return plan(where, grid, key_grid, heads=heads)
    if where.grid != grid or where.key_grid != (key_grid or grid):
        raise ChronotopeError(
            f"the plan is for {where.grid!r} -> {where.key_grid!r}, the call for {grid!r} -> {(key_grid or grid)!r}; "
            "make a plan for these grids."
        )
    if where.where.heads is not None and where.heads != heads:
        raise ChronotopeError(f"the plan is for {where.heads} heads, q has {heads}.")
    if where.heads != heads:  # all heads are alike, and the plan was made for another number of them
        (part,) = where.parts
        return replace(where, heads=heads, parts=(replace(part, heads=tuple(range(heads))),))
    return where


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, planned: Plan) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ChronotopeError(f"{name} is a {type(x).__name__}; expected a tensor [B, heads, tokens, head size].")
        if x.ndim != 4:
            raise ChronotopeError(f"{name} has shape {list(x.shape)}; expected [B, heads, tokens, head size].")
    for name, x, g, which in (
        ("q", q, planned.grid, "grid"),
        ("k", k, planned.key_grid, "key grid"),
        ("v", v, planned.key_grid, "key grid"),
    ):
        if x.shape[2] != g.size:
            raise ChronotopeError(
                f"{name} has {x.shape[2]} tokens (shape {list(x.shape)}), but the {which} {g!r} has {g.size}."
            )
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ChronotopeError(f"batch sizes differ: q {q.shape[0]}, k {k.shape[0]}, v {v.shape[0]}.")
    if k.shape[1] != v.shape[1]:
        raise ChronotopeError(f"k has {k.shape[1]} heads and v has {v.shape[1]}; they must have the same number.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ChronotopeError(f"q has {q.shape[1]} heads, not a multiple of the {k.shape[1]} heads of k and v.")
    if q.shape[3] != k.shape[3]:
        raise ChronotopeError(f"q has head size {q.shape[3]} and k has {k.shape[3]}; they must be equal.")
    if 0 in (q.shape[0], q.shape[1], q.shape[3], v.shape[3]):
        raise ChronotopeError(f"an empty dimension: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}.")
    if not q.dtype == k.dtype == v.dtype:
        raise ChronotopeError(f"dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}; convert them to one.")
    if not q.device == k.device == v.device:
        raise ChronotopeError(f"devices differ: q {q.device}, k {k.device}, v {v.device}; move them to one.")


def _check_bias(bias: Tensor | Bias | None, q: Tensor, k: Tensor, planned: Plan) -> None:
    if bias is None:
        return
    if isinstance(bias, Bias):
        bias.check(tuple(axis for axis in planned.grid.axes if axis in planned.key_grid.axes))
        if bias.heads != q.shape[1]:
            raise ChronotopeError(f"{bias} is for {bias.heads} heads, q has {q.shape[1]}.")
        return
    if not isinstance(bias, Tensor):
        raise ChronotopeError(f"bias={bias!r}: expected a tensor, or a bias object such as ct.RelativeBias.")
    if not bias.is_floating_point():
        raise ChronotopeError(
            f"bias is {bias.dtype}; expected floating point numbers, which are added to the logits. "
            "Who may look at whom is said by `where`, such as where=ct.causal('t')."
        )
    whole = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = bias.ndim <= 4 and all(
        have in (1, want) for have, want in zip(reversed(bias.shape), reversed(whole), strict=False)
    )
    if not fits:
        raise ChronotopeError(f"bias of shape {list(bias.shape)} does not broadcast to [B, H, Nq, Nk] = {list(whole)}.")
    if bias.device != q.device:
        raise ChronotopeError(f"devices differ: q {q.device}, bias {bias.device}; move them to one.")


def _choose(name: str, q: Tensor, v: Tensor, part: Part, scores: Scores) -> Backend:
    """The first backend by priority that can run the call, or the one named, or the error with all reasons."""
    if name != "auto" and name not in BACKENDS:
        raise ChronotopeError(f"backend {name!r} is unknown; there are: auto, {', '.join(BACKENDS)}.")
    asked = backends() if name == "auto" else [BACKENDS[name]]
    refusals = []
    for backend in asked:
        reasons = backend.reasons(q, v, part.tiles, scores)
        if not reasons:
            return backend
        refusals.append(f"{backend.name}: {'; '.join(reasons)}")
    raise UnsupportedError(f"no backend can run this call (backend={name!r}):\n  " + "\n  ".join(refusals))


def _heads(q: Tensor, k: Tensor, v: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the heads of one part; keys are repeated where the part's heads do not share them evenly."""
    if len(part.heads) == q.shape[1] or len(part.heads) < 1:
        return q, k, v
    group = q.shape[1] // k.shape[1]
    own = [head // group for head in part.heads]
    return q[:, list(part.heads)], k[:, own], v[:, own]


def _gather(results: list[tuple[Tensor, Tensor]], planned: Plan) -> tuple[Tensor, Tensor]:
    """The parts' heads back in order."""
    order = [head for part in planned.parts for head in part.heads]
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat([out for out, _ in results], 1)[:, back], torch.cat([lse for _, lse in results], 1)[:, back]
