"""What `ct.attention` must be given; every refusal says what came and what was expected."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from chronotope.bias import Bias
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid


def check_scores(scale: Any, softcap: Any) -> None:
    """Raises unless scale is a finite number or None, and softcap a positive one or None."""
    if scale is not None and not math.isfinite(_number(scale)):
        raise ChronotopeError(f"scale={scale}: expected a finite number; the default is 1 / sqrt(D).")
    if softcap is not None and not (math.isfinite(_number(softcap)) and softcap > 0):
        raise ChronotopeError(f"softcap={softcap}: expected a positive number, or None.")


def check_grids(grid: Any, key_grid: Any) -> None:
    """Raises unless both are grids."""
    for name, given in (("grid", grid), ("key_grid", key_grid)):
        if not isinstance(given, Grid):
            raise ChronotopeError(f"{name}={given!r}: expected a Grid, such as Grid(t=8, h=32, w=32).")


def check_tensors(q: Tensor, k: Tensor, v: Tensor, grid: Grid, key_grid: Grid) -> None:
    """Raises unless shapes, dtypes and devices fit each other and the grids."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ChronotopeError(f"{name} is a {type(x).__name__}; expected a tensor [B, heads, tokens, head size].")
        if x.ndim != 4:
            raise ChronotopeError(f"{name} has shape {list(x.shape)}; expected [B, heads, tokens, head size].")
    for name, x, g, which in (
        ("q", q, grid, "grid"),
        ("k", k, key_grid, "key grid"),
        ("v", v, key_grid, "key grid"),
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


def check_bias(bias: Tensor | Bias | None, q: Tensor, k: Tensor, grid: Grid, key_grid: Grid) -> None:
    """Raises unless the bias is None, fits [B, H, Nq, Nk], or scores places of the grids for q's heads."""
    if bias is None:
        return
    if isinstance(bias, Bias):
        bias.check(tuple(axis for axis in grid.axes if axis in key_grid.axes))
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


def _number(value: Any) -> float:
    """The value as a float; NaN for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan
