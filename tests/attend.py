"""Random calls of attention, and comparison of two ways to run them: forward, lse and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import chronotope as ct
from chronotope.kernels import BACKENDS
from chronotope.kernels.native import build
from strategies import Case, random_tile


def on_cpu(dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that run forward and backward here, in this dtype. (Triton's interpreter has tests of its own.)

    Native kernels are left out where they cannot be built; `kernels/test_native.py` then says why.
    """
    able = [b.name for b in BACKENDS.values() if "cpu" in b.devices and dtype in b.dtypes and b.differentiable != "no"]
    return [name for name in able if name != "triton" and not (name == "native" and build.reasons())]


BIASES = ("none", "tensor", "tensor", "relative", "alibi", "learned")


@dataclass
class Call:
    """The tensors and arguments of one call; `inputs` are all that may need a gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    kwargs: dict[str, Any]
    parameters: list[Tensor] = field(default_factory=list)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *self.parameters]

    def run(self, **more: Any) -> tuple[Tensor, Tensor]:
        out, lse = ct.attention(self.q, self.k, self.v, **(self.kwargs | {"return_lse": True} | more))
        return out, lse

    def gradients(self, dout: Tensor | None, dlse: Tensor | None, **more: Any) -> list[Tensor]:
        """(out, lse, and the gradient of each input) with these gradients of out and lse; None: of no concern."""
        results = self.run(**more)
        pairs = [(y, dy) for y, dy in zip(results, (dout, dlse), strict=True) if dy is not None]
        grads = torch.autograd.grad([y for y, _ in pairs], self.inputs, [dy for _, dy in pairs], allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(self.inputs, grads, strict=True)]
        return [*(y.detach() for y in results), *filled]


def random_call(case: Case, dtype: torch.dtype = torch.float64, automatic: bool | None = None) -> Call:
    """A call on the grids and the pattern of a case: heads, sizes, bias, softcap, scale and tiles at random."""
    rng = case.rng
    torch_rng = torch.Generator().manual_seed(case.seed)
    heads = case.where.heads or case.heads
    key_heads = int(rng.choice([n for n in range(1, heads + 1) if heads % n == 0]))
    batch, size = int(rng.integers(1, 3)), int(rng.integers(1, 6))
    value_size = size if rng.random() < 0.5 else int(rng.integers(1, 6))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch_rng, dtype=dtype).requires_grad_()

    bias, parameters = random_bias(rng, numbers, case, batch, heads)
    kwargs: dict[str, Any] = {"grid": case.grid, "key_grid": case.key_grid, "where": case.where, "bias": bias}
    if rng.random() < 0.3:
        kwargs["softcap"] = float(rng.uniform(0.5, 3))
    if rng.random() < 0.3:
        kwargs["scale"] = float(rng.uniform(-1, 2))
    automatic = rng.random() < 0.3 if automatic is None else automatic
    if not automatic:
        tile = random_tile(rng, case.grid)
        kwargs["where"] = ct.plan(case.where, case.grid, case.key_grid, heads=heads, tile=tile)
    q = numbers(batch, heads, case.grid.size, size)
    k, v = (numbers(batch, key_heads, case.key_grid.size, n) for n in (size, value_size))
    return Call(q, k, v, kwargs, parameters)


def random_bias(rng: np.random.Generator, numbers: Any, case: Case, batch: int, heads: int) -> tuple[Any, list[Tensor]]:
    """A bias of any kind that fits, and its tensors that learn."""
    kind = str(rng.choice(BIASES))
    shared = [axis for axis in case.grid.axes if axis in case.key_grid.axes]
    if kind == "none" or (kind == "relative" and not shared):
        return None, []
    if kind == "tensor":
        whole = (batch, heads, case.grid.size, case.key_grid.size)
        shape = [n if rng.random() < 0.6 else 1 for n in whole][int(rng.integers(0, 4)) :]
        table = numbers(*shape)
        return table, [table]
    bias: ct.Bias
    if kind == "relative":
        bias = ct.RelativeBias(heads, **{axis: int(rng.integers(0, 4)) for axis in shared})
        with torch.no_grad():
            bias.table.copy_(numbers(*bias.table.shape))
    else:
        axes = None if rng.random() < 0.5 or not shared else (str(rng.choice(shared)),)
        bias = ct.Alibi(heads, axes=axes, slopes=numbers(heads).detach(), learned=kind == "learned")
    bias = bias.to(numbers(1).dtype)
    return bias, list(bias.parameters())


# Wide enough for sums whose terms cancel: this is to catch what is wrong. `kernels/test_precision.py` has the law on
# what is inexact.
STEPS = {torch.float64: 2.0**16, torch.float32: 2.0**12}


def close(found: Tensor, expected: Tensor) -> None:
    """Equal up to rounding: so many rounding steps of the largest number, at least of 1."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = found.detach(), expected.detach()
    finite = expected.isfinite()
    assert torch.equal(finite, found.isfinite())
    assert torch.equal(found[~finite], expected[~finite])
    if finite.any():
        largest = max(1.0, float(expected[finite].abs().max()))
        step = torch.finfo(found.dtype).eps / 2
        torch.testing.assert_close(found[finite], expected[finite], rtol=0, atol=STEPS[found.dtype] * step * largest)
