"""Random tasks for memories that learn at test time."""

import torch
from torch import Tensor
from torch.nn import functional as F

from chronotope.memories import Gates, Memory, memorize, recall


def pairs(batch: int, n: int, d: int, common: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys of length 1 [B, 1, N, D], which share a direction, and random values."""
    rng = torch.Generator().manual_seed(seed)
    shared = common * torch.randn(batch, 1, 1, d, generator=rng)
    k = F.normalize(torch.randn(batch, 1, n, d, generator=rng) + shared, dim=-1)
    return k, torch.randn(batch, 1, n, d, generator=rng)


def learned(memory: Memory, k: Tensor, v: Tensor, rate: float, chunk: int = 1, **gates: float) -> Tensor:
    """What is read at every key after one pass; gates are the same for all tokens."""
    numbers = {name: torch.full(k.shape[:3], x, dtype=k.dtype) for name, x in {"rate": rate, **gates}.items()}
    return recall(k, memory, memorize(k, k, v, memory, Gates(**numbers), chunk=chunk)[1])


def accuracy(read: Tensor, v: Tensor) -> float:
    """How often what is read points at its own value more than at any other."""
    closest = (F.normalize(read, dim=-1) @ F.normalize(v, dim=-1).mT).argmax(-1)
    return float((closest == torch.arange(v.shape[2])).float().mean())
