"""Adapt: the attention of models that exist, by patterns and routes; proved, and undone."""

from chronotope.adapt.asked import Asked
from chronotope.adapt.assignment import Assignment, apply, load
from chronotope.adapt.attach import Handle, Layer, attach
from chronotope.adapt.candidates import candidates
from chronotope.adapt.control import At, Capture, Control, control
from chronotope.adapt.outcome import Outcome, report
from chronotope.adapt.profile import Profile, profile
from chronotope.adapt.search import search

__all__ = [
    "Asked", "Assignment", "At", "Capture", "Control", "Handle", "Layer", "Outcome", "Profile", "apply", "attach",
    "candidates", "control", "load", "profile", "report", "search",
]  # fmt: skip
