"""Ways to run a plan. Kernels do not import each other; `table` lists them."""

from chronotope.kernels.call import Backend, Scores
from chronotope.kernels.table import BACKENDS, backends

__all__ = ["BACKENDS", "Backend", "Scores", "backends"]
