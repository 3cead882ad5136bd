"""Light fine-tuning after patching: the patched model learns to say what the dense one says."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from chronotope.adapt import Assignment, apply
from chronotope.adapt.attach import Grids, attention_names
from chronotope.adapt.inputs import Batch, call, output_of
from chronotope.errors import ChronotopeError
from chronotope.tasks.training import adam, fit, one_cycle


def distil(
    model: nn.Module,
    assignment: Assignment | str | Path,
    batches: Sequence[Batch],
    *,
    steps: int = 100,
    rate: float = 1e-4,
    rank: int | None = None,
    grid: Grids | None = None,
    seed: int = 0,
) -> list[float]:
    """Trains a model in place, patched, towards its own dense outputs: |y' - y|^2 / |y|^2, batch by batch.

    Args:
        model: as for `ct.adapt.attach`; it is left unpatched, in eval mode.
        assignment: what it is patched with while it learns.
        batches: its inputs, drawn at random.
        rank: of LoRA on the linear layers within its attention layers (through peft), merged in the end; None: all
            weights learn.

    Returns: the loss of each step.

    Raises ChronotopeError: no inputs or steps, or peft is missing.
    """
    if not batches or steps < 1:
        raise ChronotopeError(f"distil: {len(batches)} inputs, steps={steps}; expected 1 or more of each.")
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    wanted = {name: weight.requires_grad for name, weight in model.named_parameters()}
    adapters = None if rank is None else _lora(model, rank)
    student = Distillation(model, teacher, steps, rate)
    with apply(model, assignment, grid):
        fit(student, DataLoader(Drawn(batches, seed), batch_size=None), max_steps=steps)
    if adapters is not None:
        _merge(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(wanted[name])
    model.eval()
    return student.losses


class Distillation(lightning.LightningModule):
    """A patched model and the dense one that it follows."""

    def __init__(self, model: nn.Module, teacher: nn.Module, steps: int, rate: float):
        super().__init__()
        self.model, self.steps, self.rate = model, steps, rate
        self.losses: list[float] = []
        self._teacher = [teacher]  # not a part of this module: nothing of it is trained or saved

    def training_step(self, batch: Batch, index: int) -> Float[Tensor, ""]:
        with torch.no_grad():
            expected = output_of(call(self._teacher[0], batch))
        found = output_of(call(self.model, batch))
        loss = (found - expected).square().sum() / expected.square().sum()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return one_cycle(adam(self.model, self.rate), self.rate, self.steps)


class Drawn(IterableDataset[Batch]):
    """Inputs at random, without end; the same for the same seed."""

    def __init__(self, batches: Sequence[Batch], seed: int):
        self.batches, self.seed = batches, seed

    def __iter__(self) -> Iterator[Batch]:
        rng = torch.Generator().manual_seed(self.seed)
        while True:
            yield self.batches[int(torch.randint(len(self.batches), (1,), generator=rng))]


def _lora(model: nn.Module, rank: int) -> list[str]:
    """Low-rank additions to the linear layers within attention layers; everything else stands still."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ChronotopeError("LoRA needs peft: pip install 'chronotope[adapt]'.") from None
    layers = attention_names(model)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{layer}.") for layer in layers)
    ]
    if not names:
        raise ChronotopeError("the attention layers of this model have no linear layers that LoRA could add to.")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)
    return names


def _merge(model: nn.Module) -> None:
    """Adds what was learned to the weights, and takes the additions away."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[operator]
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
