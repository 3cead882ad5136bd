"""What a page holds and what it refuses."""

import base64
import json
import re
import sys
import zlib
from html import escape

import numpy as np
import pytest

from chronotope.errors import ChronotopeError
from chronotope.report import save_results, write_report
from chronotope.report.page import summary
from chronotope.report.plot import excess, speed_error
from chronotope.report.results import ROW
from chronotope.report.table import percent, signed, table, three, times


def payload(page):
    return json.loads(re.search(r'<script type="application/json" id="payload">(.*?)</script>', page, re.DOTALL)[1])


def unpack(text, dtype):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def test_page_is_whole_and_asks_for_nothing(written):
    path, _ = written
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"<!-- \w+ -->", page)
    assert not re.search(r"<(script|img|link|iframe)[^>]+(src|href)=(?!\"data:)", page)
    assert "default-src 'none'" in page
    assert page.count("Plotly.newPlot(") == 1


def test_names_are_escaped(written):
    page = written[0].read_text(encoding="utf-8")
    assert "<title>Patterns &lt;compared&gt;</title>" in page
    assert escape("a <b>&'odd'") in page
    assert "a <b>&" not in page
    assert "segments(ids)</script>" not in page


def test_arrays_come_back(written):
    path, results = written
    got, pictures = payload(path.read_text(encoding="utf-8")), results["pictures"]
    shape = pictures["true"].shape
    assert got["shape"] == list(shape)
    assert np.array_equal(unpack(got["true"], np.uint8).reshape(shape), pictures["true"])
    assert np.array_equal(unpack(got["predicted"]["near"], np.uint8).reshape(shape), pictures["predicted"]["near"])
    for name, cone in pictures["cones"].items():
        bits = unpack(got["cones"][name]["mask"], np.uint8).reshape(*cone["mask"].shape[:2], -1)
        assert np.array_equal(np.unpackbits(bits, axis=-1, count=cone["mask"].shape[-1]).astype(bool), cone["mask"])
        assert np.array_equal(unpack(got["cones"][name]["k"], "<f2").reshape(cone["k"].shape), cone["k"])
        assert got["cones"][name]["masks"] == len(cone["mask"])


def test_table_keeps_every_row_and_marks_the_best(results):
    text = table(results)
    assert text.count("<tr data-name=") == len(results["rows"])
    assert text.count("class=best") == 1
    assert re.search(r'<tr data-name="near" class=best>.*?<span class="badge">best</span>', text)
    assert "–" not in text
    results["rows"][2]["peak_mb"], results["best"] = None, None
    assert '<td data-key="peak_mb" data-label="peak MB" data-value="">–</td>' in table(results)
    assert "badge" not in table(results)


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (three, 0.0, "0"),
        (three, 0.0041, "0.00410"),
        (three, 1.0, "1.00"),
        (three, 41.26, "41.3"),
        (three, 1234.5, "1234"),
        (three, 1e-7, "1.00e-07"),
        (times, 4.6404, "4.64×"),
        (percent, 0.12, "12.0 %"),
        (percent, 1.0, "100 %"),
        (signed, 0.0, "0 %"),
        (signed, 0.75, "+0.75 %"),
        (signed, -17.6, "-18 %"),
    ],
)
def test_numbers_have_sensible_digits(show, value, text):
    assert show(value) == text


def test_plot_has_a_point_and_a_bound_for_each_pattern(results):
    bounds, measured = speed_error(results).data
    rows = sorted(results["rows"], key=lambda row: row["forward_speedup"])
    assert list(measured.text) == [row["name"] for row in rows]
    assert list(measured.x) == [row["forward_speedup"] for row in rows]
    np.testing.assert_allclose(measured.y, [excess(results, row) for row in rows])
    assert list(bounds.x[1::3]) == [row["bound"] for row in rows]
    assert list(bounds.y[1::3]) == list(measured.y)
    layout = speed_error(results).layout
    assert layout.xaxis.type == "log"
    assert layout.shapes[0].y0 == 1.0
    for low, high in (layout.yaxis.range, layout.updatemenus[0].buttons[1].args[0]["yaxis.range"]):
        assert low < 0 < 1 < high


def test_whole_numbers_will_do(results, tmp_path):
    results["minutes"] = results["budget"] = 1
    for row in results["rows"]:
        row |= {"peak_mb": 120, "bound": 2, "forward_speedup": 1, "tuned": 3}
    assert write_report(results, tmp_path / "page.html").stat().st_size > 1e6


def test_excess_is_percent_above_dense(results):
    assert excess(results, results["rows"][0]) == 0
    assert excess(results, results["rows"][2]) == pytest.approx(5)
    assert excess(results, results["rows"][1] | {"tuned": None}) is None


def test_summary_says_what_and_where(results):
    text = summary(results)
    for part in ["moving digits &amp; co", "a processor", "2 threads", "123,456", "5 × 7 × 9", "0.0310", "seed 3"]:
        assert part in text
    assert "Best within 1 % of the dense error: near</b>, speed 4.64× forward" in text
    assert "No pattern is within 1 % of the dense error." in summary(results | {"best": None})


def test_results_are_strict_json_without_pictures(results, tmp_path):
    results["rows"][1]["mass"] = np.float32(0.5)
    path = save_results(results, tmp_path / "results.json")

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    del results["pictures"]
    assert read == results


@pytest.mark.parametrize("write", [save_results, write_report])
def test_error_not_finite(results, tmp_path, write):
    results["rows"][2]["tuned"] = float("nan")
    with pytest.raises(
        ChronotopeError, match=r"results\['rows'\]\[2\]\['tuned'\] is nan, which JSON cannot hold: give"
    ):
        write(results, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_error_type(results, tmp_path):
    results["machine"]["cpu"] = object()
    with pytest.raises(ChronotopeError, match=r"\['machine'\]\['cpu'\] is a object, expected a number, text, list"):
        save_results(results, tmp_path / "out")


@pytest.mark.parametrize("write", [save_results, write_report])
def test_error_no_folder(results, tmp_path, write):
    with pytest.raises(ChronotopeError, match=r"none is not a folder, expected one to write page\.html in: create it"):
        write(results, tmp_path / "none" / "page.html")


@pytest.mark.parametrize("name", ROW)
def test_error_missing_number(results, tmp_path, name):
    del results["rows"][1][name]
    with pytest.raises(ChronotopeError, match=rf"results\['rows'\]\[1\] lacks {name}: add them"):
        write_report(results, tmp_path / "out")


def test_error_names(results, tmp_path):
    with pytest.raises(ChronotopeError, match="best names other, expected names of rows: dense, near"):
        write_report(results | {"best": "other"}, tmp_path / "out")
    with pytest.raises(ChronotopeError, match="names a pattern twice"):
        write_report(results | {"rows": results["rows"][:2] * 2}, tmp_path / "out")
    with pytest.raises(ChronotopeError, match="rows'] is empty"):
        write_report(results | {"rows": []}, tmp_path / "out")


def test_error_pictures(results, tmp_path):
    cone = results["pictures"]["cones"]["near"]
    cone["mask"] = cone["mask"][:, :, 1:]
    message = r"\['cones'\]\['near'\]\['mask'\] is bool \[1, 315, 314\], expected bool \[1, 315, 315\]"
    with pytest.raises(ChronotopeError, match=message):
        write_report(results, tmp_path / "out")
    cone["mask"] = np.ones((1, 315, 315), bool)
    cone["q"] = cone["q"].astype(np.float32)
    with pytest.raises(ChronotopeError, match=r"\['q'\] is float32 \[2, 315, 6\], expected float16 \[2, 315, 6\]"):
        write_report(results, tmp_path / "out")


def test_error_without_plotly(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ChronotopeError, match=r"plotly, which is not installed: pip install chronotope\[report\]"):
        write_report(results, tmp_path / "out")
