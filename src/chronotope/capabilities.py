"""The capability tables: what can be computed by what."""

from __future__ import annotations

from chronotope import kernels
from chronotope.errors import ChronotopeError
from chronotope.listing import Listing
from chronotope.recurrences import table as recurrences


def backends(of: str = "attention") -> Listing:
    """What each backend of "attention" or of "recurrence" takes and gives: a list that prints as a table."""
    if of not in ("attention", "recurrence"):
        raise ChronotopeError(f"backends({of!r}): there are those of attention and of recurrence.")
    return kernels.backends() if of == "attention" else recurrences.backends()
