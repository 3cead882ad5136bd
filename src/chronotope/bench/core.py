"""What `make bench` measures: planning, forward and backward against dense attention, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import chronotope as ct
from chronotope.bench.referee import fresh, paired, ratio
from chronotope.grid import Coords
from chronotope.papers.pattern.radial import radial
from chronotope.patterns import separable
from chronotope.planning import planner

Lines = list[str]
sdpa = torch.nn.functional.scaled_dot_product_attention


def planning() -> Lines:
    """Plan of a 3-D window on 8,192 tokens, against torch's block mask of the same relation."""
    from torch.nn.attention.flex_attention import create_block_mask

    grid = ct.Grid(t=8, h=32, w=32)
    where = ct.window(t=5, h=9, w=9)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = (q // 1024 - k // 1024).abs() <= 2
        near = near & ((q // 32 % 32 - k // 32 % 32).abs() <= 4)
        return near & ((q % 32 - k % 32).abs() <= 4)

    def forget() -> None:
        planner._plan.cache_clear()
        separable._reach.cache_clear()

    def plan_only() -> None:
        forget()
        ct.plan(where, grid)

    def plan_and_masks() -> None:
        forget()
        _ = ct.plan(where, grid).parts[0].tiles.groups

    runs: dict[str, Callable[[], object]] = {
        "create_block_mask": lambda: create_block_mask(visible, None, None, 8192, 8192, device="cpu"),
        "ct.plan": plan_only,
        "ct.plan + element masks": plan_and_masks,
    }
    seconds = paired(runs, rounds=5)
    lines = [f"planning {where!r} on {grid!r}, nothing cached"]
    for name, times in seconds.items():
        faster = ratio(seconds["create_block_mask"], times)
        lines.append(f"  {name:26} {1e3 * sorted(times)[len(times) // 2]:9.1f} ms   {faster:7.1f}x")
    return lines


def million(threads: int) -> Lines:
    """Plan of a million tokens: time and peak memory, in a process of its own."""
    code = """
import time
grid = ct.Grid(t=64, h=128, w=128)
where = ct.window(t=5, h=9, w=9) & ct.causal("t")
start = time.perf_counter()
plan = ct.plan(where, grid)
print(f"{time.perf_counter() - start:.2f} s, {len(plan.parts[0].tiles.found.rows):,} pairs of tiles, "
      f"density {plan.density:.6f}, in tiles {plan.tile_density:.6f}")
"""
    done = fresh(code, threads)
    return [
        "planning window(t=5, h=9, w=9) & causal('t') on Grid(t=64, h=128, w=128), 1,048,576 tokens",
        f"  {done.printed}; peak memory {done.added:.0f} MB above import, {done.whole:.0f} MB in all",
    ]


VIDEO = ct.Grid(t=8, h=32, w=32)
LONG = ct.Grid(t=32, h=16, w=16)


@dataclass(frozen=True)
class Case:
    """A row: one pattern, or several that are computed one after the other (divided attention)."""

    name: str
    patterns: tuple[ct.Pattern, ...]
    grid: ct.Grid = VIDEO


CASES = [
    Case("window 5x9x9", (ct.window(t=5, h=9, w=9),)),
    Case("divided", (ct.along("t"), ct.along("h", "w"))),
    Case("radial", (radial(),)),
    Case("radial, 32 frames", (radial(),), LONG),
    Case("spatial", (ct.along("h", "w"),)),
    Case("temporal", (ct.along("t"),)),
    Case("axial", (ct.along("t"), ct.along("h"), ct.along("w"))),
    Case("blocks 2x8x8", (ct.blocks(t=2, h=8, w=8),)),
    Case("shifted blocks 2x8x8", (ct.blocks(t=2, h=8, w=8, shift={"t": 1, "h": 4, "w": 4}),)),
    Case("neighborhood 5x9x9", (ct.window(t=5, h=9, w=9, edge="shift"),)),
    Case("dilated 5x9x9", (ct.window(t=5, h=9, w=9, dilation={"h": 2, "w": 2}),)),
    Case("strided t4 h4 w4", (ct.strided(t=4, h=4, w=4),)),
    Case("window & causal t", (ct.window(t=5, h=9, w=9) & ct.causal("t"),)),
    Case("causal t", (ct.causal("t"),)),
    Case("causal", (ct.causal(),)),
    Case("full", (ct.full(),)),
]


def attention_table() -> Iterator[str]:
    """Forward and forward+backward of each case against dense SDPA; each output is checked first."""
    yield f"attention, B=1 H=4 D=64 float32, 8,192 tokens ({VIDEO!r}; long: {LONG!r})"
    yield "  against scaled_dot_product_attention on all pairs; layout and masks included, plans warm"
    yield "  bound: 1 / share of pairs in tiles; reached: share of the bound"
    yield (
        f"  {'pattern':22} {'density':>8} {'in tiles':>8} {'bound':>8} {'forward':>9} {'reached':>8}"
        f" {'fwd+bwd':>9} {'reached':>8} {'error':>8}"
    )
    for case in CASES:
        yield _row(case)


def _row(case: Case) -> str:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, case.grid.size, 64, generator=generator) for _ in range(3))
    plans = [ct.plan(pattern, case.grid) for pattern in case.patterns]
    error = max(_error(q, k, v, plan) for plan in plans)
    if not error < 1e-4:
        return f"  {case.name:22} WRONG: largest difference {error:.1e}; no time is given"
    in_tiles = sum(plan.tile_density for plan in plans)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = [ct.attention(q, k, v, grid=case.grid, where=plan) for plan in plans]
        return sum(outs[1:], start=outs[0])  # type: ignore[arg-type, return-value]

    def train(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        run(*leaves).sum().backward()

    forward = paired({"dense": lambda: sdpa(q, k, v), "ours": lambda: ours(q, k, v)}, rounds=7)
    both = paired({"dense": lambda: train(sdpa), "ours": lambda: train(ours)}, rounds=3)
    gain, gain_both = ratio(forward["dense"], forward["ours"]), ratio(both["dense"], both["ours"])
    return (
        f"  {case.name:22} {sum(plan.density for plan in plans):8.4f} {in_tiles:8.4f} {1 / in_tiles:7.1f}x"
        f" {gain:8.1f}x {gain * in_tiles:8.2f} {gain_both:8.1f}x {gain_both * in_tiles:8.2f} {error:8.1e}"
    )


def _error(q: Tensor, k: Tensor, v: Tensor, plan: ct.Plan) -> float:
    """Largest difference of a sample of rows from dense attention under the mask, in float64."""
    ours = ct.attention(q, k, v, grid=plan.grid, where=plan)
    rows = torch.linspace(0, plan.grid.size - 1, 257).long()
    everywhere = torch.arange(plan.grid.size)
    seen = plan.where.sees(Coords.of(plan.grid, rows).view(-1, 1), Coords.of(plan.grid, everywhere).view(1, -1))
    want = sdpa(q[:, :, rows].double(), k.double(), v.double(), attn_mask=seen)
    return float((ours[:, :, rows] - want).abs().max())  # type: ignore[call-overload]


def memory(threads: int) -> Lines:
    """Peak memory of one forward and backward pass under a window, from 8k to 128k tokens."""
    lines = ["peak memory above the input, window(t=5, h=9, w=9), H=4 D=64 float32; q+k+v+out are 1.0"]
    for frames in (8, 32, 128):
        code = f"""
grid = ct.Grid(t={frames}, h=32, w=32)
q, k, v = (torch.randn(1, 4, grid.size, 64, requires_grad=%s) for _ in range(3))
before()
out = ct.attention(q, k, v, grid=grid, where=ct.window(t=5, h=9, w=9))
"""
        base = 4 * frames * 1024 * 4 * 64 * 4 / 2**20
        forward = fresh(code % "False", threads).added
        both = fresh(code % "True" + "out.sum().backward()", threads).added
        lines.append(
            f"  {frames * 1024:7,} tokens: forward {forward:6.0f} MB ({forward / base:4.2f} of q+k+v+out), "
            f"forward and backward {both:6.0f} MB ({both / base:4.2f})"
        )
    return lines
