"""Training a small language model on the bytes of a text."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from chronotope.data.files import unpacked
from chronotope.errors import ChronotopeError
from chronotope.models import Language
from chronotope.tasks.training import adam, fit, one_cycle

HELD_OUT = 0.1
"""Share of a text, its end, that is not trained on."""
LEAST = 1 << 14
BUILT_IN = 1 << 20


def read_text(path: str | Path | None) -> UInt8[Tensor, "bytes"]:
    """The bytes of a file (.gz: unpacked). None: a megabyte of the source of Python's standard library.

    Raises ChronotopeError: no such file, or a text that is too short to learn from.
    """
    if path is None:
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        data = b"".join(source.read_bytes() for source in sources)[:BUILT_IN]
    else:
        file = Path(path)
        if not file.is_file():
            raise ChronotopeError(f"text {file}: no such file; expected a text, plain or packed as .gz.")
        data = unpacked(file)
    if len(data) < LEAST:
        raise ChronotopeError(f"the text has {len(data):,} bytes; expected {LEAST:,} or more.")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def split(text: UInt8[Tensor, "bytes"]) -> tuple[UInt8[Tensor, "train"], UInt8[Tensor, "valid"]]:
    """What is trained on, and the end of the text, which is not."""
    cut = round(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


class Windows(IterableDataset[Tensor]):
    """Windows of a text at random, without end; the same for the same seed."""

    def __init__(self, text: UInt8[Tensor, "bytes"], length: int, seed: int):
        self.text, self.length, self.seed = text, length, seed

    def __iter__(self) -> Iterator[Tensor]:
        rng = torch.Generator().manual_seed(self.seed)
        while True:
            start = int(torch.randint(len(self.text) - self.length, (1,), generator=rng))
            yield self.text[start : start + self.length + 1].long()


class Training(lightning.LightningModule):
    """The model and its loss."""

    def __init__(self, model: Language, steps: int, rate: float):
        super().__init__()
        self.model, self.steps, self.rate = model, steps, rate

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """The loss of one batch."""
        return self.model.loss(batch)

    def configure_optimizers(self) -> Any:
        """AdamW, its rate rising for a tenth of the steps and falling to 0."""
        return one_cycle(adam(self.model, self.rate), self.rate, self.steps)


def learn(
    text: UInt8[Tensor, "bytes"], length: int, steps: int, *, batch: int = 4, rate: float = 3e-3, seed: int = 0,
    model: Language | None = None,
) -> Language:  # fmt: skip
    """A model, or one that goes on learning, trained on windows of `length` bytes."""
    if model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Language()
    batches = DataLoader(Windows(text, length, seed), batch_size=batch)
    fit(Training(model, steps, rate), batches, max_steps=steps)
    return model.eval()
