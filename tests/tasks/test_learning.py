"""The trainer of learning problems: order, settings, resumption, results; on a problem that takes no time."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

import chronotope as ct
from chronotope.report.learned import result_table
from chronotope.saving import Saved
from chronotope.tasks.learning import Published, Result, Schedule, Task, learn, measure_again, read_results, settle
from chronotope.tasks.learning.log import Log
from chronotope.tasks.learning.order import Order
from chronotope.tasks.learning.run import Keeper, rate_at


class Line(Saved):
    """y = w x, with dropout, which must draw the same numbers after a kill."""

    def __init__(self, width: int = 4, dropout: float = 0.1):
        super().__init__()
        self.hidden, self.out, self.dropout = nn.Linear(3, width), nn.Linear(width, 1), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(torch.tanh(self.hidden(x))))


@dataclass(frozen=True, kw_only=True)
class Sums(Task):
    """The sum of three numbers."""

    name: ClassVar[str] = "sums"
    about: ClassVar[str] = "sums of three numbers"
    best: ClassVar[str] = "mse"
    models: ClassVar[dict[str, str]] = {"line": "one hidden layer", "noisy": "the same, of noisy examples"}
    presets: ClassVar[dict[str, dict[str, Any]]] = {"noisy": {"noise": 0.5}}

    noise: float = 0.1
    count: int = 40

    @property
    def protocol(self) -> str:
        return f"{self.count} examples, mean squared error"

    @cached_property
    def x(self) -> Tensor:
        return torch.randn(self.count, 3, generator=torch.Generator().manual_seed(1))

    @property
    def examples(self) -> int:
        return self.count

    def batch(self, index: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        return x, x.sum(1, keepdim=True) + self.noise * torch.randn(len(x), 1, generator=rng)

    def maker(self, model: str) -> Any:
        return Line

    def loss(self, model: Any, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def measure(self, model: Any, part: str) -> dict[str, float]:
        x = self.x[: 20 if part == "valid" else 30]
        return {"mse": float((model(x) - x.sum(1, keepdim=True)).square().mean())}

    def schedule(self, model: str) -> Schedule:
        return Schedule(steps=24, batch=7, rate=0.02, every=8, warmup=0.1, falls=True)

    def floors(self) -> dict[str, dict[str, float]]:
        return {"zero": {"mse": float(self.x.sum(1).square().mean())}}

    @property
    def published(self) -> tuple[Published, ...]:
        return (Published("somebody", {"mse": 0.01}, "a book"),)


HERE = Path("nowhere")


def run(out: Path, *texts: str, model: str = "line", seed: int = 0, **more: Any) -> tuple[Result, str]:
    console = Console(file=io.StringIO())
    return learn(settle(Sums, HERE, model, texts), out, console, seed=seed, **more), console.file.getvalue()


def weights(out: Path) -> dict[str, Tensor]:
    return torch.load(out / "last.ckpt", weights_only=True)["state_dict"]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5), st.integers(1, 4))
def test_every_example_comes_once_in_an_epoch_and_processes_share_a_batch(
    examples: int, batch: int, seed: int, world: int
) -> None:
    order, steps = Order(examples, batch, seed), -(-2 * examples // batch)
    drawn = torch.cat([order.of(step) for step in range(steps)])
    for epoch in range(2):
        assert sorted(drawn[epoch * examples : (epoch + 1) * examples].tolist()) == list(range(examples))
    parts = [order.of(1, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat(parts).sort().values, order.of(1).sort().values)
    assert torch.equal(order.of(1), Order(examples, batch, seed).of(1))


def test_a_model_learns_and_what_came_of_it_is_kept(tmp_path: Path) -> None:
    result, told = run(tmp_path, "steps=200", "every=50", "dropout=0.0")
    assert result.test["mse"] < 0.2 * result.floors["zero"]["mse"] and "going on" not in told
    assert (result.task, result.model, result.steps, result.parameters) == ("sums", "line", 200, 21)
    assert result.settings == {"noise": 0.1, "count": 40} and result.options == {"dropout": 0.0}
    assert read_results(tmp_path) == [result]
    assert [row["step"] for row in Log(tmp_path / "log.csv").rows()] == ["50", "100", "150", "200"]
    assert measure_again(settle(Sums, HERE, "line", ["dropout=0.0"]), tmp_path)["test"] == result.test
    assert Line.from_pretrained(tmp_path / "model").config == {"width": 4, "dropout": 0.0}
    assert "somebody" in str([column._cells for column in result_table(result).columns])


def test_the_best_weights_count_and_patience_ends_a_training(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "rate=3.0", "steps=400", "every=2", "patience=3", "falls=no")
    values = [float(row["mse"]) for row in Log(tmp_path / "log.csv").rows()]
    assert result.steps < 400 and len(values) == result.steps / 2
    assert result.valid["mse"] == pytest.approx(min(values), rel=1e-4)
    assert values.index(min(values)) == len(values) - 4


class Killed(Exception):
    """Stands for a kill between two steps."""


def test_an_interrupted_training_equals_the_whole_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(tmp_path / "whole")
    counted, saved = Keeper.on_train_batch_end, Keeper._save

    def killed(self: Keeper, trainer: Any, *rest: Any) -> None:
        counted(self, trainer, *rest)
        if self.done == 10:
            saved(self, trainer)
        if self.done == 17:  # validated at 16, but not saved since
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "on_train_batch_end", killed)
        patch.setattr(Keeper, "_save", lambda self, trainer: None)
        with pytest.raises(Killed):
            run(tmp_path / "cut")
    cut, told = run(tmp_path / "cut")
    assert "going on from step 10" in told and cut.steps == whole.steps == 24
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut")) and cut.test == whole.test
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "cut/log.csv").read_text()
    again, told = run(tmp_path / "cut")
    assert again.test == whole.test and "going on from step 24" in told


def test_another_seed_and_other_settings_are_another_training(tmp_path: Path) -> None:
    first, _ = run(tmp_path / "a")
    other, _ = run(tmp_path / "b", seed=1)
    assert first.test != other.test
    for texts, seed in (([], 1), (["steps=30"], 0), (["noise=0.2"], 0), (["width=5"], 0)):
        with pytest.raises(ct.ChronotopeError, match="other settings"):
            run(tmp_path / "a", *texts, seed=seed)


def test_a_training_that_diverges_says_so(tmp_path: Path) -> None:
    with pytest.raises(ct.ChronotopeError, match="mse is nan after 8 steps"):
        run(tmp_path, "noise=nan")


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(Schedule(steps=100, rate=2.0, warmup=0.1, falls=True), step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates.index(max(rates)) == 9 and rates[-1] < 0.001
    assert {rate_at(Schedule(steps=100, rate=2.0), step) for step in range(100)} == {2.0}


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        (["steps"], "expected key=value"),
        (["steps=many"], "steps=many: expected int"),
        (["speed=3"], "speed: sums with 'line' has no such setting; there are: noise, count, steps"),
        (["falls=maybe"], "falls=maybe: expected bool"),
    ],
)
def test_bad_settings_are_named(texts: list[str], match: str) -> None:
    with pytest.raises(ct.ChronotopeError, match=match):
        settle(Sums, HERE, "line", texts)


def test_settings_go_to_task_schedule_and_model() -> None:
    settled = settle(Sums, HERE, "noisy", ["count=12", "batch=3", "width=9", "falls=false"])
    assert settled.task == Sums(data=HERE, noise=0.5, count=12)
    assert (settled.schedule.batch, settled.schedule.falls, settled.schedule.steps) == (3, False, 24)
    assert settled.make().hidden.out_features == 9
    assert settle(Sums, HERE, "noisy", ["noise=0.0"]).task == Sums(data=HERE, noise=0.0)
    assert settle(Sums, HERE, None).model == "line"
    with pytest.raises(ct.ChronotopeError, match="unknown model 'lime': did you mean line"):
        settle(Sums, HERE, "lime")


def toy_log(path: Path) -> Path:
    """Thirty users who go round in circles."""
    path.write_text("".join(f"{u} " + " ".join(str((u + i) % 9 + 1) for i in range(12)) + "\n" for u in range(30)))
    return path


def command(out: Path, data: Path, *texts: str, devices: int = 1) -> list[str]:
    settings = ["length=10", "dim=8", "batch=8", *texts]
    given_ = [x for text in settings for x in ("--set", text)]
    return [
        sys.executable, "-m", "chronotope", "train", "recommend", "--data", str(data), "--out", str(out),
        "--threads", "1", "--devices", str(devices), *given_,
    ]  # fmt: skip


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    data = toy_log(tmp_path / "log.txt")
    for devices in (1, 2):
        asked = command(tmp_path / str(devices), data, "negatives=0", "dropout=0.0", "steps=6", devices=devices)
        done = subprocess.run(asked, check=True, capture_output=True, text=True)
        assert done.stdout.count("floor: popularity") == 1  # by one process
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    # The bias of keys has no gradient but rounding, which Adam makes as large as any.
    assert all(torch.allclose(x, two[name], atol=1e-4) for name, x in one.items() if not name.endswith(".k.bias"))


@pytest.mark.slow
def test_a_run_killed_in_the_middle_gives_the_same_weights(tmp_path: Path) -> None:
    data, texts = toy_log(tmp_path / "log.txt"), ("steps=400", "every=20")
    subprocess.run(command(tmp_path / "whole", data, *texts), check=True, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "cut", data, *texts), stdout=subprocess.DEVNULL)
    while not (tmp_path / "cut/last.ckpt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "cut/result.json").exists()
    again = subprocess.run(command(tmp_path / "cut", data, *texts), check=True, capture_output=True, text=True)
    assert "going on from step" in again.stdout
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    said = subprocess.run(
        [sys.executable, "-m", "chronotope", "eval", str(tmp_path / "cut")], check=True, capture_output=True, text=True
    )
    assert "NDCG@10" in said.stdout
