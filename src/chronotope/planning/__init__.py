"""A pattern on a grid, cut in tiles: what is empty, full, partial, and in which order tokens are laid out."""

from chronotope.planning.chosen import Chosen
from chronotope.planning.groups import Group
from chronotope.planning.layout import Layout, Order
from chronotope.planning.parse import parse_pattern
from chronotope.planning.planner import Part, Plan, heads_alike, plan
from chronotope.planning.resolve import resolve
from chronotope.planning.sight import Pool, Sight
from chronotope.planning.store import load_plan
from chronotope.planning.tiles import Tiles
from chronotope.planning.tiling import Tiling

__all__ = [
    "Chosen",
    "Group",
    "Layout",
    "Order",
    "Part",
    "Plan",
    "Pool",
    "Sight",
    "Tiles",
    "Tiling",
    "heads_alike",
    "load_plan",
    "parse_pattern",
    "plan",
    "resolve",
]
