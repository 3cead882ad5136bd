"""Ways to run a plan. Kernels do not import each other; `table` lists them, `operator` runs them."""

from chronotope.kernels.call import Backend, Facts, Scores, bias_tensors
from chronotope.kernels.operator import Call, named, run
from chronotope.kernels.table import BACKENDS, backends

__all__ = ["BACKENDS", "Backend", "Call", "Facts", "Scores", "backends", "bias_tensors", "named", "run"]
