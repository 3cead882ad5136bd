"""What holds for a model that is patched: the rows of the table in docs/adapted.md."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo_diffusers
import zoo_transformers
from reference import masked
from torch import Tensor, nn

import chronotope as ct
from chronotope.adapt import attach
from chronotope.adapt.profile import output_of

CLOSE = 2e-5  # of the largest output, float32
KINDS = {"transformers": zoo_transformers.MODELS, "diffusers": zoo_diffusers.MODELS}
LEFT = {"videomae_pretraining"}  # drops patches, so that no grid is left: refused
BY_THEMSELVES = {"bloom", "mpt", "timesformer"}  # write attention out, so that no call can be seen: listed so


@dataclass(frozen=True)
class Case:
    """A model of either zoo, and what a window is on its tokens."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    where: ct.Pattern
    reference: dict[str, Any]
    loop: Callable[[nn.Module], Tensor] | None
    kept: slice | Tensor = field(default_factory=lambda: slice(None))

    def run(self) -> Tensor:
        out = output_of(self.model(**self.inputs))
        return out[self.kept] if isinstance(self.kept, Tensor) else out


def case(library: str, name: str) -> Case:
    subject = KINDS[library][name]()
    model, inputs, grid = subject.model, subject.inputs, subject.grid
    where = ct.window(n=5) if grid is None else ct.window(**dict.fromkeys(grid.axes, 3))
    if library == "diffusers":
        reference = {name: getattr(subject, name) for name in ("grid", "text", "after", "ahead", "parts")}
        noise = subject.noise
        loop = None if subject.sample is None else lambda own: subject.sample(own, noise)
        return Case(name, model, inputs, where, reference, loop)
    # What hidden tokens of text get is not defined; they are seen by nobody.
    hides = inputs.get("attention_mask")
    out = output_of(model(**inputs))
    kept = hides.bool() if hides is not None and hides.shape == out.shape[:2] else slice(None)
    given = {"max_new_tokens": 5, "do_sample": False}
    loop = (lambda own: own.generate(**inputs, **given).float()) if subject.generates else None
    return Case(name, model, inputs, where, {"grid": grid}, loop, kept)


def rows(library: str) -> Iterator[tuple[str, list[str]]]:
    for name in KINDS[library]:
        if name not in LEFT:
            yield name, row(library, name)


def line(name: str, cells: list[str]) -> str:
    """As it stands in the page."""
    return f"| `{name}` | {' | '.join(cells)} |"


def row(library: str, name: str) -> list[str]:
    """Layers patched, and what holds: yes, -, or what was found instead."""
    torch.manual_seed(0)
    own = case(library, name)
    before, hooks = own.run(), hooked(own.model)
    with torch.no_grad(), attach(own.model, ct.full()) as handle:
        full = own.run()
        done = sum(bool(layer.done) for layer in handle.layers)
        total = len(handle.layers)
    patched = [told(full, before), *window(own), loops(own)] if done else ["-"] * 4
    cells = [f"{done} of {total}", *patched, saved(own, before)]
    return [*cells, "yes" if torch.equal(own.run(), before) and hooked(own.model) == hooks else "no"]


def told(found: Tensor, expected: Tensor) -> str:
    off = float((found - expected).detach().abs().max() / expected.detach().abs().max())
    return "yes" if off < CLOSE else f"off by {off:.1e}"


def window(own: Case) -> list[str]:
    """The outputs under a window, and the gradient of every parameter, against the masked original."""
    results = []
    for patch in (lambda: masked(own.model, own.where, **own.reference), lambda: attach(own.model, own.where)):
        own.model.zero_grad()
        with patch():
            out = own.run()
            weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
            (out * weight).sum().backward()
        grads = [p.grad.clone() for p in own.model.parameters() if p.grad is not None]
        results.append((out.detach(), grads))
    own.model.zero_grad()
    (expected, slopes), (found, grads) = results
    scale = max(float(g.abs().max()) for g in slopes)
    off = max(float((a - b).abs().max()) for a, b in zip(grads, slopes, strict=True)) / scale
    return [told(found, expected), "yes" if off < CLOSE else f"off by {off:.1e}"]


@torch.no_grad()
def loops(own: Case) -> str:
    """Generation with its cache, or a sampling loop: as before under `full()`."""
    if own.loop is None:
        return "-"
    before = own.loop(own.model)
    with attach(own.model, ct.full()):
        return told(own.loop(own.model), before)


@torch.no_grad()
def saved(own: Case, before: Tensor) -> str:
    """What is saved while a pattern is attached is the model as it was."""
    if not hasattr(own.model, "save_pretrained"):
        return "-"
    with tempfile.TemporaryDirectory() as folder:
        with attach(own.model, own.where):
            own.model.save_pretrained(folder)
        again = type(own.model).from_pretrained(folder).eval()
    out = output_of(again(**own.inputs))
    return told(out[own.kept] if isinstance(own.kept, Tensor) else out, before)


def hooked(model: nn.Module) -> list[int]:
    """How many hooks each module has."""
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
