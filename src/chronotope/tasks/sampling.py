"""A video diffusion transformer, sampled under patterns: time, and distance to what the dense model makes of the noise.

Radial attention, mixtures of blocks and a searched choice are attached to the trained model as it is, and once more
after a light fine-tuning towards the dense model, each in its own copy.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from chronotope.adapt import Assignment, apply, profile, search
from chronotope.adapt.attach import attention_names
from chronotope.adapt.candidates import candidates
from chronotope.adapt.outcome import interval
from chronotope.adapt.search import density
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.models.diffusion import flow_sample
from chronotope.models.video_dit import VideoDiT
from chronotope.nn import Attention
from chronotope.papers.pattern.radial import radial
from chronotope.papers.routing.vmoba import vmoba
from chronotope.patterns import Pattern
from chronotope.tasks.distilling import distil

LEVELS = (0.25, 0.5, 0.75)
"""Times of the flow between which layers are profiled apart, and have patterns of their own."""
SHARES = {"searched": 1.0, "searched, half as dense": 0.5}
"""Densities of searched choices, as shares of that of radial attention."""


@dataclass(frozen=True)
class Sampled:
    """distances: |sample - dense sample| / |dense sample| of each noise. speedup: of sampling, the median of pairs."""

    name: str
    density: float
    distances: tuple[float, ...]
    seconds: float
    speedup: float

    @property
    def distance(self) -> float:
        return statistics.fmean(self.distances)


def compare(
    model: VideoDiT,
    clips: Float[Tensor, "n t c h w"],
    *,
    samples: int = 8,
    steps: int = 16,
    tuning: int = 0,
    rate: float = 1e-4,
    rounds: int = 3,
    seed: int = 0,
    console: Console | None = None,
) -> list[Sampled]:
    """Each patch without and, where `tuning` is not 0, with so many steps of fine-tuning.

    clips: real ones, from which the states are made that the search and, each step another, the fine-tuning see; their
    shape is that of the samples.
    """
    if len(clips) < 2:
        raise ChronotopeError(f"{len(clips)} clips: expected 2 or more, to choose by.")
    console = Console(quiet=True) if console is None else console
    model = model.eval()
    grid = model.embed(clips[:1])[1]
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, *clips.shape[1:], generator=rng)
    states = [_state(clip[None], t, rng) for clip, t in zip(clips, torch.linspace(0.05, 0.95, len(clips)), strict=True)]
    learnt = [_state(clips[i % len(clips)][None], torch.rand((), generator=rng), rng) for i in range(tuning)]
    dense = sample(model, noise, steps)
    rows = []
    for name, patch in patches(model, grid, states).items():
        for tuned in (False, True) if tuning else (False,):
            own = copy.deepcopy(model)
            if tuned:
                distil(own, patch, learnt, steps=tuning, rate=rate, grid=grid, seed=seed)
            rows.append(_row(f"{name}, tuned" if tuned else name, own, patch, grid, noise, steps, dense, model, rounds))
            console.print(f"{rows[-1].name}: density {patch.density:.3f}, distance {rows[-1].distance:.3f}")
    return rows


def patches(model: VideoDiT, grid: Grid, states: list[tuple[Tensor, Tensor]]) -> dict[str, Assignment]:
    """By name."""
    names = attention_names(model)
    heads: int = next(one.heads for one in model.modules() if isinstance(one, Attention))
    narrowest = max(1, grid.places // grid.sizes["t"] // 16)
    out: dict[str, Assignment] = {}
    layers = {"radial attention": dict.fromkeys(names, (radial(block=narrowest),) * heads)}
    layers["mixture of blocks"] = {name: (vmoba(layer),) * heads for layer, name in enumerate(names)}
    for paper, own in layers.items():
        out[paper] = Assignment(own, density=_density(own, grid, states, model))
    seen = profile(model, states, candidates(grid), grid=grid, levels=LEVELS)
    radials = out["radial attention"].density
    return out | {name: search(seen, max_density=share * radials) for name, share in SHARES.items()}


def _density(
    layers: dict[str, tuple[Pattern, ...]], grid: Grid, states: list[tuple[Tensor, Tensor]], model: VideoDiT
) -> float:
    """Pairs in tiles, as a profile of a few states finds them."""
    tried = dict.fromkeys(one for own in layers.values() for one in own)
    return density(profile(model, states[:2], tried, grid=grid, queries=1), layers)


@torch.no_grad()
def sample(model: VideoDiT, noise: Float[Tensor, "n *s"], steps: int) -> Float[Tensor, "n *s"]:
    """A clip of each noise, one at a time."""
    return torch.cat([flow_sample(model, one[None], steps) for one in noise])


def _state(clip: Float[Tensor, "1 *s"], t: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A clip on its way, and the time."""
    noise = torch.randn(clip.shape, generator=rng)
    return t * clip + (1 - t) * noise, t[None]


def _row(
    name: str, own: VideoDiT, patch: Assignment, grid: Grid, noise: Tensor, steps: int, dense: Tensor, model: VideoDiT,
    rounds: int,
) -> Sampled:  # fmt: skip
    with apply(own, patch, grid):
        made = sample(own, noise, steps)
    lost = (made - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)
    pairs = []
    for _ in range(rounds):
        plain = _seconds(model, noise[:1], steps)
        with apply(own, patch, grid):
            pairs.append((plain, _seconds(own, noise[:1], steps)))
    return Sampled(
        name, patch.density, tuple(lost.tolist()), statistics.median(new for _, new in pairs),
        statistics.median(old / new for old, new in pairs),
    )  # fmt: skip


def _seconds(model: VideoDiT, noise: Tensor, steps: int) -> float:
    start = time.perf_counter()
    sample(model, noise, steps)
    return time.perf_counter() - start


def table(rows: list[Sampled]) -> Table:
    """One line for each patch."""
    out = Table("patch", "density", "distance to the dense sample", "sampling", "bound of its attention")
    for one in rows:
        spread = interval(one.distances)
        out.add_row(
            one.name, f"{one.density:.3f}", f"{one.distance:.3f} ± {spread:.3f}", f"{one.speedup:.2f}x",
            f"{1 / one.density:.1f}x",
        )  # fmt: skip
    return out
