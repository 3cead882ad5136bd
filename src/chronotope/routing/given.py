"""Routes whose choice somebody else has made, or makes by a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.patterns import Route
from chronotope.planning import Sight
from chronotope.routing.blockwise import Cut, Cutting

Chooser = Callable[[Tensor, Tensor, Sight], Tensor]


@dataclass(frozen=True, repr=False)
class By(Cutting):
    """What `by` returns."""

    cut: Cut
    function: Chooser

    def choose(
        self, q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], sight: Sight
    ) -> Int64[Tensor, "pairs"]:
        found = self.function(q, k, sight)
        rows, cols = sight.counts
        shape = (q.shape[0], q.shape[1], rows)
        given = tuple(found.shape) if isinstance(found, Tensor) else ()
        if len(given) != 4 or any(n not in (1, m) for n, m in zip(given[:3], shape, strict=True)):
            raise ChronotopeError(f"{self!r} chose {given or found}: expected [{', '.join(map(str, shape))}, ...].")
        found = found.detach().expand(*shape, -1)
        if found.dtype == torch.bool:
            if found.shape[3] != cols:
                raise ChronotopeError(f"{self!r} chose among {found.shape[3]} key blocks; there are {cols}.")
            return sight.pairs(found)
        if found.is_floating_point() or (found.numel() and not -1 <= int(found.min()) <= int(found.max()) < cols):
            raise ChronotopeError(f"{self!r}: expected numbers of key blocks from 0 to {cols - 1}, or -1 for none.")
        return sight.listed(found)

    def __repr__(self) -> str:
        return f"route.by({getattr(self.function, '__name__', self.function)}, {self.cut})"


def by(function: Chooser, *, queries: dict[str, int] | None = None, **block: int) -> Route:
    """A route whose choice `function(q, k, sight)` makes.

    The function returns either a table, bool [B, H, query blocks, key blocks], or numbers of key blocks, int
    [B, H, query blocks, any], with -1 for none and repeats counted once; dimensions of size 1 stand for all. `sight`
    (`planning.Sight`) has the means: `queries` and `keys` (which tokens stand for which block: `.mean(x)`), `visible`,
    `own`, and `arrow`, the order that the pattern beside the route keeps, or None. What is chosen is joined with that
    pattern as it stands: the function answers for its causality, and for keeping the query's own block.

    `block`: tokens of a block by axis, as in `top_blocks`; `n=1` chooses single tokens.
    """
    return By(Cut.of("by", block, queries), function)


def chosen(choice: Tensor, *, queries: dict[str, int] | None = None, **block: int) -> Route:
    """A choice already made: a table or numbers of key blocks, as the function of `by` returns them.

    choice: bool [B, H, query blocks, key blocks] or int [B, H, query blocks, any]; blocks in row-major order.
    """
    if not isinstance(choice, Tensor):
        raise ChronotopeError(f"chosen({choice!r}): expected a tensor of blocks chosen.")

    def given(q: Tensor, k: Tensor, sight: Sight) -> Tensor:
        return choice

    return By(Cut.of("chosen", block, queries), given)
