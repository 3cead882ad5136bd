"""Teaching a model through Lightning: validated, kept, and resumed as if nothing had happened."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.saving import Saved
from chronotope.tasks.learning.log import Log
from chronotope.tasks.learning.order import Order, Stream, generator
from chronotope.tasks.learning.results import RESULT, Result
from chronotope.tasks.learning.settings import Settled
from chronotope.tasks.learning.task import TEST, VALID, Numbers, Schedule
from chronotope.tasks.training import Bar, fit, set_rate

LAST, BEST, LOG = "last.ckpt", "best.pt", "log.csv"
SAVE_EVERY = 20.0  # seconds between checkpoints
FIRST = os.environ.get("LOCAL_RANK", "0") == "0"
"""Lightning starts the same command once more for each further process: those write and say nothing."""


def learn(settled: Settled, out: Path, console: Console, *, seed: int = 0, devices: int = 1) -> Result:
    """Trains a model, measures it, and writes `result.json`; the same call goes on where another was killed.

    In `out`: `last.ckpt` (where it goes on), `best.pt` (the weights that validated best), `log.csv`, `result.json`, and
    the model as its `save_pretrained` writes it. `devices`: processes that share each batch.
    """
    out.mkdir(parents=True, exist_ok=True)
    console.quiet = console.quiet or not FIRST
    module, keeper = Learner(settled, seed), Keeper(settled, out, seed)
    last = out / LAST
    if last.exists():
        keeper.load_state_dict(torch.load(last, weights_only=True)["callbacks"][keeper.state_key])
        console.print(f"{out} has a training: going on from step {keeper.done}")
    if not keeper.over:
        order = Order(settled.task.examples, settled.schedule.batch, seed)
        spread: dict[str, Any] = {} if devices == 1 else {"strategy": "ddp", "devices": devices}
        fit(
            module,
            Stream(settled.task, order),
            last if last.exists() else None,
            clip=settled.schedule.clip or None,
            max_epochs=-1,
            limit_val_batches=0,
            callbacks=[keeper, Bar(keeper, console)],
            default_root_dir=out,
            **spread,
        )
        keeper.load_state_dict(torch.load(last, weights_only=True)["callbacks"][keeper.state_key])
    model = settled.make()
    model.load_state_dict(torch.load(out / BEST, weights_only=True))
    result = Result.of(
        settled,
        seed,
        model,
        keeper.seconds,
        keeper.done,
        measured(settled, model, VALID),
        measured(settled, model, TEST),
    )
    if FIRST:
        result.write(out / RESULT)
        if isinstance(model, Saved):
            model.save_pretrained(out / "model")
    return result


def measure_again(settled: Settled, out: Path) -> dict[str, Numbers]:
    """The metrics of the best weights in a folder that `learn` wrote."""
    if not (out / BEST).is_file():
        raise ChronotopeError(f"{out} has no {BEST}; give the folder that `chronotope train` wrote.")
    model = settled.make()
    model.load_state_dict(torch.load(out / BEST, weights_only=True))
    return {part: measured(settled, model, part) for part in (VALID, TEST)}


@torch.inference_mode()
def measured(settled: Settled, model: nn.Module, part: str) -> Numbers:
    """The metrics of a model as it is used."""
    was = model.training
    model.eval()
    found = settled.task.measure(model, part)
    model.train(was)
    return found


class Learner(lightning.LightningModule):
    """A model of a task and its loss."""

    def __init__(self, settled: Settled, seed: int):
        super().__init__()
        self.settled, self.seed = settled, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = settled.make()

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The loss of one batch. Dropout draws the same numbers at every run of a step."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.seed, self.trainer.global_step, self.trainer.global_rank).initial_seed())
            return self.settled.task.loss(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the keeper sets its rate."""
        own = self.settled.schedule
        return torch.optim.AdamW(self.parameters(), lr=own.rate, betas=(0.9, own.beta2), weight_decay=own.decay)


def rate_at(schedule: Schedule, step: int) -> float:
    """The learning rate of a step."""
    over = step / schedule.steps
    rise = 1.0 if schedule.warmup == 0 else min(1.0, (step + 1) / (schedule.steps * schedule.warmup))
    return schedule.rate * rise * ((1 + math.cos(math.pi * over)) / 2 if schedule.falls else 1.0)


class Keeper(lightning.Callback):
    """Sets the rate, validates, keeps the best weights and a checkpoint, and ends the training."""

    def __init__(self, settled: Settled, out: Path, seed: int):
        self.settled, self.out, self.seed = settled, out, seed
        self.seconds, self.done, self.loss = 0.0, 0, math.nan
        self.best, self.since = math.nan, 0
        self.course = Log(out / LOG)

    @property
    def over(self) -> bool:
        """Whether the training has ended."""
        return self.done >= self.settled.schedule.steps or self.since >= self.settled.schedule.patience

    def fraction(self) -> float:
        """Share of the steps that are over."""
        return 1.0 if self.over else self.done / self.settled.schedule.steps

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint carries."""
        facts = {"settings": self.settled.key, "seed": self.seed}
        return {"seconds": self.seconds, "done": self.done, "best": self.best, "since": self.since, **facts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint. Raises ChronotopeError where it is of another training."""
        given = dict(state_dict)
        if (given.pop("settings"), given.pop("seed")) != (self.settled.key, self.seed):
            raise ChronotopeError(f"{self.out} has a training with other settings; give another folder, or remove it.")
        vars(self).update(given)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Starts counting."""
        self.last = self.saved = time.monotonic()
        self.course.keep(self.done)

    def on_train_batch_start(self, trainer: Any, module: lightning.LightningModule, batch: Any, index: int) -> None:
        """Sets the rate of this step."""
        set_rate(trainer.optimizers[0], rate_at(self.settled.schedule, self.done))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Counts the step; validates, saves or stops where it is time."""
        self.done += 1
        self.loss = float(outputs["loss"])
        validates = self.done % self.settled.schedule.every == 0 or self.done == self.settled.schedule.steps
        if validates:
            self._validate(trainer, module)
        now = time.monotonic()
        self.seconds += now - self.last
        self.last = now
        # Several processes save together, and their clocks differ.
        if validates or (trainer.world_size == 1 and now - self.saved >= SAVE_EVERY):
            self._save(trainer)
        trainer.should_stop = self.over

    def _validate(self, trainer: lightning.Trainer, module: Learner) -> None:
        task = self.settled.task
        found = measured(self.settled, module.model, VALID)
        value = found[task.best]
        if math.isnan(value):
            raise ChronotopeError(f"{task.best} is nan after {self.done} steps: the training diverged; lower the rate.")
        better = not (value <= self.best if task.larger else value >= self.best)  # the first beats NaN
        self.since = 0 if better else self.since + 1
        if better:
            self.best = value
        if trainer.is_global_zero:
            self.course.add({"step": self.done, "loss": self.loss, **found})
            if better:
                torch.save(module.model.state_dict(), _part(self.out / BEST))
                os.replace(_part(self.out / BEST), self.out / BEST)

    def _save(self, trainer: lightning.Trainer) -> None:
        self.saved = time.monotonic()
        trainer.save_checkpoint(_part(self.out / LAST))  # which only the first process writes
        if trainer.is_global_zero:
            os.replace(_part(self.out / LAST), self.out / LAST)


def _part(path: Path) -> Path:
    """Where a file is written first: it appears whole or not at all, since one that a kill cuts short would be lost."""
    return path.with_suffix(".part")
