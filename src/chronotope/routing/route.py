"""`ct.route`: routes, and the parts that they are made of."""

from chronotope.patterns import Route
from chronotope.planning import Pool, Sight
from chronotope.routing.blockwise import Blockwise, Cut, top_blocks
from chronotope.routing.buckets import Buckets
from chronotope.routing.cells import keep_cells, keys_of
from chronotope.routing.clusters import Clusters
from chronotope.routing.decoding import decode
from chronotope.routing.facing import Facing
from chronotope.routing.gathered import gathered
from chronotope.routing.given import by, chosen
from chronotope.routing.joint import Impartial, Joint, Threshold
from chronotope.routing.learned import Bilinear, Moments
from chronotope.routing.pages import Pages, append, pages
from chronotope.routing.predictors import LowRank
from chronotope.routing.reuse import Reuse, reuse
from chronotope.routing.scores import Cosine, Dot, Hashed, Score
from chronotope.routing.search import TreeSearch, refine, tree_search
from chronotope.routing.selections import Mass, Sampled, Selection, TopK
from chronotope.routing.shared import Shared
from chronotope.routing.summaries import Max, Mean, Middle, Summary

__all__ = [
    "Bilinear",
    "Blockwise",
    "Buckets",
    "Clusters",
    "Cosine",
    "Cut",
    "Dot",
    "Facing",
    "Hashed",
    "Impartial",
    "Joint",
    "LowRank",
    "Mass",
    "Max",
    "Mean",
    "Middle",
    "Moments",
    "Pages",
    "Pool",
    "Reuse",
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
    "gathered",
    "keep_cells",
    "keys_of",
    "pages",
    "refine",
    "reuse",
    "top_blocks",
    "tree_search",
]
