"""Boundaries of chunks for DHSA: a small network that sees the keys on both sides of a place.

    l, r = pooled attention over the w keys before token i, and over the w keys from i on (the same weights)
    logit(i) = MLP(l, r, |l - r|, l * r, cos(l, r))

Sizes: N (w dim^2 + w^2 dim), linear in N, once for all heads of a layer. Boundaries are taken in falling order of
logits, none within `apart` tokens of another.

    >>> predictor = BoundaryPredictor(size=2 * 16)
    >>> keys = torch.randn(1, 2, 100, 16)
    >>> labels = drops(keys, window=4)
    >>> loss = torch.nn.functional.binary_cross_entropy_with_logits(predictor(keys), labels)
    >>> predictor.boundaries(keys)[0, [0, -1]]
    tensor([  0, 100])

Labels are drops of similarity between what lies before a place and what follows. The paper: "DHSA", see `dhsa`; the
authors' released predictor learns ratios of attention mass instead. It looks w - 1 tokens ahead: `late=True` puts a
boundary where it is known, w - 1 tokens late, and takes them in order of place.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention

Keys = Float[Tensor, "b hk n d"]


class BoundaryPredictor(nn.Module):
    """Logits of a chunk beginning at each token, from the keys of all heads.

    Args:
        size: numbers of the keys of one token, Hk * D.
        window: w, tokens on each side.
        dim, heads: of the encoder.
    """

    def __init__(self, size: int, *, window: int = 4, dim: int = 32, heads: int = 2):
        super().__init__()
        self.window = window
        self.into = nn.Linear(size, dim)
        self.encoder = Attention(dim, heads)
        self.gate = nn.Linear(dim, 1, bias=False)
        self.decide = nn.Sequential(nn.Linear(4 * dim + 1, 2 * dim), nn.GELU(), nn.Linear(2 * dim, 1))

    def forward(self, keys: Keys) -> Float[Tensor, "b n"]:
        """Logits; of places without w keys on both sides too, from zeros beyond the ends."""
        x = self.into(keys.transpose(1, 2).flatten(2))
        pooled = self._pooled(F.pad(x, (0, 0, self.window, self.window - 1)))
        left, right = pooled[:, : -self.window], pooled[:, self.window :]
        alike = F.cosine_similarity(left, right, dim=-1)[..., None]
        return self.decide(torch.cat([left, right, (left - right).abs(), left * right, alike], -1))[..., 0]

    def _pooled(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        """One vector for each run of w tokens."""
        runs = x.unfold(1, self.window, 1).transpose(2, 3)
        flat = runs.flatten(0, 1)
        flat = flat + self.encoder(flat, Grid(n=self.window))
        return (self.gate(flat).softmax(1) * flat).sum(1).unflatten(0, runs.shape[:2])

    @torch.no_grad()
    def boundaries(
        self, keys: Keys, *, threshold: float = 0.5, apart: int = 8, most: int | None = None, late: bool = False
    ) -> Int64[Tensor, "b chunks_and_1"]:
        """Where chunks begin, and N behind, for `dhsa`; shorter rows are filled up with N.

        Args:
            threshold: least probability.
            apart: least length of a chunk.
            most: boundaries at most; default: all.
            late: boundaries where they are known, so that none depends on later keys.
        """
        n, w = keys.shape[2], self.window
        if apart < 1:
            raise ChronotopeError(f"boundaries: apart={apart}; expected tokens of the shortest chunk, 1 or more.")
        chance = self(keys).sigmoid()
        chance[:, :w], chance[:, max(0, n - w + 1) :] = 0.0, 0.0
        order = torch.arange(n).expand(len(chance), -1) if late else chance.argsort(dim=1, descending=True)
        rows = []
        for own, places in zip(chance.tolist(), order.tolist(), strict=True):
            taken: list[int] = [0]
            for place in places:
                far = all(abs(place - other) >= apart for other in taken)
                if own[place] > threshold and far and (most is None or len(taken) <= most):
                    taken.append(place)
            rows.append(sorted({0, *(place + (w - 1 if late and place else 0) for place in taken)}))
        longest = max(map(len, rows))
        return torch.tensor([row + [n] * (longest + 1 - len(row)) for row in rows], device=keys.device)


def drops(keys: Keys, window: int, *, apart: int = 8, deviations: float = 2.0) -> Float[Tensor, "b n"]:
    """Labels: 1 where the mean keys of w tokens before and from here on are less alike than in usual places.

    Less alike than the mean by so many standard deviations, and than all places less than `apart` tokens away.
    """
    x = keys.transpose(1, 2).flatten(2)
    means = F.avg_pool1d(x.transpose(1, 2), window, 1).transpose(1, 2)
    alike = F.cosine_similarity(means[:, :-window], means[:, window:], dim=-1)  # of places w .. n - w
    lowest = -F.max_pool1d(-alike[:, None], 2 * apart - 1, 1, apart - 1)[:, 0]
    low = alike < alike.mean(1, keepdim=True) - deviations * alike.std(1, keepdim=True)
    return F.pad((low & (alike == lowest)).to(keys.dtype), (window, window - 1))
