"""Recurrences over length: time for each token, share of the processor's peak, and where softmax attention loses."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

import chronotope as ct
from chronotope.bench.cases import BOTH, FORWARD
from chronotope.bench.referee import Lap, Run, paired
from chronotope.bench.results import Row, circumstances, times
from chronotope.bench.timing import Settings
from chronotope.recurrences.table import BACKENDS

HEADS, SIZE = 4, 64
PEAK, SOFTMAX = "matrix product", "causal SDPA"
SIDE = 2048
LONGEST_SOFTMAX = 16384
LONGEST_TRAINED = 16384
RIGHT = 1e-4
AT_LEAST = 32768
"""Tokens of a run: a shorter sequence is computed as often as makes so many, or waking threads up would be measured."""


@dataclass(frozen=True)
class Form:
    """What is carried: with decays for each token or channel, with the delta rule."""

    name: str
    decay: str | None = None
    delta: bool = False

    def inputs(self, n: int) -> dict[str, Tensor]:
        """Random tensors, from a fixed seed."""
        rng = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 1, HEADS, n, SIZE, generator=rng).unbind(0)
        out = {"q": q, "k": F.normalize(k, dim=-1), "v": v}
        if self.decay is not None:
            shape = (1, HEADS, n) if self.decay == "token" else (1, HEADS, n, SIZE)
            out["decay"] = -0.1 * torch.rand(shape, generator=rng)
        if self.delta:
            out["beta"] = torch.rand(1, HEADS, n, generator=rng)
        return out

    def operations(self, n: int, chunk: int) -> float:
        """Multiplications and additions of a forward pass: pairs of a chunk once, reading and writing the state."""
        pairs, state = SIZE * (chunk + 1), 2 * SIZE * SIZE
        each = 2 * pairs + 2 * state + (2 * pairs + state if self.delta else 0)
        return float(HEADS * n * each)


FORMS = (
    Form("sum"),
    Form("decay by token", "token"),
    Form("decay by channel", "channel"),
    Form("delta, decay by token", "token", delta=True),
)


def recurrences(settings: Settings) -> Iterator[list[Row] | str]:
    """Lengths from 1k to 64k, forward, and forward + backward on the shorter ones."""
    lengths = (256, 1024) if settings.quick else (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    crossed: dict[str, int] = {}
    perform: dict[str, list[float]] = {}
    for n in lengths:
        for rows in _length(n, settings):
            yield rows
            first = rows[0]
            if first.backend in (PEAK, SOFTMAX):
                continue
            label = f"{first.row}, {first.backend}"
            perform.setdefault(label, []).append((first.seconds_median or 0) / n)
            if (first.ratio_to_dense or 0) > 1:
                crossed.setdefault(label, n)
    for label, took in perform.items():
        where = f"faster than {SOFTMAX} from {crossed[label]:,} tokens on" if label in crossed else "never faster"
        yield (
            f"  {label}: {where}; time for each token from {1e6 * min(took):.2f} to {1e6 * max(took):.2f} us "
            f"over all lengths, {max(took) / min(took) - 1:.0%} apart"
        )


def _length(n: int, settings: Settings) -> Iterator[list[Row]]:
    """All rows of one length, timed in the same rounds."""
    runs: dict[str, Run] = {PEAK: _product()}
    if n <= LONGEST_SOFTMAX:
        runs[SOFTMAX] = _softmax(n)
    entries, errors = [], dict[str, float]()
    for form in FORMS:
        inputs = form.inputs(n)
        exact = ct.recurrence(**{name: x.double() for name, x in inputs.items()}, backend="torch")[0]  # type: ignore[arg-type]
        for backend in BACKENDS.values():
            out = None if backend.name == "reference" else _out(inputs, backend.name)
            if out is None:
                continue
            label = f"{form.name} | {backend.name}"
            errors[label] = float((out - exact).abs().max() / exact.abs().max())
            entries.append((form, backend, label))
            if errors[label] < RIGHT:
                runs[label] = _forward(inputs, backend.name)
                if n <= LONGEST_TRAINED:
                    runs[f"{label} | {BOTH}"] = _training(inputs, backend.name)
    again = max(1, AT_LEAST // n)
    repeated = {name: run if name == PEAK else _repeated(run, again) for name, run in runs.items()}
    seconds = {
        name: [parts[0] / (1 if name == PEAK else again) for parts in rounds]
        for name, rounds in paired(repeated, settings.rounds, 20.0).items()
    }
    for name in (PEAK, SOFTMAX):
        if name in seconds:
            yield [_row(name, n, name, FORWARD, settings, seconds[name])]
    peak = 2 * SIDE**3 / statistics.median(seconds[PEAK])
    for form, backend, label in entries:
        found = [(FORWARD, seconds.get(label)), (BOTH, seconds.get(f"{label} | {BOTH}"))]
        rows = [
            _row(form.name, n, backend.name, phase, settings, took, seconds.get(SOFTMAX) if phase == FORWARD else None)
            for phase, took in found
            if took is not None or phase == FORWARD
        ]
        fastest = form.operations(n, backend.chunk) / peak
        yield [_bounded(row, fastest, errors[label]) for row in rows]


def _out(inputs: dict[str, Tensor], backend: str) -> Tensor | None:
    """The output, unless the backend cannot run this form."""
    try:
        return ct.recurrence(**inputs, backend=backend)[0]  # type: ignore[arg-type]
    except ct.UnsupportedError:
        return None


def _repeated(run: Run, times: int) -> Run:
    def several(lap: Lap) -> None:
        for _ in range(times):
            run(lap)

    return several


def _product() -> Run:
    """The product that the processor's peak is measured by."""
    x, y = torch.randn(2, SIDE, SIDE).unbind(0)
    out = torch.empty(SIDE, SIDE)

    def run(lap: Lap) -> Tensor:
        return torch.mm(x, y, out=out)

    return run


def _softmax(n: int) -> Run:
    q, k, v = torch.randn(3, 1, HEADS, n, SIZE).unbind(0)

    def run(lap: Lap) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def _forward(inputs: dict[str, Tensor], backend: str) -> Run:
    def run(lap: Lap) -> object:
        return ct.recurrence(**inputs, backend=backend)  # type: ignore[arg-type]

    return run


def _training(inputs: dict[str, Tensor], backend: str) -> Run:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    dout = torch.randn_like(inputs["v"])

    def run(lap: Lap) -> object:
        out, _ = ct.recurrence(**leaves, backend=backend)  # type: ignore[arg-type]
        return torch.autograd.grad(out, list(leaves.values()), dout)

    return run


def _row(
    name: str, n: int, backend: str, phase: str, settings: Settings, seconds: list[float] | None,
    softmax: list[float] | None = None,
) -> Row:  # fmt: skip
    return Row(
        table="recurrences",
        row=name,
        pattern="",
        grid=repr(ct.Grid(n=n)),
        heads=HEADS,
        head_size=SIZE,
        dtype="float32",
        backend=backend,
        phase=phase,
        **times(seconds, softmax),
        **circumstances(settings.threads, settings.device),
    )


def _bounded(row: Row, fastest: float, error: float) -> Row:
    """The bound is the time of the counted operations at the peak of a matrix product."""
    row = replace(row, error=error)
    if row.phase != FORWARD or row.seconds_median is None:
        return row
    bound = None if row.dense_seconds_median is None else row.dense_seconds_median / fastest
    return replace(row, bound=bound, reached=fastest / row.seconds_median)
