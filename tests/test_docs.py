"""The documents keep up with the code: the table of mechanisms, the screen of code, the links of README.md and docs."""

import re
from pathlib import Path

import pytest
import torch

import chronotope as ct
from chronotope.papers import papers
from chronotope.report.learned import results_page
from chronotope.tasks.learning import read_results

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_of_mechanisms_is_the_registry() -> None:
    for paper in papers():
        status = paper.status if paper.missing is None else f"partial: {paper.missing}"
        assert f"| {paper.system} | [{paper.name}](" in README
        assert f"| {paper.claim} | {status} |" in README


def test_the_page_of_results_is_that_of_the_files() -> None:
    assert (ROOT / "docs/results.md").read_text() == results_page(read_results(ROOT / "results"))


@pytest.mark.parametrize(
    "document", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).exists(), target


def test_the_screen_of_code_in_the_readme_runs() -> None:
    code = README.split("```python")[1].split("```")[0]
    small = code.replace("t=8, h=32, w=32, prefix=1", "t=3, h=6, w=5, prefix=1").replace(
        "query=(4, 16, 16)", "query=(1, 3, 2)"
    )
    small = small.replace("t=8, h=8, w=8", "t=3, h=4, w=4").replace("t=8, h=32, w=32)", "t=3, h=6, w=5, prefix=1)")
    size = ct.Grid(t=3, h=6, w=5, prefix=1).size
    q, k, v = (torch.randn(1, 8, size, 8) for _ in range(3))
    out, lse = ct.attention(q, k, v, grid=ct.Grid(n=size), return_lse=True)
    names = {"q": q, "k": k, "v": v, "x": torch.randn(1, size, 256), "decay": torch.full((8,), -0.1)}
    names |= {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse}
    for statement in _statements(small):
        if "key_grid" in statement:  # the queries of this line lie on another, coarser grid
            names["q"] = torch.randn(1, 8, 48, 8)
        exec(statement, names)
        names["q"] = q


def _statements(code: str) -> list[str]:
    import ast

    lines = code.split("\n")
    return ["\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in ast.parse(code).body]
