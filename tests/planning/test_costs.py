"""The estimate behind the choice of tiles: what is counted, measured, kept, shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import chronotope as ct
from chronotope.kernels.native import calibrate
from chronotope.planning import Layout, Tiles, costs
from chronotope.planning.cost import choose
from chronotope.planning.costs import NATIVE, TORCH

GRID = ct.Grid(t=4, h=16, w=16)
NEAR = ct.window(t=3, h=5, w=5)


@pytest.mark.parametrize("where", [NEAR, NEAR & ct.causal("t"), ct.along("t") | ct.along("h")], ids=repr)
def test_the_estimate_adds_up_what_the_plan_holds(where: ct.Pattern) -> None:
    """Looks and pairs of tiles are counted exactly for separable patterns; computed pairs never below those visible."""
    for choice in choose(where, GRID, GRID, NATIVE)[:8]:
        tiles = Tiles(where, Layout(GRID, choice.q_tile), Layout(GRID, choice.k_tile))
        computed, looks, pairs, count, tokens = calibrate.counts(tiles).tolist()
        assert computed >= tiles.visible
        exact = NATIVE.pair * computed + NATIVE.look * looks + NATIVE.tile_pair * pairs + NATIVE.tile * count
        exact = exact / tokens + NATIVE.token
        assert 0.6 < choice.cost / exact < 1.7
        # The torch kernel computes whole tiles, so its work is known without looking inside them.
        if where is NEAR:
            listed = tiles.computed / GRID.size
            whole = TORCH.pair * listed + TORCH.look * listed / int(tiles.q.sizes[0])
            assert choice.whole == pytest.approx(whole, rel=1e-9)


def test_the_fit_finds_the_costs_behind_times() -> None:
    torch.manual_seed(0)
    work = torch.rand(20, 5, dtype=torch.float64)
    true = torch.tensor([3.0, 5.0, 0.0, 100.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(calibrate._fit(work / (work @ true)[:, None]), true)
    negative = torch.tensor([3.0, 5.0, -1.0, 100.0, 20.0], dtype=torch.float64)
    assert (calibrate._fit(work / (work @ negative)[:, None]) >= 0).all()


def test_measured_costs_are_kept_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from chronotope.kernels.call import Facts, Scores
    from chronotope.kernels.native.kernel import forward, reasons

    path = tmp_path / "folder" / "costs.json"
    monkeypatch.setattr(costs, "measured_path", lambda: path)
    monkeypatch.setattr(calibrate, "measured_path", lambda: path)
    assert "built in" in ct.plan(NEAR, GRID).explain()
    if reasons(
        Facts("cpu", torch.float32, 8, 8),
        Tiles(NEAR, *[Layout(GRID, (4, 4, 4))] * 2),
        Scores(1.0, None, None, False, (), (0,)),
    ):
        pytest.skip("the native kernels cannot be built here")
    path.unlink(missing_ok=True)
    calibrate.calibrate(forward)
    assert set(json.loads(path.read_text())) == {"float32", "bfloat16"}
    found = costs.costs()
    assert found.measured
    assert found.pair > 0
    assert "measured on this machine" in ct.plan(NEAR, GRID).explain()
    written = path.stat().st_mtime_ns
    calibrate.calibrate(forward)
    assert path.stat().st_mtime_ns == written
    path.write_text("{}")
    costs._read.cache_clear()
    assert costs.costs() == NATIVE


def test_costs_that_cannot_be_kept_are_no_trouble(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(costs, "measured_path", lambda: tmp_path / "file" / "costs.json")
    costs.save({"float32": NATIVE})
    assert costs.costs() == NATIVE
