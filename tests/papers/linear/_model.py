"""A model around a stack of mixers, and its training, for the trained evidence of several pages."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import chronotope as ct


class Model(nn.Module):
    """Embedded tokens, a stack on the grid, and a linear head for every token."""

    def __init__(self, vocab: int, stack: ct.nn.Stack, grid: ct.Grid, classes: int | None = None):
        super().__init__()
        self.token, self.stack, self.grid = nn.Embedding(vocab, stack.dim), stack, grid
        self.head = nn.Linear(stack.dim, classes or vocab)
        nn.init.normal_(self.token.weight, std=0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.stack(self.token(ids), self.grid))


def train(
    model: nn.Module, batch: Callable[[torch.Generator], tuple[Tensor, Tensor]], steps: int, lr: float, seed: int = 0
) -> float:
    """Adam with warm-up and linear decay on targets [B, N], -100 where nothing is asked; the mean of 50 last losses."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 50, 1 - step / steps)
        ids, target = batch(generator)
        loss = F.cross_entropy(model(ids).flatten(0, 1), target.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / len(losses[-50:])


@torch.no_grad()
def accuracy(model: nn.Module, ids: Tensor, target: Tensor) -> float:
    """Share of the asked places where the model's first choice is the target."""
    asked = target != -100
    return float((model(ids).argmax(-1) == target)[asked].float().mean())
