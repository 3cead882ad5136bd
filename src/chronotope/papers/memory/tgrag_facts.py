"""What TG-RAG stores: edges of dated facts, time nodes with summaries, and how edges are scored."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import date

import torch
from jaxtyping import Float
from torch import Tensor

from chronotope.errors import ChronotopeError
from chronotope.papers.memory.tgrag_time import Period, period

Time = str | date
Fact = tuple[str, str, str, Time] | tuple[str, str, str, Time, Time | None]


@dataclass
class Edge:
    """Facts of one key: the days from `first` to `last` (ordinals), how often mentioned, and in which texts."""

    subject: str
    object: str
    start: str
    end: str
    first: int
    last: int
    relations: list[str] = field(default_factory=list)
    weight: int = 0
    sources: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        when = self.start if self.start == self.end else f"{self.start} to {self.end}"
        return f"{self.subject} {', '.join(self.relations)} {self.object} ({when})"


@dataclass
class TimeNode:
    """A bucket of the calendar: the edges dated with it itself, the names of its children, and its summary."""

    level: str
    first: int
    last: int
    edges: list[int] = field(default_factory=list)
    children: list[str] = field(default_factory=list)
    summary: str = ""


@dataclass(frozen=True)
class Ranking:
    """The weights of the parts of an edge's score."""

    alignment: float | int = 0.35
    proximity: float | int = 0.15
    degree: float | int = 0.05
    weight: float | int = 0.15
    relevance: float | int = 0.35

    def scores(
        self, edges: list[Edge], relevance: Float[Tensor, "m"], days: tuple[int, int] | None
    ) -> Float[Tensor, "m"]:
        """The scores of the edges inside a scope, from its first to its last day."""
        degree = Counter(entity for edge in edges for entity in (edge.subject, edge.object))
        fixed = []
        for edge in edges:
            known = min((degree[edge.subject] + degree[edge.object]) / 100, 1.0)
            score = self.degree * known + self.weight * min(edge.weight / 10, 1.0)
            if days is not None:
                shared = min(edge.last, days[1]) - max(edge.first, days[0]) + 1
                apart = abs(edge.first + edge.last - sum(days)) / 2 / 365.25
                score += self.alignment * shared / (edge.last - edge.first + 1)
                score += self.proximity * max(0.0, 1 - apart / 10)
            fixed.append(score)
        return torch.tensor(fixed) + self.relevance * relevance


@dataclass(frozen=True)
class Context:
    """What a language model is given: lines under their budgets, best first."""

    sources: list[str]
    entities: list[str]
    relations: list[str]
    reports: list[str]


def span_of(fact: Fact) -> tuple[Period, Period]:
    """First and last bucket of a fact."""
    if len(fact) not in (4, 5):
        raise ChronotopeError(f"{fact!r} is no fact: expected (subject, relation, object, time), and maybe an end.")
    end = fact[4] if len(fact) == 5 else None
    span = period(fact[3]), period(fact[3] if end is None else end)
    if span[0].first > span[1].last:
        raise ChronotopeError(f"{fact!r} ends before it starts.")
    return span
