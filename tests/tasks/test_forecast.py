"""Multivariate forecasting: the reader, the cut, the scale, what a forecast may know, and the published Repeat row."""

import gzip
import io
import os
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from chronotope.data.forecast import Parts, read_series
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.models import Forecaster
from chronotope.tasks.forecast import BATCH, MAKERS, Forecast
from chronotope.tasks.learning import TEST, VALID, learn, settle

DATA = Path(os.environ.get("CHRONOTOPE_DATA", Path(__file__).parents[3] / "shared" / "data"))
TABLES = {
    "ETTh1": (DATA / "forecast_ett" / "ETTh1.csv.gz", (96, 192, 336, 720)),
    "ETTh2": (DATA / "forecast_ett" / "ETTh2.csv.gz", (96, 192, 336, 720)),
    "ETTm1": (DATA / "forecast_ett" / "ETTm1.csv.gz", (96, 192, 336, 720)),
    "Exchange": (DATA / "forecast_exchange" / "exchange_rate.csv.gz", (96, 192, 336, 720)),
    "ILI": (DATA / "forecast_ili" / "national_illness.csv.gz", (24, 36, 48, 60)),
}


def table(path, rows=300, columns=2, seed=0):
    """A wave and noise, 6 rows a day, gzipped; returns its path and the numbers as they were written."""
    rng = torch.Generator().manual_seed(seed)
    wave = torch.sin(torch.arange(rows)[:, None] / 3 + torch.arange(columns))
    values = (5 + 2 * wave + 0.1 * torch.randn(rows, columns, generator=rng)).double()
    lines = [",".join(["date", *(f"c{i}" for i in range(columns))])]
    for i, row in enumerate(values.tolist()):
        day, hour = divmod(4 * i, 24)
        month, day = divmod(day, 28)
        lines.append(
            f"20{10 + month // 12}-{month % 12 + 1:02}-{day + 1:02} {hour:02}:00:00," + ",".join(map(str, row))
        )
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path, values


def task(path, **settings):
    return Forecast(data=path, **{"lookback": 12, "horizon": 4, **settings})


def model(blocks, lookback=24, horizon=5, **options):
    torch.manual_seed(0)
    options = {"patch": 4, "stride": 3, "dim": 8, "heads": 2, "ratio": 2, **options}
    return Forecaster(lookback, horizon, blocks, **options).double().eval()


def past(batch=2, lookback=24, variables=3):
    return torch.randn(batch, lookback, variables, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_reads_a_table_with_dates(tmp_path):
    path, values = table(tmp_path / "made.csv.gz")
    series = read_series(path)
    assert torch.equal(series.values, values)
    assert series.names == ("c0", "c1") and series.step == timedelta(hours=4)
    assert series.rows(timedelta(days=1)) == 6 and series.rows(timedelta(hours=5)) is None


def test_reads_numbers_alone(tmp_path):
    (tmp_path / "made.txt").write_text("1,2,3\n4,5,6\n")
    series = read_series(tmp_path / "made.txt")
    assert series.values.tolist() == [[1, 2, 3], [4, 5, 6]] and series.step is None and len(series.names) == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "", "0 rows"),
        ("a.csv", "date,x\n2020-01-01,1\n", "1 rows of 1"),
        ("a.csv", "date,x\n2020-01-01,1\n2020-01-02,1,2\n", "row 1 has 2 numbers; expected 1"),
        ("a.csv", "date,x\n2020-01-01,1\n2020-01-02,one\n", "expected numbers"),
        ("a.csv", "date,x\n2020-01-01,1\n2020-01-02,nan\n", "row 1 has nan"),
        ("a.csv", "date,x\nmonday,1\ntuesday,2\n", "is no date"),
        ("a.csv", "date,x\n2020-01-02,1\n2020-01-01,2\n", "in order of time"),
        ("a.csv.gz", "date,x\n2020-01-01,1\n2020-01-02,1\n", "gzip"),
        ("a.json", "{}", "expected a table"),
    ],
)
def test_says_what_does_not_fit(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ChronotopeError, match=said):
        read_series(tmp_path / name)


def test_the_cut_by_months_needs_dates_and_months(tmp_path):
    path, _ = table(tmp_path / "ETTx.csv.gz", rows=20 * 30 * 6 + 7)
    assert task(path).parts == Parts(12 * 180, 16 * 180, 20 * 180)
    assert task(path, split="shares").parts == Parts(2524, 2886, 3607)
    with pytest.raises(ChronotopeError, match="20 months"):
        _ = task(table(tmp_path / "ETTy.csv.gz")[0]).parts
    (tmp_path / "bare.txt").write_text("1\n2\n")
    with pytest.raises(ChronotopeError, match="with dates"):
        _ = task(tmp_path / "bare.txt", split="months").parts


def test_the_scale_is_of_the_training_part_alone(tmp_path):
    path, values = table(tmp_path / "made.csv.gz")
    one = task(path)
    torch.testing.assert_close(one.scaled[: one.parts.train].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(one.scaled[: one.parts.train].std(0, correction=0), torch.ones(2))
    own = values[: one.parts.train]
    torch.testing.assert_close(one.scaled, ((values - own.mean(0)) / own.std(0, correction=0)).float())


def test_a_column_that_stands_still_is_not_divided_by_zero(tmp_path):
    (tmp_path / "made.txt").write_text("\n".join(f"{i},7" for i in range(100)))
    assert task(tmp_path / "made.txt").scaled[:, 1].tolist() == [0.0] * 100


def test_training_windows_lie_in_the_training_part_and_cover_it(tmp_path):
    one = task(table(tmp_path / "made.csv.gz")[0])
    before, after = one.batch(torch.tensor([0, one.examples - 1]), torch.Generator())
    assert before.shape == (2, 12, 2) and after.shape == (2, 4, 2)
    assert torch.equal(torch.cat([before[0], after[0]]), one.scaled[:16])
    assert torch.equal(torch.cat([before[1], after[1]]), one.scaled[one.parts.train - 16 : one.parts.train])


@pytest.mark.parametrize("part", [VALID, TEST])
def test_measures_equal_brute_force_over_whole_batches_and_over_all(tmp_path, part):
    one = task(table(tmp_path / "made.csv.gz", rows=700)[0])
    first, end = (one.parts.train, one.parts.valid) if part == VALID else (one.parts.valid, one.parts.test)
    errors = [one.scaled[s : s + 4] - one.scaled[s - 3] for s in range(first, end - 3)]
    found = one.measure(lambda x: x[:, 9:10].expand(-1, 4, -1), part)
    assert len(errors) % BATCH, "the law needs a batch to drop"
    for counted, said in ((errors[: len(errors) // BATCH * BATCH], ""), (errors, ", all windows")):
        error = torch.stack(counted).double()
        assert found[f"MSE{said}"] == pytest.approx(float(error.square().mean()))
        assert found[f"MAE{said}"] == pytest.approx(float(error.abs().mean()))
    kept = task(one.data, drop_last=False).measure(lambda x: x[:, 9:10].expand(-1, 4, -1), part)
    assert kept == {key: pytest.approx(found[f"{key}, all windows"]) for key in ("MSE", "MAE")}


def test_a_perfect_forecast_has_no_error_and_the_last_day_is_one_of_a_daily_wave(tmp_path):
    days = "\n".join(f"2020-01-{i // 6 + 1:02} {i % 6 * 4:02}:00:00,{i % 6}" for i in range(180))
    (tmp_path / "made.csv").write_text("date,x\n" + days)
    floors = task(tmp_path / "made.csv", horizon=13, drop_last=False).floors()
    assert floors["the last day"] == {"MSE": 0, "MAE": 0}
    assert floors["repeat"]["MSE"] > 0 and floors["mean"]["MSE"] > 0


def test_too_few_rows_are_said(tmp_path):
    path, _ = table(tmp_path / "made.csv.gz", rows=100)
    with pytest.raises(ChronotopeError, match="no whole batch of 32"):
        task(path).measure(lambda x: x[:, -4:], TEST)
    with pytest.raises(ChronotopeError, match="has no window"):
        _ = task(path, lookback=90).examples
    with pytest.raises(ChronotopeError, match="has no window"):
        task(path, horizon=30).measure(lambda x: x, TEST)


@pytest.mark.parametrize("blocks", [["time"], ["recurrence"], []])
@pytest.mark.parametrize("norm", ["none", "last", "instance"])
def test_without_mixing_of_variables_each_is_forecast_from_itself(blocks, norm):
    forecaster, x = model(blocks, norm=norm), past()
    other = x.clone()
    other[:, :, 1] += torch.randn_like(other[:, :, 1])
    a, b = forecaster(x), forecaster(other)
    torch.testing.assert_close(a[:, :, ::2], b[:, :, ::2])
    assert not torch.allclose(a[:, :, 1], b[:, :, 1])
    torch.testing.assert_close(forecaster(x[:, :, :1]), a[:, :, :1])


@pytest.mark.parametrize("blocks", [["variable"], ["time", "variable"], ["joint"]])
def test_mixing_of_variables_is_a_set_function_of_them(blocks):
    forecaster, x = model(blocks, norm="instance"), past()
    order = torch.tensor([2, 0, 1])
    a = forecaster(x)
    torch.testing.assert_close(forecaster(x[:, :, order]), a[:, :, order])
    other = x.clone()
    other[:, :, 1] += torch.randn_like(other[:, :, 1])
    assert not torch.allclose(forecaster(other)[:, :, 0], a[:, :, 0]), "another variable is looked at"


def test_dropout_is_in_the_blocks_too_and_in_training_alone():
    x, plain, dropping = past(), model(["time", "variable"]), model(["time", "variable"], dropout=0.3)
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(dropping(x), plain(x))
    tokens = torch.randn(2, 7 * 3, 8, dtype=torch.float64)
    dropping.train()
    for block in dropping.body.stack.blocks:
        assert not torch.equal(block(tokens, Grid(t=7, v=3)), block(tokens, Grid(t=7, v=3)))
    assert not torch.equal(dropping(x), dropping(x))


def test_a_whole_look_back_is_one_token_of_each_variable():
    forecaster = model(["variable", "variable"], patch=None)
    assert forecaster.body.tokens == 1 and forecaster.body.embed.in_features == 24
    assert forecaster(past()).shape == (2, 5, 3)


@given(st.integers(6, 40), st.integers(1, 6), st.integers(1, 7))
def test_patches_end_at_the_last_value_and_drop_only_what_no_patch_can_hold(lookback, patch, stride):
    body = model(["time"], lookback, patch=patch, stride=stride).body
    assert body.skipped + patch + stride * (body.tokens - 1) == lookback and 0 <= body.skipped < stride


@pytest.mark.parametrize(("norm", "scaled"), [("last", False), ("instance", True)])
def test_norms_move_with_the_series(norm, scaled):
    """f(a x + b) = a f(x) + b: b for both, a only where the spread is divided out."""
    forecaster, x = model(["time", "joint"], norm=norm), past()
    level = torch.tensor([3.0, -2.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(forecaster(x + level), forecaster(x) + level)
    # Not exactly: a small number keeps the spread of a still series from being 0.
    assert torch.allclose(forecaster(5 * x), 5 * forecaster(x), atol=1e-3) == scaled


def test_trend_and_rest_by_equal_matrices_are_one_matrix():
    x, apart, one = past(), model([], trend=7), model([])
    apart.body.rest.load_state_dict(one.body.rest.state_dict())
    apart.body.slow.weight.data, apart.body.slow.bias.data = one.body.rest.weight.data, torch.zeros(5).double()
    torch.testing.assert_close(apart(x), one(x))


def test_the_trend_is_a_moving_average():
    x, forecaster = past(1, 24, 1), model([], trend=5)
    forecaster.body.rest.weight.data.zero_(), forecaster.body.rest.bias.data.zero_()
    forecaster.body.slow.bias.data.zero_()
    rows = [sum(x[0, min(23, max(0, i + d)), 0] for d in range(-2, 3)) / 5 for i in range(24)]
    expected = forecaster.body.slow.weight @ torch.stack(rows)
    torch.testing.assert_close(forecaster(x)[0, :, 0], expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"blocks": ["tim"]}, "did you mean time"),
        ({"norm": "batch"}, "none, last, instance"),
        ({"trend": 4}, "odd width"),
        ({"blocks": ["time"], "trend": 5}, "no blocks"),
        ({"blocks": ["time"], "patch": 25}, "within the look-back"),
        ({"horizon": 0}, "horizon of 1 or more"),
    ],
)
def test_a_model_says_what_does_not_fit(options, said):
    with pytest.raises(ChronotopeError, match=said):
        Forecaster(**{"lookback": 24, "horizon": 5, **options})
    with pytest.raises(ChronotopeError, match="expected \\[B, 24, V\\]"):
        model([])(past(lookback=23))


def test_saved_and_loaded_it_forecasts_the_same(tmp_path):
    forecaster, x = model(["time", "variable"], norm="instance"), past()
    forecaster.save_pretrained(tmp_path)
    torch.testing.assert_close(Forecaster.from_pretrained(tmp_path).double().eval()(x), forecaster(x))


@pytest.mark.parametrize("name", MAKERS)
def test_each_model_learns_a_wave(tmp_path, name):
    path, _ = table(tmp_path / "made.csv.gz", rows=500)
    small = ["steps=60", "every=30", "batch=16", "rate=0.01", "lookback=24", "horizon=6"]
    small += [] if name.endswith("linear") else ["dim=8", "heads=2", "dropout=0"]
    small += ["patch=8", "stride=8"] if name in ("patches", "both", "recurrence") else []
    settled = settle(Forecast, path, name, small)
    assert set(Forecast.models) == set(MAKERS)
    result = learn(settled, tmp_path / "out", Console(file=io.StringIO()))
    assert result.test["MSE"] < 0.5 * min(floor["MSE"] for floor in result.floors.values())
    again = Forecaster.from_pretrained(tmp_path / "out" / "model").eval()
    assert settled.task.measure(again, TEST) == pytest.approx(result.test)


def test_published_rows_are_of_the_table_and_the_horizon(tmp_path):
    path = tmp_path / "ETTh2.csv.gz"
    rows = {row.name: row for row in Forecast(data=path, horizon=720).published}
    assert rows["NLinear"].numbers == {"MSE": 0.394, "MAE": 0.436} and "look-back 336" in rows["NLinear"].source
    assert rows["Informer"].numbers == {"MSE": 3.647, "MAE": 1.625} and "look-back 96" in rows["Informer"].source
    assert Forecast(data=path, horizon=24).published == () == Forecast(data=path, split="shares").published
    assert Forecast(data=tmp_path / "other.csv").published == ()


@pytest.mark.parametrize("name", TABLES)
def test_repeat_is_the_published_row_to_three_decimals(name, monkeypatch):
    path, horizons = TABLES[name]
    if not path.exists():
        pytest.skip(f"{path} is absent: set CHRONOTOPE_DATA")
    monkeypatch.setattr("chronotope.tasks.forecast.read_series", lru_cache(read_series))
    for horizon in horizons:
        one = Forecast(data=path, lookback=1, horizon=horizon)
        published = next(row.numbers for row in one.published if row.name == "Repeat")
        found = one.floors()["repeat"]
        assert {key: round(found[key], 3) for key in published} == published, horizon


def test_without_dropping_the_numbers_are_others():
    path = TABLES["ILI"][0]
    if not path.exists():
        pytest.skip(f"{path} is absent: set CHRONOTOPE_DATA")
    found = Forecast(data=path, lookback=36, horizon=24, drop_last=False).floors()["repeat"]
    assert (round(found["MSE"], 3), round(found["MAE"], 3)) == (6.213, 1.622)
