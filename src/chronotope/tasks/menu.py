"""What is compared: named patterns, scaled to the grid; and how a caller names some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers import papers
from chronotope.patterns import Pattern, along, blocks, causal, full, per_head, sinks, strided, window
from chronotope.planning.parse import WORDS, parse_pattern, unknown_name

DENSE = "dense"


@dataclass(frozen=True)
class Entry:
    """One line of the menu. Layer i of a model uses patterns[i % len(patterns)], joined with `causal("t")`."""

    name: str
    patterns: tuple[Pattern, ...]
    about: str

    @property
    def expression(self) -> str:
        """The patterns as text: one expression, or a list that takes turns over the layers."""
        alone = repr(self.patterns[0])
        return alone if len(self.patterns) == 1 else f"[{', '.join(map(repr, self.patterns))}]"

    def layers(self, count: int) -> list[Pattern]:
        """The pattern of each of `count` layers, as the model runs it."""
        return [pattern & causal("t") for pattern in islice(cycle(self.patterns), count)]


def menu(grid: Grid, heads: int) -> dict[str, Entry]:
    """Every entry by name: dense first, the forms that video transformers use, then what the papers add.

    grid: axes t, h, w. heads: of the model; a pattern for another number of heads is left out, and so are a paper's
    pattern that does not fit the grid and one that is on the menu already.

    A paper's lower-case name is its name on the menu. Raises ChronotopeError for a grid with other axes.
    """
    if grid.axes != ("t", "h", "w") or grid.prefix:
        raise ChronotopeError(
            f"{grid!r}: clips lie on the axes t, h, w without a prefix; give three sizes, such as 8,16,16."
        )
    entries = {entry.name: entry for entry in _forms(grid, heads)}
    known = {entry.patterns for entry in entries.values()}
    for page in papers():
        patterns = _fitting(page.menu, grid, heads)
        if patterns is not None and patterns not in known:
            known.add(patterns)
            name = page.name.lower()
            entries[name if name not in entries else f"{name} ({page.system})"] = Entry(name, patterns, page.claim)
    return {name: Entry(name, entry.patterns, entry.about) for name, entry in entries.items()}


def choose(text: str | None, grid: Grid, heads: int) -> list[Entry]:
    """The entries that `text` names, dense first; None: the whole menu.

    text: names of the menu, pattern expressions, and lists of expressions that take turns over the layers, separated
    by commas or semicolons: `window, axial; [along("t"), along("h", "w")]; window(h=5) | along("t")`.

    Raises ChronotopeError: an unknown name (with the near ones), or a pattern that does not fit the grid or the heads.
    """
    known = menu(grid, heads)
    if text is None:
        return list(known.values())
    chosen = {DENSE: known[DENSE]}
    for part in split(text):
        entry = known.get(part) or _written(part, known)
        for pattern in entry.patterns:
            pattern.check(grid, grid)
            if pattern.heads not in (None, heads):
                raise ChronotopeError(f"{pattern!r} is for {pattern.heads} heads, the model has {heads}.")
        chosen[entry.name] = entry
    return list(chosen.values())


def split(text: str) -> list[str]:
    """The parts between commas and semicolons that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter in ",;" and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _written(text: str, known: dict[str, Entry]) -> Entry:
    """An entry out of an expression, or out of a list of them."""
    if text.replace("-", "").replace("_", "").replace(" ", "").isalnum():
        raise unknown_name("pattern", text, [*known, *WORDS])
    if text.startswith("[") and text.endswith("]"):
        patterns = tuple(parse_pattern(part) for part in split(text[1:-1]))
        if not patterns:
            raise ChronotopeError(f"{text!r} lists no pattern; write [along('t'), along('h', 'w')].")
        return Entry(text, patterns, "as given, taking turns over the layers")
    return Entry(text, (parse_pattern(text),), "as given")


def _forms(grid: Grid, heads: int) -> list[Entry]:
    t, h, w = (odd(size, share) for size, share in zip(grid.shape, (5 / 8, 7 / 16, 7 / 16), strict=True))
    small: dict[str, Any] = {"h": odd(grid.sizes["h"], 1 / 4), "w": odd(grid.sizes["w"], 1 / 4)}
    half: dict[str, Any] = {axis: max(1, size // 2) for axis, size in grid.sizes.items()}
    near = window(t=t, h=h, w=w)
    mix = [along("t"), along("h", "w"), near, strided(h=4, w=4)]
    return [
        Entry(DENSE, (full(),), "every token up to the own frame: the measure of all others"),
        Entry("divided", (along("t"), along("h", "w")), "time, then space, layer by layer (Bertasius et al. 2021)"),
        Entry("axial", (along("t"), along("h"), along("w")), "one axis after the other (Ho et al. 2019)"),
        Entry("window", (near,), "near tokens; the window is cut at the border"),
        Entry("shifted window", (blocks(**half), blocks(**half, shift={a: n // 2 for a, n in half.items()})),
              "blocks, in every second layer moved by half a block (Liu et al. 2021)"),
        Entry("neighborhood", (window(t=t, h=h, w=w, edge="shift"),),
              "near tokens; the window moves inside at the border (Hassani et al. 2023)"),
        Entry("dilated", (near, window(t=t, **small, dilation={"h": 2, "w": 2})),
              "near tokens, in every second layer every other token of a larger window (Hassani and Shi 2022)"),
        Entry("strided", (window(t=t, **small) | strided(h=4, w=4),),
              "near tokens and every fourth one of all frames (Child et al. 2019)"),
        Entry("sinks and window", (sinks(4) | near,), "near tokens and the first four (after Xiao et al. 2023)"),
        Entry("per-head mix", (per_head(list(islice(cycle(mix), heads))),),
              "heads that look along time, space, near and far"),
    ]  # fmt: skip


def odd(size: int, share: float) -> int:
    """The largest odd number up to share * size, but 3 where the axis has as many, and never more than the axis."""
    wanted = max(3, int(share * size))
    wanted = min(wanted, size)
    return wanted if wanted % 2 else wanted - 1


def _fitting(page: Callable[[Grid], Pattern] | None, grid: Grid, heads: int) -> tuple[Pattern, ...] | None:
    """The pattern of a page, or None where it is not for this grid or these heads."""
    if page is None:
        return None
    try:
        pattern = page(grid)
        pattern.check(grid, grid)
    except ChronotopeError:
        return None
    return (pattern,) if pattern.heads in (None, heads) else None
