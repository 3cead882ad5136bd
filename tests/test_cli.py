"""The command line, end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import chronotope as ct
from chronotope.cli import app

pytest.importorskip("lightning")
TINY = ["--grid", "3,4,4", "--patch", "2", "--tune", "2"]


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(folder, what was printed) of one small comparison."""
    out = tmp_path_factory.mktemp("compared")
    patterns = "divided, per-head mix; window(t=3, h=3, w=3)"
    result = run("compare", *TINY, "--steps", 3, "--patterns", patterns, "--out", out, "--budget", "0.5")
    return out, result.output


def test_compare_prints_and_writes_everything(compared):
    out, told = compared
    results = json.loads((out / "results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    assert names == ["dense", "divided", "per-head mix", "window(t=3, h=3, w=3)"]
    assert all(f"[{number}/4]" in told for number in range(1, 5)) and "* " + results["best"] in told
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert results["model"]["steps"] == 3 and results["grid"] == {"t": 3, "h": 4, "w": 4}
    dense = results["rows"][0]
    # Dense means all frames up to the own one: 6 of 9 pairs of frames.
    assert dense["density"] == pytest.approx(6 / 9) and dense["tile_density"] >= dense["density"]
    assert dense["mass"] == pytest.approx(1) and dense["bound"] == 1
    for row in results["rows"]:
        assert 0 < row["mass"] <= 1 + 1e-5 and row["bound"] == pytest.approx(
            dense["tile_density"] / row["tile_density"]
        )
        assert len(row["layers"]) == results["model"]["layers"] and row["peak_mb"] > 0
        assert len(row["layers"][0]["mass"]) == results["model"]["heads"]


def test_compare_leaves_plans_that_load(compared):
    out, _ = compared
    results = json.loads((out / "results.json").read_text())
    best = next(row for row in results["rows"] if row["name"] == results["best"])
    plans = [
        ct.load_plan(path, ct.Grid(t=3, h=4, w=4))
        for path in sorted(out.glob("plan*.json"), key=lambda path: (len(path.name), path))
    ]
    assert [repr(plan.where) for plan in plans] == list(dict.fromkeys(layer["pattern"] for layer in best["layers"]))


def test_compare_a_second_time_trains_nothing(compared):
    out, _ = compared
    before = json.loads((out / "results.json").read_text())
    kept = {path: path.stat().st_mtime_ns for path in (out / "kept").iterdir()}
    told = run("compare", *TINY, "--steps", 3, "--patterns", "divided", "--out", out, "--budget", "0.5").output
    assert "kept from before" in told and "training" not in told.replace("steps of training", "")
    after = json.loads((out / "results.json").read_text())
    assert [row["tuned"] for row in after["rows"]] == [row["tuned"] for row in before["rows"][:2]]
    assert kept == {path: path.stat().st_mtime_ns for path in (out / "kept").iterdir()}


def test_compare_by_minutes(tmp_path):
    run("compare", *TINY, "--minutes", 0.005, "--patterns", "axial", "--out", tmp_path)
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 2
    assert not (tmp_path / "lightning_logs").exists()


def started(out, *more):
    command = [sys.executable, "-m", "chronotope", "compare", *TINY, "--patterns", "axial", "--out", str(out), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_compare_goes_on_after_a_kill(tmp_path):
    """A training killed by SIGKILL and started again has the errors of one that was let alone."""
    first = started(tmp_path / "cut", "--steps", "400", "--minutes", "0.05")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut").glob("kept/*.ckpt")):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL and not (tmp_path / "cut" / "results.json").exists()
    results = []
    for folder in ("cut", "whole"):
        process = started(tmp_path / folder, "--steps", "400", "--minutes", "0.05")
        told, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and ("going on from step" in told) == (folder == "cut"), told + errors
        results.append(json.loads((tmp_path / folder / "results.json").read_text()))
    cut, whole = ([(row["error"], row["tuned"]) for row in result["rows"]] for result in results)
    assert cut == whole


@pytest.mark.slow
def test_a_real_film_through_the_whole_menu(tmp_path):
    data = Path(os.environ.get("CHRONOTOPE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    film = data / "video_clips" / "bikes.mp4"
    if not film.exists():
        pytest.skip(f"{film} is absent: set CHRONOTOPE_DATA")
    run(
        "compare",
        film,
        "--grid",
        "3,4,6",
        "--patch",
        "4",
        "--channels",
        "3",
        "--tune",
        2,
        "--steps",
        4,
        "--out",
        tmp_path,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["input"] == "bikes.mp4" and len(results["rows"]) >= 10 and list(tmp_path.glob("plan*.json"))


@pytest.fixture
def film(tmp_path):
    """Writes a gif of some frames, and gives its path."""
    av = pytest.importorskip("av")
    np = pytest.importorskip("numpy")

    def write(frames):
        path = tmp_path / f"film{frames}.gif"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("gif", rate=10)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "rgb8"
            for number in range(frames):
                image = np.full((16, 16, 3), 10 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        return path

    return write


def refused(*args):
    """What is said on stderr of bad input: one line, exit code 2."""
    result = run(*args, code=2)
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output
    return result.stderr


def test_videos_that_cannot_be_compared(tmp_path, film):
    empty, text = tmp_path / "empty.mp4", tmp_path / "text.mp4"
    empty.write_bytes(b"")
    text.write_bytes(b"not a video at all" * 100)
    for path, message in (
        (tmp_path / "none.mp4", "none.mp4 is not a file, expected a video such as an mp4, gif or avi: check the path"),
        (empty, "empty.mp4 is empty (0 bytes), expected a video"),
        (text, "text.mp4 is not a video, expected an mp4, gif, avi"),
        (film(3), "film3.gif has 3 frames, expected at least 4 for one clip"),
        (film(5), "2 clips of 4 frames leave none to train on"),
    ):
        assert message in refused("compare", path, *TINY, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--grid", "8,16,16,16"], "grid '8,16,16,16': 4 sizes without names; write t=8,h=32,w=32."),
        (["--grid", "8,x,16"], "is not of the form axis=size, such as t=8."),
        (["--grid", "0,4,4"], "Grid axis t=0: an axis needs a size of at least 1 token"),
        (["--grid", "16,16"], "Grid(h=16, w=16): clips lie on the axes t, h, w without a prefix"),
        (["--patterns", "neighbour"], "unknown pattern 'neighbour': did you mean neighborhood"),
        (["--patterns", "dense; windw(t=3)"], "unknown pattern 'windw': did you mean window"),
        (["--patterns", "window(z=3)"], "'z'"),
        (["--minutes", "-1"], "minutes=-1.0: expected a positive number of minutes to train, such as 1."),
        (["--budget", "-0.1"], "budget=-0.1: expected the share of error that may be added, such as 0.01."),
        (["--tune", "0"], "tune=0: expected 1 or more steps of tuning for each pattern."),
        (["--seed", "-1"], "seed=-1: expected 0 to 4,294,967,295."),
        (["--threads", "0"], "threads=0: expected 1 or more."),
        (["--channels", "2"], "channels=2: expected 1 (gray) or 3"),
    ],
)
def test_bad_options(args, message, tmp_path):
    assert message in refused("compare", *args, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_draw_prints_the_picture_and_saves_it(tmp_path):
    told = run(
        "draw",
        'window(t=3, h=3, w=3) & causal("t")',
        "--grid",
        "4,6,6",
        "--query",
        "2,0,5",
        "--save",
        tmp_path / "a.png",
    )
    assert "query t=2, h=0, w=5" in told.output and "sees 8 of 144 tokens" in told.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "head 1" in run("draw", "per_head([full(), along('t')])", "--grid", "2,2,2", "--head", 1).output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["windw(t=3)"], "unknown pattern 'windw': did you mean window?"),
        (["full()", "--query", "a,b"], "query 'a,b': expected whole numbers between commas, such as 4,8,8."),
        (["full()", "--query", "1,2"], "query=(1, 2): expected one whole number for each of the axes t, h, w"),
        (["full()", "--head", "1"], "head=1: all heads of full() are alike; leave head out."),
    ],
)
def test_bad_drawings(args, message):
    assert message in refused("draw", *args)


def test_papers_as_table_and_as_json():
    pages = json.loads(run("papers", "--json").output)
    assert {"system", "name", "family", "status", "module", "evidence"} <= set(pages[0])
    table = run("papers", "--family", "pattern").output
    count = sum(page["family"] == "pattern" for page in pages)
    assert f"{count} mechanisms" in table
    assert "unknown family 'patern': did you mean pattern" in refused("papers", "--family", "patern")


def test_backends_lists_the_kernels():
    told = run("backends").output
    assert "reference" in told and "torch" in told


def test_bench_checks_times_and_writes_a_file_for_each_table(tmp_path):
    few = ["--only", "temporal", "--only", "rounding"]
    told = run("bench", "--quick", "--rounds", 1, "--threads", 1, *few, "--csv", tmp_path).output
    assert "rearrange, SDPA" in told and "GB/s" in told and "WRONG" not in told
    assert sorted(path.name.partition("-")[0] for path in tmp_path.glob("*.csv")) == ["rounding", "temporal"]
    run("bench", "--quick", "--rounds", 1, "--threads", 1, *few[:2], "--csv", tmp_path / "none", "--no-csv")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "tmporal"], "unknown table 'tmporal': did you mean temporal"),
        (["--rounds", "0"], "rounds=0: expected 1 or more."),
        (["--device", "gpu"], "unknown device 'gpu': did you mean cpu?"),
        (["--compile", "some"], "unknown choice for compile 'some'"),
    ],
)
def test_bad_options_of_bench(args, message):
    assert message in refused("bench", *args)


def test_bench_names_its_tables_in_the_help():
    from chronotope.bench.run import TABLES

    told = run("bench", "--help").output
    assert all(name in told for name in TABLES)


def test_help_names_every_command_and_needs_no_lightning():
    assert all(name in run("--help").output for name in ("compare", "draw", "papers", "backends", "bench"))
    assert "--budget" in run("compare", "--help").output
    code = "import sys\nfrom chronotope import cli\nassert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_m_runs_the_same_command():
    done = subprocess.run([sys.executable, "-m", "chronotope", "backends"], capture_output=True, text=True, check=True)
    assert "torch" in done.stdout
