"""Parts of a comparison that the command line's tests do not reach."""

import io
import json

import pytest
from rich.console import Console

import chronotope as ct
from chronotope.tasks import compare
from chronotope.tasks.compare import Settings
from chronotope.tasks.menu import Entry

GRID = ct.Grid(t=2, h=4, w=4)


def console():
    return Console(file=io.StringIO(), width=200)


def results(**tuned_and_speed):
    rows = [{"name": n, "tuned": tuned, "forward_speedup": speed} for n, (tuned, speed) in tuned_and_speed.items()]
    return {"rows": rows, "budget": 0.01}


def test_the_plan_is_of_the_fastest_within_the_budget_that_a_file_can_hold(tmp_path):
    (tmp_path / "plan.7.json").write_text("of an earlier run")
    odd = ct.predicate(lambda q, k: (q.h + k.h) % 2 == 0)
    entries = [
        Entry("dense", (ct.full(),), ""),
        Entry("odd", (odd,), ""),
        Entry("half", (ct.along("t"), odd), ""),
        Entry("two", (ct.along("t"), ct.along("h", "w")), ""),
        Entry("wrong", (ct.along("w"),), ""),
    ]
    told = console()
    numbers = results(dense=(1.0, 1.0), odd=(1.0, 9.0), half=(1.0, 8.0), two=(1.009, 3.0), wrong=(1.02, 99.0))
    compare._save_plans(numbers, entries, Settings(grid=GRID).recipe(), tmp_path, told)
    assert "no plan file of odd: " in told.file.getvalue() and "no plan file of half: " in told.file.getvalue()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.1.json", "plan.json"]
    assert ct.load_plan(tmp_path / "plan.1.json", GRID).where == ct.along("h", "w") & ct.causal("t")


def test_a_large_grid_has_a_report_without_cones(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "LARGEST_CONES", 16)
    told = console()
    settings = Settings(grid=GRID, patch=2, steps=1, tune=1, patterns="axial", out=tmp_path)
    found = compare.compare(settings, told)
    assert "the report has no light cones: 32 tokens are more than 16" in told.file.getvalue()
    assert found["pictures"]["cones"] == {} and set(found["pictures"]["predicted"]) == {"dense", "axial"}
    assert (tmp_path / "report.html").exists()


def test_rows_are_kept_and_times_are_measured_again(tmp_path, monkeypatch):
    settings = Settings(grid=GRID, patch=2, steps=1, tune=1, patterns="axial", out=tmp_path)
    first = compare.compare(settings, console())
    monkeypatch.setattr(compare, "tune", lambda *_: pytest.fail("tuned again"))
    second = compare.compare(settings, console())
    keep = ("error", "tuned", "mass", "density")
    assert [[row[k] for k in keep] for row in first["rows"]] == [[row[k] for k in keep] for row in second["rows"]]
    assert [row["forward_ms"] for row in first["rows"]] != [row["forward_ms"] for row in second["rows"]]
    assert (
        json.loads((tmp_path / "results.json").read_text())["rows"][0]["forward_ms"] == second["rows"][0]["forward_ms"]
    )


def test_many_patterns_share_the_steps_of_tuning():
    assert [Settings().tuning_steps(count) for count in (1, 20, 40, 1000)] == [24, 24, 12, 1]
    assert Settings(tune=7).tuning_steps(1000) == 7


def test_predicted_frames_begin_with_the_one_given(tmp_path):
    settings = Settings(grid=GRID, patch=2, steps=1, tune=1, patterns="dense", out=tmp_path)
    pictures = compare.compare(settings, console())["pictures"]
    true, predicted = pictures["true"], pictures["predicted"]["dense"]
    assert true.shape == predicted.shape == (3, 3, 8, 8, 1)
    assert (true[:, 0] == predicted[:, 0]).all() and not (true[:, 1:] == predicted[:, 1:]).all()
