"""What a layer of somebody else's model asks of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from chronotope.bias import Bias
from chronotope.grid import Grid
from chronotope.patterns import Pattern

Edit = Callable[[Tensor], Tensor]
"""Of scores or probabilities [B, H, Nq, Nk]."""


@dataclass(frozen=True, eq=False)
class Asked:
    """One call, in one form for every library.

    q [B, H, Nq, D], k [B, Hk, Nk, D], v [B, Hk, Nk, Dv]. `mask` broadcasts to [B, H, Nq, Nk]: bool, True where a query
    may look, or added to the scores. `causal`: query i sees keys up to `start` + i. `start`: the place of the first
    query among the keys. `sinks` [H]: logits that take part in the softmax and bring no value. `crossed`: keys come
    from another sequence. `bias`: a bias object of Chronotope's own layers, which bring
    `where`, kept in `first`, and `grid` too, and `key_grid` where the keys lie on another.

    What handlers set: `where` on `grid`, whose prefix are the last `tail` tokens where that is not 0; `scores` and
    `probs`: edits, in turn.
    """

    q: Float[Tensor, "b h nq d"]
    k: Float[Tensor, "b hk nk d"]
    v: Float[Tensor, "b hk nk dv"]
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    softcap: float | None = None
    sinks: Float[Tensor, "h"] | None = None
    dropout: float = 0.0
    start: int = 0
    crossed: bool = False
    bias: Bias | None = None
    first: Pattern | None = None
    where: Pattern | None = None
    grid: Grid | None = None
    key_grid: Grid | None = None
    tail: int = 0
    scores: tuple[Edit, ...] = ()
    probs: tuple[Edit, ...] = ()

    def but(self, **changes: Any) -> Asked:
        """The same with some fields changed."""
        return replace(self, **changes)

    @property
    def square(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return not self.crossed and self.q.shape[2] == self.k.shape[2]


Own = Callable[[Asked], Tensor]
"""The model's own way: q, k, v, mask and the rest of the call -> [B, H, Nq, Dv]."""
