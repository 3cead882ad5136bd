"""The menu of patterns, and how a caller names some of them."""

import pytest

import chronotope as ct
from chronotope.tasks.menu import choose, menu, odd, split

GRID = ct.Grid(t=4, h=6, w=5)
NAMES = [
    "dense", "divided", "axial", "window", "shifted window", "neighborhood", "dilated", "strided",
    "sinks and window", "per-head mix",
]  # fmt: skip


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 6, 5), (2, 3, 3), (1, 1, 1), (5, 1, 7)])
def test_every_entry_fits_every_grid(shape):
    grid = ct.Grid(**dict(zip("thw", shape, strict=True)))
    entries = menu(grid, heads=4)
    assert list(entries)[: len(NAMES)] == NAMES
    for entry in entries.values():
        for where in entry.layers(3):
            assert 0 < ct.plan(where, grid, heads=4).density <= ct.plan(ct.causal("t"), grid).density


def test_layers_take_turns_and_are_causal():
    assert menu(GRID, 4)["divided"].layers(3) == [
        ct.along("t") & ct.causal("t"), ct.along("h", "w") & ct.causal("t"), ct.along("t") & ct.causal("t")
    ]  # fmt: skip


def test_papers_come_after_the_forms_and_none_twice():
    entries = menu(GRID, 4)
    patterns = [entry.patterns for entry in entries.values()]
    assert len(set(patterns)) == len(patterns)
    assert all(entry.name == name for name, entry in entries.items())


def test_a_paper_joins_the_menu_by_its_name(monkeypatch):
    def paper(name, pattern):
        return type(
            "Page", (), {"name": name, "system": 7, "claim": "a claim", "menu": staticmethod(lambda grid: pattern)}
        )

    pages = [
        paper("New One", ct.window(h=3) | ct.along("t")),
        paper("Same again", ct.full()),
        paper("Two heads", ct.per_head([ct.full(), ct.along("t")])),
        paper("No such axis", ct.along("z")),
        paper("Window", ct.window(w=3) | ct.along("t")),
    ]
    monkeypatch.setattr("chronotope.tasks.menu.papers", lambda: pages)
    entries = menu(GRID, 4)
    assert list(entries)[len(NAMES) :] == ["new one", "window (7)"]
    assert entries["new one"].about == "a claim" and choose("new one", GRID, 4)[1].name == "new one"


def test_split_at_the_top_only():
    assert split("window, axial; window(t=3, h=5) | along('t'),[full(), along(\"h\", 'w')] ;; ") == [
        "window", "axial", "window(t=3, h=5) | along('t')", "[full(), along(\"h\", 'w')]",
    ]  # fmt: skip


def test_names_expressions_and_lists():
    chosen = choose("axial, window(t=3); [along('t'), along('h', 'w')]", GRID, 4)
    assert [entry.name for entry in chosen] == ["dense", "axial", "window(t=3)", "[along('t'), along('h', 'w')]"]
    assert chosen[2].patterns == (ct.window(t=3),)
    assert chosen[3].patterns == (ct.along("t"), ct.along("h", "w"))
    assert [entry.name for entry in choose(None, GRID, 4)] == list(menu(GRID, 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("neighbourhood", "unknown pattern 'neighbourhood': did you mean neighborhood"),
        ("windw", "unknown pattern 'windw': did you mean window"),
        ("windw(t=3)", "unknown pattern 'windw': did you mean window"),
        ("window(t=4)", "an even window has no centre"),
        ("window(x=3)", "'x'"),
        ("[]", "lists no pattern"),
        ("per_head([full(), along('t')])", "is for 2 heads, the model has 4"),
        ("window(t=3", "is not a pattern expression"),
    ],
)
def test_bad_names(text, message):
    with pytest.raises(ct.ChronotopeError, match=message.replace("(", r"\(").replace("[", r"\[")):
        choose(text, GRID, 4)


@pytest.mark.parametrize("grid", [ct.Grid(n=64), ct.Grid(h=8, w=8), ct.Grid(prefix=1, t=2, h=2, w=2)])
def test_other_grids_are_refused(grid):
    with pytest.raises(ct.ChronotopeError, match="clips lie on the axes t, h, w without a prefix; give three sizes"):
        menu(grid, 4)


def test_odd():
    assert [odd(16, 7 / 16), odd(8, 5 / 8), odd(16, 1 / 4), odd(2, 1 / 2), odd(3, 0.1), odd(1, 1.0)] == [
        7,
        5,
        3,
        1,
        3,
        1,
    ]
