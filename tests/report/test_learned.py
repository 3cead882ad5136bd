"""The page of results: means and spreads, floors, published numbers; nothing is dropped."""

from dataclasses import replace

from chronotope.report.learned import result_table, results_page
from chronotope.tasks.learning import Result

ONE = Result(
    task="sums", data="numbers.csv", protocol="40 examples", settings={"noise": 0.1}, model="line",
    options={"width": 4}, schedule={}, seed=0, steps=10, minutes=2.0, parameters=1234, best="mse", larger=False,
    valid={"mse": 1.0}, test={"mse": 0.5, "mae": 0.25}, floors={"zero": {"mse": 3.0}},
    published=[{"name": "somebody", "numbers": {"mae": 0.125}, "source": "a book"}],
    machine="a machine", threads=2, torch="2.13", version="0", date="2026-01-01",
)  # fmt: skip


def test_seeds_are_a_mean_and_a_spread() -> None:
    page = results_page([ONE, replace(ONE, seed=1, test={"mse": 0.7, "mae": 0.25}, minutes=4.0)])
    assert "| **line (width=4)** | 0.6000 ± 0.1414 | 0.2500 ± 0.0000 | 1,234 | 3.0 | 2 |" in page
    assert (
        "| floor: zero | 3.0000 |  |" in page
        and "| published: somebody |  | 0.1250 |" in page
        and "somebody: a book." in page
    )


def test_every_model_and_setting_has_its_row() -> None:
    others = [
        replace(ONE, model="deep", options={}),
        replace(ONE, settings={"noise": 0.2}, test={"mse": 9.0, "mae": 0}),
    ]
    page = results_page([ONE, *others])
    assert page.count("## sums: numbers.csv") == 1 and "| **deep (noise=0.1)** | 0.5000 |" in page
    assert "| **line (noise=0.2, width=4)** | 9.0000 |" in page


def test_runs_of_other_schedules_are_no_seeds_of_each_other() -> None:
    page = results_page([replace(ONE, schedule={"steps": n, "rate": 1}) for n in (10, 20)])
    assert "| **line (width=4, steps=10)** |" in page and "| **line (width=4, steps=20)** |" in page


def test_the_summary_takes_what_validated_best_and_the_better_rivals() -> None:
    floors = {"zero": {"mse": 3.0}, "one": {"mse": 2.0}}
    published = [{"name": name, "numbers": {"mse": x}, "source": "a book"} for name, x in (("a", 0.25), ("b", 0.125))]
    one = replace(ONE, floors=floors, published=published)
    other = replace(one, model="deep", valid={"mse": 2.0}, test={"mse": 0.4, "mae": 0.0})
    row = "| sums | numbers.csv, 40 examples | mse | 0.5000 | line (width=4) | 1 | 2.0000 (one) | 0.1250 (b) |"
    assert row in results_page([one, other])
    larger = "| 0.4000 | deep (width=4) | 1 | 3.0000 (zero) | 0.2500 (a) |"
    assert larger in results_page([replace(result, larger=True) for result in (one, other)])


def test_the_summary_tells_what_can_be_compared() -> None:
    floors = {"one": {"accuracy": 0.25}, "other": {"accuracy": 0.5}}
    one = replace(ONE, test={"accuracy": 0.75, "mse": 0.5}, floors=floors, published=[])
    assert "| accuracy | 0.7500 | line (width=4) | 1 | 0.5000 (other) |  |" in results_page([one])


def test_the_table_of_a_run_has_floors_and_published_numbers() -> None:
    columns = [list(column.cells) for column in result_table(ONE).columns]
    assert columns[0] == ["line, seed 0", "floor: zero", "published: somebody"] and columns[2] == [
        "0.2500",
        "",
        "0.1250",
    ]
