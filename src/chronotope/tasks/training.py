"""Training the dense model through Lightning, so that it can be interrupted anywhere; and the short tuning of a row."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import chronotope
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.models import Predictor
from chronotope.tasks.clips import Batches, ClipModule, Clips

WARMUP = 0.1  # share of the training over which the learning rate rises
TUNING_RATE = 0.1  # of the learning rate of the training
CLIP_NORM = 1.0
SAVES = 12  # checkpoints in a training
SAVE_EVERY = (0.2, 5.0)  # seconds between checkpoints, least and most


@dataclass(frozen=True)
class Recipe:
    """What is trained and how long: `steps`, or else `minutes` of wall-clock time, interruptions not counted."""

    grid: Grid
    patch: int = 4
    channels: int = 1
    dim: int = 64
    heads: int = 4
    layers: int = 3
    minutes: float = 1.0
    steps: int | None = None
    batch: int = 2
    rate: float = 3e-3
    seed: int = 0

    def model(self) -> Predictor:
        """The untrained dense model, of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Predictor(
                self.grid, patch=self.patch, channels=self.channels, dim=self.dim, heads=self.heads, layers=self.layers
            )

    def key(self, clips: Clips) -> str:
        """A short hash of the recipe, the clips and the version: equal keys, equal training."""
        facts = {**asdict(self), "grid": repr(self.grid), "clips": clips.digest(), "version": chronotope.__version__}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Trained:
    """The dense model, how many steps it had, and whether it was there already."""

    model: Predictor
    steps: int
    reused: bool


def train(recipe: Recipe, clips: Clips, folder: Path, console: Console) -> Trained:
    """Trains the dense model of a recipe, or goes on where an interrupted run of the same recipe stopped.

    The checkpoint is `folder/dense-<key>.ckpt`; with the same recipe and clips a finished training is read and not
    repeated. With `steps` given, the weights are those of an uninterrupted run to the bit.
    """
    path = folder / f"dense-{recipe.key(clips)}.ckpt"
    clock = Clock(recipe, path)
    module = DenseTraining(recipe)
    if path.exists():
        saved = torch.load(path, weights_only=True)
        clock.load_state_dict(saved["callbacks"][clock.state_key])
        if clock.fraction() >= 1:
            module.load_state_dict(saved["state_dict"])
            return Trained(module.model.eval(), clock.done, True)
        console.print(f"an interrupted training is there: going on from step {clock.done}")
    fit(
        module,
        ClipModule(clips, recipe.batch, recipe.seed),
        path if path.exists() else None,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[clock, Bar(clock, console)],
        default_root_dir=folder,
    )
    return Trained(module.model.eval(), clock.done, False)


def tune(model: Predictor, clips: Clips, recipe: Recipe, steps: int) -> None:
    """Some steps of training in place, at a falling rate: the same batches in the same order for every model."""
    optimizer = adam(model, TUNING_RATE * recipe.rate)
    model.train()
    # Another stream of batches than that of the training: its first ones are already learned.
    batches = Batches(clips.train, recipe.batch, recipe.seed + 1)
    for step, batch in enumerate(islice(iter(batches), steps)):
        set_rate(optimizer, TUNING_RATE * recipe.rate * min(1, (step + 1) / 4) * (1 - step / steps))
        optimizer.zero_grad()
        model.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
    model.eval()


def adam(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW as transformers are trained with it."""
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)


def one_cycle(optimizer: torch.optim.Optimizer, rate: float, steps: int) -> Any:
    """For Lightning: a rate that rises for a tenth of the steps and falls to 0."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DenseTraining(lightning.LightningModule):
    """The dense predictor and its loss: mean squared error of each frame, predicted from those before.

    Always whole frames: trained on parts of them, dense attention would be new to the distances of the whole, and
    every pattern that cuts them off would seem to help.
    """

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe, self.model = recipe, recipe.model()

    def training_step(self, batch: Float[Tensor, "b frames c height width"], index: int) -> Tensor:
        """The loss of one batch."""
        return self.model.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the clock sets its rate."""
        return adam(self.model, self.recipe.rate)


class Clock(lightning.Callback):
    """Ends the training, sets the learning rate by the share that is over, and keeps a checkpoint.

    rate(x) = rate * min(1, x / warmup) * (1 + cos(pi x)) / 2,  x = share of the steps, or of the seconds, that are over

    Seconds are carried from run to run with the checkpoint, and so an interruption costs only what came after it.
    """

    def __init__(self, recipe: Recipe, path: Path):
        self.recipe, self.path = recipe, path
        self.seconds, self.done, self.loss = 0.0, 0, math.nan
        least, most = SAVE_EVERY
        self.every = min(most, max(least, 60 * recipe.minutes / SAVES))

    def fraction(self) -> float:
        """Share of the training that is over, 0 to 1 and a little above."""
        if self.recipe.steps is not None:
            return self.done / self.recipe.steps
        return self.seconds / (60 * self.recipe.minutes)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint carries."""
        return {"seconds": self.seconds, "done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the clock to a checkpoint."""
        self.seconds, self.done = state_dict["seconds"], state_dict["done"]

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Starts counting."""
        self.last = self.saved = time.monotonic()

    def on_train_batch_start(self, trainer: Any, module: lightning.LightningModule, batch: Any, index: int) -> None:
        """Sets the rate of this step."""
        over = min(1.0, self.fraction())
        rise = min(1.0, (over + 1e-3) / WARMUP)
        set_rate(trainer.optimizers[0], self.recipe.rate * rise * (1 + math.cos(math.pi * over)) / 2)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Counts the step; stops or saves where it is time."""
        now = time.monotonic()
        self.seconds += now - self.last
        self.last = now
        self.done += 1
        self.loss = float(outputs["loss"])
        over = self.fraction() >= 1
        if over or now - self.saved >= self.every:
            self._save(trainer)
            self.saved = time.monotonic()
        if over:
            trainer.should_stop = True

    def _save(self, trainer: lightning.Trainer) -> None:
        """A checkpoint appears whole or not at all: one that a kill cuts short would be lost."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        trainer.save_checkpoint(part)
        os.replace(part, self.path)


@runtime_checkable
class Counts(Protocol):
    """What a bar shows: steps, the loss of the last one, the share of the training that is over."""

    done: int
    loss: float

    def fraction(self) -> float:
        """The share."""
        ...


class Bar(lightning.Callback):
    """A progress bar: the share of the training that is over, the step and the loss."""

    def __init__(self, clock: Counts, console: Console):
        columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
        self.clock, self.progress = clock, Progress(*columns, console=console)
        self.task = self.progress.add_task("training", total=1.0, told="")

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Shows the bar."""
        self.progress.start()
        self._tell()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Moves it."""
        self._tell()

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Leaves it where it is."""
        self.progress.stop()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Gives the terminal back."""
        self.progress.stop()
        if isinstance(exception, KeyboardInterrupt):
            told = f"interrupted at step {self.clock.done}: the same command goes on from the last checkpoint"
            self.progress.console.print(told)

    def _tell(self) -> None:
        loss = "" if math.isnan(self.clock.loss) else f"  loss {self.clock.loss:.5f}"
        told = f"step {self.clock.done}{loss}"
        self.progress.update(self.task, completed=min(1.0, self.clock.fraction()), told=told)


def check(recipe: Recipe) -> None:
    """Raises ChronotopeError for a length of training that is not positive."""
    if not (math.isfinite(recipe.minutes) and recipe.minutes > 0):
        raise ChronotopeError(f"minutes={recipe.minutes}: expected a positive number of minutes to train, such as 1.")
    if recipe.steps is not None and recipe.steps < 1:
        raise ChronotopeError(f"steps={recipe.steps}: expected 1 or more steps to train.")


def set_rate(optimizer: Any, rate: float) -> None:
    """The learning rate of every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def fit(
    module: lightning.LightningModule,
    data: Any,
    checkpoint: Path | None = None,
    *,
    clip: float | None = CLIP_NORM,
    devices: int = 1,
    **more: Any,
) -> None:
    """Trains a module through Lightning on the CPU, in silence; `data` and `more` as its Trainer takes them."""
    with _quiet():
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=devices,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            gradient_clip_val=clip,
            **more,
        )
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's notes on hardware and workers do not concern a training on the CPU from memory; its errors do."""
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
