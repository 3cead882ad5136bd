"""The bench of routes: what it checks and counts, not how fast anything is."""

from __future__ import annotations

import pytest

import chronotope as ct
from chronotope.bench import routes
from chronotope.bench.cases import BACKWARD, FORWARD
from chronotope.bench.lines import line
from chronotope.bench.routes import CHOOSING, Routed, growth
from chronotope.bench.timing import Settings

SETTINGS = Settings(threads=1, rounds=1, quick=True, compiled="none")


def test_growth_is_the_power() -> None:
    assert growth([1000, 2000, 4000], [3e-9 * n**1.5 for n in (1000, 2000, 4000)]) == pytest.approx(1.5)


def test_rows_of_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [Routed("best", lambda n: ct.route.top_blocks(4, n=16) & ct.causal(), "1")]
    monkeypatch.setattr(routes, "_cases", lambda: few)
    found = list(routes.routes(SETTINGS))
    parts = [part for part in found if not isinstance(part, str)]
    assert [row.phase for row in parts[2]] == [FORWARD, CHOOSING, BACKWARD]
    first = parts[2][0]
    assert first.tile_density is not None and first.bound == pytest.approx(1 / first.tile_density)
    assert first.error is not None and first.error < routes.RIGHT and first.seconds_median is not None
    assert "choosing" in line(parts[2]) and any("claimed: 1" in part for part in found if isinstance(part, str))


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "RIGHT", -1.0)
    monkeypatch.setattr(routes, "_cases", lambda: [Routed("best", lambda n: ct.route.top_blocks(4, n=16), "1")])
    parts = [part for part in routes.routes(SETTINGS) if not isinstance(part, str)]
    assert all(row.wrong for part in parts for row in part if row.row == "best")
