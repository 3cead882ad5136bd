"""Peak memory of attention, each time in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import chronotope as ct
from chronotope.bench.cases import BOTH, FORWARD
from chronotope.bench.competitors import COMPILED, DEFINITION
from chronotope.bench.referee import fresh
from chronotope.bench.results import Row, circumstances
from chronotope.bench.timing import Settings

HEADS, SIZE = 4, 64
WHERE = ct.window(t=5, h=9, w=9)
CODE = """
where = {where}
small, grid = ct.Grid(t=4, h=4, w=4), {grid}
# A first call loads the kernel's library; what that takes does not grow with the input.
x = torch.randn(1, 1, small.size, {size}, device=device, requires_grad={trains})
out = ct.attention(x, x, x, grid=small, where=where, backend={backend!r})
if {trains}:
    out.sum().backward()
before()
q, k, v = (torch.randn(1, {heads}, grid.size, {size}, device=device, requires_grad={trains}) for _ in range(3))
out = ct.attention(q, k, v, grid=grid, where=where, backend={backend!r})
if {trains}:
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
"""


def memory(settings: Settings) -> Iterator[list[Row] | str]:
    """From 8k to 128k tokens under a window; kernels but the first at the middle one."""
    frames = (4,) if settings.quick else (8, 32, 128)
    apart = (DEFINITION, COMPILED)
    names = [one.name for one in ct.backends() if settings.device in one.devices and one.name not in apart]
    for i, backend in enumerate(names):
        for count in frames if i == 0 else frames[len(frames) // 2 :][:1]:
            grid = ct.Grid(t=count, h=32, w=32)
            yield [_row(grid, backend, phase, settings) for phase in (FORWARD, BOTH)]


def _row(grid: ct.Grid, backend: str, phase: str, settings: Settings) -> Row:
    code = CODE.format(
        where=f"ct.{WHERE!r}", grid=f"ct.{grid!r}", backend=backend, heads=HEADS, size=SIZE, trains=phase == BOTH
    )
    used = fresh(code, settings.threads, settings.device).added
    return Row(
        table="memory",
        row=f"{grid.size:,} tokens",
        pattern=repr(WHERE),
        grid=repr(grid),
        heads=HEADS,
        head_size=SIZE,
        dtype="float32",
        backend=backend,
        phase=phase,
        peak_mb=used,
        peak_share=used / (4 * grid.size * HEADS * SIZE * 4 / 2**20),
        rounds=1,
        **circumstances(settings.threads, settings.device),
    )
