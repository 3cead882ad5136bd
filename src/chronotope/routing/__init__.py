"""Routes: who looks at whom, decided by content."""

from chronotope.routing import route
from chronotope.routing.fidelity import Fidelity, fidelity

__all__ = ["Fidelity", "fidelity", "route"]
