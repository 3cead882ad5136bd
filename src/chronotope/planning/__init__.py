"""A pattern on a grid, cut in tiles: what is empty, full, partial, and in which order tokens are laid out."""

from chronotope.planning.groups import Group
from chronotope.planning.layout import Layout
from chronotope.planning.parse import parse_pattern
from chronotope.planning.planner import Part, Plan, plan
from chronotope.planning.store import load_plan
from chronotope.planning.tiles import Tiles

__all__ = ["Group", "Layout", "Part", "Plan", "Tiles", "load_plan", "parse_pattern", "plan"]
