"""Laws for every page of the registry: its pattern plans on any video grid, evidence exists, numbers are unique."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chronotope as ct
from attend import close
from chronotope.papers.registry import FAMILIES, Paper, paper, papers
from strategies import grids

ROOT = Path(__file__).parents[2]
PAPERS = papers()
MENU = [entry for entry in PAPERS if entry.menu]


def named(entries: list[Paper]) -> list:
    return [pytest.param(entry, id=entry.name) for entry in entries]


@pytest.mark.parametrize("entry", named(PAPERS))
def test_pages_say_what_they_are(entry: Paper) -> None:
    assert entry.family in FAMILIES
    assert entry.entry.__module__.startswith(f"chronotope.papers.{entry.family}.")
    assert entry.claim.strip()
    assert entry.entry.__doc__
    missing = [file for file in entry.evidence if not (ROOT / file).is_file()]
    assert entry.evidence
    assert not missing
    data = entry.to_dict()
    assert {"system", "name", "family", "status", "module", "evidence"} <= set(data)
    assert data["status"] == ("partial" if entry.missing else "works")
    assert ("missing" in data) == (data["status"] == "partial")


def test_numbers_and_names_are_unique() -> None:
    assert len({entry.system for entry in PAPERS}) == len(PAPERS)
    assert len({entry.name for entry in PAPERS}) == len(PAPERS)
    assert [entry.system for entry in PAPERS] == sorted(entry.system for entry in PAPERS)
    for family in FAMILIES:
        assert papers(family) == [entry for entry in papers() if entry.family == family]


@pytest.mark.parametrize("entry", named(MENU))
def test_menus_plan_on_any_video_grid(entry: Paper) -> None:
    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(grids(60, ("t", "h", "w")), st.integers(0, 2**31))
    def law(grid: ct.Grid, seed: int) -> None:
        assert entry.menu is not None
        pattern = entry.menu(grid)
        assert pattern == entry.menu(grid)
        heads = pattern.heads or 2
        plan = ct.plan(pattern, grid, heads=heads)
        assert plan.density == pytest.approx(plan.mask().double().mean().item(), abs=1e-15)
        assert plan.mask().any(-1).all(), "every query sees something"
        torch.manual_seed(seed)
        tensors = [torch.randn(1, heads, grid.size, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        results = [ct.attention(*tensors, grid=grid, where=pattern, backend=name) for name in ("torch", "reference")]
        dout = torch.randn_like(results[0])
        close(*(out.detach() for out in results))
        for found, expected in zip(*(torch.autograd.grad(out, tensors, dout) for out in results), strict=True):
            close(found, expected)

    law()


@pytest.mark.parametrize("entry", named(MENU))
def test_plans_of_menus_are_read_back_from_their_file(entry: Paper, tmp_path: Path) -> None:
    assert entry.menu is not None
    plan = ct.plan(entry.menu(ct.Grid(t=4, h=9, w=8)), ct.Grid(t=4, h=9, w=8))
    plan.save(tmp_path / "plan.json")
    again = ct.load_plan(tmp_path / "plan.json", grid=plan.grid)
    assert again.where == plan.where
    assert torch.equal(again.mask(), plan.mask())


def test_registration_refuses_nonsense() -> None:
    with pytest.raises(ct.ChronotopeError, match="family 'patern' is none of pattern"):
        paper(system=-1, name="x", family="patern", claim="", evidence=["x"])
    with pytest.raises(ct.ChronotopeError, match="paper 'x' has no evidence"):
        paper(system=-1, name="x", family="pattern", claim="", evidence=[])
    if PAPERS:
        with pytest.raises(ct.ChronotopeError, match=f"system {PAPERS[0].system} is"):
            paper(system=PAPERS[0].system, name="x", family="pattern", claim="", evidence=["x"])(ct.Grid)
