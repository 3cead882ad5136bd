"""`ct.route`: routes, and the parts that they are made of."""

from chronotope.patterns import Route
from chronotope.planning import Pool, Sight
from chronotope.routing.blockwise import Blockwise, Cut, top_blocks
from chronotope.routing.decoding import Pages, append, decode, pages
from chronotope.routing.given import by, chosen
from chronotope.routing.joint import Impartial, Joint, Threshold
from chronotope.routing.scores import Cosine, Dot, Hashed, Score
from chronotope.routing.search import TreeSearch, refine, tree_search
from chronotope.routing.selections import Mass, Sampled, Selection, TopK
from chronotope.routing.shared import Shared
from chronotope.routing.summaries import Max, Mean, Middle, Summary

__all__ = [
    "Blockwise",
    "Cosine",
    "Cut",
    "Dot",
    "Hashed",
    "Impartial",
    "Joint",
    "Mass",
    "Max",
    "Mean",
    "Middle",
    "Pages",
    "Pool",
    "Route",
    "Sampled",
    "Score",
    "Selection",
    "Shared",
    "Sight",
    "Summary",
    "Threshold",
    "TopK",
    "TreeSearch",
    "append",
    "by",
    "chosen",
    "decode",
    "pages",
    "refine",
    "top_blocks",
    "tree_search",
]
