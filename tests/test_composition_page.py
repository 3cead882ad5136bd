"""Every list of blocks on docs/composition.md runs: at once, backwards, and slice by slice where the page says so."""

import re
from pathlib import Path

import pytest
import torch

from chronotope.nn import Stack

PAGE = (Path(__file__).parents[1] / "docs/composition.md").read_text()
PIECES = re.split(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
CODES = PIECES[1::2]
STEPS = ["*Steps*" in text.split("\n\n")[-2] or "*steps*" in text.split("\n\n")[-2] for text in PIECES[:-1:2]]
LISTS = [i for i, code in enumerate(CODES) if "\nblocks = [" in f"\n{code}"]


def names(last: int) -> dict:
    """What the first pieces of code of the page define."""
    torch.manual_seed(0)
    known: dict = {}
    for code in CODES[: last + 1]:
        known.pop("coords", None)
        exec(code, known)
    return known


def run(known: dict, steps: bool) -> None:
    stack, grid, coords = Stack(known["blocks"]).double().eval(), known["grid"], known.get("coords", {})
    x = torch.randn(2, grid.size, known["dim"], dtype=torch.float64, requires_grad=True)
    given = {"coords": coords} if coords else {}
    out = stack(x, grid, **given)
    grads = torch.autograd.grad(out.square().sum(), [x, *stack.parameters()])
    assert out.shape == x.shape and all(bool(grad.isfinite().all()) and bool(grad.ne(0).any()) for grad in grads)
    if not steps:
        return
    one = grid.replace(**{grid.axes[0]: 1})
    state, parts = stack.init_state(2, one), []
    with torch.no_grad():
        for i, part in enumerate(x.split(one.size, 1)):
            own = {axis: c[:, i * one.size : (i + 1) * one.size] for axis, c in coords.items()}
            y, state = stack.step(part, state, coords=own or None)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), out, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("number", LISTS)
def test_the_list_runs(number: int) -> None:
    run(names(number), STEPS[number])


def test_the_page_has_lists_that_step_and_lists_that_do_not() -> None:
    assert len(LISTS) == 7 and [STEPS[number] for number in LISTS] == [False, True, False, True, True, True, True]


@pytest.mark.parametrize("name", ["joint", "divided", "factorised", "axial"])
def test_the_lists_of_the_table_run(name: str) -> None:
    known = {**names(0), "layers": 2, "n": 1}
    (code,) = re.findall(rf"\| {name} \| `(.*?)`", PAGE)
    known["blocks"] = eval(code, known)
    run(known, steps=False)


def test_streams_come_back_on_their_grids() -> None:
    known = names(len(CODES) - 1)
    assert known["video"].shape == (2, 121, 48) and known["text"].shape == (2, 7, 32)
    assert known["space"].shape == known["time"].shape == (2, 121, 48)
