"""A state carried along time instead of a set of keys."""

from chronotope.recurrences import features
from chronotope.recurrences.linear import Normalizers, linear_attention, normalizers
from chronotope.recurrences.recurrence import recurrence
from chronotope.recurrences.scans import scan
from chronotope.recurrences.state import RecurrentState

__all__ = ["Normalizers", "RecurrentState", "features", "linear_attention", "normalizers", "recurrence", "scan"]
