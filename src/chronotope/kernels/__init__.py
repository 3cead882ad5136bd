"""Ways to run a plan. Kernels do not import each other; `BACKENDS` lists them."""

from chronotope.kernels.call import Backend, Scores
from chronotope.kernels.reference import REFERENCE
from chronotope.kernels.tiled import TORCH

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (REFERENCE, TORCH)}

__all__ = ["BACKENDS", "Backend", "Scores"]
