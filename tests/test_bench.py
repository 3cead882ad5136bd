"""The benchmark: its files, checks before timing, figures, and the page made of them; not how fast anything is."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import chronotope as ct
from chronotope.bench import cases, referee, results, run, tables, timing
from chronotope.bench.cases import BACKWARD, BOTH, FORWARD, Case
from chronotope.bench.check import Inputs, Truth, right
from chronotope.bench.competitors import Competitor, absent, competitors, sdpa
from chronotope.bench.lines import line
from chronotope.bench.planning import forget
from chronotope.bench.results import COLUMNS, Row
from chronotope.bench.timing import Settings
from chronotope.bench.why import UNKNOWN, WHY, loses, why
from chronotope.kernels import BACKENDS, Backend
from chronotope.kernels.call import Gradients, Known, Results

ROOT = Path(__file__).parents[1]
GRID = ct.Grid(t=4, h=4, w=6)
SETTINGS = Settings(threads=1, rounds=1, quick=True, compiled="none")
CASE = Case("window", (ct.window(t=3, h=3, w=3) & ct.causal("t"),), GRID, heads=2, head_size=16)
DIVIDED = Case("divided", (ct.along("t"), ct.along("h", "w")), GRID, heads=2, head_size=16)


@pytest.fixture(scope="module")
def document() -> ModuleType:
    """docs/benchmarks.py."""
    spec = importlib.util.spec_from_file_location("benchmarks_page", ROOT / "docs" / "benchmarks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(*some: Case) -> list[Row]:
    found = timing.table("attention", list(some), SETTINGS)
    return [row for part in found if not isinstance(part, str) for row in part]


def example(**changes: object) -> Row:
    row = Row("attention", "a, b", "window(t=3)", "Grid(t=4)", 2, 16, "float32", "native", FORWARD)
    times = {"seconds_median": 0.5, "seconds_min": 0.25, "dense_seconds_median": 1.5, "ratio_to_dense": 3.0}
    about = {"machine": "Some CPU (R) @ 2.5GHz", "torch": "2.13.0+cpu", "python": "3.11.7", "date": "2026-01-02"}
    shares = {"density": 0.125, "tile_density": 0.25, "bound": 4.0, "reached": 0.75, "error": 1e-7, "rounds": 5}
    return dataclasses.replace(row, **{**times, **about, **shares, **changes})


# Files


def test_the_columns() -> None:
    assert ",".join(COLUMNS) == (
        "table,row,pattern,grid,heads,head_size,dtype,backend,pass,seconds_median,seconds_min,dense_seconds_median,"
        "ratio_to_dense,density,tile_density,bound,reached,error,gb_per_s,peak_mb,peak_share,rounds,threads,machine,"
        "torch,python,date"
    )


def test_a_file_read_is_what_was_written(tmp_path: Path) -> None:
    rows = [example(), example(row="ü", heads=None, seconds_median=None, error=float("inf")), example(phase="plan")]
    path = results.write(tmp_path, rows)
    assert path.name == "attention-some-cpu-r-2.5ghz-torch2.13.0-cpu-1threads.csv"
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert results.read(path) == rows
    results.write(tmp_path, rows[:1])
    assert results.read_all(tmp_path.glob("*.csv")) == rows[:1]


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("table,row\nattention,window\n")
    with pytest.raises(ct.ChronotopeError, match=r"old\.csv: the columns are \['table', 'row'\], expected"):
        results.read(path)


# Checks


def broken(backend: Backend, what: str) -> Backend:
    """A backend whose out or dk is a little wrong, or NaN in one place."""

    def forward(*args: object) -> Results:
        out, lse = backend.forward(*args)  # type: ignore[arg-type]
        if what == "nan":
            out[0, 0, 0, 0] = float("nan")
        return (out * 1.01 if what == "out" else out), lse

    def backward(known: Known, *args: object) -> Gradients:
        assert backend.backward is not None
        dq, dk, dv, rest = backend.backward(known, *args)  # type: ignore[arg-type]
        return dq, dk * 1.01 if what == "dk" else dk, dv, rest

    return dataclasses.replace(backend, forward=forward, backward=backward)


@pytest.mark.parametrize("what", ["out", "dk", "nan"])
def test_a_wrong_kernel_gets_no_figure(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "torch", broken(BACKENDS["torch"], what))
    rows = measured(CASE, DIVIDED)
    wrong = [row for row in rows if row.backend == "torch"]
    assert len(wrong) == 6 and all(row.wrong and row.seconds_min is row.ratio_to_dense is None for row in wrong)
    assert "WRONG, not timed" in line(wrong[:3])
    assert any(not (row.error or 0) < 1e-3 for row in wrong)
    others = [row for row in rows if row.backend not in ("torch", "dense")]
    assert not any(row.wrong or row.seconds_median is None for row in others)


def test_a_right_kernel_is_right_in_every_layout() -> None:
    for case in (CASE, DIVIDED):
        truth = Truth(case, Inputs.random(case.shape, torch.float32, "cpu"))
        plans = [ct.plan(pattern, GRID) for pattern in case.patterns]

        def masked(q: Tensor, k: Tensor, v: Tensor, plans: list[ct.Plan] = plans) -> Tensor:
            return torch.stack([sdpa(q, k, v, attn_mask=plan.mask()) for plan in plans]).sum(0)

        def last(q: Tensor, k: Tensor, v: Tensor, masked=masked) -> Tensor:
            return masked(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        for competitor in (Competitor("first", masked), Competitor("last", last, heads_last=True)):
            errors = truth.errors(competitor, trains=True)
            assert list(errors) == [FORWARD, BACKWARD, BOTH] and right(errors, torch.float32)
            assert list(truth.errors(competitor, trains=False)) == [FORWARD]


def test_other_libraries_are_given_their_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the layouts that the libraries document: NATTEN [B, T, H, W, heads, D], fla [B, N, heads, D]."""

    def by_us(q: Tensor, k: Tensor, v: Tensor, where: ct.Pattern) -> Tensor:
        first = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
        return ct.attention(*first, grid=GRID, where=where).transpose(1, 2).reshape(q.shape)

    def na3d(q: Tensor, k: Tensor, v: Tensor, kernel_size: tuple[int, int, int]) -> Tensor:
        assert q.shape == (1, *GRID.shape, 2, 16)
        return by_us(q, k, v, ct.window(**dict(zip("thw", kernel_size, strict=True)), edge="shift"))

    def parallel_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape == (1, GRID.size, 2, 16)
        return by_us(q, k, v, ct.causal())

    for name, inner, function in (("natten", "functional", na3d), ("fla", "ops", parallel_attn)):
        for path in (name, f"{name}.{inner}"):
            module = ModuleType(path)
            module.__spec__ = importlib.util.spec_from_loader(path, loader=None)
            monkeypatch.setitem(sys.modules, path, module)
        setattr(sys.modules[f"{name}.{inner}"], function.__name__, function)
    assert absent() == []
    shifted = dataclasses.replace(CASE, patterns=(ct.window(t=3, h=3, w=5, edge="shift"),))
    causal = dataclasses.replace(CASE, patterns=(ct.causal(),))
    for case, name in ((shifted, "natten"), (causal, "fla")):
        (one,) = [one for one in competitors(case, "cuda", "none") if one.name == name]
        assert right(Truth(case, Inputs.random(case.shape, torch.float32, "cpu")).errors(one, True), torch.float32)
    others = [CASE, DIVIDED, dataclasses.replace(CASE, patterns=(ct.window(w=3, dilation=2, edge="shift"),))]
    found = itertools.chain(*(competitors(case, "cuda", "none") for case in others))
    assert not {one.name for one in found} & {"natten", "fla"}


def test_what_cannot_run_says_why() -> None:
    def refuse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad:
            raise NotImplementedError("no backward pass here")
        return sdpa(q, k, v, attn_mask=ct.plan(CASE.patterns[0], GRID).mask())

    truth = Truth(CASE, Inputs.random(CASE.shape, torch.float32, "cpu"))
    entry = timing.checked(truth, Competitor("half", refuse))
    assert list(entry.errors) == [FORWARD] and entry.refused == "NotImplementedError: no backward pass here"

    def fail(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise ZeroDivisionError("a bug")

    assert timing.checked(truth, Competitor("theirs", fail, foreign=True)).refused == "ZeroDivisionError: a bug"
    with pytest.raises(ZeroDivisionError):
        timing.checked(truth, Competitor("ours", fail))


# Figures


def test_the_figures_of_a_row_agree() -> None:
    rows = measured(CASE, DIVIDED)
    assert {row.row for row in rows} == {"dense", "window", "divided"}
    plans = {case.name: [ct.plan(pattern, GRID) for pattern in case.patterns] for case in (CASE, DIVIDED)}
    for row in rows:
        assert row.seconds_median and row.seconds_min and row.dense_seconds_median and row.ratio_to_dense
        assert row.ratio_to_dense == pytest.approx(row.dense_seconds_median / row.seconds_median)  # one round
        assert row.bound == pytest.approx(1 / row.tile_density)
        assert row.reached == pytest.approx(row.ratio_to_dense / row.bound)
        assert (row.threads, row.torch, row.rounds) == (1, torch.__version__, 1)
        if row.row != "dense":
            assert row.density == pytest.approx(sum(plan.density for plan in plans[row.row]))
    dense = [row for row in rows if row.row == "dense"]
    assert [row.phase for row in dense] == [FORWARD, BACKWARD, BOTH]
    assert all(row.ratio_to_dense == row.bound == row.reached == 1 for row in dense)


def test_backends_of_this_device_take_part_and_the_definition_does_not() -> None:
    names = {row.backend for row in measured(CASE)}
    able = {one.name for one in ct.backends() if "cpu" in one.devices} - {"reference", "flex"}
    assert names == able | {"dense"}


def test_batches_keep_order_and_share_shapes() -> None:
    some = [CASE, DIVIDED, dataclasses.replace(CASE, head_size=32), CASE, dataclasses.replace(CASE, trains=False)]
    found = list(timing.batches(some))
    assert list(itertools.chain(*found)) == some
    assert all(len({(case.shape, case.trains) for case in batch}) == 1 for batch in found)
    full = dataclasses.replace(CASE, patterns=(ct.full(),))
    assert [len(batch) for batch in timing.batches([full, full, full])] == [1, 1, 1]


def test_rounds_are_paired_and_each_starts_with_another() -> None:
    order: list[str] = []
    found = referee.paired({name: lambda lap, name=name: order.append(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(len(rounds) == 3 for rounds in found.values())
    order.clear()
    found = referee.paired({name: lambda lap, name=name: order.append(name) for name in "ab"}, 9, limit=0.0, cold=["b"])
    assert "".join(order) == "b" + "ab" + "ba" + "ab" and len(found["a"]) == referee.LEAST


def test_parts_are_timed_apart() -> None:
    def work(lap: referee.Lap) -> None:
        time.sleep(0.02)
        lap()
        time.sleep(0.06)

    first, second = referee.laps(work)
    assert first >= 0.02 and second >= 0.06
    assert referee.ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == 2


def test_memory_of_a_fresh_process_is_what_it_allocates() -> None:
    code = "a = torch.ones(1 << 26)\ndel a\nbefore()\nb = torch.ones(1 << 24)\nprint('made', len(b))"
    done = referee.fresh(code, threads=1)
    assert done.printed == "made 16777216" and 60 < done.added < 80 and done.whole > done.added
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        referee.fresh("1 / 0", threads=1)


def test_the_rule_by_hand_is_the_window() -> None:
    sizes = {"t": 3, "h": 3, "w": 5}
    n = torch.arange(GRID.size)
    seen = cases.window_rule(GRID, **sizes)(n, n, n[:, None], n[None])
    assert torch.equal(seen, ct.plan(ct.window(**sizes), GRID).mask())


def test_rearranging_by_hand_is_attention_along_time() -> None:
    case = Case("temporal", (ct.along("t"),), GRID)
    q, k, v = torch.randn(3, 2, 2, GRID.size, 8)
    torch.testing.assert_close(tables.rearranged(case)(q, k, v), ct.attention(q, k, v, grid=GRID, where=ct.along("t")))


def test_planning_forgets() -> None:
    plan = ct.plan(CASE.patterns[0], GRID)
    assert ct.plan(CASE.patterns[0], GRID) is plan
    forget()
    assert ct.plan(CASE.patterns[0], GRID) is not plan


# The page


def test_reasons_are_of_rows_that_there_are() -> None:
    known = {*cases.attention(False), *cases.windows(False, "cpu"), *cases.sequences(False, "cpu")}
    names = {case.name for case in {*known, *cases.temporal(False)}}
    assert {row for _, row in WHY} - {""} <= names


def test_a_row_that_loses_says_why() -> None:
    near, slow, far = ({"ratio_to_dense": r, "reached": s} for r, s in ((1.0, 0.6), (0.9, 0.9), (3.0, 0.4)))
    assert not loses([example(**near)]) and loses([example(**near), example(phase=BOTH, **slow)])
    assert loses([example(**far)]) and not loses([example(row="dense", backend="dense", **far)])
    assert why([example()]) == UNKNOWN and "memory" in why([example(row="temporal")])


def page_of(document: ModuleType, folder: Path, rows: list[Row]) -> dict[str, str]:
    """The page and pictures of some rows, by file name."""
    for _, some in itertools.groupby(rows, lambda row: (row.table, row.torch)):
        results.write(folder / "csv", list(some))
    page = folder / "page.md"
    page.write_text(f"before\n{document.BEGIN}\nold\n{document.END}\nafter\n")
    document.main(folder / "csv", page)
    return {path.name: path.read_text() for path in (page, *sorted((folder / "page").glob("*")))}


def test_the_page_is_made_again_word_for_word(document: ModuleType, tmp_path: Path) -> None:
    slow = {"row": "temporal", "ratio_to_dense": 0.5, "reached": 0.1}
    wrong = dict.fromkeys(("seconds_median", "seconds_min", "dense_seconds_median", "ratio_to_dense", "reached"))
    rows = [
        example(),
        example(phase=BOTH),
        example(backend="torch", **slow),
        example(backend="flex", error=0.5, **wrong),
        example(backend="FlexAttention"),
        example(backend="FlexAttention", phase="mask", error=None, seconds_median=12.0),
        example(torch="2.12.0"),
    ]
    first = page_of(document, tmp_path, rows)
    name = "attention-some-cpu-r-2.5ghz-torch2.13.0-cpu-1threads.svg"
    assert name in first and len(first) == 3
    text = first["page.md"]
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("WRONG") == 3 and "mask 12.00 s" in text and text.count("\n## ") == 2
    assert "1. copies keys and values into tiles first, and memory is the limit" in text
    (tmp_path / "page" / "stale.svg").write_text("")
    document.main(tmp_path / "csv", tmp_path / "page.md")
    assert {path.name: path.read_text() for path in (tmp_path / "page").glob("*")} | {"page.md": text} == first


def test_the_page_in_docs_is_that_of_the_files(document: ModuleType) -> None:
    rows = results.read_all(sorted((ROOT / "benchmarks" / "results").glob("*.csv")))
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    between = text.split(document.BEGIN)[1].split(document.END)[0]
    assert between == f"\n{document.page(rows)}", "python docs/benchmarks.py writes the page again"
    found = {path.name: path.read_text() for path in (ROOT / "docs" / "benchmarks").glob("*.svg")}
    assert found == document.pictures(rows)


# The command


def test_everything_runs_on_small_shapes(document: ModuleType, tmp_path: Path) -> None:
    said: list[str] = []
    few = ["attention", "windows", "sequences", "temporal", "rounding"]
    rows = run.bench(SETTINGS, few, tmp_path / "csv", said.append)
    assert len(list((tmp_path / "csv").glob("*.csv"))) == len(few)
    assert {row.table for row in rows} == set(few) and not any(row.wrong for row in rows)
    assert {case.name for case in cases.attention(True)} <= {row.row for row in rows}
    assert any("can reach more than 1.0 of the bound" in text for text in said)
    made = page_of(document, tmp_path, rows)
    assert all(f"### {document.TITLES[table]}" in made["page.md"] for table in few)


def test_threads_are_put_back() -> None:
    threads = torch.get_num_threads()
    (row, *_) = run.bench(dataclasses.replace(SETTINGS, threads=threads + 1), ["rounding"], None, lambda text: None)
    assert row.threads == threads + 1 and torch.get_num_threads() == threads


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "chronotope.bench", "--threads", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr == "threads=0: expected 1 or more.\n"
