"""Models built from the layers of `chronotope.nn`."""

from chronotope.models.language import Language
from chronotope.models.predictor import Predictor

__all__ = ["Language", "Predictor"]
