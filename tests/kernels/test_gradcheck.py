"""First and second derivatives against finite differences, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import chronotope as ct
from attend import on_cpu

GRID = ct.Grid(t=2, h=2, prefix=1)
KEYS = ct.Grid(t=3, h=1)
BACKENDS = pytest.mark.parametrize("backend", on_cpu(torch.float64))


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def tensors(heads: int = 2, key_heads: int = 1, keys: ct.Grid = GRID, value_size: int = 2) -> list[Tensor]:
    return [
        numbers(1, heads, GRID.size, 2),
        numbers(1, key_heads, keys.size, 2),
        numbers(1, key_heads, keys.size, value_size),
    ]


def check(call: Any, inputs: list[Tensor]) -> None:
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


SITUATIONS: dict[str, dict[str, Any]] = {
    "window": {"where": ct.window(t=3, h=3) & ct.causal("t")},
    "along": {"where": ct.along("t")},
    "blind": {"where": ct.causal("t", strict=True) & ~ct.sinks(1)},
    "softcap": {"where": ct.window(h=3), "softcap": 1.5},
    "heads": {"where": ct.per_head([ct.window(h=1), ct.causal()])},
}


@BACKENDS
@pytest.mark.parametrize("name", SITUATIONS)
def test_out(backend: str, name: str) -> None:
    torch.manual_seed(0)
    check(lambda q, k, v: ct.attention(q, k, v, grid=GRID, backend=backend, **SITUATIONS[name]), tensors())


@BACKENDS
def test_lse(backend: str) -> None:
    torch.manual_seed(1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ct.attention(
            q, k, v, grid=GRID, where=ct.window(t=3, h=3), softcap=2.0, return_lse=True, backend=backend
        )
        return out, lse

    check(call, tensors())


@BACKENDS
def test_cross_grids_and_a_value_size_of_its_own(backend: str) -> None:
    torch.manual_seed(2)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ct.attention(q, k, v, grid=GRID, key_grid=KEYS, where=ct.window(t=3, h=1), scale=0.7, backend=backend)

    check(call, tensors(keys=KEYS, value_size=3))


@BACKENDS
@pytest.mark.parametrize("kind", ["relative", "alibi", "tensor"])
def test_bias(backend: str, kind: str) -> None:
    torch.manual_seed(3)
    if kind == "tensor":
        bias, learned = None, numbers(2, 1, GRID.size)
    else:
        bias = ct.RelativeBias(2, t=1, h=1) if kind == "relative" else ct.Alibi(2, learned=True)
        bias = bias.double()
        learned = numbers(*next(bias.parameters()).shape)

    def call(q: Tensor, k: Tensor, v: Tensor, learned: Tensor) -> Tensor:
        given = learned if bias is None else Held(bias, learned)
        return ct.attention(q, k, v, grid=GRID, where=ct.window(t=3, h=3), bias=given, softcap=3.0, backend=backend)

    check(call, [*tensors(), learned])


class Held(ct.Bias):
    """A bias object whose one parameter is replaced by a given tensor, so that gradcheck can move it."""

    def __init__(self, inner: ct.Bias, value: Tensor):
        super().__init__()
        self.inner, self.heads = inner, inner.heads
        self.name, _ = next(inner.named_parameters())
        self.register_buffer("value", value, persistent=False)

    def check(self, axes: tuple[str, ...]) -> None:
        self.inner.check(axes)

    def score(self, q: Any, k: Any) -> Tensor:
        state = {name: self.value if name == self.name else value for name, value in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, state, (q, k))
