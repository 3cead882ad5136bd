"""The list of published mechanisms: each page registers itself by the `paper` decorator."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.patterns import Pattern

FAMILIES = (
    "pattern", "routing", "linear", "memory", "spacetime", "stream", "score", "position", "model",
    "control", "fusion", "training", "probe", "bench", "apart",
)  # fmt: skip

Entry = TypeVar("Entry", bound=Callable[..., Any])


@dataclass(frozen=True)
class Paper:
    """One published mechanism: its page, what it claims, and the tests that show it."""

    system: int
    name: str
    family: str
    claim: str
    evidence: tuple[str, ...]
    missing: str | None
    entry: Callable[..., Any]
    menu: Callable[[Grid], Pattern] | None

    @property
    def status(self) -> str:
        """`works`, or `partial` where `missing` says what the page does not show."""
        return "partial" if self.missing else "works"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `chronotope papers --json` prints."""
        out = {
            "system": self.system, "name": self.name, "family": self.family, "status": self.status,
            "module": self.entry.__module__, "entry": self.entry.__qualname__, "claim": self.claim,
            "evidence": list(self.evidence),
        }  # fmt: skip
        return out | ({"missing": self.missing} if self.missing else {})


_PAPERS: dict[int, Paper] = {}


def paper(
    *,
    system: int,
    name: str,
    family: str,
    claim: str,
    evidence: list[str],
    missing: str | None = None,
    menu: Callable[[Grid], Pattern] | None = None,
) -> Callable[[Entry], Entry]:
    """Registers the function or class of a page.

    Args:
        system: number of the mechanism's row in the list of systems.
        name: short name of the mechanism.
        family: one of `FAMILIES`, and the folder of the page.
        claim: what the mechanism does, in one line.
        evidence: test files, relative to the repository, that show it.
        missing: what the page does not show yet; None: nothing.
        menu: a function from a grid to the page's pattern at its published defaults, scaled to the grid; it puts the
            mechanism on the menu of `chronotope compare` and under the generic laws.
    """
    if family not in FAMILIES:
        raise ChronotopeError(f"paper {name!r}: family {family!r} is none of {', '.join(FAMILIES)}.")
    if not evidence:
        raise ChronotopeError(f"paper {name!r} has no evidence: name the test files that show it.")

    def register(entry: Entry) -> Entry:
        if system in _PAPERS:
            raise ChronotopeError(f"paper {name!r}: system {system} is {_PAPERS[system].name!r} already.")
        _PAPERS[system] = Paper(system, name, family, claim, tuple(evidence), missing, entry, menu)
        return entry

    return register


def papers(family: str | None = None) -> list[Paper]:
    """Every registered mechanism in order of system number, or those of one family; imports all pages."""
    root = importlib.import_module("chronotope.papers")
    for module in pkgutil.walk_packages(root.__path__, "chronotope.papers."):
        importlib.import_module(module.name)
    return [entry for _, entry in sorted(_PAPERS.items()) if family in (None, entry.family)]
