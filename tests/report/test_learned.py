"""The page of results: means and spreads, floors, published numbers; nothing is dropped."""

from dataclasses import replace

from chronotope.report.learned import results_page
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
    assert "| **line (width=4)** | 0.6000 ± 0.1414 | 0.2500 ± 0.0000 | 1,234 | 3 | 2 |" in page
    assert (
        "| floor: zero | 3.0000 |  |" in page
        and "| published: somebody |  | 0.1250 |" in page
        and "somebody: a book." in page
    )


def test_every_model_and_setting_has_its_row() -> None:
    others = [replace(ONE, model="deep", options={}), replace(ONE, settings={"noise": 0.2}, test={"mse": 9.0})]
    page = results_page([ONE, *others])
    assert page.count("## sums: numbers.csv") == 2 and "| **deep** | 0.5000 |" in page and "9.0000" in page
