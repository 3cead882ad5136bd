"""Patterns that content decides."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float
from torch import Tensor

from chronotope.boxes import Boxes
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.patterns.base import Pattern, Verdict

if TYPE_CHECKING:
    from jaxtyping import Int64

Shape = tuple[int, ...]


class Route(Pattern):
    """A pattern that is decided by q and k: it cuts both grids in blocks, and chooses pairs of blocks.

    Routes and patterns join by `&`, `|` and `~`. A choice is made for each batch element and head, without gradients.
    The prefix is no concern of a route: everybody sees it, and it sees everybody.
    """

    @abstractmethod
    def blocks(self, grid: Grid, key_grid: Grid) -> tuple[Shape, Shape]:
        """Tokens of a block of queries and of a block of keys on each axis."""

    @abstractmethod
    def choose(self, q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], sight: Any) -> Tensor:
        """The pairs chosen, as `Sight.pairs` gives them: sorted numbers of (batch, head, query block, key block).

        `sight` (`planning.Sight`) knows the blocks, which pairs of them the pattern beside this route lets see each
        other, and what may influence a choice.
        """

    @property
    def routes(self) -> tuple[Pattern, ...]:
        return (self,)

    def prefix_sees(self) -> tuple[bool, bool]:
        return True, True

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        raise self._undecided()

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        raise self._undecided()

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        raise self._undecided()

    def _undecided(self) -> ChronotopeError:
        return ChronotopeError(
            f"{self!r} is decided by q and k: give it to ct.attention, ct.fidelity or .select(q, k, grid), which have "
            "them; a plan and a picture are made from coordinates alone."
        )
