"""What all tests share: the counts of random cases, printed at the end, and memory that is never zero by chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from chronotope.kernels import BACKENDS
from chronotope.kernels.native import calibrate
from chronotope.planning import costs

LAW = "law: "


@pytest.fixture
def count_cases(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """`count_cases("sees against over", 2000)`: the summary adds these up over all tests that passed."""
    return lambda law, count: record_property(LAW + law, count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Properties travel with the reports, so that the counts are right under pytest-xdist too.
    totals: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in getattr(report, "user_properties", []):
            if name.startswith(LAW):
                totals[name.removeprefix(LAW)] += value
    for law, count in sorted(totals.items()):
        terminalreporter.write_line(f"laws: {count:,} cases of {law}")


@pytest.fixture(autouse=True, scope="session")
def built_in_costs() -> Iterator[None]:
    """Tiles are chosen by the costs that are built in: a busy machine that runs tests is no place to measure them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "measured_path", lambda: None)
        patch.setattr(calibrate, "measured_path", lambda: None)
        yield


@pytest.fixture
def torch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel made of torch's operators runs, whose work can be watched from outside."""
    monkeypatch.delitem(BACKENDS, "native")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory is NaN: an element that a kernel forgets to write shows up in its results."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))
    yield
