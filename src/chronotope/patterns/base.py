"""What a pattern is, and the algebra that closes patterns under `&`, `|` and `~`."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from chronotope.boxes import Boxes, identify
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.held import Held
from chronotope.patterns.reach import Reach

Verdict = tuple[Bool[Tensor, "p"], Bool[Tensor, "p"]]
Reaches = dict[str, list[Reach]]


class Pattern(ABC):
    """A relation between query tokens and key tokens, by coordinates. Frozen and hashable.

    `sees` is the meaning. `over` is the same relation on boxes, in three-valued logic: (some, all) = (True, True)
    when every pair of the two boxes is visible, (False, False) when none is, (True, False) when it depends.

    Coordinates of queries reach `_sees` aligned onto the key grid's axes. Prefix tokens are no concern of
    `_sees` and `_over`: `prefix_sees` says what they see and who sees them, and this class puts it in place.
    """

    heads: int | None = None
    """Number of heads that this pattern tells apart; None: all heads are alike."""
    costly: bool = False
    """Whether `over` looks at pairs of tokens: then a plan tries one tile shape only."""
    held: Held | None = None
    """This pattern as a constant for torch.compile; None where it was made inside what is compiled."""

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():
            # Of a copy: no cycle keeps a pattern's data alive.
            object.__setattr__(self, "held", Held(copy.copy(self)))

    def sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        """Whether each query sees each key; the coordinates broadcast against each other."""
        seen = self._sees(q.aligned(k.grid), k)
        of_prefix, by_prefix = self.prefix_sees()
        if q.grid.prefix:
            seen = torch.where(q.prefix, torch.tensor(by_prefix, device=seen.device), seen)
        if k.grid.prefix:
            seen = torch.where(k.prefix, torch.tensor(of_prefix, device=seen.device), seen)
        return seen

    def over(self, q: Boxes, k: Boxes) -> Verdict:
        """For each of P box pairs: whether some pair of tokens is visible, and whether all are."""
        some, every = self._over(q, k)
        of_prefix, by_prefix = self.prefix_sees()
        for boxes, constant in ((q, by_prefix), (k, of_prefix)):
            if boxes.prefix is not None:
                some = torch.where(boxes.prefix, torch.tensor(constant), some)
                every = torch.where(boxes.prefix, torch.tensor(constant), every)
        return some, every

    @abstractmethod
    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]: ...

    @abstractmethod
    def _over(self, q: Boxes, k: Boxes) -> Verdict: ...

    @abstractmethod
    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        """A number per pair of boxes of two tilings: equal sizes and equal number mean the same element mask."""

    @abstractmethod
    def prefix_sees(self) -> tuple[bool, bool]:
        """(whether prefix keys are seen, by anybody; whether prefix queries see the keys that have a place)."""

    @abstractmethod
    def check(self, grid: Grid, key_grid: Grid) -> None:
        """Raises ChronotopeError where this pattern means nothing on these grids."""

    def reaches(self, grid: Grid, key_grid: Grid) -> Reaches | None:
        """Per axis the relations whose conjunction is this pattern, or None where it is not separable."""
        return None

    def horizon(self, axis: str) -> int | None:
        """How many steps back along the axis a query can look at most; None: no limit is known."""
        return None

    def head(self, index: int) -> Pattern:
        """The pattern of one head."""
        return self

    @property
    def routes(self) -> tuple[Pattern, ...]:
        """The parts that content decides, each once."""
        return ()

    def given(self, decided: Mapping[Pattern, Pattern]) -> Pattern:
        """The same expression with other patterns in place of some of its leaves."""
        return decided.get(self, self)

    def select(self, q: Tensor, k: Tensor, grid: Grid, key_grid: Grid | None = None) -> Bool[Tensor, "b h nq nk"]:
        """What every query sees, q [B, H, Nq, D] and k [B, Hk, Nk, D] being where routes choose. For small grids."""
        from chronotope.routed import select  # below this layer nothing is known of tensors

        return select(self, q, k, grid, key_grid)

    def __bool__(self) -> bool:
        raise ChronotopeError(f"{self!r} is neither true nor false: join patterns by & | ~, and ask `is None`.")

    def __and__(self, other: Pattern) -> Pattern:
        return And.of(self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return Or.of(self, other)

    def __invert__(self) -> Pattern:
        return Not(self)


@dataclass(frozen=True, repr=False)
class Joint(Pattern, ABC):
    """Several patterns joined by one operator: what `&` and `|` share."""

    parts: tuple[Pattern, ...]

    @classmethod
    def of(cls, a: Pattern, b: Pattern) -> Pattern:
        """Joins two patterns, taking apart what is joined by the same operator already."""
        if not isinstance(a, Pattern) or not isinstance(b, Pattern):
            raise ChronotopeError(
                f"{a!r} and {b!r} cannot be joined: both sides must be patterns, such as ct.causal('t')."
            )
        parts = tuple(part for side in (a, b) for part in (side.parts if isinstance(side, cls) else (side,)))
        heads_of(parts)
        return cls(parts)

    @property
    def heads(self) -> int | None:  # type: ignore[override]
        return heads_of(self.parts)

    @property
    def costly(self) -> bool:  # type: ignore[override]
        return any(part.costly for part in self.parts)

    def head(self, index: int) -> Pattern:
        return self if self.heads is None else type(self)(tuple(part.head(index) for part in self.parts))

    @property
    def routes(self) -> tuple[Pattern, ...]:
        return tuple(dict.fromkeys(route for part in self.parts for route in part.routes))

    def given(self, decided: Mapping[Pattern, Pattern]) -> Pattern:
        return type(self)(tuple(part.given(decided) for part in self.parts)) if self.routes else self

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        return identify(*(part.alike(q, k) for part in self.parts))

    def check(self, grid: Grid, key_grid: Grid) -> None:
        for part in self.parts:
            part.check(grid, key_grid)


@dataclass(frozen=True, repr=False)
class And(Joint):
    """Visible where every part says so."""

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        return reduce(torch.logical_and, (part._sees(q, k) for part in self.parts))

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        verdicts = [part._over(q, k) for part in self.parts]
        return reduce(torch.logical_and, (v[0] for v in verdicts)), reduce(torch.logical_and, (v[1] for v in verdicts))

    def prefix_sees(self) -> tuple[bool, bool]:
        rules = [part.prefix_sees() for part in self.parts]
        return all(rule[0] for rule in rules), all(rule[1] for rule in rules)

    def reaches(self, grid: Grid, key_grid: Grid) -> Reaches | None:
        out: Reaches = {}
        for part in self.parts:
            reaches = part.reaches(grid, key_grid)
            if reaches is None:
                return None
            for axis, found in reaches.items():
                out.setdefault(axis, []).extend(found)
        return out

    def horizon(self, axis: str) -> int | None:
        known = [h for h in (part.horizon(axis) for part in self.parts) if h is not None]
        return min(known) if known else None

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Or) else repr(part) for part in self.parts)


@dataclass(frozen=True, repr=False)
class Or(Joint):
    """Visible where some part says so."""

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        return reduce(torch.logical_or, (part._sees(q, k) for part in self.parts))

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        verdicts = [part._over(q, k) for part in self.parts]
        return reduce(torch.logical_or, (v[0] for v in verdicts)), reduce(torch.logical_or, (v[1] for v in verdicts))

    def prefix_sees(self) -> tuple[bool, bool]:
        rules = [part.prefix_sees() for part in self.parts]
        return any(rule[0] for rule in rules), any(rule[1] for rule in rules)

    def horizon(self, axis: str) -> int | None:
        known = [part.horizon(axis) for part in self.parts]
        return None if None in known else max(h for h in known if h is not None)

    def __repr__(self) -> str:
        return " | ".join(repr(part) for part in self.parts)


@dataclass(frozen=True, repr=False)
class Not(Pattern):
    """Visible where the pattern says no."""

    part: Pattern

    @property
    def heads(self) -> int | None:  # type: ignore[override]
        return self.part.heads

    @property
    def costly(self) -> bool:  # type: ignore[override]
        return self.part.costly

    def head(self, index: int) -> Pattern:
        return Not(self.part.head(index))

    @property
    def routes(self) -> tuple[Pattern, ...]:
        return self.part.routes

    def given(self, decided: Mapping[Pattern, Pattern]) -> Pattern:
        return Not(self.part.given(decided))

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        return ~self.part._sees(q, k)

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        some, every = self.part._over(q, k)
        return ~every, ~some

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        return self.part.alike(q, k)

    def prefix_sees(self) -> tuple[bool, bool]:
        of_prefix, by_prefix = self.part.prefix_sees()
        return not of_prefix, not by_prefix

    def check(self, grid: Grid, key_grid: Grid) -> None:
        self.part.check(grid, key_grid)

    def __invert__(self) -> Pattern:
        return self.part

    def __repr__(self) -> str:
        return f"~({self.part!r})" if isinstance(self.part, Joint) else f"~{self.part!r}"


@dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    """Head i uses pattern i."""

    patterns: tuple[Pattern, ...]

    @property
    def heads(self) -> int:  # type: ignore[override]
        return len(self.patterns)

    def head(self, index: int) -> Pattern:
        return self.patterns[index]

    @property
    def routes(self) -> tuple[Pattern, ...]:
        return tuple(dict.fromkeys(route for pattern in self.patterns for route in pattern.routes))

    def given(self, decided: Mapping[Pattern, Pattern]) -> Pattern:
        return PerHead(tuple(pattern.given(decided) for pattern in self.patterns))

    def check(self, grid: Grid, key_grid: Grid) -> None:
        for pattern in self.patterns:
            pattern.check(grid, key_grid)

    def horizon(self, axis: str) -> int | None:
        known = [pattern.horizon(axis) for pattern in self.patterns]
        return None if None in known else max(h for h in known if h is not None)

    def _sees(self, q: Coords, k: Coords) -> Bool[Tensor, "..."]:
        raise self._ambiguous()

    def _over(self, q: Boxes, k: Boxes) -> Verdict:
        raise self._ambiguous()

    def alike(self, q: Boxes, k: Boxes) -> Int64[Tensor, "p"]:
        raise self._ambiguous()

    def prefix_sees(self) -> tuple[bool, bool]:
        raise self._ambiguous()

    def _ambiguous(self) -> ChronotopeError:
        return ChronotopeError(f"{self!r} has {self.heads} heads: ask one of them, with pattern.head(i).")

    def __repr__(self) -> str:
        return f"per_head([{', '.join(map(repr, self.patterns))}])"


def per_head(patterns: list[Pattern] | tuple[Pattern, ...]) -> Pattern:
    """Head i uses pattern i. The number of patterns must be the number of query heads."""
    if isinstance(patterns, Pattern):
        raise ChronotopeError(f"per_head({patterns!r}): give a list of one plain pattern for each head.")
    patterns = tuple(patterns)
    if not patterns or any(not isinstance(p, Pattern) or p.heads is not None for p in patterns):
        raise ChronotopeError(f"per_head({list(patterns)!r}): give a list of one plain pattern for each head.")
    return PerHead(patterns)


def heads_of(parts: tuple[Pattern, ...]) -> int | None:
    """The number of heads that the parts tell apart; raises where two parts disagree."""
    counts = {part.heads for part in parts} - {None}
    if len(counts) > 1:
        raise ChronotopeError(
            f"per_head patterns for {' and '.join(str(c) for c in sorted(counts))} heads cannot be joined: "  # type: ignore[type-var]
            "give both the same number of heads."
        )
    return counts.pop() if counts else None
