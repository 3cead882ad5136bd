"""torch.compile, torch.export and checkpointing of models with attention inside: the same numbers, one operator."""

from __future__ import annotations

import copy
import functools
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import chronotope as ct
from attend import close
from chronotope.kernels import BACKENDS, Call, Scores, named

GRID = ct.Grid(t=3, h=4, w=2, prefix=1)
COARSE = ct.Grid(t=3, h=2, w=2)
NEAR = ct.window(t=3, h=3) & ct.causal("t")
HEADS = 4


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    # What checks the types of arguments in tests is no part of what is compiled.
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Model(nn.Module):
    """A layer, and something around it to compile."""

    def __init__(self, where: Any = NEAR, bias: ct.Bias | None = None, **kwargs: Any):
        super().__init__()
        self.mix = ct.nn.Attention(32, HEADS, where=where, bias=bias, **kwargs)
        self.double()
        for weight in () if bias is None else bias.parameters():
            nn.init.normal_(weight)

    def forward(self, x: Tensor, grid: ct.Grid, context: Any = None) -> Tensor:
        return self.mix(x.sin(), grid, context).relu()


MODELS: dict[str, Callable[[], Model]] = {
    "qk_norm": lambda: Model(qk_norm=True),
    "relative": lambda: Model(bias=ct.RelativeBias(HEADS, h=2, w=1)),
    "alibi, softcap": lambda: Model(bias=ct.Alibi(HEADS, learned=True), softcap=3.0),
    "per head": lambda: Model(
        ct.per_head([NEAR, ct.segments([i % 3 for i in range(24)]), ct.predicate(lambda q, k: q.t == k.t), NEAR])
    ),
    "grouped heads": lambda: Model(kv_heads=2),
    "reference": lambda: Model(backend="reference"),
    "plan": lambda: Model(ct.plan(NEAR, GRID, heads=HEADS, tile={"t": 2, "h": 3})),
}
FAST = ("qk_norm", "alibi, softcap")
SOME = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def tokens(grid: ct.Grid = GRID, batch: int = 2) -> Tensor:
    return torch.randn(batch, grid.size, 32, dtype=torch.float64, requires_grad=True)


def gradients(model: Callable[..., Tensor], weights: nn.Module, x: Tensor, *args: Any) -> list[Tensor]:
    """The output and the gradients of everything that learns."""
    out = model(x, *args)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *weights.parameters()])]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        close(x, y)


@pytest.mark.parametrize("name", SOME)
def test_a_compiled_model_is_the_model(name: str) -> None:
    model, x = MODELS[name](), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(gradients(compiled, model, x, GRID), gradients(model, model, x, GRID))


@pytest.mark.slow
def test_cross_grids() -> None:
    model, x, context = Model(bias=ct.Alibi(HEADS)), tokens(), tokens(COARSE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    given = (GRID, (context, COARSE))
    same(gradients(compiled, model, x, *given), gradients(model, model, x, *given))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("name", MODELS)
def test_inductor(name: str) -> None:
    model, x = MODELS[name](), tokens()
    compiled = torch.compile(model, fullgraph=True)
    same(gradients(compiled, model, x, GRID), gradients(model, model, x, GRID))


def attend(x: Tensor, grid: ct.Grid, where: Any, **kwargs: Any) -> Tensor:
    q = x.unflatten(2, (HEADS, -1)).transpose(1, 2)
    return ct.attention(q, q, q, grid=grid, where=where, **kwargs)


def counted(function: Callable[..., Tensor], calls: list[tuple[Any, ...]]) -> int:
    """How often the function was compiled over these calls, each of which must give what it gives uncompiled."""
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for args in calls:
        close(compiled(*args).detach(), function(*args).detach())
    return int(counter.frame_count)


def test_equal_grids_and_patterns_do_not_compile_again() -> None:
    def made() -> tuple[ct.Grid, ct.Pattern]:
        return ct.Grid(t=3, h=4, w=2, prefix=1), ct.window(t=3) & ~ct.segments([i % 3 for i in range(24)])

    assert counted(attend, [(tokens(), *made()) for _ in range(3)]) == 1


def test_other_grids_and_patterns_do() -> None:
    x = tokens()
    other = ct.Grid(t=4, h=3, w=2, prefix=1)
    rule = [ct.predicate(lambda q, k, reach=reach: (q.t - k.t).abs() <= reach) for reach in (0, 1, 2)]
    assert counted(attend, [(x, GRID, NEAR), (x, other, NEAR), (x, GRID, NEAR), (x, other, NEAR)]) == 2
    assert counted(attend, [(x, GRID, ct.window(t=size)) for size in (1, 3, 5)]) == 3
    assert counted(attend, [(x, GRID, where) for where in rule]) == 3


@pytest.mark.slow
def test_a_copy_of_a_bias_is_another_bias() -> None:
    first = Model(bias=ct.RelativeBias(HEADS, h=1))
    second = copy.deepcopy(first)
    second.mix.bias.extent = {"t": 1}
    for model in (first, second):
        x = tokens()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        same(gradients(compiled, model, x, GRID), gradients(model, model, x, GRID))


# In a process of its own: what checks types in tests wraps constructors, and the compiler does not see through it.
INSIDE = """
import torch, chronotope as ct

torch.manual_seed(0)

NEAR = ct.window(t=3) & ~ct.sinks(1)

def attend(x, grid, where):
    return ct.attention(x, x, x, grid=grid, where=where)

def mixed(x):
    frames = (x.shape[2] - 1) // 8
    where = ct.window(t=3, h=(1, 0)) & ct.causal("t") | ct.strided(t=2) & ct.blocks(h=2) | ct.sinks(2) & NEAR
    return attend(x, ct.Grid(t=frames, h=4, w=2, prefix=1), where)

def heads(x):
    rule = ct.predicate(lambda q, k: q.t >= k.t)
    grid = ct.Grid(t=2, h=4, w=2).replace(t=3, prefix=1)
    return attend(x, grid, ct.per_head([ct.full(), NEAR, ct.along("t", "w"), rule]))

for function, dynamic in ((mixed, True), (heads, None)):
    x = torch.randn(2, 4, 25, 8, dtype=torch.float64)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert (compiled(x) - function(x)).abs().max() < 1e-14

layer = ct.nn.Attention(32, 4, where=NEAR, position=ct.Rope()).double()
x, context = (torch.randn(2, n, 32, dtype=torch.float64, requires_grad=True) for n in (25, 12))
grid, coarse = ct.Grid(t=3, h=4, w=2, prefix=1), ct.Grid(t=3, h=2, w=2)
for args in ((x, grid), (x, grid, (context, coarse))):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, args).module()
    for found in (compiled(*args), exported(*args)):
        expected = layer(*args)
        assert (found - expected).abs().max() < 1e-14
        (dx,), (dy,) = (torch.autograd.grad(y.square().sum(), x) for y in (found, expected))
        assert (dx - dy).abs().max() < 1e-13
"""


def test_grids_and_patterns_may_be_made_inside_and_places_may_turn() -> None:
    subprocess.run([sys.executable, "-c", INSIDE], check=True)


def test_a_batch_of_any_size_is_compiled_once() -> None:
    # The second size tells the compiler that it varies.
    assert counted(attend, [(tokens(batch=batch), GRID, NEAR) for batch in (2, 3, 4, 7)]) == 2


def test_numbers_that_change() -> None:
    def capped(x: Tensor, softcap: float, scale: float) -> Tensor:
        return attend(x, GRID, NEAR, softcap=softcap, scale=scale)

    x = tokens()
    assert counted(capped, [(x, 1.5, 0.5), (x, 2.5, 1 / 3), (x, 1.5, 0.5)]) == 2


def test_errors_say_what_they_say_uncompiled() -> None:
    compiled = torch.compile(lambda x: attend(x, GRID, ct.along("z")), backend="eager")
    with pytest.raises(Exception, match="along\\('z'\\) names 'z', but Grid\\(t=3, h=4, w=2, prefix=1\\) has the axes"):
        compiled(tokens())


@pytest.mark.parametrize(
    ("reentrant", "compile"), [(False, False), (True, False), pytest.param(False, True, marks=pytest.mark.slow)]
)
def test_checkpointing_changes_nothing(reentrant: bool, compile: bool) -> None:
    model, x = Model(bias=ct.Alibi(HEADS, learned=True)), tokens()

    def checkpointed(x: Tensor, grid: ct.Grid) -> Tensor:
        return checkpoint(model, x, grid, use_reentrant=reentrant)  # type: ignore[no-any-return]

    run = torch.compile(checkpointed, fullgraph=True, backend="aot_eager") if compile else checkpointed

    def found(run: Callable[..., Tensor]) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        model.zero_grad()
        out = run(leaf, GRID)
        out.square().sum().backward()  # the reentrant kind knows no torch.autograd.grad
        return [out.detach(), *(y.grad for y in (leaf, *model.parameters()) if y.grad is not None)]

    same(found(run), found(model))


class Runs(TorchDispatchMode):
    """The operators of chronotope that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "chronotope":
            self.names.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_sees_one_operator() -> None:
    x = tokens()
    seen: list[tuple[bool, str]] = []

    def policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append((ctx.is_recompute, str(operator)))
        kept = operator is torch.ops.chronotope.attend.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def body(x: Tensor) -> Tensor:
        return attend(2 * x, GRID, NEAR).exp()

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(body, x, use_reentrant=False, context_fn=contexts)
    assert [name for again, name in seen if name.startswith("chronotope")] == ["chronotope.attend.default"]
    with Runs() as runs:
        (dx,) = torch.autograd.grad(out.sum(), x)
    assert runs.names == ["attend_backward"]  # kept, so not run again
    close(dx, torch.autograd.grad(body(x).sum(), x)[0])


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # of torch's own reader (2.11)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(strict: bool) -> None:
    class Fixed(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model, self.grid = model, GRID

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x, self.grid)

    model = Model(qk_norm=True, bias=ct.RelativeBias(HEADS, t=1)).eval()
    x = tokens().detach()
    batch = {0: torch.export.Dim("batch", min=2)}
    given = torch.export.export(model, (x, GRID), strict=strict, dynamic_shapes=(batch, []))
    fixed = torch.export.export(Fixed(model), (x,), strict=strict, dynamic_shapes=(batch,))
    buffer = io.BytesIO()
    torch.export.save(given, buffer)
    loaded = torch.export.load(io.BytesIO(buffer.getvalue()))
    for size in (2, 5):
        x = tokens(batch=size)
        expected = gradients(model, model, x, GRID)
        close(given.module()(x, ct.Grid(t=3, h=4, w=2, prefix=1)).detach(), expected[0])
        close(loaded.module()(x, GRID).detach(), expected[0])
        same(gradients(fixed.module(), model, x), expected)
    with pytest.raises(ValueError, match="Grid"):
        given.module()(x, ct.Grid(t=3, h=2, w=4, prefix=1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch 2.15
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["heads outside", "heads inside"])
def test_the_operator_keeps_its_promises(backend: str, biased: bool, inside: bool) -> None:
    """torch's own checks: schema, autograd registration, shapes without numbers, tracing with sizes left open."""
    part = ct.plan(NEAR, GRID, heads=2).parts[0]
    bias = ct.Alibi(2, learned=True).double() if biased else None
    call = Call(BACKENDS[backend], part.tiles, Scores(0.5, None, bias, biased, (), part.heads))
    name = named(call)
    tensors = [] if bias is None else [bias.slopes.detach()]
    q, k, v = (torch.randn(2, 2, GRID.size, 4, dtype=torch.float64) for _ in range(3))
    if inside:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.chronotope.attend.default, (*leaves, [x.requires_grad_() for x in tensors], name))
    if backend == "torch" and not biased:  # the others pull gradients back by torch.func, which the checks cannot see
        out, lse = torch.ops.chronotope.attend(q, k, v, tensors, name)
        args = (q, k, v, out, lse, torch.randn_like(out), torch.randn_like(lse), tensors, [], name)
        torch.library.opcheck(torch.ops.chronotope.attend_backward.default, args)


@pytest.mark.parametrize("name", SOME)
def test_second_derivatives(name: str) -> None:
    model, x = MODELS[name](), tokens()
    other = copy.deepcopy(model)
    other.mix.backend = "reference"

    def twice(model: Model) -> list[Tensor]:
        weights = [x, *model.parameters()]
        grads = torch.autograd.grad(model(x, GRID).square().sum(), weights, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), weights))

    same(twice(model), twice(other))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # of torch's own transforms
def test_transforms_of_functions() -> None:
    """torch.func passes through the reference; the operator has no rule for it and refuses."""
    x = tokens()
    (expected,) = torch.autograd.grad(attend(x, GRID, NEAR).square().sum(), x)

    def loss(x: Tensor, backend: str) -> Tensor:
        return attend(x, GRID, NEAR, backend=backend).square().sum()

    given = x.detach()
    close(torch.func.grad(loss)(given, "reference"), expected)
    several = torch.stack([given, 2 * given])
    each = torch.stack([loss(one, "reference") for one in several])
    close(torch.func.vmap(loss, in_dims=(0, None))(several, "reference"), each)
    for transformed in (torch.func.grad(loss), torch.func.vmap(loss, in_dims=(0, None))):
        with pytest.raises(RuntimeError):
            transformed(several, "torch")
    _, rise = torch.func.jvp(lambda x: loss(x, "reference"), (given,), (given,))
    close(rise, (expected * given).sum())
    with pytest.raises(ct.UnsupportedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: loss(x, "torch"), (given,), (given,))


@pytest.mark.slow
def test_an_exported_program_is_refused_elsewhere(tmp_path: Path) -> None:
    program, x = torch.export.export(Model(backend="torch"), (tokens().detach(), GRID)), tokens().detach()
    torch.export.save(program, tmp_path / "program.pt2")
    script = """
import sys, torch, chronotope as ct
grid = ct.Grid(t=3, h=4, w=2, prefix=1)
torch.compile(lambda q: ct.attention(q, q, q, grid=grid), backend="eager")(torch.randn(1, 4, 25, 8).double())
try:
    torch.export.load(sys.argv[1]).module()(torch.randn(2, 25, 32).double(), grid)
except ct.ChronotopeError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "program.pt2")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "is of another process: run an exported program where it was exported" in said
    assert program.module()(x, GRID).isfinite().all()
