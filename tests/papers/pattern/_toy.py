"""A small causal transformer and its training loop, for the trained evidence of several pages."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Tiny(nn.Module):
    """Token and place embeddings, then layers of attention and MLP; `attend(layer, q, k, v)` is set from outside."""

    def __init__(
        self, vocab: int, length: int, dim: int, heads: int, layers: int, attend: Attend, classes: int | None = None
    ):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.token, self.place = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * layers + 1))
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(layers))
        self.proj = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(layers)
        )
        self.head = nn.Linear(dim, classes or vocab)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place.weight[: ids.shape[1]]
        for i, (qkv, proj, mlp) in enumerate(zip(self.qkv, self.proj, self.mlp, strict=True)):
            q, k, v = qkv(self.norms[2 * i](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + proj(self.attend(i, q, k, v).transpose(1, 2).flatten(2))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


def train(
    model: nn.Module, batch: Callable[[torch.Generator], tuple[Tensor, Tensor]], steps: int, lr: float, seed: int = 0
) -> None:
    """Adam with warm-up and linear decay on targets [B, N], -100 where nothing is asked."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 30, 1 - step / steps)
        ids, target = batch(generator)
        loss = F.cross_entropy(model(ids).flatten(0, 1), target.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, ids: Tensor, target: Tensor) -> float:
    """Share of the asked places where the model's first choice is the target."""
    asked = target != -100
    return float((model(ids).argmax(-1) == target)[asked].float().mean())
