"""Models of transformers and diffusers, patched: each line of docs/adapted.md."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import adapted
from zoo_diffusers import WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*WARNINGS, "ignore:Passing `generation_config`")]

PAGE = Path(__file__).parents[2] / "docs/adapted.md"
# One for each way in which calls differ; all are evidence.
QUICK = {
    "llama", "gpt_oss", "bloom", "vit",
    "WanTransformer3DModel", "CogVideoXTransformer3DModel", "SD3Transformer2DModel",
}  # fmt: skip
NAMES = [(library, name) for library in adapted.KINDS for name in adapted.KINDS[library] if name not in adapted.LEFT]


@pytest.mark.parametrize(
    ("library", "name"),
    [pytest.param(*one, marks=() if one[1] in QUICK else pytest.mark.slow, id=one[1]) for one in NAMES],
)
def test_the_row_of_a_model_holds(library: str, name: str) -> None:
    cells = adapted.row(library, name)
    assert adapted.line(name, cells) in PAGE.read_text(), cells
    assert set(cells[1:]) <= {"yes", "-"}, cells
    assert (cells[0].startswith("0 ")) == (name in adapted.BY_THEMSELVES)


def test_the_page_has_a_row_for_every_model() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(NAMES)
