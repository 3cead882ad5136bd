"""Who may look at whom: relations between query and key coordinates, closed under `&`, `|` and `~`."""

from chronotope.patterns.base import And, Not, Or, Pattern, PerHead, per_head
from chronotope.patterns.order import causal, full, nothing, sinks
from chronotope.patterns.route import Route
from chronotope.patterns.separable import along, blocks, strided, window
from chronotope.patterns.tables import graph, predicate, segments

__all__ = [
    "And",
    "Not",
    "Or",
    "Pattern",
    "PerHead",
    "Route",
    "along",
    "blocks",
    "causal",
    "full",
    "graph",
    "nothing",
    "per_head",
    "predicate",
    "segments",
    "sinks",
    "strided",
    "window",
]
