"""The calendar of TG-RAG: days in months in quarters in years, and the buckets that a fact belongs to."""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from chronotope.errors import ChronotopeError

LEVELS = ("year", "quarter", "month", "day")
_FORMS = {
    "year": re.compile(r"(\d{4})"),
    "quarter": re.compile(r"(\d{4})-?Q([1-4])"),
    "month": re.compile(r"(\d{4})-(\d{2})"),
    "day": re.compile(r"(\d{4})-(\d{2})-(\d{2})"),
}


@dataclass(frozen=True)
class Period:
    """A bucket of the calendar: "2021", "2021-Q3", "2021-08" or "2021-08-05", and its first and last day (ordinals)."""

    name: str
    level: str
    first: int
    last: int


def period(time: str | date) -> Period:
    """The bucket that a normalised date names. Raises ChronotopeError for what is none."""
    if isinstance(time, date):
        time = f"{time:%Y-%m-%d}"
    for level, form in _FORMS.items():
        found = form.fullmatch(time)
        if found is not None:
            year, *rest = (int(part) for part in found.groups())
            month = 1 if level == "year" else 3 * rest[0] - 2 if level == "quarter" else rest[0]
            try:
                return around(date(year, month, rest[1] if level == "day" else 1), level)
            except ValueError:
                break
    raise ChronotopeError(f"{time!r} is no date: expected a year, '2021-Q3', '2021-08' or '2021-08-05'.")


def around(day: date, level: str) -> Period:
    """The bucket of a level that holds a day."""
    year, month = day.year, day.month
    if level == "year":
        return Period(f"{year:04}", level, date(year, 1, 1).toordinal(), date(year, 12, 31).toordinal())
    if level == "quarter":
        end = (month + 2) // 3 * 3
        first, last = date(year, end - 2, 1), date(year, end, monthrange(year, end)[1])
        return Period(f"{year:04}-Q{end // 3}", level, first.toordinal(), last.toordinal())
    if level == "month":
        first, last = date(year, month, 1), date(year, month, monthrange(year, month)[1])
        return Period(f"{year:04}-{month:02}", level, first.toordinal(), last.toordinal())
    return Period(f"{day:%Y-%m-%d}", level, day.toordinal(), day.toordinal())


def leaves(start: Period, end: Period, levels: Sequence[str]) -> list[Period]:
    """The buckets of a fact from start to end, of the finest level that both its dates and `levels` know."""
    finest = min(LEVELS.index(start.level), LEVELS.index(end.level))
    known = [level for level in LEVELS[: finest + 1] if level in levels]
    if not known:
        raise ChronotopeError(f"{start.name!r} to {end.name!r} fit none of the levels {', '.join(levels)}.")
    out = [around(date.fromordinal(start.first), known[-1])]
    while out[-1].last < end.last:
        out.append(around(date.fromordinal(out[-1].last + 1), known[-1]))
    return out


def parents(leaf: Period, levels: Sequence[str]) -> list[Period]:
    """The buckets around a bucket, the nearest first."""
    coarser = [level for level in LEVELS[: LEVELS.index(leaf.level)] if level in levels]
    return [around(date.fromordinal(leaf.first), level) for level in reversed(coarser)]
