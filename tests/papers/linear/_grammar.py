"""Characters of a synthetic grammar and a small training loop: what language models of several pages compete on."""

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import chronotope as ct

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SYMBOLS = " .,()" + LETTERS
VOCAB = len(SYMBOLS)


def _words(random: np.random.Generator, count: int) -> list[str]:
    return ["".join(random.choice(list(LETTERS), random.integers(2, 6))) for _ in range(count)]


class Grammar:
    """Sentences: subject verb object, with agreement in number, relative clauses, and asides in brackets."""

    def __init__(self, seed: int = 0):
        random = np.random.default_rng(seed)
        self.nouns, self.verbs, self.adjectives = _words(random, 40), _words(random, 20), _words(random, 20)

    def sentence(self, random: np.random.Generator, depth: int = 0) -> str:
        many = random.random() < 0.5
        parts = [self.noun(random, many)]
        if depth < 2 and random.random() < 0.3:
            parts.append("(" + self.sentence(random, depth + 1) + ")")
        parts += [self.pick(random, self.verbs) + ("" if many else "s"), self.noun(random, random.random() < 0.5)]
        return " ".join(parts) + ("." if depth == 0 else "")

    def noun(self, random: np.random.Generator, many: bool) -> str:
        adjective = [self.pick(random, self.adjectives)] if random.random() < 0.4 else []
        return " ".join(
            ["those" if many else "that", *adjective, self.pick(random, self.nouns) + ("en" if many else "")]
        )

    @staticmethod
    def pick(random: np.random.Generator, words: list[str]) -> str:
        # Frequencies as of words: about 1 / rank.
        return words[min(int(len(words) ** random.random()) - 1 + int(random.random() < 0.3), len(words) - 1)]


@cache
def text(length: int, seed: int) -> Tensor:
    """Symbols of so many characters, int64 [length]; other seeds are other sentences of the same grammar."""
    grammar, random = Grammar(), np.random.default_rng(seed)
    parts, size = [], 0
    while size < length:
        parts.append(grammar.sentence(random) + " ")
        size += len(parts[-1])
    return torch.tensor([SYMBOLS.index(c) for c in "".join(parts)[:length]])


def train(model: nn.Module, steps: int = 800, lr: float = 3e-3, batch: int = 16, length: int = 128) -> float:
    """AdamW with warm-up and linear decay; the loss on text that was not trained on, in nats for each character."""
    data, held_out = text(400_000, 1), text(32_768, 2).view(-1, 256)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 30, 1 - step / steps)
        starts = torch.randint(len(data) - length, (batch, 1), generator=generator)
        ids = data[starts + torch.arange(length + 1)]
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        logits = model(held_out[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item()


class SoftmaxModel(nn.Module):
    """The same with softmax attention, rotary positions and swiglu: what the linear model is held against."""

    def __init__(self, dim: int = 128, heads: int = 4, layers: int = 2, ratio: float = 4.5):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB, bias=False)
        self.blocks = ct.nn.Stack([self.block(dim, heads, ratio) for _ in range(layers)])

    @staticmethod
    def block(dim: int, heads: int, ratio: float) -> ct.nn.Block:
        # Without the norm of queries and keys it learns more slowly: 0.71 at its better rate, 1e-3.
        attention = ct.nn.Attention(dim, heads, where=ct.causal(), position=ct.Rope("n"), qk_norm=True)
        return ct.nn.Block([attention], mlp_ratio=ratio)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids), ct.Grid(n=ids.shape[1])))


@cache
def softmax_loss() -> float:
    """That of the softmax model, trained like the others."""
    torch.manual_seed(0)
    return train(SoftmaxModel())


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
