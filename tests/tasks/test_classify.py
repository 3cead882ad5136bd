"""Classification of series: the files, the split, what lies after the end, floors on the real sets."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chronotope.data.series import Series, read_pair, read_series
from chronotope.errors import ChronotopeError
from chronotope.models import Classifier
from chronotope.models.classifier import Stem
from chronotope.tasks.classify import Classify, accuracy, gathered, nearest, parted, stretched, warped
from chronotope.tasks.learning import settle
from chronotope.tasks.registry import task

REAL = Path(os.environ.get("CHRONOTOPE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "timeseries_ucr_uea"
HEAD = "# a set\n@problemName Toy\n@timeStamps false\n@univariate false\n@classLabel true up down\n@data\n"
BODY = "1,2,3:4,5,6:up\n-1:2e-1:down\n\n0,0:1,1:up\n"


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def toy(folder: Path, cases: int = 24) -> Path:
    """Series of 5 to 9 values in two channels, the first of which rises or falls."""
    rng = torch.Generator().manual_seed(0)
    for part in ("TRAIN", "TEST"):
        lines = []
        for case in range(cases):
            n = 5 + case % 5
            ramp = torch.arange(n) * (1 - 2 * (case % 2)) * 0.5
            rows = (torch.stack((ramp, 0 * ramp)) + 0.1 * torch.randn(2, n, generator=rng)).tolist()
            lines.append(":".join(",".join(f"{x:.5f}" for x in row) for row in rows) + f":{('up', 'down')[case % 2]}")
        write(folder / f"Toy_{part}.ts", HEAD + "\n".join(lines) + "\n")
    return folder / "Toy_TRAIN.ts"


@pytest.mark.parametrize("name", ["toy.ts", "toy.ts.gz"])
def test_a_file_is_read(tmp_path, name):
    series = read_series(write(tmp_path / name, HEAD + BODY))
    assert (series.name, series.classes, series.channels, len(series)) == ("Toy", ("up", "down"), 2, 3)
    assert series.labels.tolist() == [0, 1, 0] and series.lengths.tolist() == [3, 1, 2]
    assert torch.equal(series.values[0], torch.tensor([[1.0, 4], [2, 5], [3, 6]]))
    assert torch.equal(series.values[1], torch.tensor([[-1.0, 0.2]]))


@pytest.mark.parametrize(
    "text, told",
    [
        (HEAD + "1,2:1:up\n", r":7: dimensions of \[2, 1\] values"),
        (HEAD + "1,2:1,2:left\n", "class 'left'; @classLabel has up, down"),
        (HEAD + "1,?:1,2:up\n", "no number; missing ones"),
        (HEAD + "1,nan:1,2:up\n", "not finite"),
        (HEAD + "1:1:up\n1:up\n", ":8: 1 dimensions of 1 values; expected 2 of 1"),
        (HEAD.replace("@data", "@seriesLength 3\n@data") + "1:1:up\n", "expected 2 of 3"),
        (HEAD.replace("@data", "@dimensions 3\n@data") + "1:1:up\n", "expected 3 of 1"),
        (HEAD.replace("Stamps false", "Stamps true") + BODY, "time stamps"),
        (HEAD.replace("true up down", "false") + BODY, "@classLabel false; expected `true`"),
        (HEAD.replace("@data\n", ""), "no line @data"),
        (HEAD, "no case after @data"),
    ],
)
def test_what_is_no_such_file_is_told(tmp_path, text, told):
    with pytest.raises(ChronotopeError, match=told):
        read_series(write(tmp_path / "toy.ts", text))


def test_two_files_lie_side_by_side(tmp_path):
    with pytest.raises(ChronotopeError, match="no such file"):
        read_series(tmp_path / "Toy_TRAIN.ts")
    write(tmp_path / "Toy_TRAIN.ts", HEAD + BODY)
    with pytest.raises(ChronotopeError, match=r"no file Toy_TEST\.ts or Toy_TEST\.ts\.gz"):
        read_pair(tmp_path / "Toy_TRAIN.ts")
    write(tmp_path / "Toy_TEST.ts.gz", HEAD + "7:7:down\n")
    for name in ("Toy_TRAIN.ts", "Toy_TEST.ts.gz", "Toy"):
        train, test = read_pair(tmp_path / name)
        assert (len(train), len(test)) == (3, 1)
    write(tmp_path / "Toy_TEST.ts.gz", HEAD + "7:7:7:down\n")
    with pytest.raises(ChronotopeError, match="TRAIN has 2 channels"):
        read_pair(tmp_path / "Toy")


@given(counts=st.lists(st.integers(2, 12), min_size=1, max_size=5), held=st.floats(0.01, 0.45), seed=st.integers(0, 99))
def test_the_split_has_a_share_of_each_class(counts, held, seed):
    labels = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    learned, kept = parted(labels, held, seed)
    assert torch.equal(torch.cat((learned, kept)).sort().values, torch.arange(len(labels)))
    assert torch.bincount(labels[kept]).tolist() == [max(1, round(held * n)) for n in counts]
    assert all(torch.equal(a, b) for a, b in zip(parted(labels, held, seed), (learned, kept), strict=True))
    assert len(parted(labels, 0.0, seed)[1]) == 0


def test_a_split_that_leaves_nothing_is_told():
    with pytest.raises(ChronotopeError, match="class 1 has 1 cases"):
        parted(torch.tensor([0, 0, 1]), 0.2, 0)
    with pytest.raises(ChronotopeError, match=r"held=1\.0"):
        parted(torch.tensor([0, 0]), 1.0, 0)


MODELS = [
    {"blocks": ["attention", "attention"]},
    {"blocks": ["none", "attention"], "pool": "class"},
    {"blocks": ["convolution"], "width": 3},
    {"blocks": ["recurrence", "recurrence"]},
    {"blocks": ["recurrence+convolution+attention"], "pool": "class", "width": 5},
    {"blocks": ["none"], "width": 1},
    {"blocks": []},
]


def named(options: dict) -> str:
    return " ".join([*options["blocks"], options.get("pool", "")])


def model_of(options: dict, patch: int) -> Classifier:
    torch.manual_seed(0)
    units = [[1.0, 2.0], [0.0, 1.0]]
    return Classifier(2, 3, dim=16, heads=2, patch=patch, units=units, **options).eval().double()


@pytest.mark.parametrize("options", MODELS, ids=named)
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), patch=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_series_is_classified_as_if_it_were_alone(options, lengths, patch, seed):
    model, rng = model_of(options, patch), torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, 2, generator=rng, dtype=torch.float64) for n in lengths]
    values = torch.full((len(rows), max(lengths) + 2, 2), torch.nan, dtype=torch.float64)
    for row, n, own in zip(values, lengths, rows, strict=True):
        row[:n] = own
    together = model(values, torch.tensor(lengths))
    alone = torch.cat([model(row[None]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", MODELS, ids=named)
def test_gradients_are_finite_and_do_not_cross(options):
    model = model_of(options, 1)
    values = torch.randn(3, 6, 2, dtype=torch.float64, requires_grad=True)
    model(values, torch.tensor([6, 2, 4]))[1].sum().backward()
    assert values.grad is not None
    seen = values.grad.abs().sum(2) > 0
    assert seen.tolist() == [[False] * 6, [True] * 2 + [False] * 4, [False] * 6]
    assert all(x.grad is None or bool(x.grad.isfinite().all()) for x in model.parameters())


def test_order_counts_unless_tokens_do_not_meet():
    values = torch.randn(2, 7, 2, dtype=torch.float64)
    for options in MODELS:
        model = model_of(options, 1)
        same = torch.allclose(model(values), model(values.flip(1)), atol=1e-9)
        assert same == (options.get("width") == 1), options


@settings(max_examples=12, deadline=None)
@given(patch=st.integers(1, 5), width=st.sampled_from((1, 3, 7)), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_tokens_move_with_the_series(patch, width, n, seed):
    """A start that is left out by one token leaves the same tokens, but those that see the start."""
    torch.manual_seed(seed)
    stem, x = Stem(2, 8, patch, width).double(), torch.randn(3, n + patch, 2, dtype=torch.float64)
    tokens, real = stem(x, torch.full((3,), n + patch))
    later, _ = stem(x[:, patch:], torch.full((3,), n))
    assert tokens.shape == (3, math.ceil(n / patch) + 1, 8) and bool(real.all())
    seen = math.ceil(2 * (width // 2) / patch)
    torch.testing.assert_close(tokens[:, 1 + seen :], later[:, seen:])


def test_values_are_measured_by_the_training_data(tmp_path):
    own = settle(Classify, toy(tmp_path), "convolution")
    model = own.make()
    mean, scale = own.task.scale
    assert torch.equal(model.units, torch.stack((mean, scale), 1))
    cases = torch.cat([own.task.sets[0].values[case] for case in own.task.parts[0].tolist()])
    torch.testing.assert_close(cases.mean(0), mean)
    model.save_pretrained(tmp_path / "kept")
    values, lengths, _ = gathered(own.task.sets[1], torch.arange(5))
    again = Classifier.from_pretrained(tmp_path / "kept").eval()
    assert torch.equal(again(values, lengths), model.eval()(values, lengths))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"blocks": ["attention+lstm"]}, "mixer 'lstm'"),
        ({"blocks": ["convolution"], "pool": "class"}, "a class token sees the others by attention"),
        ({"pool": "max"}, "one of mean, class"),
        ({"width": 4}, "odd"),
        ({"patch": 0}, "1 or more"),
        ({"units": [[0.0, 1.0]]}, "mean and deviation of each of 2 channels"),
    ],
)
def test_sizes_that_do_not_fit_are_told(options, told):
    with pytest.raises(ChronotopeError, match=told):
        Classifier(2, 3, **options)


def test_inputs_that_do_not_fit_are_told():
    model = Classifier(2, 3, dim=16)
    with pytest.raises(ChronotopeError, match="series of 3 channels; the model is for 2"):
        model(torch.zeros(1, 4, 3))
    with pytest.raises(ChronotopeError, match="expected 1 to 4"):
        model(torch.zeros(1, 4, 2), torch.tensor([5]))


def made(values: list[Tensor], labels: list[int]) -> Series:
    return Series("toy", ("a", "b", "c"), values, torch.tensor(labels))


@given(seed=st.integers(0, 999))
def test_the_nearest_is_found_as_by_a_loop(seed):
    rng = torch.Generator().manual_seed(seed)
    train, test = (made([torch.randn(6, 2, generator=rng) for _ in range(5)], [0, 1, 2, 1, 0]) for _ in range(2))
    away = [[float((a - b).pow(2).sum()) for b in train.values] for a in test.values]
    assert nearest(train, test).tolist() == [int(train.labels[row.index(min(row))]) for row in away]


def test_stretching_keeps_ends_and_lines():
    line = torch.linspace(-1, 3, 5)[:, None]
    torch.testing.assert_close(stretched(line, 9), torch.linspace(-1, 3, 9)[:, None])
    torch.testing.assert_close(stretched(line, 3), torch.linspace(-1, 3, 3)[:, None])
    assert torch.equal(stretched(torch.ones(1, 2), 4), torch.ones(4, 2))


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), spread=st.floats(0, 1), seed=st.integers(0, 99))
def test_warping_keeps_the_way_and_its_ends(lengths, spread, seed):
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.rand(n, 2, generator=rng).cumsum(0) for n in lengths]
    values, ends = nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)
    out = warped(values, ends, spread, rng)
    for new, row, n in zip(out, rows, lengths, strict=True):
        torch.testing.assert_close(new[[0, n - 1]], row[[0, n - 1]])
        assert bool((new[:n].diff(dim=0) >= -1e-5).all()) and not bool(new[n:].any())
    torch.testing.assert_close(warped(values, ends, 0.0, rng), values, rtol=1e-4, atol=1e-4)
    # Values of a straight line tell where they were read: both channels at the same place.
    line = torch.arange(9.0)[None, :, None].expand(1, 9, 2)
    bent = warped(line, torch.tensor([9]), spread, rng)
    assert torch.equal(bent[..., 0], bent[..., 1]) and (spread < 0.1 or not torch.allclose(bent, line, atol=1e-3))


def test_accuracy():
    found = accuracy(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
    assert found["accuracy"] == 0.75 and found["standard error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_batches_are_a_function_of_cases_and_generator(tmp_path):
    own = Classify(data=toy(tmp_path), held=0.2)
    first, again = (own.batch(torch.tensor([3, 0]), torch.Generator().manual_seed(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    unchanged = {"warp": 0.0, "scaling": 0.0, "noise": 0.0}
    plain = Classify(data=own.data, held=0.2, **unchanged).batch(torch.tensor([3, 0]), torch.Generator())
    assert torch.equal(first[2], plain[2])
    for name in unchanged:
        one = Classify(data=own.data, held=0.2, **(unchanged | {name: 0.2}))
        assert not torch.equal(one.batch(torch.tensor([3, 0]), torch.Generator())[0], plain[0]), name
    learned, held = own.parts
    case = own.sets[0].values[int(learned[3])]
    assert torch.equal(plain[0][0, : len(case)], case)
    assert not set(learned.tolist()) & set(held.tolist()) and len(held) == 4


@pytest.mark.parametrize("mixers", list(Classify.models))
def test_a_few_steps_lower_the_loss(tmp_path, mixers):
    own = settle(task("classify"), toy(tmp_path), mixers, ["dim=16", "layers=1", "dropout=0"])
    torch.manual_seed(0)
    model = own.make()
    with torch.no_grad():
        before = own.task.measure(model, "test")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(15):
        batch = own.task.batch(torch.arange(own.task.examples), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        own.task.loss(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        after, held = own.task.measure(model, "test"), own.task.measure(model, "valid")
    assert after["cross-entropy"] < 0.5 * before["cross-entropy"] and after["accuracy"] > 0.9, (before, after)
    assert held.keys() == after.keys()


FLOORS = {  # of the archive's own tables where the window that it learned is 0, which is Euclid's distance
    "ArrowHead": (36, 175, 1, 3, 0.800),
    "GunPoint": (50, 150, 1, 2, 0.913),
    "ItalyPowerDemand": (67, 1029, 1, 2, 0.955),
}
SIZES = {
    "BasicMotions": (40, 40, 6, 4),
    "JapaneseVowels": (270, 370, 12, 9),
    "PickupGestureWiimoteZ": (50, 50, 1, 10),
    "OSULeaf": (200, 242, 1, 6),
    "ACSF1": (100, 100, 1, 10),
}


def real(name: str) -> Classify:
    path = REAL / f"{name}_TRAIN.ts.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent: set CHRONOTOPE_DATA")
    return Classify(data=path)


@pytest.mark.parametrize("name", [*FLOORS, *SIZES])
def test_the_real_sets(name):
    own, (cases, asked, channels, classes) = real(name), (SIZES | FLOORS)[name][:4]
    train, test = own.sets
    assert (len(train), len(test), train.channels, len(train.classes)) == (cases, asked, channels, classes)
    floors = own.floors()
    if name in FLOORS:
        assert floors["1-NN Euclidean"]["accuracy"] == pytest.approx(FLOORS[name][4], abs=5e-4)
    assert floors["majority class"]["accuracy"] < floors["1-NN Euclidean"]["accuracy"]
    assert str(cases) in own.protocol and str(asked) in own.protocol


@pytest.mark.slow
@pytest.mark.parametrize("model", ["attention", "recurrence", "convolution+attention"])
def test_basic_motions_are_told_apart(tmp_path, model):
    """Six channels of 40 walks, games and rests: above the nearest neighbour, and at least the warped one."""
    import io

    from rich.console import Console

    from chronotope.tasks.learning import learn

    own = real("BasicMotions")
    found = learn(settle(Classify, own.data, model, ["steps=200"]), tmp_path, Console(file=io.StringIO()))
    assert found.test["accuracy"] >= 0.975 > found.floors["1-NN Euclidean"]["accuracy"]
