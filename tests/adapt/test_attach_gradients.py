"""Models of plain PyTorch that are patched: gradients, precision, compilation."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from plain import GRID, WHERE, C, N, Own, Stack, masked, near, nothing_is_left, shown_by  # noqa: F401
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import chronotope as ct
from chronotope.adapt import attach
from chronotope.errors import ChronotopeError


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients_are_those_of_the_masked_model(reentrant: bool | None) -> None:
    """Also where layers run again for them."""
    by = None if reentrant is None else lambda block, x, mask: checkpoint(block, x, mask, use_reentrant=reentrant)
    model, plain = Stack(by=by), Stack()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, N, C)
    grads = []
    for own, patch in ((plain, masked(shown_by(WHERE))), (model, attach(model, WHERE, grid=GRID))):
        with patch:
            given = x.clone().requires_grad_()
            out = own(given)
            out.square().sum().backward()
        grads.append([out.detach(), given.grad, *(p.grad for p in own.parameters())])
    for found, expected in zip(grads[1], grads[0], strict=True):
        near(found, expected, 4e-6)


def test_layers_that_run_again_lie_where_they_lay() -> None:
    """Two calls on grids of the same size, and then the gradient: refused, as it cannot be told which it is of."""
    model = Stack(by=lambda block, x, mask: checkpoint(block, x, mask, use_reentrant=True))
    x = torch.randn(2, 1, N, C, requires_grad=True)
    sides = iter([ct.Grid(h=3, w=4), ct.Grid(h=4, w=3), ct.Grid(h=4, w=3)])
    with attach(model, ct.window(h=1), grid=lambda x: next(sides)):
        one, two = model(x[0]).sum(), model(x[1]).sum()
        with pytest.raises(ChronotopeError, match="in several ways"):
            (one + two).backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_function_that_runs_again_unseen_is_refused(reentrant: bool) -> None:
    """A module that checkpoints a function of its own: torch runs that again, and no module."""

    class Inside(Own):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return checkpoint(super().forward, x, mask, use_reentrant=reentrant)

    model, x = Inside(), torch.randn(1, N, C, requires_grad=True)
    with attach(model, WHERE, grid=GRID):
        with pytest.raises(ChronotopeError, match="checkpoint a module"):
            model(x)
        with torch.no_grad(), masked(shown_by(WHERE)):
            expected = Own.forward(model, x)
        with torch.no_grad():
            if not reentrant:  # whose function cannot tell
                near(model(x), expected)
    model(x).sum().backward()


def test_grids_may_change_from_step_to_step() -> None:
    """Also between shapes of one size, where layers run again; and beside calls without gradients."""
    model = Stack(by=lambda block, x, mask: checkpoint(block, x, mask, use_reentrant=True))
    plain = Stack()
    plain.load_state_dict(model.state_dict())
    where = ct.window(h=1)
    sides = iter([GRID, ct.Grid(h=4, w=3), ct.Grid(h=12, w=1), ct.Grid(h=2, w=6)])
    with attach(model, where, grid=lambda x: next(sides)):
        for grid in (GRID, ct.Grid(h=4, w=3), None, ct.Grid(h=2, w=6)):
            x = torch.randn(1, N, C, requires_grad=True)
            if grid is None:
                with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # of torch: nothing to run again for
                    model(x)
                continue
            for own, patch in ((model, nullcontext()), (plain, masked(shown_by(where, grid)))):
                own.zero_grad()
                with patch:
                    own(x).square().sum().backward()
            for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
                near(found.grad, expected.grad, 4e-6)


def test_training_learns_as_the_masked_model_does() -> None:
    model = Stack().train()
    plain = copy.deepcopy(model)
    x, target = torch.randn(2, 2, N, C)
    for own, patch in ((plain, masked(shown_by(WHERE))), (model, attach(model, WHERE, grid=GRID))):
        optimizer = torch.optim.SGD(own.parameters(), 0.1)
        with patch:
            for _ in range(3):
                optimizer.zero_grad()
                F.mse_loss(own(x), target).backward()
                optimizer.step()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        near(found, expected, 4e-6)


def test_autocast() -> None:
    model, x = Stack(), torch.randn(2, N, C)
    with torch.autocast("cpu", torch.bfloat16):
        with masked(shown_by(WHERE)):
            expected = model(x)
        with attach(model, WHERE, grid=GRID):
            found = model(x)
    assert found.dtype == expected.dtype
    near(found, expected, 0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer, x = nn.MultiheadAttention(C, 2, batch_first=True).to(dtype), torch.randn(2, N, C, dtype=dtype)
    expected, seen = layer(x, x, x, attn_mask=~shown_by(WHERE))
    with attach(layer, WHERE, grid=GRID):
        out, weights = layer(x, x, x)
    assert (out.dtype, weights.dtype) == (expected.dtype, seen.dtype)
    near(out.double(), expected.double(), 0.03 if dtype == torch.bfloat16 else 1e-10)
    near(weights.double(), seen.double(), 0.03 if dtype == torch.bfloat16 else 1e-10)


COMPILED = """
import torch
from torch import nn
from torch.nn import functional as F
import chronotope as ct
from chronotope.adapt import attach

class Layer(nn.Module):
    def forward(self, x):
        return 2 * F.scaled_dot_product_attention(x + 1, x, x) - x

grid, x = ct.Grid(h=3, w=4), torch.randn(1, 2, 12, 8)
model = nn.Sequential(Layer())
compiled = torch.compile(model, backend="eager")

def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)

plain = model(x)
near(compiled(x), plain)
for where in (ct.window(h=3, w=1), ct.along("w"))[:WHERES]:
    expected = 2 * F.scaled_dot_product_attention(x + 1, x, x, ct.plan(where, grid).mask()) - x
    for own in (model, compiled)[:WHERES]:
        with attach(own, where, grid=grid) as handle:
            near(compiled(x), expected)
        assert [bool(layer.done) for layer in handle.layers] == [True]
        near(compiled(x), plain)
torch._dynamo.reset()
with attach(model, ct.full(), grid=grid):
    try:
        torch.compile(model, backend="eager", fullgraph=True)(x)
    except torch._dynamo.exc.Unsupported:
        print("refused")
"""


@pytest.mark.parametrize("wheres", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_compiled_models(wheres: int) -> None:
    """By torch.compile before or after; what is attached later counts. The graph breaks at attention, or is refused.

    In a process of its own: a compiler traces the checks of types that tests switch on.
    """
    done = subprocess.run(
        [sys.executable, "-c", COMPILED.replace("WHERES", str(wheres))], check=True, capture_output=True, text=True
    )
    assert done.stdout == "refused\n"
