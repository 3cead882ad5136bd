"""A choice that is made now and then, and used until the next time."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.patterns import Route
from chronotope.planning import Sight

Place = tuple[Sight, tuple[int, ...], tuple[int, ...]]


@dataclass
class Last:
    """The choice of the last time, the mean query of then, and how often it was used."""

    chosen: Int64[Tensor, "pairs"]
    query: Float[Tensor, "b h d"]
    uses: int = 1


@dataclass(frozen=True, eq=False, repr=False)
class Reuse(Route):
    """What `reuse` returns. `kept`: the last choice for each grid, batch and number of heads."""

    route: Route
    every: int | None
    similarity: float | None
    kept: dict[Place, Last] = field(default_factory=dict)

    def blocks(self, grid: Grid, key_grid: Grid) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.route.blocks(grid, key_grid)

    def check(self, grid: Grid, key_grid: Grid) -> None:
        self.route.check(grid, key_grid)

    def choose(
        self, q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], sight: Sight
    ) -> Int64[Tensor, "pairs"]:
        place = (sight, tuple(q.shape), tuple(k.shape))
        query = q.mean(2)
        last = self.kept.get(place)
        if last is None or self._due(last, query):
            last = self.kept[place] = Last(self.route.choose(q, k, sight), query, uses=0)
        last.uses += 1
        return last.chosen

    def _due(self, last: Last, query: Float[Tensor, "b h d"]) -> bool:
        """Whether it is time to choose again."""
        if self.every is not None and last.uses >= self.every:
            return True
        alike = 1.0 if self.similarity is None else float(F.cosine_similarity(query, last.query, dim=-1).min())
        return self.similarity is not None and alike < self.similarity

    def forget(self) -> None:
        """The next call chooses anew."""
        self.kept.clear()

    def __repr__(self) -> str:
        return f"route.reuse({self.route!r}, every={self.every}, similarity={self.similarity})"


def reuse(route: Route, *, every: int | None = None, similarity: float | None = None) -> Reuse:
    """A route that chooses at the first call and then uses that choice again.

    Args:
        every: it chooses anew at every so manieth call: layers that share one object, or steps of denoising.
        similarity: and where the cosine between the mean query now and that of the last choice falls below this, for
            any head of the batch.

    Neither: until `forget()`. Choices are kept for each pair of grids, batch size and pattern beside the route. Under
    an order, an earlier call's choice knows what that call knew.

    Raises ChronotopeError: not a route, or numbers out of range.
    """
    if not isinstance(route, Route):
        raise ChronotopeError(f"reuse({route!r}): expected a route, such as ct.route.top_blocks(n=64).")
    if every is not None and (isinstance(every, bool) or every < 1):
        raise ChronotopeError(f"every={every!r}: expected a number of calls from 1 on.")
    if similarity is not None and not -1 <= similarity <= 1:
        raise ChronotopeError(f"similarity={similarity!r}: expected a cosine, -1 to 1.")
    return Reuse(route, every, similarity)
