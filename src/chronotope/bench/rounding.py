"""Rounding: the root mean square error of every kernel against float64, beside that of torch's own attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import chronotope as ct
from chronotope.bench.cases import Case
from chronotope.bench.check import Inputs
from chronotope.bench.competitors import DEFINITION, Competitor, competitors, ours, refusal, sdpa
from chronotope.bench.results import Row, circumstances
from chronotope.bench.timing import Settings

NAMES = ("out", "dq", "dk", "dv")


def rounding(settings: Settings) -> Iterator[list[Row] | str]:
    """A window on 1,024 tokens: every kernel, and scaled_dot_product_attention under the dense mask."""
    grid = ct.Grid(t=4, h=8, w=8) if settings.quick else ct.Grid(t=4, h=16, w=16)
    case = Case("window 3x5x5", (ct.window(t=3, h=5, w=5),), grid)
    mask = ct.plan(case.patterns[0], grid).mask().to(settings.device)
    dense = Competitor("dense, masked", lambda q, k, v: sdpa(q, k, v, attn_mask=mask))
    definition = Competitor(DEFINITION, ours(case, DEFINITION))
    others = list(competitors(case, settings.device, "all" if settings.compiled == "all" else "none"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = Inputs.random(case.shape, dtype, settings.device)
        exact = _results(dense, Inputs(*(x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.dout))))
        least = _errors(dense, inputs, exact)
        for one in (dense, definition, *others):
            try:
                found = _errors(one, inputs, exact)
            except Exception as error:
                reason = refusal(one, error)
                if reason is None:
                    raise
                yield f"  {one.name}, {dtype}: {reason}"
                continue
            yield [_row(case, one.name, name, dtype, found[name], least[name], settings) for name in NAMES]


def _results(one: Competitor, inputs: Inputs) -> dict[str, Tensor]:
    *leaves, dout = inputs.leaves(one)
    out = one.attend(*leaves)
    found = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    return {name: x.transpose(1, 2) if one.heads_last else x for name, x in zip(NAMES, found, strict=True)}


def _errors(one: Competitor, inputs: Inputs, exact: dict[str, Tensor]) -> dict[str, float]:
    found = _results(one, inputs)
    return {name: float((found[name].double() - exact[name]).square().mean().sqrt()) for name in NAMES}


def _row(
    case: Case, backend: str, name: str, dtype: torch.dtype, error: float, dense: float, settings: Settings
) -> Row:
    return Row(
        table="rounding",
        row=case.name,
        pattern=case.pattern,
        grid=repr(case.grid),
        heads=case.heads,
        head_size=case.head_size,
        dtype=str(dtype).removeprefix("torch."),
        backend=backend,
        phase=name,
        ratio_to_dense=error / dense,
        error=error,
        **circumstances(settings.threads, settings.device),
    )
