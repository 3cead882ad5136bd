"""Multi-query associative recall: which mixers find the value of a key that was seen before, at which size of state.

A sequence begins with pairs of a key and its value; then every key comes again, once, somewhere in random tokens, soon
rather than late (gaps by a power law), and the value is to be said there. Source: Arora et al. 2023, Zoology, arXiv
2312.04927.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import chronotope as ct
from chronotope import features
from chronotope.grid import Grid
from chronotope.memories import Learner, Matrix, Memory, Mlp, Normalized
from chronotope.nn import Attention, Block, Decay, DeepMemory, Mamba2, Mixer, Recurrence, ShortConv, Stack
from chronotope.patterns import Pattern
from chronotope.planning.parse import named
from chronotope.tasks.training import fit, one_cycle

IGNORED = -100
POWER = 0.01


@dataclass(frozen=True)
class Recall:
    """The task and the training. pairs: how many there are in the sequences, each batch of one number of them."""

    pairs: tuple[int, ...] = (2, 4, 8, 16)
    length: int = 64
    vocabulary: int = 128
    dim: int = 64
    heads: int = 2
    layers: int = 2
    steps: int = 800
    batch: int = 64
    rate: float = 5e-3
    seed: int = 0
    tested: int = 256


def sequences(task: Recall, pairs: int, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens, targets), each [count, length]; a target is the value where a key comes again, else `IGNORED`.

    Keys are of the first quarter of the vocabulary, values of the second, noise of the rest: with a vocabulary as small
    as this, noise of all of it would say false pairs. The query of a pair is the key itself, and the value follows.
    """
    quarter, start = task.vocabulary // 4, 2 * pairs
    keys = torch.rand(count, quarter, generator=rng).argsort(1)[:, :pairs]
    values = quarter + torch.rand(count, quarter, generator=rng).argsort(1)[:, :pairs]
    tokens = torch.randint(2 * quarter, task.vocabulary, (count, task.length), generator=rng)
    targets = torch.full((count, task.length), IGNORED)
    tokens[:, :start:2], tokens[:, 1:start:2] = keys, values
    places = (task.length - start) // 2
    weights = POWER * (torch.arange(places) + 1.0) ** (POWER - 1)
    chosen = start + 2 * torch.multinomial(weights.expand(count, -1), pairs, generator=rng)
    tokens.scatter_(1, chosen, keys)
    tokens.scatter_(1, chosen + 1, values)
    targets.scatter_(1, chosen, values)
    return tokens, targets


Makes = tuple[Callable[[], Mixer], ...]
"""Mixers of the layers, in turn."""
Parts = dict[str, Callable[[], Any]]
"""What a recurrence is made with, made anew for each."""


class Model(nn.Module):
    """Embedding, blocks of a short convolution and a mixer, and a head."""

    def __init__(self, task: Recall, makes: Makes):
        super().__init__()
        self.embed = nn.Embedding(task.vocabulary, task.dim)
        mixers = [makes[i % len(makes)]() for i in range(task.layers)]
        self.stack = Stack([Block([ShortConv(task.dim, 3), mixer], mlp_ratio=2) for mixer in mixers], task.dim)
        self.head = nn.Linear(task.dim, task.vocabulary)

    def forward(self, tokens: Int64[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        """Logits of the token that follows."""
        return self.head(self.stack(self.embed(tokens), Grid(n=tokens.shape[1])))  # type: ignore[no-any-return]

    def state_bytes(self, length: int) -> int:
        """What the mixers carry after a sequence, short convolutions left out."""
        total = 0
        for block in self.stack.blocks:
            mixer: Any = block.mixers[1]  # type: ignore[index,union-attr]
            state, x = mixer.init_state(1, Grid(n=1)), torch.zeros(1, 1, mixer.dim)
            for _ in range(length):
                _, state = mixer.step(x, state)
            total += state.nbytes
        return total


class Sequences(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches without end, the same for every mixer."""

    def __init__(self, task: Recall):
        self.task = task

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = torch.Generator().manual_seed(self.task.seed)
        while True:
            for pairs in self.task.pairs:
                yield sequences(self.task, pairs, self.task.batch, rng)


class Training(lightning.LightningModule):
    """Cross entropy at the queries, AdamW, a rate that rises for a tenth of the steps and falls to 0."""

    def __init__(self, task: Recall, model: Model):
        super().__init__()
        self.task, self.model = task, model

    def training_step(self, batch: Any, index: int) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def configure_optimizers(self) -> Any:
        adam = torch.optim.AdamW(self.parameters(), lr=self.task.rate, weight_decay=0.01)
        return one_cycle(adam, self.task.rate, self.task.steps)


def learn(task: Recall, makes: Makes) -> Model:
    """A trained model."""
    torch.manual_seed(task.seed)
    model = Model(task, makes)
    fit(Training(task, model), DataLoader(Sequences(task), batch_size=None), max_steps=task.steps)
    return model.eval()


@torch.inference_mode()
def accuracy(task: Recall, model: Model, pairs: int) -> float:
    """Share of queries of new sequences whose value is said."""
    tokens, targets = sequences(task, pairs, task.tested, torch.Generator().manual_seed(task.seed + 1))
    said = torch.cat([model(part).argmax(-1) for part in tokens.split(task.batch)])
    asked = targets != IGNORED
    return float((said == targets)[asked].float().mean())


def menu(task: Recall) -> dict[str, Makes]:
    """The mixers, each with small and large states where it has a size to choose."""
    dim, heads = task.dim, task.heads
    elu: Parts = {"features": features.Elu, "normalize": lambda: True}
    taylor: Parts = {"features": features.Taylor, "normalize": lambda: True}
    delta: Parts = {"delta": lambda: True}

    def softmax(where: Pattern) -> Callable[[], Mixer]:
        return lambda: Attention(dim, heads, where=where, position=ct.Rope(axes=("n",)))

    def recurrence(size: int, parts: Parts) -> Callable[[], Mixer]:
        value = dim // heads
        return lambda: Recurrence(
            dim, heads, head_dim=size, value_dim=value, **{k: part() for k, part in parts.items()}
        )

    def descent(learner: Learner) -> Callable[[], Mixer]:
        # The blocks have a short convolution already.
        return lambda: DeepMemory(dim, heads, memory=Memory(learner, optimizer=Normalized()), chunk=8, conv=None)

    window = softmax(ct.window(n=(15, 0)))
    return {
        "softmax": (softmax(ct.causal()),),
        "window of 16": (window,),
        "linear, 8 features": (recurrence(8, elu),),
        "linear, 32 features": (recurrence(32, elu),),
        "Taylor of 8": (recurrence(8, taylor),),
        "Taylor of 8, window of 16": (recurrence(8, taylor), window),
        "decay by token, 32": (recurrence(32, {"decay": lambda: Decay(dim, heads)}),),
        "delta rule, 8": (recurrence(8, delta),),
        "delta rule, 32": (recurrence(32, delta),),
        "delta rule, 32, window of 16": (recurrence(32, delta), window),
        "Mamba-2, 32 states": (lambda: Mamba2(dim, 32, head_dim=dim // heads),),
        "matrix memory by descent": (descent(Matrix()),),
        "deep memory": (descent(Mlp(2, expansion=2)),),
    }


@dataclass(frozen=True)
class Found:
    """What one model learned: accuracy for each number of pairs."""

    name: str
    state_bytes: int
    parameters: int
    seconds: float
    accuracy: dict[int, float]


def compare(task: Recall, names: Sequence[str] | None = None, tell: Callable[[str], None] = print) -> list[Found]:
    """Trains and tests the mixers of the menu, or those named. Raises ChronotopeError on a name that is not there."""
    makes = menu(task)
    names, out = named("mixer", names, makes), []
    tell(f"{'':32}{'state':>10}  " + "".join(f"{pairs:>4} pairs" for pairs in task.pairs))
    for name in names:
        start = time.perf_counter()
        model = learn(task, makes[name])
        correct = {pairs: accuracy(task, model, pairs) for pairs in task.pairs}
        parameters = sum(x.numel() for x in model.parameters())
        out.append(Found(name, model.state_bytes(task.length), parameters, time.perf_counter() - start, correct))
        cells = "".join(f"{correct[pairs]:>10.3f}" for pairs in task.pairs)
        tell(f"  {name:30}{out[-1].state_bytes / 1024:>7.1f} kB{cells}   {out[-1].seconds:5.0f} s")
    return out
