"""The order of examples: a function of seed and step, so that a run that was killed goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import lightning
import torch
from jaxtyping import Int64
from torch import Tensor

from chronotope.tasks.learning.task import Task

SEEDS_APART = 1_000_003  # more than the steps of any training: the generator reads 32 bits


@dataclass(frozen=True)
class Order:
    """Every example once in each epoch, shuffled anew; batch i begins where batch i - 1 ended, across epochs."""

    examples: int
    batch: int
    seed: int

    def of(self, step: int, rank: int = 0, world: int = 1) -> Int64[Tensor, "b"]:
        """The examples of a step; of these, the share of one process out of `world`."""
        places = torch.arange(step * self.batch, (step + 1) * self.batch)[rank::world]
        epoch, at = places // self.examples, places % self.examples
        out = torch.empty_like(at)
        for one in epoch.unique().tolist():
            here = epoch == one
            out[here] = _shuffled(self.examples, self.seed * SEEDS_APART + one)[at[here]]
        return out


@lru_cache(maxsize=4)
def _shuffled(count: int, seed: int) -> Int64[Tensor, "count"]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**32))


@dataclass(frozen=True)
class Batches:
    """The batches of a task for one process, from a step on, without end."""

    task: Task
    order: Order
    start: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[Any]:
        step = self.start
        while True:
            yield self.task.batch(
                self.order.of(step, self.rank, self.world), generator(self.order.seed, step, self.rank)
            )
            step += 1


def generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """What is drawn in one step: the same at every run."""
    return torch.Generator().manual_seed(((seed * SEEDS_APART + step) * 1009 + rank) % 2**32)


class Stream(lightning.LightningDataModule):
    """The batches for Lightning, from the trainer's step on."""

    def __init__(self, task: Task, order: Order):
        super().__init__()
        self.task, self.order = task, order

    def train_dataloader(self) -> Batches:
        """Those of this process."""
        if self.trainer is None:
            return Batches(self.task, self.order, 0, 0, 1)
        return Batches(
            self.task, self.order, self.trainer.global_step, self.trainer.global_rank, self.trainer.world_size
        )
